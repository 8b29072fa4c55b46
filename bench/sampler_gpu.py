"""The sampler on a GPU beside its peers, on random weights of real shapes: nothing is downloaded.

Every cell of the table is a process of its own, so that peak memory is its own and no engine finds what another left.

    decode-SHAPE-ROWS   decoding alone: ROWS texts of 2,048 tokens write on, the recipe's sampling; 256 tokens a text
        are clocked, from the 17th of the last text on, so neither prompts nor compilation count. SHAPE: 7B or 0.6B
    a   256 texts, prompts and outputs of 100 to 1,024 tokens, Qwen3-0.6B's shape, temperature 0.6 alone: the job of
        nano-vllm's and mini-sglang's offline benches
    b   128 texts, 512 tokens in, 4,096 out, the shape of Qwen2.5-7B; b-nf4: the same over NF4 weights
    c   the recipe's sampling on 500 prompts, n = 2, outputs that end raggedly (lognormal, median 1,200 tokens, at most
        8,192), the 7B's shape
    d   Extender-like texts, 16 at once, the 7B's shape, with and without lookup. A random model copies nothing, so this
        one's head is made such that the newest token alone decides the next one (`make_it_follow`): the output
        continues a place of the prompt in spans of 12 tokens on average for `--copied` of its length and is new
        elsewhere. All passes, draws and drafts are computed as ever, captured steps included.

Columns: tokens/s over the whole job (prompts included, but in the decode cases), the share of the memory's bandwidth
over the last half minute of decoding (sampling/meter.py), peak GB as torch counts them. Engines: ours; ours without
captured steps; with keys and values in fp8; and peers on the same prompts and lengths where they can:

    generate         transformers, the best of --batches, left-padded, each batch as long as its longest text
    generate_batch   transformers' continuous batching; it drops the repetition penalty, so in c it does less work
    vllm             where importable (dummy weights of the same config, its own memory management: no peak)

The defaults take a few minutes on an H200. No GPU has run this yet; --tiny runs every line of it on a CPU with a toy
shape (about a minute).

    python bench/sampler_gpu.py --cases a b c d
    python bench/sampler_gpu.py --cases decode-7B-64 --engines ours "ours, no graphs"
    python bench/sampler_gpu.py --tiny
"""

import argparse
import importlib.util
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import harness

import lengthen  # noqa: F401  before torch

# isort: split
import torch
import torch.nn.functional as F
from models import SHAPES, config_of, random_model
from transformers import GenerationConfig

from lengthen.sampling.engine import Sampler
from lengthen.sampling.meter import Meter
from lengthen.sampling.request import Request, Sampling

