"""steps.py: how a step is spelt, and what is kept of what it says.   python -m pytest tests/test_steps.py"""

import io
import os
import pty
import re
import sys
from pathlib import Path

import pytest

import run
from lengthen import steps
from lengthen.records import UserError
from lengthen.steps import Step, command_of, launched, moved

# A stage of a test: plain lines, a bar that is drawn over and over with a line above it in between, one torn line.
STAGE = """
import sys, time
from rich.console import Console
from rich.progress import track
print("not the summary")
console = Console(stderr=True)
console.print("[bold red]error:[/] nothing, on a terminal:", console.is_terminal)
for i in track(range(6), console=console, description="drawn"):
    time.sleep(0.12)
    if i == 3:
        console.print("a line above the bar")
print("\\u957f\\x1b]0;title\\x07 and no end", file=sys.stderr, end="", flush=True)
print('{"seconds": 1}')
raise SystemExit(int(sys.argv[2]))
"""


@pytest.fixture
def step(tmp_path: Path) -> Step:
    (tmp_path / "stage.py").write_text(STAGE)
    return Step("iter_1", "extend", (str(tmp_path / "stage.py"),), {"exit": 0, "output": f"{tmp_path}/iter_1/out"})


def test_settings_become_flags():
    settings = {
        "model": "m",
        "adapter": "",
        "no_probes": True,
        "offload": False,
        "input": ["a", "b c"],
        "dedup_against": [],
        "demand_steps": (50, 100),
        "limit": 0,
        "learning_rate": 2e-4,
        "judge_margin": float("-inf"),
    }
    words = ["--model", "m", "--no-probes", "--input", "a", "b c", "--demand-steps", "50,100", "--limit", "0"]
    step = Step("iter_1", "extend", ("generate.py", "responses"), settings)
    assert command_of(step) == ["generate.py", "responses", *words, "--learning-rate", "0.0002", "--judge-margin=-inf"]


def test_a_moved_step_is_the_same_elsewhere_but_for_its_changes():
    step = Step("iter_1", "extend", ("extend.py",), {"rounds": 3, "output": "runs/iter_1/iter_1/extended.jsonl"})
    copy = moved(step, "controls/x", "x", rounds=1, stages=1)
    assert copy.settings == {"rounds": 1, "stages": 1, "output": "runs/iter_1/controls/x/extended.jsonl"}
    assert (copy.part, copy.control, copy.name) == ("controls/x", "x", "extend") and step.settings["rounds"] == 3


def test_what_a_stage_says_is_shown_at_once_and_kept(step, tmp_path, capfd):
    results, ended = steps.execute([step, step], str(tmp_path))
    assert results == [{"seconds": 1, "part": "iter_1", "stage": "extend"}] * 2 and not ended
    shown, log = capfd.readouterr().err, (tmp_path / "run.log").read_text()
    for text in (shown, log):
        assert text.count("error: nothing, on a terminal: False\n") == 2
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert len(re.findall(rf"^{stamp}  iter_1 extend\n\$ python \S+stage.py --exit 0 --output \S+$", log, re.M)) == 2
    assert len(re.findall(rf"^{stamp}  iter_1 extend: exit code 0 after \d+\.\d s$", log, re.M)) == 2


def test_a_terminal_has_its_bars_and_the_log_has_lines(step, tmp_path, monkeypatch):
    ours, theirs = pty.openpty()
    monkeypatch.setattr(sys, "stderr", open(theirs, "w"))
    log = io.BytesIO()
    code, output = steps.run_command([*step.command, "--exit", "5"], log)
    shown = ""
    while not shown.endswith(" and no end"):
        shown += os.read(ours, 1 << 16).decode()
    assert code == 5 and output == 'not the summary\n{"seconds": 1}\n'
    assert shown.count("drawn") > 2 and "\x1b[1;31m" in shown and "\x1b[2K" in shown  # drawn over, in colours
    lines = [line.rstrip() for line in log.getvalue().decode().splitlines()]
    assert all(line.isprintable() for line in lines)
    assert lines[:2] == ["error: nothing, on a terminal: True", "a line above the bar"]
    assert "drawn" in lines[2] and "100%" in lines[2] and len(lines) == 4  # the bar as it stood at last
    assert lines[3].startswith("长") and lines[3].endswith(" and no end")


def test_a_stage_that_fails_ends_the_run_and_a_control_only_itself(step, tmp_path):
    low = Step(step.part, step.name, step.command, {**step.settings, "exit": 3}, control="told")
    results, ended = steps.execute([low, low, step], str(tmp_path))
    assert ended == ["told"] and len(results) == 1  # what follows of that control is not run
    for code in (2, 3, 130):
        failing = Step(step.part, step.name, step.command, {**step.settings, "exit": code})
        with pytest.raises(SystemExit) as error:
            steps.execute([failing], str(tmp_path))
        assert error.value.code == code and f"exit code {code} after" in (tmp_path / "run.log").read_text()


def test_a_full_disk_hides_nothing_that_a_stage_says(step, capfd):
    """Its reason for ending stands in what it says: the pipe stays open when the log takes no more."""
    with open("/dev/full", "wb", buffering=0) as log:
        assert steps.run_step(step, log) == {"seconds": 1}
    assert "error: nothing" in (shown := capfd.readouterr().err) and shown.endswith(" and no end")


def test_a_run_folder_that_cannot_be_made_is_a_mistake_in_one_line(step, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*run.log: Not a directory"):
        steps.execute([step], f"{tmp_path}/file/run")


def test_training_is_started_by_its_launcher(tmp_path, capsys):
    """run.py --train-launcher: on the printed commands, and through the torchrun of this environment, two processes."""
    run.main(["--dry-run", "--train-launcher", "torchrun --nproc-per-node 2"])
    commands = [line for line in capsys.readouterr().out.splitlines() if "train.py" in line]
    assert commands and all(line.startswith("torchrun --nproc-per-node 2 train.py --") for line in commands[:3])
    (tmp_path / "script.py").write_text(
        "import json, os, sys\n"
        "if os.environ['RANK'] == '0':\n"
        "    print(json.dumps([os.environ['WORLD_SIZE'], *sys.argv[1:]]))\n"
    )
    command = (str(tmp_path / "script.py"),)
    launcher = "torchrun --standalone --nproc-per-node 2"
    step = Step("iter_1", "train generator", command, {"output": "x"}, launcher=launcher)
    with open(tmp_path / "run.log", "wb", buffering=0) as log:
        code, output = steps.run_command(steps.command_of(step), log, step.launcher)
    assert code == 0 and output.splitlines()[-1] == '["2", "--output", "x"]'
    with pytest.raises(UserError, match="there is no program 'torchrum'"):
        run.main(["--dry-run", "--train-launcher", "torchrum --nproc-per-node 2"])


def test_a_launcher_that_no_shell_would_take_is_one_line():
    with pytest.raises(UserError, match='--train-launcher torchrun "2: No closing quotation'):
        launched('torchrun "2')
