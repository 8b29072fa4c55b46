"""Our sampler against transformers' generate: useful tokens per second on the same job.

1. The job: real prompts, the recipe's sampling (T 0.7, top-p 0.8, top-k 20, repetition penalty 1.1), natural endings.
   Same weights, dtype, threads, prompts and token limit for both. Useful tokens = those up to EOS, EOS included.
2. generate gets its best batch size of --batches, prompts sorted by length, and pads on the left; each size runs once.
3. That run of the best size is its first, then ours and generate alternate until both have run --runs times; the table
   shows medians. The texts differ (other random numbers), so do the totals a little; the rate is what is compared.
4. Beside it: the machine's matrix-product ceiling (a large product), and what part of it each of the two reaches,
   counting 2 operations per parameter of the linear layers and useful token (attention not counted).

    python bench/sampler.py                                        # 2 cores: about half an hour, most of it generate
    python bench/sampler.py --prompts 16 --max-new-tokens 64 --batches 16 --runs 1     # a minute or two
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lengthen  # noqa: E402, F401  before torch: it sets how OpenMP's threads wait, for both sides

# isort: split
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from lengthen.model import LoadedModel, load_model  # noqa: E402
from lengthen.sampler import Request, Sampler, Sampling  # noqa: E402

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"


def real_prompts(count: int) -> list[str]:
    """Our seeds and the mini benchmark's queries, English, in file order."""
    texts = [json.loads(x)["prompt"] for x in (PROMPTS / "seeds.en.jsonl").read_text("utf-8").splitlines()]
    rows = [json.loads(x) for x in (PROMPTS / "bench_mini.jsonl").read_text("utf-8").splitlines()]
    texts += [row["query"] for row in rows if row["language"] == "en"]
    texts += [f"{text} Keep it short." for text in texts]
    assert len(texts) >= count, len(texts)
    return texts[:count]


def matmul_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a 2048^3 product, the best of 10."""
    a, best = torch.randn(2048, 2048, dtype=dtype, device=device), 0.0
    for _ in range(10):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - began))
    return best


def run_sampler(loaded: LoadedModel, prompts: list[list[int]], limit: int, rows: int, seed: int) -> dict:
    with Sampler(
        loaded.model, loaded.tokenizer, eos_ids=loaded.chat.eos_ids, context=loaded.context, max_rows=rows
    ) as sampler:
        began = time.perf_counter()
        for i, prompt in enumerate(prompts):
            sampler.add(Request(i, prompt, seed * 1_000_003 + i, Sampling(max_new_tokens=limit)))
        samples = list(sampler.run())
        seconds = time.perf_counter() - began
    ended = sum(sample.finish == "eos" for sample in samples)
    return {"tokens": sum(s.num_tokens for s in samples), "seconds": seconds, "eos": ended / len(samples)}


@torch.no_grad()
def run_generate(loaded: LoadedModel, prompts: list[list[int]], limit: int, batch: int, seed: int) -> dict:
    torch.manual_seed(seed)
    pad, tokens, ended = loaded.tokenizer.pad_token_id or 0, 0, 0
    ordered = sorted(prompts, key=len)
    began = time.perf_counter()
    for first in range(0, len(ordered), batch):
        some = ordered[first : first + batch]
        width = max(map(len, some))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in some], device=loaded.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device=loaded.device)
        out = loaded.model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=0.7,
            top_p=0.8,
            top_k=20,
            repetition_penalty=1.1,
            max_new_tokens=limit,
            eos_token_id=sorted(loaded.chat.eos_ids),
            pad_token_id=pad,
        )[:, width:].tolist()
        for row in out:
            end = next((i + 1 for i, token in enumerate(row) if token in loaded.chat.eos_ids), None)
            tokens, ended = tokens + (end or len(row)), ended + (end is not None)
    return {"tokens": tokens, "seconds": time.perf_counter() - began, "eos": ended / len(prompts)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2", help="as in every stage (default smollm2)")
    p.add_argument("--prompts", type=int, default=48, help="how many prompts (default 48)")
    p.add_argument("--max-new-tokens", type=int, default=384, help="limit per text, tokens (default 384)")
    p.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 48], help="batch sizes generate may choose")
    p.add_argument("--rows", type=int, default=0, help="our texts at once; 0 = its own choice (default)")
    p.add_argument("--runs", type=int, default=3, help="alternating runs; medians are shown (default 3)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, console = parse_args(argv), Console(stderr=True)
    loaded = load_model(args.model)
    texts = real_prompts(args.prompts)
    prompts = [loaded.chat.encode([{"role": "user", "content": text}]) for text in texts]
    say = console.print

    # 1) the batch size that suits generate, and a warm-up of ours
    run_sampler(loaded, prompts[:2], 8, args.rows, 0)
    run_generate(loaded, prompts[:2], 8, 2, 0)
    probes, rates = {}, {}
    for batch in args.batches:
        one = probes[batch] = run_generate(loaded, prompts, args.max_new_tokens, batch, 0)
        rates[batch] = one["tokens"] / one["seconds"]
        say(f"generate, batch {batch}: {rates[batch]:.1f} tokens/s")
    best = max(rates, key=rates.get)

    # 2) both, in alternation
    runs: dict[str, list[dict]] = {"generate": [probes[best]], "sampler": []}
    for seed in range(args.runs):
        if seed:
            runs["generate"].append(run_generate(loaded, prompts, args.max_new_tokens, best, seed))
        runs["sampler"].append(run_sampler(loaded, prompts, args.max_new_tokens, args.rows, seed))
        for name, done in runs.items():
            say(
                f"run {seed + 1}, {name}: {done[-1]['tokens']} tokens, {done[-1]['tokens'] / done[-1]['seconds']:.1f}/s"
            )

    # 3) the table
    dtype = next(loaded.model.parameters()).dtype
    ceiling = matmul_ceiling(dtype, loaded.device)
    weights = sum(m.weight.numel() for m in loaded.model.modules() if isinstance(m, torch.nn.Linear))
    threads = torch.get_num_threads()
    table = Table(title=f"{args.model}, {args.prompts} prompts, <= {args.max_new_tokens} tokens, {threads} threads")
    for column in ("", "tokens", "ended by EOS", "seconds", "tokens/s", "of the matmul ceiling"):
        table.add_column(column, justify="right" if column else "left")
    result = {"bench": "sampler", "model": args.model, "prompts": args.prompts, "threads": threads}
    result |= {"dtype": str(dtype).removeprefix("torch."), "machine": platform.processor() or platform.machine()}
    for name, done in runs.items():
        rate = statistics.median(one["tokens"] / one["seconds"] for one in done)
        middle = {key: statistics.median(one[key] for one in done) for key in ("tokens", "seconds", "eos")}
        label = f"generate, batch {best}" if name == "generate" else "lengthen.sampler"
        share = rate * 2 * weights / ceiling
        cells = (
            f"{middle['tokens']:.0f}",
            f"{middle['eos']:.0%}",
            f"{middle['seconds']:.1f}",
            f"{rate:.1f}",
            f"{share:.0%}",
        )
        table.add_row(label, *cells)
        result[f"{name}_tokens_per_second"] = round(rate, 1)
    result["speedup"] = round(result["sampler_tokens_per_second"] / result["generate_tokens_per_second"], 2)
    result["generate_batches"] = {str(batch): round(rate, 1) for batch, rate in rates.items()}
    result["ceiling_gflops"] = round(ceiling / 1e9, 1)
    say(table)
    say(f"speed-up {result['speedup']}x; matrix-product ceiling {result['ceiling_gflops']} GFLOP/s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
