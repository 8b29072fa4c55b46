"""What every benchmark here shares: the machine it ran on, engines in processes of their own, figures on their way into
a document.

1. `machine()` names the CPU, its widest instruction sets, the cores and the commit: a figure is one of them all.
2. An `Engine` is a process that answers requests. It inherits the user's environment and nothing that we set: our own
   waiting policy comes with `import lengthen`, which only our engine does. A bench imports this file before lengthen.
3. What is compared runs in turns (`in_turns`); where one must not meet what another left, it is `measured` in a process
   of its own, with the same environment.
4. `finish` prints the tables to stderr and everything as one JSON line to stdout. --save NAME also writes it to
   bench/results/NAME.json.
5. Documents quote these files: the lines between `<!-- bench/results/NAME.json: TABLE -->` and `<!-- end -->` are made
   from them, and tests/test_results.py fails where they differ. After a new run:

    python bench/harness.py                     # rewrite the tables of README.md and docs/
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUOTED = re.compile(r"(<!-- bench/results/([\w.-]+)\.json: ([\w -]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
ENVIRONMENT = dict(os.environ)  # the user's: importing lengthen, which comes later, adds our waiting policy
PLACES = ("--save", "--run", "--folder", "--python", "--wheels", "--out")
SETS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}  # flag of /proc/cpuinfo: name


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """CPU, its instruction sets, cores that this process may use, GPU, versions, commit ("-dirty" = changed since)."""
    try:
        info = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:  # not Linux
        info = ""
    found = dict(re.findall(r"^(model name|flags|Features)\s*: (.*)$", info, re.MULTILINE))
    flags = (found.get("flags") or found.get("Features") or "").split()
    versions = [f"{name} {version}" for name in ("torch", "transformers") if (version := _version(name))]
    return {
        "cpu": found.get("model name") or platform.processor() or platform.machine(),
        "instructions": ", ".join(name for flag, name in SETS.items() if flag in flags) or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": _printed("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "commit": _printed("git", "describe", "--always", "--dirty", "--exclude", "*"),
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _printed(*command: str) -> str:
    """The first line that a program prints, "" where it is not installed."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip().partition("\n")[0]
    except OSError:
        return ""


def place(where: dict[str, Any]) -> str:
    """The machine in a few words."""
    return where["gpu"] or f"{where['cpu']} ({where['instructions']}), {where['cores']} cores"


# ---- engines ---------------------------------------------------------------------------------------------------------


class Engine:
    """A process that answers one JSON line with another; its first line says that it is ready.

    threads: OMP_NUM_THREADS for it, 0 = its own default.
    """

    def __init__(self, command: Sequence[str], threads: int = 0):
        env = {**ENVIRONMENT, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, **pipes)
        self._answer()

    def __call__(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{shlex.join(map(str, self.process.args))} ended with code {self.process.wait()}: see above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(start: Callable[[], Callable[..., dict]]) -> None:
    """The other end: start() -> what answers each line of stdin, `answer(**request)`, until it is closed.

    Whatever a library prints meanwhile goes to stderr.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = start()
    print("{}", file=replies, flush=True)  # ready
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=replies, flush=True)


@contextmanager
def busy_neighbour():
    """One other process that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


# ---- measuring -------------------------------------------------------------------------------------------------------


def in_turns(runs: int, names: Sequence, work: Callable) -> dict:
    """{name: [work(name, turn) of each turn]}, each turn in the reverse order of the last."""
    done: dict = {name: [] for name in names}
    for turn in range(runs):
        for name in list(names)[:: -1 if turn % 2 else 1]:
            done[name].append(work(name, turn))
    return done


def ratios(these: Sequence[float], those: Sequence[float]) -> list[float]:
    """Turn by turn: what slows a shared machine for minutes slows both of a turn."""
    return [a / b for a, b in zip(these, those, strict=True)]


def clock(cuda: bool) -> float:
    """Now, in seconds, with nothing left to compute."""
    if cuda:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable, cuda: bool) -> float:
    start = clock(cuda)
    work()
    return clock(cuda) - start


