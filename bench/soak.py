"""Kill every stage with SIGKILL at random moments, start the same command again, and compare with an unbroken run.

    python bench/soak.py                      20 kills a stage, about 10 minutes on 2 cores
    python bench/soak.py --kills 3 --stages extend generator

The model is the tiny hand-built writer of the tests: texts of real sentences in seconds. Each stage runs once without
being disturbed; then in another folder of the same name, killed after a random share of that time, again and again.
What is left in the end must be what the unbroken run wrote: the same ids, the same records to the last character, for
training the same loss in every step to 1e-6 and the same adapter, and no temporary file. A run that ends before its
kill is compared and a new one started, until all kills are spent; so is the last one.

The processes are forks of one that has imported everything, so that kills hit the work and not the imports.
Prints one table and, as the last line of stdout, one JSON document; exit code 1 if anything differs.
"""

import argparse
import importlib
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from rich.table import Table

from lengthen import cli
from lengthen.jobs import read_sidecar
from lengthen.reading import read_jsonl
from lengthen.records import UserError

STAGES = ("instructions", "responses", "extend", "constrain", "generator", "extender", "evaluate")
LOSS_TOLERANCE = 1e-6

# ---------------------------------------------------------------------------------------------------------
# The stages


def commands(model: Path, clean: Path, folder: Path) -> dict[str, tuple[str, list[str], Path]]:
    """Stage -> (script, arguments, what it writes into `folder`); inputs come from the unbroken run in `clean`."""
    common = ["--model", str(model), "--language", "en", "--device", "cpu"]
    short = ["--max-new-tokens", "200", "--max-rows", "2"]  # few at a time: lines then come throughout, not at the end
    asked, drafts, longer = (str(clean / f"{n}.jsonl") for n in ("instructions", "responses", "extended"))
    seeds = str(ROOT / "prompts" / "en" / "seeds.jsonl")
    scale = ["--demand-min", "5", "--demand-max", "2000", "--demand-steps", "5,10"]
    steps = ["--epochs", "10", "--save-every", "2", "--dropout", "0.1", "--learning-rate", "1e-3"]
    lines = {
        "instructions": (
            "generate",
            ["instructions", *common, "--seeds", seeds, "--count", "12", "--max-rows", "2"],
            "instructions.jsonl",
        ),
        "responses": (
            "generate",
            ["responses", *common, *short, "--input", asked, "--max-attempts", "3"],
            "responses.jsonl",
        ),
        "extend": (
            "extend",
            [*common, *short, "--input", drafts, "--samples", "1", "--max-attempts", "4"],
            "extended.jsonl",
        ),
        "constrain": (
            "generate",
            ["constrain", *common, *short, *scale, "--input", longer, drafts, "--max-attempts", "2"],
            "constrained.jsonl",
        ),
        "generator": ("train", ["--role", "generator", *common, *steps, "--input", longer], "generator"),
        "extender": ("train", ["--role", "extender", *common, *steps, "--input", longer], "extender"),
        "evaluate": ("evaluate", [*common, *short, "--benchmark", "mini", "--limit", "8", "--samples", "2"], "eval"),
    }
    return {
        stage: (script, [*argv, "--output", str(folder / name)], folder / name)
        for stage, (script, argv, name) in lines.items()
    }


def child(script: str, argv: list[str], log: str) -> None:
    """One process of a stage, as the command line would run it."""
    import torch

    torch.set_num_threads(1)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    cli.run(lambda: importlib.import_module(script).main(argv))


