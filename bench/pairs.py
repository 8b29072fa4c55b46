"""From records to training rows: the time of train.py's own path against the bare tokenizer on the same texts.

    python bench/pairs.py                     # 10,000 Extender pairs of about 8,000 tokens, SmolLM2's tokenizer
    python bench/pairs.py --pairs 100         # a look

Ours reads the JSONL, removes lines of the drafts, renders the chat template, encodes, writes pairs.bin with its
checksum, opens it again and packs every pair of one epoch into its row. The bare tokenizer gets the finished prompts
and answers as one list in memory: `tokenizer(texts)`. Each runs in a process of its own, so that peak memory is its
own, too; in turns, --repeats times. Medians of the seconds, and of the ratio of the two in each turn. The texts are
random words of the tokenizer's vocabulary in lines and paragraphs: only their length matters. The table goes to stderr,
the same data as one JSON line to stdout; --save keeps it (harness.py).
"""

import argparse
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import harness

import lengthen  # noqa: F401  before torch: it sets how OpenMP's threads wait

# isort: split
import train
from lengthen.cli import InputFlags, ModelFlags, OutputFlags
from lengthen.models.loading import load_chat, load_tokenizer
from lengthen.reading import each_record
from lengthen.training.folder import TrainingFolder
from lengthen.training.packed import pack
from lengthen.training.parallel import Processes
from lengthen.training.settings import PairFlags, Training

LONGEST = 1_000_000  # tokens of a pair: none is left out


def write_records(path: Path, args: argparse.Namespace) -> None:
    """Answers of two thirds of the tokens, drafts of one third."""
    tokenizer = load_tokenizer(args.model)
    vocabulary = [tokenizer.decode([i]).strip() for i in range(300, min(20_000, len(tokenizer)))]
    words = [w for w in vocabulary if w.isalpha() and len(w) > 2]
    rng = random.Random(0)

    def text(count: int) -> str:
        lines = [" ".join(rng.choices(words, k=12)) + "." for _ in range(count // 16)]  # 16 tokens a line
        return "\n\n".join("\n".join(lines[i : i + 4]) for i in range(0, len(lines), 4))

    with open(path, "w") as handle:
        for number in range(args.pairs):
            fields = {"prompt": text(60), "initial": text(args.tokens // 3), "response": text(args.tokens * 2 // 3)}
            handle.write(json.dumps({"id": str(number), "language": "en", "finish": "eos", **fields}) + "\n")


def training_of(args: argparse.Namespace, path: Path) -> Training:
    out, pairs = OutputFlags(str(path.parent / "out"), overwrite=True), PairFlags("extender", max_length=LONGEST)
    return Training(InputFlags([str(path)]), out, ModelFlags(args.model), pairs)


def ours(args: argparse.Namespace, path: Path) -> dict:
    training, chat = training_of(args, path), load_chat(args.model)
    settings = {**training.recorded(), "templates": {}}
    io = {"inputs": training.inputs.input, "overwrite": True, "allow_partial": False}
    started = time.perf_counter()
    with TrainingFolder(training.out.output, settings=settings, **io) as folder:
        pairs = train.pairs_of(training, folder, chat, LONGEST, Processes())
    tokens = 0
    for step in range(len(pairs)):
        (row,) = train.split_rows([pairs[i] for i in train.step_pairs(step, len(pairs), 1, 0)], 1, 1 << 30)
        tokens += pack([p.ids for p in row]).input_ids.numel()
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


def bare(args: argparse.Namespace, path: Path) -> dict:
    keep_lines, tokenizer = training_of(args, path).pairs.kept_lines, load_tokenizer(args.model)
    texts = []
    for record in each_record(path):
        texts += [train.to_messages(record, "extender", keep_lines, 0)[0]["content"], record["response"]]
    started = time.perf_counter()
    ids = tokenizer(texts)["input_ids"]
    return {"seconds": time.perf_counter() - started, "tokens": sum(map(len, ids))}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pairs", type=int, default=10_000, help="records")
    p.add_argument("--tokens", type=int, default=8000, help="of draft and answer together, about")
    p.add_argument("--model", default="smollm2", help="whose tokenizer")
    p.add_argument("--repeats", type=int, default=3, help="runs of each, in turns")
    p.add_argument("--worker", nargs=2, metavar=("WHO", "FILE"), help="used by the script itself")
    harness.add_save(p)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.worker:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = {"ours": ours, "bare": bare}[args.worker[0]](args, Path(args.worker[1]))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps({**found, "grown_gb": grown * 1024 / 1e9}))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "extended.jsonl"
        write_records(path, args)

        def run(who: str, turn: int) -> dict:
            command = [sys.executable, __file__, "--model", args.model, "--worker", who, str(path)]
            [one] = harness.measured(command, "failed")
            return one if "failed" not in one else sys.exit(f"error: {who} {one['failed']}")

        rows = harness.in_turns(args.repeats, ("ours", "bare"), run)
    ratios = harness.ratios(*([one["seconds"] for one in found] for found in rows.values()))
    lines = []
    for who, found in rows.items():
        middle, memory = statistics.median(r["seconds"] for r in found), max(r["grown_gb"] for r in found)
        times = harness.spread(ratios) if who == "ours" else ""
        lines.append([who, f"{found[0]['tokens']:,}", f"{middle:.1f}", times, f"{memory:.2f}"])
    columns = ["", "tokens", "seconds", "times the tokenizer's", "GB more memory"]
    harness.finish("pairs", argv, args.save, [harness.table("pairs", columns, lines)], {"runs": rows})


if __name__ == "__main__":
    main()
