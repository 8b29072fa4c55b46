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

import cold
import pytest

import run
from lengthen import steps
from lengthen.jobs import Lock
from lengthen.records import UserError
from lengthen.steps import Step, command_of

ROOT = Path(__file__).parents[1]


def steps_of(*argv: str) -> list[Step]:
    return run.plan(run.parse_args(list(argv)))


def value(step: Step, flag: str) -> str:
    command = command_of(step)
    return command[command.index(flag) + 1]


def effective(command: list[str]) -> dict:
    """Every flag of a stage command, those it does not give with the stage's defaults."""
    stage = importlib.import_module(command[0].removesuffix(".py"))
    argv = stage.with_command(command[1:]) if command[0] == "evaluate.py" else command[1:]
    return {"script": command[0], **vars(stage.make_parser().parse_args(argv))}


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--model", "m", "--iterations", "3"],
        ["--model", "m", "--adapter-mode", "restart", "--extend.stages", "1", "--train.no-line-removal"],
        ["--responses.no-length-bias", "--extend.no-length-bias", "--instructions.dedup-against", "a", "b"],
        ["--controls", "--iterations", "2", "--evaluate.samples", "3"],
        ["--controls", "drafts", "other-mode", "--iterations", "3", "--adapter-mode", "restart"],
        ["--evaluate.limit", "3", "--language", "both", "--trust-remote-code", "--quantize", "nf4"],
        ["--instructions.judge-margin=-inf"],
        ["--max-rows", "3", "--kv-cache", "fp8", "--device", "cpu", "--dtype", "float32", "--seed", "7"],
    ],
)
def test_every_stage_understands_its_command(argv):
    for step in steps_of(*argv):
        effective(command_of(step))


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
        assert "--adapter" not in command_of(steps[part, name])  # the first ones are the base model
    assert value(steps["iter_2", "responses"], "--adapter") == "r/iter_1/generator"
    assert value(steps["iter_2", "extend"], "--adapter") == "r/iter_1/extender"
    assert value(steps["iter_2", "train generator"], "--adapter") == "r/iter_1/generator"
    assert value(steps["iter_2", "train extender"], "--adapter") == "r/iter_1/extender"
    assert value(steps["final", "responses"], "--adapter") == "r/iter_2/generator"
    assert value(steps["eval/final", "evaluate"], "--adapter") == "r/final/generator"
    for part in ("iter_1", "iter_2", "final"):  # self-instruct and constrain are the base model's, always
        assert "--adapter" not in command_of(steps[part, "instructions"])
    for name in ("constrain", "train generator"):
        assert "--adapter" not in command_of(steps["final", name])
    assert value(steps["iter_2", "instructions"], "--dedup-against") == "r/iter_1/instructions.jsonl"


def test_the_collection_reaches_the_last_stage():
    """Defect 3 of the release: its collector writes what its next script cannot read."""
    steps = {(s.part, s.name): s for s in steps_of("--model", "m", "--iterations", "2", "--run", "r")}
    collected = ["r/iter_1/extended.jsonl", "r/iter_2/extended.jsonl", "r/final/responses.jsonl"]
    assert steps["final", "constrain"].settings["input"] == collected
    assert value(steps["final", "train generator"], "--input") == value(steps["final", "constrain"], "--output")


def test_restart_trains_from_the_base_on_the_union():
    steps = {(s.part, s.name): s for s in steps_of("--model", "m", "--adapter-mode", "restart", "--run", "r")}
    train = steps["iter_3", "train extender"]
    assert "--adapter" not in command_of(train)
    assert train.settings["input"] == [f"r/iter_{k}/extended.jsonl" for k in (1, 2, 3)]


