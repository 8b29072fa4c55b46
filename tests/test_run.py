"""run.py: the plan, and that every stage understands the commands in it.   python -m pytest tests/test_run.py"""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run
from lengthen.jobs import Lock
from lengthen.records import UserError

ROOT = Path(__file__).parents[1]


def steps_of(*argv: str) -> list[run.Step]:
    return run.plan(run.parse_args(list(argv)))


def value(step: run.Step, flag: str) -> str:
    return step.command[step.command.index(flag) + 1]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--model", "m", "--iterations", "3"],
        ["--model", "m", "--adapter-mode", "restart", "--stages", "1", "--no-length-bias", "--no-line-removal"],
        ["--controls", "--iterations", "2", "--answers", "3"],
        ["--controls", "drafts", "other-mode", "--iterations", "3", "--adapter-mode", "restart"],
        ["--limit", "3", "--language", "both", "--trust-remote-code", "--quantize", "nf4"],
    ],
)
def test_every_stage_understands_its_command(argv):
    for step in steps_of(*argv):
        stage = importlib.import_module(step.command[0].removesuffix(".py"))
        parse = stage.make_parser().parse_args if hasattr(stage, "make_parser") else stage.parse_args
        parse(step.command[1:])


def test_the_order_is_the_papers():
    steps = [(s.part, s.name) for s in steps_of("--model", "m", "--iterations", "2")]
    loop = ["instructions", "responses", "extend", "train generator", "train extender"]
    assert steps == [
        *[("iter_1", name) for name in loop],
        *[("iter_2", name) for name in loop],
        *[("final", name) for name in ("instructions", "responses", "constrain", "train generator")],
        *[(f"eval/{name}", "evaluate") for name in ("base", "iter_1", "iter_2", "final")],
    ]


def test_the_roles_pass_from_iteration_to_iteration():
    steps = {(s.part, s.name): s for s in steps_of("--model", "m", "--iterations", "2", "--run", "r")}
    for part, name in (("iter_1", "responses"), ("iter_1", "extend"), ("iter_1", "train generator")):
        assert "--adapter" not in steps[part, name].command  # the first ones are the base model
    assert value(steps["iter_2", "responses"], "--adapter") == "r/iter_1/generator"
    assert value(steps["iter_2", "extend"], "--adapter") == "r/iter_1/extender"
    assert value(steps["iter_2", "train generator"], "--adapter") == "r/iter_1/generator"
    assert value(steps["iter_2", "train extender"], "--adapter") == "r/iter_1/extender"
    assert value(steps["final", "responses"], "--adapter") == "r/iter_2/generator"
    assert value(steps["eval/final", "evaluate"], "--adapter") == "r/final/generator"
    for part in ("iter_1", "iter_2", "final"):  # self-instruct and constrain are the base model's, always
        assert "--adapter" not in steps[part, "instructions"].command
    for name in ("constrain", "train generator"):
        assert "--adapter" not in steps["final", name].command
    assert value(steps["iter_2", "instructions"], "--dedup-against") == "r/iter_1/instructions.jsonl"


def test_the_collection_reaches_the_last_stage():
    """Defect 3 of the release: its collector writes what its next script cannot read."""
    steps = {(s.part, s.name): s for s in steps_of("--model", "m", "--iterations", "2", "--run", "r")}
    constrain = steps["final", "constrain"].command
    first = constrain.index("--input") + 1
    assert constrain[first : first + 3] == [
        "r/iter_1/extended.jsonl",
        "r/iter_2/extended.jsonl",
        "r/final/responses.jsonl",
    ]
    assert value(steps["final", "train generator"], "--input") == value(steps["final", "constrain"], "--output")


def test_restart_trains_from_the_base_on_the_union():
    steps = {(s.part, s.name): s for s in steps_of("--model", "m", "--adapter-mode", "restart", "--run", "r")}
    train = steps["iter_3", "train extender"].command
    assert "--adapter" not in train
    assert train[train.index("--input") + 1 :][:3] == [f"r/iter_{k}/extended.jsonl" for k in (1, 2, 3)]


