"""Each sampling stage, killed by SIGKILL at three named points and started again.   python -m pytest tests/test_kill.py

(Training has its own in test_train.py; bench/soak.py kills at random moments.)
"""

import importlib
import json
import os
import signal
from pathlib import Path

import cold
import pytest

from lengthen import records

# In the middle of a line is the quick tier's; at the others test_tasks.py proves the driver, which all stages share.
POINTS = (
    pytest.param("after-the-first-line", marks=pytest.mark.soak),
    "inside-the-fourth-line",
    pytest.param("before-the-last-rename", marks=pytest.mark.soak),
)


def run_stage(name: str, argv: list[str], point: str = "") -> None:
    """What the child process does: the stage's own main(), and where asked for a SIGKILL to itself."""
    import torch

    torch.set_num_threads(1)
    write, replace, lines = records._write, records._replace, []

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly_write(descriptor: int, data: bytes) -> int:
        if not os.readlink(f"/proc/self/fd/{descriptor}").endswith(".jsonl"):
            return write(descriptor, data)
        lines.append(data)
        if point == "inside-the-fourth-line" and len(lines) == 4:
            write(descriptor, bytes(data[: len(data) // 2]))
            die()
        written = write(descriptor, data)
        if point == "after-the-first-line":
            die()
        return written

    def deadly_replace(source: Path, target: Path) -> None:
        if point == "before-the-last-rename" and target.name.endswith("meta.json"):
            if json.loads(Path(source).read_text())["status"] == "done":
                die()
        replace(source, target)

    records._write, records._replace = deadly_write, deadly_replace
    importlib.import_module(name).main(argv)


def run(name: str, argv: list[str], point: str = "") -> int:
    process = cold.SERVER.Process(target=run_stage, args=(name, argv, point))
    process.start()
    process.join(cold.HANG)
    return process.exitcode


def rows_of(output: Path) -> dict[str, list[str]]:
    """Accepted and rejected records in their order; the id of a run is part of them, so folders must be equal."""
    paths = (output, output.with_name(output.stem + ".rejected.jsonl"))
    return {p.name: p.read_text().splitlines() if p.exists() else [] for p in paths}


@pytest.fixture(scope="module")
def chain(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str], Path]]:
    """The stages' commands, each with its uninterrupted output, each fed by the one before."""
    folder = tmp_path_factory.mktemp("clean") / "run" / "iter_1"
    model = ["--model", str(writer), "--language", "en"]
    short = ["--max-new-tokens", "200"]
    asked, drafts, longer = (str(folder / f"{n}.jsonl") for n in ("instructions", "responses", "extended"))
    commands = {
        "instructions": (
            "generate",
            ["instructions", *model, "--seeds", "prompts/en/seeds.jsonl", "--count", "6"],
            asked,
        ),
        "responses": ("generate", ["responses", *model, *short, "--input", asked, "--max-attempts", "3"], drafts),
        "extend": ("extend", [*model, *short, "--input", drafts, "--rounds", "2", "--max-attempts", "5"], longer),
        "constrain": (
            "generate",
            ["constrain", *model, "--input", drafts, longer, "--demand-min", "5", "--demand-max", "2000"]
            + ["--demand-steps", "5,10", "--max-attempts", "2"],
            str(folder / "constrained.jsonl"),
        ),
        "evaluate": ("evaluate", [*model, *short, "--benchmark", "mini", "--limit", "5"], str(folder / "eval")),
    }
    done = {}
    for stage, (name, argv, output) in commands.items():
        assert run(name, [*argv, "--output", output]) == 0, stage
        done[stage] = (name, argv, Path(output))
    return done


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("stage", ["instructions", "responses", "extend", "constrain", "evaluate"])
def test_killed_and_started_again_it_gives_the_same_records(chain, tmp_path, stage, point):
    name, argv, clean = chain[stage]
    output = tmp_path / "run" / "iter_1" / clean.name
    assert run(name, [*argv, "--output", str(output)], point) == -signal.SIGKILL
    assert run(name, [*argv, "--output", str(output)]) == 0
    if stage == "evaluate":
        output, clean = output / "outputs.jsonl", clean / "outputs.jsonl"
    assert rows_of(output) == rows_of(clean)
    assert not [p.name for p in output.parent.iterdir() if p.name.startswith(".") or "work" in p.name]
