"""Our sampler against transformers' generate and llama.cpp: useful tokens per second on the same job.

1. The job: real prompts, the recipe's sampling (T 0.7, top-p 0.8, top-k 20, repetition penalty 1.1), natural endings.
   Same dtype, threads, prompts and token limit for all. Useful tokens = those up to EOS, EOS included.
2. generate gets its best batch size of --batches, prompts sorted by length, and pads on the left; each size runs once.
3. llama.cpp, where llama-cpp-python is importable and the model is a GGUF file: the same file, which it computes in its
   4 bits where we have dequantised to fp32, through its batch calls, a text's place taken as soon as it ends, and the
   best of --batches. Its sampler chain has the same steps in the same order.
4. Then all run in turns, --runs times, in this order and its reverse. The table shows medians, the speed-up is the
   median of the turns' ratios of rate. The texts differ (other random numbers), so do the totals a little.
5. Beside it: the machine's matrix-product ceiling (a large product), and what part of it each of them reaches,
   counting 2 operations per parameter of the linear layers and useful token (attention not counted).
6. --lookup instead: the sampler with and without draft tokens (sampling/lookup.py), --rows texts at once
   (8 where none is given), the same texts by construction, so the same tokens. Two sets: copy-heavy (passages of our
   LICENSE to be repeated, penalty off) and the Extender's ordinary prompts (stage 1 of extend.py on drafts that this
   model wrote). A run is one seed with and without, in turns; the speed-up is the median of the runs' ratios of time.
   Beside it: the share of all tokens that the last three tokens' last successor foretold.

    python bench/sampler.py                                        # 2 cores: about half an hour, most of it generate
    python bench/sampler.py --prompts 16 --max-new-tokens 64 --batches 16 --runs 1     # a minute or two
    python bench/sampler.py --lookup                               # about ten minutes
"""

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lengthen  # noqa: F401  before torch: it sets how OpenMP's threads wait, for both sides

# isort: split
import torch
from rich.console import Console
from rich.table import Table

from extend import shown
from lengthen.models.chat import fill
from lengthen.models.loading import LoadedModel, demo_file, load_model
from lengthen.sampling.engine import Sampler
from lengthen.sampling.lookup import Lookup
from lengthen.sampling.request import Request, Sampling

PROMPTS = ROOT / "prompts"
LLAMA_INSTALL = "pip install llama-cpp-python==0.3.36 (it compiles llama.cpp)"


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


# ---------------------------------------------------------------------------------------------------------
# The three of them: each takes prompts (ids), a token limit, texts at once, a seed; each returns counts and seconds


def run_sampler(
    loaded: LoadedModel,
    prompts: list[list[int]],
    limit: int,
    rows: int,
    seed: int,
    lookup: bool = True,
    **sampling: float,
) -> dict:
    with Sampler(
        loaded.model,
        loaded.tokenizer,
        eos_ids=loaded.chat.eos_ids,
        context=loaded.context,
        max_rows=rows,
        lookup=lookup,
    ) as sampler:
        began = time.perf_counter()
        for i, prompt in enumerate(prompts):
            settings = Sampling(max_new_tokens=limit, **sampling)
            # Over the prompt the penalty is the Extender's: not counted. For plain prompts it is generate's.
            start = len(prompt) if sampling else 0
            sampler.add(Request(i, prompt, seed * 1_000_003 + i, settings, penalty_from=start))
        samples = sorted(sampler.run(), key=lambda sample: sample.request.key)
        seconds = time.perf_counter() - began
    ended = sum(sample.finish == "eos" for sample in samples)
    counts = {"tokens": sum(s.num_tokens for s in samples), "seconds": seconds, "eos": ended / len(samples)}
    return counts | {"texts": [sample.token_ids for sample in samples], "stats": sampler.stats}


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