def measured(command: Sequence[str], failed: str) -> Iterator[dict]:
    """What a process prints as JSON lines, as soon as it does; where it fails, last {failed: why}."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=said, text=True) as process:
            assert process.stdout
            try:
                for line in process.stdout:
                    if line.startswith('{"'):  # libraries print there, too
                        yield json.loads(line)
            except BaseException:  # also where nobody asks for more
                process.kill()
                raise
        said.seek(0)
        text = said.read()
    print(text, end="", file=sys.stderr)
    if process.returncode:
        yield {failed: f"failed: {' '.join(text.strip().splitlines()[-1:])[:100]}"}


# ---- figures ---------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 2) -> str:
    """median (least to most)"""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> dict[str, Any]:
    """One table of a result, as it is printed and quoted. name: letters, digits and spaces."""
    lines = [[str(cell) for cell in row] for row in rows]
    assert all(len(line) == len(columns) for line in lines), (columns, lines)
    return {"name": name, "columns": list(columns), "rows": lines}


def add_save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", default="", metavar="NAME", help="also write bench/results/NAME.json")


def finish(bench: str, argv: Sequence[str] | None, save: str, tables: list[dict], figures: dict[str, Any]) -> None:
    """Print the tables and the JSON line, write the file. argv: as `main` got it; figures: everything behind them."""
    from rich.console import Console
    from rich.table import Table

    console, where = Console(stderr=True), machine()
    console.print(place(where), highlight=False)
    for one in tables:
        shown = Table(title=one["name"])
        for i, column in enumerate(one["columns"]):
            shown.add_column(column, justify="right" if i else "left")
        for row in one["rows"]:
            shown.add_row(*row)
        console.print(shown)
    result = report(bench, argv, where, tables, figures)
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{save}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
        console.print(f"bench/results/{save}.json is written; python bench/harness.py brings it into the documents")


def report(
    bench: str, argv: Sequence[str] | None, where: dict[str, Any], tables: list[dict], figures: dict[str, Any]
) -> dict[str, Any]:
    """Prints the JSON line, and returns what it says. A bench of long cells does so after each: if it is ended before
    the last, the last line has what was measured until then."""
    words: list[str] = []
    ours = False  # a flag that names a place of this machine, and its values: no part of what is run
    for word in sys.argv[1:] if argv is None else argv:
        ours = word in PLACES if word.startswith("--") else ours
        words += [] if ours else [word]
    command = shlex.join(["python", f"bench/{bench}.py", *words])
    result = {"bench": bench, "command": command, "machine": where, "tables": tables, "figures": figures}
    print(json.dumps(result), flush=True)
    return result


def markdown(result: dict[str, Any], name: str) -> str:
    """A table of a result as a document quotes it: whence it is, and the cells."""
    where, found = result["machine"], next((t for t in result["tables"] if t["name"] == name), None)
    if found is None:
        sys.exit(f"error: the result of {result['command']} has no table {name!r}")
    whence = f"`{result['command']}`, {place(where)}, {where['commit']}, {where['date']}:"
    lines = [textwrap.fill(whence, 108, break_long_words=False, break_on_hyphens=False), ""]
    for row in (found["columns"], ["---"] * len(found["columns"]), *found["rows"]):
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def requoted(text: str, results: Path = RESULTS) -> str:
    """A document with the tables of the files it names."""

    def fresh(found: re.Match) -> str:
        path = results / f"{found[2]}.json"
        try:
            result = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            sys.exit(f"error: a document quotes {path.name}, which is not in {results}")
        return found[1] + markdown(result, found[3]) + found[5]

    return QUOTED.sub(fresh, text)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path in DOCUMENTS:
        before = path.read_text("utf-8")
        if (after := requoted(before)) != before:
            path.write_text(after, "utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