def test_the_papers_constants_are_the_defaults():
    steps = {s.name: effective(command_of(s)) for s in steps_of("--model", "m")}  # of each kind the last one
    assert {s.part for s in steps_of("--model", "m")} >= {"iter_1", "iter_3"} and steps["instructions"]["count"] == 5000
    drafts = effective(command_of(next(s for s in steps_of("--model", "m") if s.name == "responses")))
    want = {
        "instructions": {"long_words": 2000},
        "extend": {"samples": 2, "max_attempts": 20, "rounds": 3, "stages": 2, "min_gain": 1.2},
        "train extender": {"rank": 8, "alpha": 16, "learning_rate": 1e-4, "epochs": 4},
        "constrain": {"demand_min": 2000, "demand_max": 8000, "demand_steps": (1000, 2000), "max_attempts": 5},
        "evaluate": {"benchmark": "mini", "samples": 1, "limit": 0},
    }
    assert (drafts["samples"], drafts["max_attempts"], drafts["no_length_bias"]) == (2, 20, False)
    for name, values in want.items():
        assert {key: steps[name][key] for key in values} == values


@pytest.mark.parametrize("script", ["demo", "paper"])
def test_the_settings_are_those_of_the_commands_before_the_plan_was_data(script):
    """tests/commands/*.sh: what --dry-run printed at commit 82225ee, which spelt out defaults and left out nothing."""
    before = (ROOT / "tests" / "commands" / f"{script}.sh").read_text()
    argv = {"demo": [], "paper": ["--model", "M", "--iterations", "3"]}[script]
    old = [shlex.split(line)[1:] for line in before.splitlines() if line.startswith("python ")]
    assert list(map(effective, map(command_of, steps_of(*argv)))) == list(map(effective, old))


@pytest.mark.parametrize(
    ("script", "argv"), [("demo", []), ("small", ["--scale", "small"]), ("paper", ["--scale", "paper"])]
)
def test_the_recipes_are_what_a_dry_run_prints(script, argv, capsys, monkeypatch):
    """python run.py --dry-run > recipes/demo.sh"""
    monkeypatch.chdir(ROOT)
    run.main([*argv, "--dry-run"])
    recipe = ROOT / "recipes" / f"{script}.sh"
    assert capsys.readouterr().out == recipe.read_text() and os.access(recipe, os.X_OK)
    assert len(recipe.read_text().splitlines()) <= 55  # one screen


def test_without_a_model_it_is_the_demo_and_flags_still_override():
    own = run.parse_args(["--instructions", "3", "--extend.samples", "9"])
    assert own.shared["model"] == "smollm2" and own.loop.instructions == 3
    assert own.stages["extend"] == {**run.DEMO["extend"], "samples": 9}
    assert run.parse_args(["--model", "smollm2"]).loop.instructions == 5000
    assert not any(run.parse_args(["--model", "smollm2"]).stages.values())


def test_a_scale_is_a_preset_that_flags_still_override(capsys):
    """Without --scale: the demo, or the paper's constants where a model is given."""
    assert run.parse_args(["--scale", "demo"]).stages == run.parse_args([]).stages
    paper, given = (steps_of(*argv) for argv in (["--scale", "paper"], ["--model", run.MODEL]))
    assert paper == given and paper == steps_of("--scale", "paper", "--model", run.MODEL)
    own = run.parse_args(["--scale", "small", "--model", "other", "--iterations", "3", "--extend.rounds", "1"])
    assert (own.shared["model"], own.loop.iterations, own.loop.run) == ("other", 3, "runs/small")
    assert own.stages["extend"] == {**run.SMALL["extend"], "rounds": 1}
    demo = run.parse_args(["--scale", "demo", "--model", "other"])
    assert demo.shared["model"] == "other" and demo.stages["extend"] == run.DEMO["extend"]
    with pytest.raises(UserError, match="invalid choice: 'huge'"):
        run.parse_args(["--scale", "huge"])


def test_what_a_preset_switches_on_can_be_switched_off():
    assert all("--no-probes" in command_of(s) for s in steps_of() if s.name == "evaluate")
    assert not any("--no-probes" in command_of(s) for s in steps_of("--evaluate.probes"))
    assert run.parse_args(["--extend.one-pair", "--extend.no-one-pair"]).stages["extend"]["one_pair"] is False
    assert not any("--one-pair" in command_of(s) for s in steps_of("--extend.no-one-pair"))