def run_llama(loaded: LoadedModel, prompts: list[list[int]], limit: int, rows: int, seed: int) -> dict:
    """llama.cpp's parallel decoding: every running text's newest token, and the prompts of new ones, in one batch."""
    import llama_cpp as llama

    run_llama.silent = llama.llama_log_callback(lambda level, text, data: None)  # kept: C goes on calling it
    llama.llama_log_set(run_llama.silent, None)
    model = llama.llama_model_load_from_file(str(gguf_of(loaded.name)).encode(), llama.llama_model_default_params())
    room = max(map(len, prompts)) + limit  # of one text
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = rows * room, rows, 2048, 512
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    context = llama.llama_init_from_model(model, params)
    memory, batch = llama.llama_get_memory(context), llama.llama_batch_init(2048, 0, 1)

    def chain(number: int) -> object:
        one = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        vocabulary = loaded.model.config.vocab_size
        for step in (
            llama.llama_sampler_init_penalties(vocabulary, room, 1.1, 0.0, 0.0),
            llama.llama_sampler_init_temp(0.7),
            llama.llama_sampler_init_top_k(20),
            llama.llama_sampler_init_top_p(0.8, 1),
            llama.llama_sampler_init_dist(seed * 1_000_003 + number & 0xFFFFFFFF),
        ):
            llama.llama_sampler_chain_add(one, step)
        for token in prompts[number]:
            llama.llama_sampler_accept(one, token)
        return one

    def put(token: int, position: int, place: int, draw: bool) -> int:
        at = batch.n_tokens
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, position, 1, draw
        batch.seq_id[at][0] = place
        batch.n_tokens += 1
        return at

    began, waiting, running, tokens, ended = time.perf_counter(), list(range(len(prompts)))[::-1], {}, 0, 0
    while waiting or running:
        batch.n_tokens, draws = 0, []
        for place, (number, _, written) in running.items():
            draws.append((place, put(written[-1], len(prompts[number]) + len(written) - 1, place, True)))
        for place in set(range(rows)) - running.keys():
            if not waiting or batch.n_tokens + len(prompts[waiting[-1]]) > 2048:
                break
            number = waiting.pop()
            for position, token in enumerate(prompts[number]):
                at = put(token, position, place, position + 1 == len(prompts[number]))
            running[place] = (number, chain(number), [])
            draws.append((place, at))
        assert llama.llama_decode(context, batch) == 0
        for place, at in draws:
            _, sampler, written = running[place]
            written.append(llama.llama_sampler_sample(sampler, context, at))  # it accepts the token, too
            if written[-1] in loaded.chat.eos_ids or len(written) == limit:
                tokens, ended = tokens + len(written), ended + (written[-1] in loaded.chat.eos_ids)
                llama.llama_memory_seq_rm(memory, place, -1, -1)
                llama.llama_sampler_free(sampler)
                del running[place]
    seconds = time.perf_counter() - began
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return {"tokens": tokens, "seconds": seconds, "eos": ended / len(prompts)}


def gguf_of(name: str) -> Path | None:
    """The GGUF file that --model stands for, if it does."""
    return demo_file() if name == "smollm2" else Path(name) if name.endswith(".gguf") else None


# ---------------------------------------------------------------------------------------------------------
# --lookup


def copy_prompts(loaded: LoadedModel, count: int, words: int = 120) -> list[list[int]]:
    """To repeat passages of `words` words of our LICENSE; the answer begins with the first twelve of them."""
    stream = (ROOT / "LICENSE").read_text("utf-8").split()
    passages = [stream[i : i + words] for i in range(0, len(stream) - words, 90)][:count]
    assert len(passages) == count, "not enough text for so many prompts"
    ask = "Repeat the following text word for word, without any change.\n\n"
    return [
        loaded.chat.encode([{"role": "user", "content": ask + " ".join(passage)}], prefill=" ".join(passage[:12]))
        for passage in passages
    ]