def start(script: str, argv: list[str], log: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("forkserver").Process(target=child, args=(script, argv, str(log)))
    process.start()
    return process


def finish(process: multiprocessing.Process, stage: str, log: Path) -> None:
    process.join()
    if process.exitcode:
        last = log.read_text().strip().splitlines()[-3:]
        raise UserError(f"{stage} ended with exit code {process.exitcode}: {' / '.join(last)}", f"see {log}")


# ---------------------------------------------------------------------------------------------------------
# What an output says


def main_file(output: Path) -> Path:
    """The file that grows while the stage works: records, or the steps of a training run."""
    if output.suffix == ".jsonl":
        return output
    return output / ("outputs.jsonl" if output.name == "eval" else "train_log.jsonl")


def contents(output: Path) -> dict:
    """records: {(file, id): record}; losses: [(step, loss)]; adapter: its bytes; left: files that should be gone."""
    lines, records, losses, adapter = main_file(output), {}, [], b""
    if lines.name == "train_log.jsonl":
        losses = [(e["step"], e["loss"]) for e in read_jsonl(lines, needs=())]
        adapter = (output / "adapter_model.safetensors").read_bytes()
        assert read_sidecar(output)["status"] == "done", output
    else:
        for path in (lines, lines.with_name(lines.stem + ".rejected.jsonl")):
            rows = read_jsonl(path, needs=()) if path.exists() and path.stat().st_size else []
            records |= {(path.name, r["id"]): r for r in rows}
        assert read_sidecar(lines)["status"] == "done", output
    left = [
        p for p in output.parent.rglob("*") if p.name.startswith(".") or ".work." in p.name or "checkpoint" in p.name
    ]
    return {"records": records, "losses": losses, "adapter": adapter, "left": left}


def differences(clean: dict, now: dict) -> dict[str, float]:
    """Counts of what is not as in the unbroken run; for losses the largest gap."""
    ids, ids_now = clean["records"].keys(), now["records"].keys()
    steps = [s for s, _ in clean["losses"]] == [s for s, _ in now["losses"]]
    gaps = [abs(a - b) for (_, a), (_, b) in zip(clean["losses"], now["losses"], strict=False)]
    return {
        "ids": len(ids ^ ids_now) + (0 if steps else 1),
        "texts": sum(clean["records"][k] != now["records"][k] for k in ids & ids_now),
        "loss": max(gaps, default=0.0),
        "adapter": int(clean["adapter"] != now["adapter"]),
        "left": len(now["left"]),
    }


def soak(
    stage: str, script: str, argv: list[str], output: Path, log: Path, clean: dict, duration: float, kills: int, rng
):
    """Spend the kills on one stage; returns counts and the worst difference seen. mid_work: kills that hit a run that
    had lines on disk, records or journal."""
    killed = mid_work = runs = 0
    worst = dict.fromkeys(("ids", "texts", "loss", "adapter", "left"), 0)
    while killed < kills or runs == 0:
        shutil.rmtree(output.parent, ignore_errors=True)
        undisturbed, started = True, time.monotonic()
        while True:
            process = start(script, argv, log)
            if killed < kills:
                process.join(rng.uniform(0, duration))
            if killed >= kills or process.exitcode is not None:
                finish(process, stage, log)
                break
            process.kill()
            process.join()
            assert process.exitcode in (-signal.SIGKILL, 0), process.exitcode  # 0: it ended while we took aim
            undisturbed = False
            killed += process.exitcode != 0
            mid_work += any(p.stat().st_size for p in output.parent.rglob("*.jsonl"))
        runs += 1
        if undisturbed:  # the first timing was taken on a busier machine: aim within the work again
            duration = min(duration, time.monotonic() - started)
        for name, value in differences(clean, contents(output)).items():
            worst[name] = max(worst[name], value)
    return {"kills": killed, "mid_work": mid_work, "finished_runs": runs, **worst}


# ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, "bench/soak.py")
    parser.add_argument("--kills", type=cli.at_least(1), default=20, help="SIGKILLs for each stage")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which stages are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", default="", help="where it works, kept afterwards; empty = a temporary folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        [
            "torch",
            "transformers",
            "lengthen.sampling.engine",
            "generate",
            "extend",
            "train",
            "evaluate",
            "matplotlib.figure",
        ]
    )
    with tempfile.TemporaryDirectory() as temporary:
        summary = measure(args, Path(args.folder or temporary).resolve())
    cli.emit(summary)
    if not summary["ok"]:
        sys.exit(1)


def measure(args: argparse.Namespace, folder: Path) -> dict:
    import tiny  # tests/tiny.py

    # Equal names of the last two folders: they are part of every id.
    clean, soaked, began = folder / "clean" / "run" / "iter_1", folder / "soaked" / "run" / "iter_1", time.monotonic()
    for old in (clean, soaked):
        shutil.rmtree(old, ignore_errors=True)
    model = tiny.save_writer(folder / "writer")

    # 1) the unbroken run, timed; the first fork waits for the imports
    seconds, log = {}, folder / "log.txt"
    warm = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(0,))
    warm.start()
    warm.join()
    for stage, (script, argv, _) in commands(model, clean, clean).items():
        started = time.monotonic()
        finish(start(script, argv, log), stage, log)
        seconds[stage] = time.monotonic() - started
        cli.say(f"{stage}: {seconds[stage]:.1f} s unbroken")

    # 2) the same commands, killed
    rng, results = random.Random(args.seed), {}
    for stage, (script, argv, output) in commands(model, clean, soaked).items():
        if stage in args.stages:
            before, started = contents(clean / output.name), time.monotonic()
            result = soak(stage, script, argv, output, log, before, seconds[stage], args.kills, rng)
            size = {"records": len(before["records"]), "steps": len(before["losses"])}
            results[stage] = {**size, **result, "seconds": round(time.monotonic() - started, 1)}
            cli.say(f"{stage}: {', '.join(f'{name} {value}' for name, value in results[stage].items())}")

    # 3) what came of it
    table = Table(title=f"{args.kills} SIGKILLs a stage at random moments, against an unbroken run")
    for name in ("stage", "lines", "kills", "mid-work", "runs", "differ", "loss gap", "s"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for stage, r in results.items():
        differ = r["ids"] + r["texts"] + r["adapter"] + r["left"]
        counts = (str(n) for n in (r["records"] or r["steps"], r["kills"], r["mid_work"], r["finished_runs"], differ))
        table.add_row(stage, *counts, f"{r['loss']:.0e}" if r["steps"] else "-", f"{r['seconds']:.0f}")
    cli.console.print(table)
    exact = ("ids", "texts", "left")
    ok = all(r["loss"] <= LOSS_TOLERANCE and not any(r[k] for k in exact) for r in results.values())
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    return {"bench": "soak", "ok": ok, **machine, "seconds": round(time.monotonic() - began, 1), "stages": results}


if __name__ == "__main__":
    cli.run(main)