def test_a_stages_flag_reaches_that_stage_alone():
    steps = steps_of("--extend.stages", "3", "--train.no-line-removal", "--responses.temperature", "0.5")
    has = {flag: {s.name for s in steps if flag in command_of(s)} for flag in ("--stages", "--no-line-removal")}
    assert has["--stages"] == {"extend"} and {value(s, "--stages") for s in steps if s.name == "extend"} == {"3"}
    assert has["--no-line-removal"] == {"train generator", "train extender"}  # the Generator has no lines to remove
    assert {s.part for s in steps if "--temperature" in command_of(s)} == {"iter_1"}  # `answers` is another stage
    steps = steps_of("--answers.temperature", "0.5", "--model", "m", "--iterations", "1")
    assert {(s.part, s.name) for s in steps if "--temperature" in command_of(s)} == {("final", "responses")}
    for held_out in (["a.jsonl"], ["a.jsonl", "b.jsonl"]):
        steps = steps_of("--instructions.dedup-against", *held_out, "--iterations", "2", "--run", "r")
        known = [s.settings["dedup_against"] for s in steps if s.name == "instructions"]
        assert known[0] == held_out and known[1] == [*held_out, "r/iter_1/instructions.jsonl"] and len(known) == 3


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (["--samples", "3"], "unrecognized arguments: --samples 3", "--responses.samples or --extend.samples"),
        (["--rounds=2"], "unrecognized arguments: --rounds=2", "--extend.rounds"),
        (["--draft-tokens", "360", "560"], "--draft-tokens 360 560", "--responses.max-new-tokens"),
        (["--extend-samples", "6"], "--extend-samples 6", "--extend.samples"),
        (["--rank", "16"], "--rank 16", "--train.rank"),
        (["--limit", "16"], "--limit 16", "--evaluate.limit"),
        (["--answers", "3"], "--answers 3", "--evaluate.samples"),
        (["--extend.roundz", "3"], "unrecognized arguments: --extend.roundz 3", "python run.py --help"),
        (["--extend.rounds", "0"], "argument --extend.rounds: must be at least 1, got 0", "python run.py --help"),
        (["--answers.samples", "2"], "unrecognized arguments: --answers.samples 2", "python run.py --help"),
    ],
)
def test_an_unknown_flag_or_value_is_refused_before_anything_starts(argv, message, hint):
    with pytest.raises(UserError) as error:
        run.parse_args(argv)
    assert message in error.value.message and error.value.hint.startswith(hint)


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
    assert value(first, "--input") == "r/iter_1/responses.jsonl" and "--adapter" not in command_of(first)
    assert value(by["controls/drafts_2", "responses"], "--input") == "r/iter_2/instructions.jsonl"
    assert value(by["controls/drafts_2", "responses"], "--adapter") == "r/controls/drafts_1/generator"
    assert value(second, "--input") == "r/controls/drafts_2/responses.jsonl"
    assert value(second, "--adapter") == "r/controls/drafts_1/generator"
    # one thing differs from the method's command of the same stage, and the output
    theirs, ours = ({(s.part, s.name): s for s in method}["iter_1", "extend"], by["controls/one-stage", "extend"])
    changed = {key for key, setting in ours.settings.items() if setting != theirs.settings.get(key)}
    assert changed == {"stages", "output"} and value(ours, "--stages") == "1"
    assert "--no-length-bias" in command_of(by["controls/no-bias", "responses"])
    assert "--no-length-bias" in command_of(by["controls/no-bias", "extend"])
    removal = by["controls/no-removal", "train extender"]
    assert "--no-line-removal" in command_of(removal) and value(removal, "--input") == "r/iter_1/extended.jsonl"
    assert value(by["controls/no-removal", "extend"], "--adapter") == "r/controls/no-removal/extender"
    assert value(by["controls/no-removal", "train generator"], "--adapter") == "r/iter_1/generator"
    other = by["controls/other-mode", "train generator"]
    assert "--adapter" not in command_of(other)
    assert other.settings["input"] == ["r/iter_1/extended.jsonl", "r/iter_2/extended.jsonl"]
    # every control is trained on as many tokens as what it is compared with, and evaluated
    for (part, name), step in by.items():
        if name.startswith("train"):
            k = 2 if part in ("controls/drafts_2", "controls/no-removal", "controls/other-mode") else 1
            role = name.removeprefix("train ")
            want = f"r/iter_{1 if role == 'extender' else k}/{role}"
            assert value(step, "--budget-of") == want, part
    generators = {part for part, name in by if name == "train generator"}
    assert {f"eval/control_{part.removeprefix('controls/')}" for part in generators} <= {part for part, _ in by}


