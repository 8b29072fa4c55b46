"""Our sampler against transformers' generate, llama.cpp and OpenVINO GenAI on this machine's CPU.

Every engine is a process of its own with its own defaults (bench/peers.py); all are up at once and work in turns, each
turn in the reverse order of the last. A speed-up is the median of the turns' ratios, with the least and the most.

1. Two jobs of --prompts real prompts. "ragged": a quarter each asks for any length, one paragraph, two sentences, one;
   texts end by EOS, at --max-new-tokens at the latest. "even": EOS does not count, every text gets --even tokens.
   Rates count useful tokens (up to EOS, EOS included). generate and llama.cpp get the better of --batches, tried once
   on the ragged job; the other engines choose for themselves.
2. Decode steps: --rows texts at once, all of one length. A step's time is that of 4 + --steps tokens less that of 4,
   over --steps. Each engine with its default threads and with one thread; ours also with its default threads beside
   one other process that never waits (a step of generate takes some fifteen times as long there).
3. --lookup instead: our sampler with and without draft tokens (sampling/lookup.py), --rows texts at once (8 where none
   is given), the same texts by construction, so the same tokens. Two sets: copy-heavy (passages of our LICENSE to be
   repeated, penalty off) and the Extender's ordinary prompts (stage 1 of extend.py on drafts that this model wrote). A
   run is one seed with and without, in turns; the speed-up is the median of the runs' ratios of time. Beside it: the
   share of all tokens that the last three tokens' last successor foretold.

    python bench/sampler.py                                       # all of it: some twenty minutes on 2 cores
    python bench/sampler.py --only steps --peers generate --rows 1 4 8 32 --runs 1      # while you change a kernel
    python bench/sampler.py --lookup                              # about ten minutes
    python bench/sampler.py --python openvino=VENV/bin/python --save sampler_xeon

--python names another interpreter for an engine whose packages do not go with ours. An engine that is missing is left
out, with the command that installs it. --folder keeps what was converted for the next run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import harness  # before lengthen
import peers

# isort: split
import lengthen  # noqa: F401  before torch: it sets how OpenMP's threads wait, for --lookup

# isort: split
from extend import shown
from lengthen.cli import say
from lengthen.models.chat import fill
from lengthen.models.loading import LoadedModel, demo_file, load_model, multiplies_bf16
from lengthen.sampling.engine import Sampler
from lengthen.sampling.lookup import Lookup
from lengthen.sampling.request import Request, Sampling

PROMPTS = ROOT / "prompts" / "en"
WISHES = ("", " Write one short paragraph.", " Answer in two sentences.", " Answer in one sentence.")
WARM = 4  # tokens of a text before its steps are timed
OURS = ("ours", "ours-bf16")
PLACES = {"default": (0, False), "1 thread": (1, False), "busy": (0, True)}  # threads, a busy neighbour


def real_prompts(count: int) -> list[str]:
    """Our seeds and the mini benchmark's queries, English, in file order; what they lack of `count`, once more."""
    texts = [json.loads(x)["prompt"] for x in (PROMPTS / "seeds.jsonl").read_text("utf-8").splitlines()]
    rows = [json.loads(x) for x in (PROMPTS / "bench_mini.jsonl").read_text("utf-8").splitlines()]
    texts += [row["query"] for row in rows]
    texts += [f"{text} Keep it short." for text in texts]
    assert len(texts) >= count, len(texts)
    return texts[:count]


# ---------------------------------------------------------------------------------------------------------
# Against the others


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, list[list[int]]]]:
    """Write what the engines load, in their formats; (the setup for bench/peers.py, prompts by job as ids)."""
    loaded = load_model(args.model, device="cpu")
    weights, setup = folder / "weights", folder / "setup.json"
    if not weights.exists():
        loaded.model.save_pretrained(weights)
        loaded.tokenizer.save_pretrained(weights)
    gguf = demo_file() if args.model == "smollm2" else args.model if args.model.endswith(".gguf") else ""
    paths = {"folder": str(weights), "gguf": str(gguf or ""), "openvino": str(folder / "openvino")}
    setup.write_text(json.dumps({"model": args.model, **paths, "eos": sorted(loaded.chat.eos_ids)}), "utf-8")
    asked = real_prompts(args.prompts)
    ragged = [text + WISHES[i % len(WISHES)] for i, text in enumerate(asked)]
    jobs = {"ragged": ragged, "even": asked}
    encoded = {
        job: [loaded.chat.encode([{"role": "user", "content": text}]) for text in texts] for job, texts in jobs.items()
    }
    return setup, encoded


def runnable(args: argparse.Namespace, gguf: bool) -> dict[str, str]:
    """{engine: its interpreter}, ours first; says what the missing ones need."""
    others = dict(pair.split("=", 1) for pair in args.python)
    found = {"ours": sys.executable}
    for name in args.peers:
        python = others.get(name) or others.get(name.partition("-")[0]) or sys.executable
        module, needs = peers.NEEDS.get(name, ("transformers", ""))
        known = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        if name == "llama.cpp" and not gguf:
            say("llama.cpp: left out, --model is no GGUF file")
        elif name == "ours-bf16" and not multiplies_bf16():
            say("ours-bf16: left out, this CPU has neither AMX nor AVX-512 BF16")
        elif subprocess.run([python, "-c", known]).returncode:
            say(f"{name}: left out; to have it: {needs}; then --python {name}=ITS/bin/python if it is elsewhere")
        else:
            found[name] = python
    return found