def test_the_papers_constants_are_the_defaults():
    args = run.parse_args(["--model", "m"])
    assert (args.iterations, args.instructions, args.samples, args.extend_samples, args.rounds) == (3, 5000, 2, [2], 3)
    assert (args.max_attempts, args.extend_attempts, args.min_gain, args.long_words) == (20, 20, 1.2, 2000)
    assert (args.rank, args.alpha, args.learning_rate, args.epochs) == (8, 16, 1e-4, 4)
    assert (args.demand_min, args.demand_max, args.demand_steps) == (2000, 8000, "1000,2000")


def test_without_a_model_it_is_the_demo_and_flags_still_override():
    args = run.parse_args(["--instructions", "3"])
    assert args.model == "smollm2" and args.rounds == run.DEMO["rounds"] and args.instructions == 3
    assert run.parse_args(["--model", "smollm2"]).instructions == 5000


def test_controls_reach_their_stages():
    steps = steps_of("--stages", "3", "--no-length-bias", "--no-line-removal")
    has = {f: {s.name for s in steps if f in s.command} for f in ("--stages", "--no-length-bias", "--no-line-removal")}
    assert has["--stages"] == {"extend"} and {value(s, "--stages") for s in steps if s.name == "extend"} == {"3"}
    assert has["--no-length-bias"] == {"responses", "extend"}
    assert has["--no-line-removal"] == {"train extender"}


def test_controls_stand_beside_the_method_and_share_its_files():
    steps = steps_of("--model", "m", "--run", "r", "--iterations", "2", "--controls")
    method = [s for s in steps if not s.control]
    assert method == steps_of("--model", "m", "--run", "r", "--iterations", "2") and steps[: len(method)] == method
    assert {s.control for s in steps} == {"", *run.CONTROLS}
    by = {(s.part, s.name): s for s in steps if s.control}
    assert value(by["eval/control_told", "evaluate"], "--at-least") == "4000"
    assert value(by["eval/control_eos-ban", "evaluate"], "--min-new-tokens") == "5400"
    # drafts: the first iteration's own, then those of the control's own Generator on the second's instructions
    first, second = by["controls/drafts_1", "train generator"], by["controls/drafts_2", "train generator"]
    assert value(first, "--input") == "r/iter_1/responses.jsonl" and "--adapter" not in first.command
    assert value(by["controls/drafts_2", "responses"], "--input") == "r/iter_2/instructions.jsonl"
    assert value(by["controls/drafts_2", "responses"], "--adapter") == "r/controls/drafts_1/generator"
    assert value(second, "--input") == "r/controls/drafts_2/responses.jsonl"
    assert value(second, "--adapter") == "r/controls/drafts_1/generator"
    # one thing differs from the method's command of the same stage, and the output
    theirs, ours = ({(s.part, s.name): s for s in method}["iter_1", "extend"], by["controls/one-stage", "extend"])
    assert set(ours.command) - set(theirs.command) == {"1", "r/controls/one-stage/extended.jsonl"}
    assert (value(theirs, "--stages"), value(ours, "--stages")) == ("2", "1")
    assert "--no-length-bias" in by["controls/no-bias", "responses"].command
    assert "--no-length-bias" in by["controls/no-bias", "extend"].command
    removal = by["controls/no-removal", "train extender"]
    assert "--no-line-removal" in removal.command and value(removal, "--input") == "r/iter_1/extended.jsonl"
    assert value(by["controls/no-removal", "extend"], "--adapter") == "r/controls/no-removal/extender"
    assert value(by["controls/no-removal", "train generator"], "--adapter") == "r/iter_1/generator"
    other = by["controls/other-mode", "train generator"]
    assert "--adapter" not in other.command and other.command.count("r/iter_1/extended.jsonl") == 1
    # every control is trained on as many tokens as what it is compared with, and evaluated
    for (part, name), step in by.items():
        if name.startswith("train"):
            k = 2 if part in ("controls/drafts_2", "controls/no-removal", "controls/other-mode") else 1
            role = name.removeprefix("train ")
            want = f"r/iter_{1 if role == 'extender' else k}/{role}"
            assert value(step, "--budget-of") == want, part
    generators = {part for part, name in by if name == "train generator"}
    assert {f"eval/control_{part.removeprefix('controls/')}" for part in generators} <= {part for part, _ in by}