def extender_prompts(loaded: LoadedModel, count: int, rows: int, limit: int) -> list[list[int]]:
    """What extend.py asks in stage 1, about drafts of this model."""
    asked = real_prompts(count)
    encoded = [loaded.chat.encode([{"role": "user", "content": text}]) for text in asked]
    drafts = run_sampler(loaded, encoded, limit, rows, 0)["texts"]
    prompts = []
    for text, ids in zip(asked, drafts, strict=True):
        draft = shown(loaded.tokenizer.decode(ids, skip_special_tokens=True), 1, 2)
        content = fill("extend", "en", instruction=text, draft=draft)
        prompts.append(loaded.chat.encode([{"role": "user", "content": content}]))
    return prompts


def hit_share(prompts: list[list[int]], texts: list[list[int]]) -> float:
    """Of all tokens: how many are what followed their three predecessors the last time."""
    hits = 0
    for prompt, text in zip(prompts, texts, strict=True):
        lookup = Lookup(list(prompt))
        for token in text:
            hits += lookup.guess(1) == [token]
            lookup.ids.append(token)
            lookup.learn()
    return hits / sum(map(len, texts))


def bench_lookup(args: argparse.Namespace, loaded: LoadedModel, say: Callable) -> dict:
    rows, count = args.rows or 8, min(args.prompts, 16)
    sets = {
        "copy-heavy": (copy_prompts(loaded, count), {"repetition_penalty": 1.0}),
        "Extender": (extender_prompts(loaded, count, rows, args.max_new_tokens), {"repetition_penalty": 1.1}),
    }
    table = Table(title=f"{args.model}, {count} prompts, {rows} at once, <= {args.max_new_tokens} tokens")
    for column in ("", "right guesses", "tokens", "without, tokens/s", "with, tokens/s", "steps saved", "speed-up"):
        table.add_column(column, justify="right" if column else "left")
    result = {"bench": "sampler-lookup", "model": args.model, "rows": rows, "prompts": count}
    for name, (prompts, sampling) in sets.items():
        runs = {False: [], True: []}
        for seed in range(args.runs):
            # The same texts with and without, each first in turn: what a machine does to both is no difference.
            for lookup in (False, True) if seed % 2 == 0 else (True, False):
                one = run_sampler(loaded, prompts, args.max_new_tokens, rows, seed, lookup, **sampling)
                runs[lookup].append(one)
                say(
                    f"{name}, run {seed + 1}, {'with' if lookup else 'without'}: {one['tokens'] / one['seconds']:.1f}/s"
                )
        same = [a["texts"] == b["texts"] for a, b in zip(runs[False], runs[True], strict=True)]
        rate = {key: statistics.median(one["tokens"] / one["seconds"] for one in done) for key, done in runs.items()}
        steps = {key: sum(one["stats"]["steps"] for one in done) for key, done in runs.items()}
        share = statistics.mean(hit_share(prompts, one["texts"]) for one in runs[True])
        speedups = [a["seconds"] / b["seconds"] for a, b in zip(runs[False], runs[True], strict=True)]
        speedup, saved = statistics.median(speedups), 1 - steps[True] / steps[False]
        tokens = f"{statistics.median(one['tokens'] for one in runs[True]):.0f}"
        by_run = f"{speedup:.2f}x ({min(speedups):.2f} to {max(speedups):.2f})"
        table.add_row(name, f"{share:.0%}", tokens, f"{rate[False]:.1f}", f"{rate[True]:.1f}", f"{saved:.0%}", by_run)
        key = name.lower().replace("-", "_")
        result |= {f"{key}_hit_share": round(share, 3), f"{key}_speedup": round(speedup, 3)}
        result[f"{key}_speedups"] = [round(one, 3) for one in speedups]
        result |= {f"{key}_without": round(rate[False], 1), f"{key}_with": round(rate[True], 1)}
        result[f"{key}_runs_with_equal_texts"] = f"{sum(same)}/{len(same)}"
    say(table)
    return result


# ---------------------------------------------------------------------------------------------------------