def bench_jobs(args: argparse.Namespace, engines: dict, prompts: dict) -> tuple[list[dict], dict]:
    batches, tried = dict.fromkeys(engines, 0), {}
    job = {"ragged": {"limit": args.max_new_tokens, "exact": False}, "even": {"limit": args.even, "exact": True}}

    def run(name: str, which: str, seed: int, rows: int) -> dict:
        one = engines[name](prompts=prompts[which], seed=seed, rows=rows, **job[which])
        rate = one["tokens"] / one["seconds"]
        say(f"{which}, {name}, {rows or 'its own'} at once: {one['tokens']} tokens, {rate:.1f}/s")
        return one

    for name in engines.keys() & {"generate", "llama.cpp"}:
        sizes = [
            int(rows) for engine, _, rows in (word.rpartition("=") for word in args.batches) if engine in ("", name)
        ]
        if len(sizes) > 1:
            probes = {rows: run(name, "ragged", 0, rows) for rows in sizes}
            tried[name] = {rows: one["tokens"] / one["seconds"] for rows, one in probes.items()}
        batches[name] = max(tried[name], key=tried[name].__getitem__) if name in tried else sizes[0]
    tables, figures = [], {"tokens_per_second_by_batch": tried}
    for which in job:
        runs = harness.in_turns(args.runs, list(engines), lambda name, turn: run(name, which, turn + 1, batches[name]))  # noqa: B023
        pace = {name: [one["seconds"] / one["tokens"] for one in done] for name, done in runs.items()}  # s per token
        rows = []
        for name, done in runs.items():
            middle = {key: statistics.median(one[key] for one in done) for key in ("tokens", "seconds", "eos")}
            cells = [f"{middle['tokens']:,.0f}", f"{middle['eos']:.0%}", f"{middle['seconds']:.1f}"]
            cells.append(f"{1 / statistics.median(pace[name]):.1f}")
            cells.append("" if name == "ours" else harness.spread(harness.ratios(pace[name], pace["ours"])))
            rows.append([f"{name}, {batches[name]} at once" if batches[name] else name, *cells])
        columns = ["", "tokens", "ended by EOS", "seconds", "tokens/s", "ours is faster by"]
        tables.append(harness.table(which, columns, rows))
        figures[which] = runs
    return tables, figures


def bench_steps(args: argparse.Namespace, start: Callable, names: Sequence[str], prompts: dict) -> tuple[dict, dict]:
    """start(name, threads): an engine, kept."""
    milliseconds: dict = {}
    engines = {(name, threads): start(name, threads) for name in names for threads in {t for t, _ in args.places}}
    same = [prompt[:32] for prompt in prompts["even"] if len(prompt) >= 32] or prompts["even"]

    def step(key: tuple, turn: int) -> float:
        name, (threads, busy), rows = key
        some = {"prompts": (same * rows)[:rows], "seed": turn, "rows": rows, "exact": True}
        with harness.busy_neighbour() if busy else nullcontext():
            short, long = (engines[name, threads](limit=n, **some) for n in (WARM, WARM + args.steps))
        return 1000 * (long["seconds"] - short["seconds"]) / args.steps

    for engine in engines.values():  # a first call takes what no later one takes
        engine(prompts=same[:2], limit=WARM, seed=0, rows=2, exact=True)
    shown = [(name, place) for name in names for place in args.places if name in OURS or not place[1]]
    for rows in args.rows:
        keys = [(name, place, rows) for name, place in shown]
        milliseconds |= harness.in_turns(args.runs, keys, step)
        found = ", ".join(f"{name} {statistics.median(milliseconds[name, place, n]):.1f}" for name, place, n in keys)
        say(f"a step of {rows} rows, ms: {found}")
    lines, spelt = [], {place: word for word, place in PLACES.items()}
    for name, place in shown:
        line = [f"{name}, {spelt[place]}"]
        for rows in args.rows:
            own, these = milliseconds["ours", place, rows], milliseconds[name, place, rows]
            ratio = "" if name == "ours" else f" ({statistics.median(harness.ratios(these, own)):.2f})"
            line.append(f"{statistics.median(these):.1f}{ratio}")
        lines.append(line)
    columns = ["ms per step (times ours)", *(f"{rows} row{'s' * (rows > 1)}" for rows in args.rows)]
    flat = {f"{name}, {spelt[place]}, {rows} rows": some for (name, place, rows), some in milliseconds.items()}
    return harness.table("steps", columns, lines), {"milliseconds_per_step": flat}