def test_each_iteration_has_its_own_settings_and_the_last_one_holds_on():
    own = ["--draft-tokens", "360", "560", "--extend-samples", "6", "3", "2"]
    steps = steps_of("--iterations", "3", *own, "--controls", "drafts", "no-removal", "one-stage")
    limits = {s.part: value(s, "--max-new-tokens") for s in steps if s.name == "responses"}
    assert [limits[f"iter_{k}"] for k in (1, 2, 3)] == ["360", "560", "560"]
    assert [limits[f"controls/drafts_{k}"] for k in (2, 3)] == ["560", "560"]
    jobs = {s.part: value(s, "--samples") for s in steps if s.name == "extend"}
    assert [jobs[f"iter_{k}"] for k in (1, 2, 3)] == ["6", "3", "2"]
    assert [jobs[f"controls/{name}"] for name in ("one-stage", "no-removal")] == ["6", "2"]


def test_controls_of_one_iteration_and_by_name(capsys):
    steps = steps_of("--controls")
    assert {s.control for s in steps} == {"", "told", "eos-ban", "drafts", "one-stage", "no-bias"}
    assert "eval/iter_1" in {s.part for s in steps}  # the demo evaluates the ends only: controls need the middle
    assert {s.control for s in steps_of("--controls", "told")} == {"", "told"}
    with pytest.raises(UserError, match="knows no rubbish"):
        run.parse_args(["--controls", "told", "rubbish"])
    run.main(["--controls", "told", "no-removal", "--dry-run"])
    assert "controls left out: no-removal" in capsys.readouterr().err


def test_a_control_without_pairs_is_a_result_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    calls = []

    def stage(step: run.Step) -> dict | None:
        calls.append((step.control, step.name))
        if (step.control, step.name) == ("one-stage", "extend"):
            return None
        scores = dict.fromkeys(("words_median", "words_p90", "eos_share", "loop_rate"), 1.0)
        return {
            "seconds": 1,
            **scores,
            "length_score": None,
            "rank_correlation": None,
            "intervals": {"words_median": [1, 2]},
        }

    monkeypatch.setattr(run, "run_step", stage)
    (tmp_path / "r").mkdir()
    run.main(["--run", str(tmp_path / "r"), "--controls", "one-stage", "no-bias"])
    names = [name for control, name in calls if control == "one-stage"]
    assert names == ["extend"] and ("no-bias", "evaluate") in calls
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["controls_without_pairs"] == ["one-stage"] and "control_no-bias" in summary["models"]


def test_dry_run_prints_a_script_that_runs_the_same_commands_when_pasted(tmp_path):
    argv = ["--run", "runs/a b", "--seeds", "it's.jsonl", "--dry-run"]
    process = subprocess.run([sys.executable, str(ROOT / "run.py"), *argv], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and not (ROOT / "runs" / "a b").exists()
    # Paste it into a shell in which `python` only says what it was given.
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$#" "$@"\n')
    os.chmod(tmp_path / "python", 0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(["sh", "-c", process.stdout], cwd=ROOT, capture_output=True, text=True, env=env).stdout
    want = [part for step in steps_of(*argv) for part in (str(len(step.command)), *step.command)]
    assert said.splitlines() == want


def test_demand_window_upside_down_is_an_error():
    with pytest.raises(UserError, match="--demand-min 9 is not below --demand-max 8"):
        run.parse_args(["--demand-min", "9", "--demand-max", "8"])


def test_a_failing_stage_ends_the_run_with_its_exit_code(tmp_path):
    process = subprocess.run(
        [sys.executable, "run.py", "--model", str(tmp_path / "no model"), "--run", str(tmp_path / "r")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert "error:" in process.stderr and "Traceback" not in process.stderr
    assert "iter_1 instructions ended with exit code 2" in process.stderr.replace("\n", " ")
    assert shlex.quote(str(tmp_path / "no model")) in process.stderr.replace("\n", "")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_killing_run_stops_its_stage_too(tmp_path, sent, writer):
    """Else the stage goes on alone and holds the lock that the next start needs."""
    command = [sys.executable, "run.py", "--model", str(writer), "--run", str(tmp_path / "r"), "--language", "en"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    output = tmp_path / "r" / "iter_1" / "instructions.jsonl"
    wait_until(lambda: output.exists())
    process.send_signal(sent)
    assert process.wait(60) == {signal.SIGTERM: 130, signal.SIGKILL: -9}[sent]

    def free() -> bool:
        try:
            Lock(output).release()
        except UserError:
            return False
        return True

    wait_until(free)


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