def test_controls_follow_the_settings_of_their_iteration():
    """A study sets what an iteration has of its own in the steps; the controls are copies of them."""
    own = run.parse_args(["--iterations", "3", "--controls", "drafts", "no-removal", "one-stage"])
    method = run.method(own)
    for k, step in ((k, s) for k in (2, 3) for s in method if s.part == f"iter_{k}"):
        step.settings.update({"responses": {"max_new_tokens": 500 + k}, "extend": {"samples": k}}.get(step.name, {}))
    steps = {(s.part, s.name): s for s in [*method, *run.controls(own, method)]}
    limits = [value(steps[f"controls/drafts_{k}", "responses"], "--max-new-tokens") for k in (2, 3)]
    assert limits == ["502", "503"]
    jobs = [value(steps[f"controls/{name}", "extend"], "--samples") for name in ("one-stage", "no-removal")]
    assert jobs == ["6", "3"]


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

    def stage(step: Step, log: object) -> dict | None:
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

    monkeypatch.setattr(steps, "run_step", stage)
    # Started in another folder: a relative path means the same to us as to the stages.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    run.main(["--run", "r", "--controls", "one-stage", "no-bias"])
    names = [name for control, name in calls if control == "one-stage"]
    assert names == ["extend"] and ("no-bias", "evaluate") in calls
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["controls_without_pairs"] == ["one-stage"] and "control_no-bias" in summary["models"]


def test_dry_run_prints_a_script_that_runs_the_same_commands_when_pasted(tmp_path):
    argv = ["--run", "runs/a b", "--instructions.seeds", "it's.jsonl", "--dry-run"]
    process = cold.run("run.py", *argv)
    assert process.returncode == 0 and not (ROOT / "runs" / "a b").exists()
    # Paste it into a shell in which `python` only says what it was given.
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$#" "$@"\n')
    os.chmod(tmp_path / "python", 0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(["sh", "-c", process.stdout], cwd=ROOT, capture_output=True, text=True, env=env).stdout
    commands = [command_of(step) for step in steps_of(*argv)]
    want = [word for command in commands for word in (str(len(command)), *command)]
    assert said.splitlines() == want


def test_demand_window_upside_down_is_an_error():
    with pytest.raises(UserError, match="--demand-min 9 is not below --demand-max 8"):
        run.parse_args(["--constrain.demand-min", "9", "--constrain.demand-max", "8"])


def test_a_failing_stage_ends_the_run_with_its_exit_code(tmp_path):
    process = cold.run("run.py", "--model", tmp_path / "no model", "--run", tmp_path / "r")
    assert process.returncode == 2
    assert "error:" in process.stderr and "Traceback" not in process.stderr
    assert "iter_1 instructions ended with exit code 2" in process.stderr.replace("\n", " ")
    assert shlex.quote(str(tmp_path / "no model")) in process.stderr.replace("\n", "")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killing_run_stops_its_stage_too(tmp_path, sent, writer):
    """Else the stage goes on alone and holds the lock that the next start needs."""
    command = [sys.executable, "run.py", "--model", str(writer), "--run", str(tmp_path / "r"), "--language", "en"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    output = tmp_path / "r" / "iter_1" / "instructions.jsonl"
    wait_until(lambda: output.exists())
    send = os.killpg if sent == signal.SIGINT else os.kill  # Ctrl-C reaches all that the terminal runs
    send(process.pid, sent)
    assert process.wait(cold.HANG) == {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGKILL: -9}[sent]
    log = (tmp_path / "r" / "run.log").read_text()
    assert "iter_1 instructions\n$ python generate.py instructions" in log
    assert sent == signal.SIGKILL or "iter_1 instructions: exit code 130 after" in log

    def free() -> bool:
        try:
            Lock(output).release()
        except UserError:
            return False
        return True

    wait_until(free)


def wait_until(condition) -> None:
    end = time.monotonic() + cold.HANG
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