def bench_peers(args: argparse.Namespace) -> tuple[list[dict], dict]:
    tables, figures = [], {}
    with ExitStack() as stack:
        folder = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        setup, prompts = prepare(args, folder)
        pythons = runnable(args, bool(json.loads(setup.read_text("utf-8"))["gguf"]))
        kept: dict = {}

        def start(name: str, threads: int = 0) -> harness.Engine:
            if (name, threads) not in kept:
                command = [pythons[name], str(ROOT / "bench" / "peers.py"), name, str(setup)]
                kept[name, threads] = harness.Engine(command, threads)
                stack.callback(kept[name, threads].close)
            return kept[name, threads]

        if args.only != "steps":
            more, found = bench_jobs(args, {name: start(name) for name in pythons}, prompts)
            tables, figures = more, found
        if args.only != "jobs":
            one, found = bench_steps(args, start, list(pythons), prompts)
            tables, figures = [*tables, one], {**figures, **found}
    return tables, figures


# ---------------------------------------------------------------------------------------------------------
# --lookup


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


def bench_lookup(args: argparse.Namespace, loaded: LoadedModel) -> tuple[list[dict], dict]:
    rows, count = args.rows[0], min(args.prompts, 16)
    sets = {
        "copy-heavy": (copy_prompts(loaded, count), {"repetition_penalty": 1.0}),
        "Extender": (extender_prompts(loaded, count, rows, args.max_new_tokens), {"repetition_penalty": 1.1}),
    }
    columns = ["", "right guesses", "tokens", "without, tokens/s", "with, tokens/s", "steps saved", "speed-up"]
    lines, figures = [], {"rows": rows, "prompts": count}
    for name, (prompts, sampling) in sets.items():

        def run(lookup: bool, seed: int, name=name, prompts=prompts, sampling=sampling) -> dict:
            one = run_sampler(loaded, prompts, args.max_new_tokens, rows, seed, lookup, **sampling)
            how = "with" if lookup else "without"
            say(f"{name}, run {seed + 1}, {how}: {one['tokens'] / one['seconds']:.1f}/s")
            return one

        runs = harness.in_turns(args.runs, (False, True), run)  # the same texts with and without
        same = [a["texts"] == b["texts"] for a, b in zip(runs[False], runs[True], strict=True)]
        rate = {key: statistics.median(one["tokens"] / one["seconds"] for one in done) for key, done in runs.items()}
        steps = {key: sum(one["stats"]["steps"] for one in done) for key, done in runs.items()}
        share = statistics.mean(hit_share(prompts, one["texts"]) for one in runs[True])
        speedups = harness.ratios(*([one["seconds"] for one in runs[key]] for key in (False, True)))
        saved = 1 - steps[True] / steps[False]
        tokens = f"{statistics.median(one['tokens'] for one in runs[True]):,.0f}"
        cells = (f"{share:.0%}", tokens, f"{rate[False]:.1f}", f"{rate[True]:.1f}", f"{saved:.0%}")
        lines.append([name, *cells, harness.spread(speedups)])
        equal = f"{sum(same)}/{len(same)}"
        figures[name] = {"hit_share": share, "speedups": speedups, "runs_with_equal_texts": equal}
    return [harness.table("lookup", columns, lines)], figures


# ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [name for name in peers.ENGINES if name != "ours"]
    p.add_argument("--model", default="smollm2", help="as in every stage (default smollm2)")
    p.add_argument("--only", default="", choices=["", "jobs", "steps"], help="one of the two parts")
    p.add_argument("--peers", nargs="+", choices=others, default=others, help="default: all that are installed")
    p.add_argument("--python", nargs="+", default=[], metavar="ENGINE=PATH", help="interpreter with its packages")
    p.add_argument("--folder", default="", help="keep converted weights here (default: a temporary folder)")
    p.add_argument("--prompts", type=int, default=48, help="how many prompts (default 48; --lookup: at most 16)")
    p.add_argument("--max-new-tokens", type=int, default=384, help="limit of a ragged text, tokens (default 384)")
    p.add_argument("--even", type=int, default=96, help="tokens of each text of the even job (default 96)")
    p.add_argument(
        "--batches",
        nargs="+",
        default=["16", "48"],
        metavar="N or ENGINE=N",
        help="texts at once, of one engine or of both; the best counts (default 16 48)",
    )
    p.add_argument("--rows", type=int, nargs="+", default=[], help="decode steps of so many rows (default 1 4 8 32 48)")
    p.add_argument("--steps", type=int, default=32, help="decode steps that are timed together (default 32)")
    p.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES), help="how steps run (default: all)")
    p.add_argument("--runs", type=int, default=3, help="turns; medians are shown (default 3)")
    p.add_argument("--lookup", action="store_true", help="with and without draft tokens, instead of peers")
    harness.add_save(p)
    args = p.parse_args(argv)
    args.rows = args.rows or ([8] if args.lookup else [1, 4, 8, 32, 48])
    args.places = [PLACES[word] for word in args.places]
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    tables, figures = bench_lookup(args, load_model(args.model)) if args.lookup else bench_peers(args)
    harness.finish("sampler", argv, args.save, tables, figures)


if __name__ == "__main__":
    main()