PLAIN = {"temperature": 0.6, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
RECIPE = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
ENGINES = ("ours", "ours, no graphs", "ours, fp8 pages", "ours, no lookup", "generate", "generate_batch", "vllm")
NAMES = {"7B": "Qwen2.5-7B", "0.6B": "Qwen3-0.6B"}
DECODE = tuple(f"decode-{shape}-{rows}" for shape in NAMES for rows in (1, 64, 256))
CASES = (*DECODE, "a", "b", "b-nf4", "c", "d")
WARM = 16  # decode: tokens of each text before the clock starts; by then everything is compiled and captured
PEAK = 40.0  # d: the logit of the token that follows; those of all others stay below half of it


@dataclass
class Work:
    """What a case asks for: one entry a text."""

    shape: str
    prompts: list[list[int]]
    lengths: list[int]  # tokens to write; nothing ends by itself
    sampling: dict
    quantize: bool = False
    rows: int = 0  # at once; 0 = the engine's own choice
    script: list[list[int]] = field(default_factory=list)  # d: what the model will write
    decode_only: bool = False  # clocked without prompts and compilation
    clocked: int = 0  # decode_only: tokens of each text until the clock stops


def make_work(case: str, args: argparse.Namespace) -> Work:
    rng, scale = random.Random(0), 64 if args.tiny else 1  # tiny: lengths and counts by so much less
    vocab = SHAPES["tiny"].vocab if args.tiny else 150_000

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(count)]

    def less(count: int) -> int:
        return max(4, count // scale)

    large, small = ["tiny"] * 2 if args.tiny else NAMES.values()
    if case in DECODE:
        _, shape, rows = case.split("-")
        prompts = [tokens(less(2048)) for _ in range(less(int(rows)))]
        # While the prompts are computed, 8,192 tokens a step, the first texts write a burst of 8 beside each.
        beside = 8 * -(-len(prompts) * less(2048) // 8192)
        clocked = max(2 * WARM, less(256))
        lengths = [clocked + beside + WARM] * len(prompts)
        return Work("tiny" if args.tiny else NAMES[shape], prompts, lengths, RECIPE, decode_only=True, clocked=clocked)
    if case == "a":
        sizes = [(less(rng.randint(100, 1024)), less(rng.randint(100, 1024))) for _ in range(less(256))]
        return Work(small, [tokens(a) for a, _ in sizes], [b for _, b in sizes], PLAIN)
    if case in ("b", "b-nf4"):
        return Work(large, [tokens(less(512)) for _ in range(less(128))], [less(4096)] * less(128), PLAIN, case != "b")
    if case == "c":
        prompts = [prompt for _ in range(less(500)) for prompt in [tokens(less(rng.randint(100, 400)))] * 2]
        return Work(large, prompts, [less(min(8192, int(rng.lognormvariate(7.1, 0.7)))) for _ in prompts], RECIPE)
    # No token twice in all texts: which one follows is a function of the newest.
    unused = iter(rng.sample(range(vocab), vocab))
    prompts, script = [], []
    for _ in range(8 if args.tiny else 40):
        prompts.append([next(unused) for _ in range(max(60, less(1500)))])
        script.append(copying(rng, prompts[-1], max(40, less(2000)), args.copied, unused))
    return Work(large, prompts, list(map(len, script)), RECIPE, rows=16, script=script)


def copying(rng: random.Random, prompt: list[int], length: int, copied: float, unused: Iterator[int]) -> list[int]:
    """`length` tokens, of which about the share `copied` continues places of the prompt, each place once."""
    places, at = [], 0
    while at < len(prompt) - 1:  # its last token starts the text
        places.append(prompt[at : at + 1 + int(rng.expovariate(1 / 12))][: len(prompt) - 1 - at])
        at += len(places[-1])
    rng.shuffle(places)
    text: list[int] = []
    while len(text) < length:
        new = not places or rng.random() >= copied
        text += [next(unused) for _ in range(1 + int(rng.expovariate(1 / 12)))] if new else places.pop()
    return text[:length]


@torch.no_grad()
def make_it_follow(model: torch.nn.Module, work: Work) -> None:
    """Gives the model a head that writes the script: of each of its tokens, and a prompt's last, the next one.

    The layers add little to the embedding of the newest token, so the head's row of the next token is its direction.
    """
    head, table = (m.weight for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight *= 1e-3
    table *= 50  # of about length 1 per element, as the norms make it
    texts = [[prompt[-1], *text] for prompt, text in zip(work.prompts, work.script, strict=True)]
    now, then = torch.tensor([pair for text in texts for pair in pairwise(text)], device=head.device).T
    head[then] = (F.normalize(table[now].float(), dim=1) * PEAK / table.shape[1] ** 0.5).to(head.dtype)


class Ids:
    """Stands in for a tokenizer: the ids have no texts."""

    added_tokens_decoder: dict = {}

    def __init__(self, size: int):
        self.size = size

    def get_vocab(self) -> dict[int, int]:
        return dict(enumerate(range(self.size)))

    def decode(self, ids: list[int], **_: object) -> str:
        return ""


def context_of(work: Work) -> int:
    return max(1024, 1 + max(len(p) + n for p, n in zip(work.prompts, work.lengths, strict=True)))


def make_model(work: Work, device: torch.device) -> torch.nn.Module:
    model = random_model(work.shape, device, work.quantize, context_of(work))
    if work.script:
        make_it_follow(model, work)
    return model


# ---------------------------------------------------------------------------------------------------------
# The engines: each returns the tokens it made, and what it knows of itself


def run_ours(work: Work, device: torch.device, graphs: bool = True, **options: object) -> dict:
    model = make_model(work, device)
    context, ids = model.config.max_position_embeddings, Ids(model.config.vocab_size)
    with Sampler(model, ids, eos_ids=set(), context=context, max_rows=work.rows, **options) as sampler:
        if not graphs:
            sampler.graphs = None
        for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True)):
            settings = Sampling(**work.sampling, max_new_tokens=length)
            sampler.add(Request(i, prompt, i, settings, penalty_from=len(prompt) if work.script else 0))
        if work.decode_only:
            return decode_alone(sampler, len(work.prompts), work.clocked)
        made, most, roofline, as_written = 0, 0, 0.0, 0
        began = time.perf_counter()
        for sample in sampler.run():
            made += sample.num_tokens
            progress = sampler.progress()
            most = max(most, progress.rows)
            if progress.rows > most // 2:  # before the last texts are left alone
                roofline = progress.roofline
            if work.script:
                as_written += sum(map(int.__eq__, sample.token_ids, work.script[sample.request.key]))
        seconds = time.perf_counter() - began
        notes = "; ".join(sampler.notes)
        if work.script:
            rate = sampler.stats["decode_tokens"] / max(1, sampler.stats["row_steps"])
            notes = f"{rate:.2f} tokens per row and step; {as_written / made:.1%} of the tokens as scripted"
        return {"tokens": made, "seconds": seconds, "roofline": roofline, "notes": notes}


def decode_alone(sampler: Sampler, texts: int, tokens: int) -> dict:
    """From the step in which every text has WARM tokens until `tokens` more a text, or until the first ends."""
    rows = sampler.scheduler.rows
    while len(rows) < texts or any(len(row.output) < WARM for row in rows):
        sampler.step()
        if sampler.finished:
            return {"notes": f"{texts} texts do not fit at once: {'; '.join(sampler.notes)}"}
    sampler.meter, before = Meter(), sampler.stats["decode_tokens"]
    began = time.perf_counter()
    made = 0
    while not sampler.finished and made < texts * tokens:
        sampler.step()
        made = int(sampler.stats["decode_tokens"] - before)
    seconds = time.perf_counter() - began
    roofline = sampler.meter.roofline(sampler.device)
    return {"tokens": made, "seconds": seconds, "roofline": roofline, "notes": "; ".join(sampler.notes)}


@torch.no_grad()
def run_generate(work: Work, device: torch.device, batches: list[int]) -> dict:
    """Useful tokens only: what a text is made to write beyond its own length does not count."""
    model, best = make_model(work, device), {}
    order = sorted(range(len(work.prompts)), key=lambda i: work.lengths[i])
    for batch in batches:
        torch.manual_seed(0)
        began = time.perf_counter()
        try:
            for first in range(0, len(order), batch):
                some = order[first : first + batch]
                width = max(len(work.prompts[i]) for i in some)
                ids = [[0] * (width - len(work.prompts[i])) + work.prompts[i] for i in some]
                mask = [[0] * (width - len(work.prompts[i])) + [1] * len(work.prompts[i]) for i in some]
                longest = max(work.lengths[i] for i in some)
                model.generate(
                    torch.tensor(ids, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    generation_config=generation_of(work, longest),
                )
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        seconds = time.perf_counter() - began
        if not best or seconds < best["seconds"]:
            best = {"tokens": sum(work.lengths), "seconds": seconds, "notes": f"batch {batch}"}
    return best or {"notes": "out of memory at every batch size"}


def run_generate_batch(work: Work, device: torch.device) -> dict:
    """Each text with its own limit, as a caller of its manager would."""
    model, made = make_model(work, device), 0
    with model.continuous_batching_context_manager(generation_of(work, max(work.lengths))) as manager:
        began = time.perf_counter()
        for prompt, length in zip(work.prompts, work.lengths, strict=True):
            manager.add_request(prompt, max_new_tokens=length)
        for _ in work.prompts:
            done = manager.get_result(timeout=600)
            if done is None:
                return {"notes": "its background thread died"}
            made += len(done.generated_tokens)
        seconds = time.perf_counter() - began
    drops = "the repetition penalty is dropped" if work.sampling["repetition_penalty"] != 1 else ""
    return {"tokens": made, "seconds": seconds, "notes": drops}


def generation_of(work: Work, length: int) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True, **work.sampling, max_new_tokens=length, min_new_tokens=length, eos_token_id=-1, pad_token_id=0
    )


def run_vllm(work: Work, device: torch.device) -> dict:
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        config = config_of(work.shape, context_of(work))
        config.architectures = ["Qwen3ForCausalLM" if config.model_type == "qwen3" else "Qwen2ForCausalLM"]
        config.save_pretrained(folder)
        options = {"quantization": "bitsandbytes"} if work.quantize else {}
        engine = LLM(folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", **options)
        settings = [
            SamplingParams(
                **{**work.sampling, "top_k": work.sampling["top_k"] or -1},
                max_tokens=n,
                ignore_eos=True,
                detokenize=False,
            )
            for n in work.lengths
        ]
        began = time.perf_counter()
        done = engine.generate([{"prompt_token_ids": prompt} for prompt in work.prompts], settings, use_tqdm=False)
        seconds = time.perf_counter() - began
    return {"tokens": sum(len(one.outputs[0].token_ids) for one in done), "seconds": seconds, "notes": ""}


# ---------------------------------------------------------------------------------------------------------


def run_one(case: str, engine: str, args: argparse.Namespace) -> dict:
    """In a process of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = make_work(case, args)
    if engine == "generate":
        result = run_generate(work, device, args.batches)
    else:
        result = {
            "ours": lambda: run_ours(work, device),
            "ours, no graphs": lambda: run_ours(work, device, graphs=False),
            "ours, fp8 pages": lambda: run_ours(work, device, kv_dtype=torch.float8_e4m3fn),
            "ours, no lookup": lambda: run_ours(work, device, lookup=False),
            "generate_batch": lambda: run_generate_batch(work, device),
            "vllm": lambda: run_vllm(work, device),
        }[engine]()
    if device.type == "cuda" and engine != "vllm":
        result["peak"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def engines_of(case: str, args: argparse.Namespace) -> list[str]:
    """The decode cases and d are for ours: peers say nothing of decoding alone, and of lookup only ours has any.
    Lookup makes no difference on random weights elsewhere. Pages of fp8 are for a GPU."""
    able = {"vllm": importlib.util.find_spec("vllm"), "ours, fp8 pages": torch.cuda.is_available()}
    fits = {"ours, no lookup": case == "d", "ours, no graphs": case in DECODE}
    mine = case == "d" or case in DECODE
    asked = [name for name in args.engines if able.get(name, True) and fits.get(name, True)]
    return [name for name in asked if not mine or name in ("ours", *fits)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", nargs="+", choices=CASES, default=["decode-7B-64", "decode-0.6B-256", "a", "d"])
    p.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="which of them (default all)")
    p.add_argument("--batches", type=int, nargs="+", default=[128], help="batch sizes generate may choose")
    p.add_argument("--copied", type=float, default=0.5, help="d: share of the output that copies (default 0.5)")
    p.add_argument("--tiny", action="store_true", help="a toy shape, everywhere: to see that it runs")
    p.add_argument("--one", nargs=2, metavar=("CASE", "ENGINE"), help="one cell, in this process (used by itself)")
    harness.add_save(p)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.one:
        print(json.dumps(run_one(*args.one, args)))
        return
    if not torch.cuda.is_available() and not args.tiny:
        raise SystemExit("error: no CUDA device\n  hint: --tiny runs a toy shape on a CPU")
    columns = ["case", "engine", "tokens", "seconds", "tokens/s", "roofline", "peak GB", "notes"]
    lines: list[list[str]] = []
    cells: list[dict] = []
    where = harness.machine()
    for case in args.cases:
        for engine in engines_of(case, args):
            options = [*(["--tiny"] if args.tiny else []), "--copied", str(args.copied)]
            options += ["--batches", *map(str, args.batches)]
            command = [sys.executable, __file__, "--one", case, engine, *options]
            *_, one = harness.measured(command, "notes")
            rate = one["tokens"] / one["seconds"] if one.get("tokens") else 0.0
            shown = [f"{one[key]:{form}}" if key in one else "" for key, form in FORMS.items()]
            lines.append([case, engine, *shown[:2], f"{rate:,.0f}" if rate else "", *shown[2:], one.get("notes", "")])
            cells.append({"case": case, "engine": engine, "tokens_per_second": round(rate, 1), **one})
            print(f"{case}, {engine}: {rate:,.0f} tokens/s {one.get('notes', '')}", file=sys.stderr, flush=True)
            harness.report("sampler_gpu", argv, where, [harness.table("sampling", columns, lines)], {"cells": cells})
    harness.finish("sampler_gpu", argv, args.save, [harness.table("sampling", columns, lines)], {"cells": cells})


FORMS = {"tokens": ",", "seconds": ".1f", "roofline": ".0%", "peak": ".1f"}

if __name__ == "__main__":
    main()