def bench_peers(args: argparse.Namespace, loaded: LoadedModel, say: Callable) -> dict:
    prompts = [loaded.chat.encode([{"role": "user", "content": text}]) for text in real_prompts(args.prompts)]
    peers: dict[str, Callable] = {"generate": run_generate}
    if not gguf_of(args.model):
        say("llama.cpp: left out, --model is no GGUF file")
    elif importlib.util.find_spec("llama_cpp") is None:
        say(f"llama.cpp: left out; for its row: {LLAMA_INSTALL}")
    else:
        peers["llama.cpp"] = run_llama

    # 1) the batch size that suits each peer, and a warm-up of ours
    run_sampler(loaded, prompts[:2], 8, args.rows, 0)
    run_generate(loaded, prompts[:2], 8, 2, 0)
    best, probed = {"sampler": args.rows}, {}
    for name, run in peers.items():
        probes = {batch: run(loaded, prompts, args.max_new_tokens, batch, 0) for batch in args.batches}
        probed[name] = {batch: one["tokens"] / one["seconds"] for batch, one in probes.items()}
        best[name] = max(probed[name], key=probed[name].get)
        say(f"{name}: " + ", ".join(f"{rate:.1f} tokens/s at {batch}" for batch, rate in probed[name].items()))

    # 2) all, in turns
    everyone = {**peers, "sampler": run_sampler}
    runs = {name: [] for name in everyone}
    for turn in range(args.runs):
        for name, run in list(everyone.items())[:: -1 if turn % 2 else 1]:
            one = run(loaded, prompts, args.max_new_tokens, best[name], turn + 1)
            runs[name].append(one)
            say(f"turn {turn + 1}, {name}: {one['tokens']} tokens, {one['tokens'] / one['seconds']:.1f}/s")
            gc.collect()

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
    rates = {name: statistics.median(one["tokens"] / one["seconds"] for one in done) for name, done in runs.items()}
    for name, done in runs.items():
        middle = {key: statistics.median(one[key] for one in done) for key in ("tokens", "seconds", "eos")}
        label = f"{name}, {best[name]} at once" if name in peers else "lengthen.sampling.engine"
        share = f"{rates[name] * 2 * weights / ceiling:.0%}" if name != "llama.cpp" else "(4 bits)"
        cells = (f"{middle['tokens']:.0f}", f"{middle['eos']:.0%}", f"{middle['seconds']:.1f}", f"{rates[name]:.1f}")
        table.add_row(label, *cells, share)
        result[f"{name.replace('.', '_')}_tokens_per_second"] = round(rates[name], 1)
    over = []
    for name in peers:
        key = "speedup" if name == "generate" else "speedup_over_llama_cpp"
        turns = [
            a["tokens"] / a["seconds"] * b["seconds"] / b["tokens"]
            for a, b in zip(runs["sampler"], runs[name], strict=True)
        ]
        result[key], result[f"{key}_by_turn"] = round(statistics.median(turns), 2), [round(one, 2) for one in turns]
        over.append(f"{result[key]:.2f}x {name} ({min(turns):.2f} to {max(turns):.2f})")
        result[f"{name.replace('.', '_')}_batches"] = {str(b): round(rate, 1) for b, rate in probed[name].items()}
    result["ceiling_gflops"] = round(ceiling / 1e9, 1)
    say(table)
    say(f"ours: {', '.join(over)}; matrix-product ceiling {result['ceiling_gflops']} GFLOP/s")
    return result


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2", help="as in every stage (default smollm2)")
    p.add_argument("--prompts", type=int, default=48, help="how many prompts (default 48; --lookup: at most 16)")
    p.add_argument("--max-new-tokens", type=int, default=384, help="limit per text, tokens (default 384)")
    p.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 48], help="batch sizes the peers may choose")
    p.add_argument(
        "--rows", type=int, default=0, help="our texts at once; 0 = its own choice (default), or 8 with --lookup"
    )
    p.add_argument("--runs", type=int, default=3, help="alternating runs; medians are shown (default 3)")
    p.add_argument("--lookup", action="store_true", help="with and without draft tokens, instead of peers")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, console = parse_args(argv), Console(stderr=True)
    loaded = load_model(args.model)
    bench = bench_lookup if args.lookup else bench_peers
    print(json.dumps(bench(args, loaded, console.print)))


if __name__ == "__main__":
    main()
