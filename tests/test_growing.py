"""More is asked of a run that is there, or a part of it afresh; and machines that lack what a run would like to have.

python -m pytest tests/test_growing.py
"""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import in_process
import pytest
from scripted import ScriptedSampler, chat, prose
from test_end_to_end import SMALL, files_of

import run
from lengthen import cli, jobs, records, steps
from lengthen.jobs import Job, read_sidecar
from lengthen.models.cards import memory_limits, physical_memory
from lengthen.reading import numbered_lines
from lengthen.records import UserError
from lengthen.stage import length_bias_drops
from lengthen.steps import stale, standing_on
from lengthen.tasks import Redraw, run_tasks

ROOT = Path(__file__).parents[1]
MORE = ["--responses.max-attempts", "5", "--extend.samples", "2", "--extend.max-attempts", "5", "--evaluate.limit", "3"]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """run.py in tmp_path/r with its stages in this process, a script in place of the model and of what is learnt.

    Returns what was said. Half of the draws are cut; an adapter is the hash of what it was made of.
    """

    def write(request) -> tuple[str, str]:
        return prose(request.seed, 20 + request.seed % 100), "length" if request.seed % 2 else "eos"

    def learn(training, folder, processes) -> None:
        made_of = json.dumps([folder.settings, training.inputs.input])
        (folder.folder / "adapter_model.safetensors").write_text(made_of)
        folder.save_meta("done", summary={"target_tokens": len(made_of)}, base=training.model.model)

    sampler = ScriptedSampler(write)
    monkeypatch.setattr("lengthen.stage.open_model", lambda stage, job: (SimpleNamespace(chat=chat()), sampler))
    monkeypatch.setattr("train.train", learn)
    monkeypatch.setattr(cli, "save_figure", lambda path, draw: None)
    monkeypatch.setattr(steps, "run_command", in_process.run_command)
    monkeypatch.setattr(run, "write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr(run, "write_cards", lambda folder: None)

    def call(*argv: str) -> str:
        run.main(["--model", "m", "--run", str(tmp_path / "r"), *SMALL, "--evaluate.no-probes", *argv])
        return capsys.readouterr().err

    return call


def test_a_damaged_sidecar_is_repaired_by_the_redo_that_the_hint_names(loop, tmp_path):
    loop()
    sidecar = tmp_path / "r" / "iter_1" / "responses.meta.json"
    sidecar.write_text(sidecar.read_text()[:40])
    with pytest.raises(UserError, match="responses.meta.json is damaged") as caught:
        loop()
    assert caught.value.hint == "--redo iter_1/responses makes it afresh"
    loop("--redo", "iter_1/responses")
    assert read_sidecar(tmp_path / "r" / "iter_1" / "responses.jsonl")["status"] == "done"


def test_a_redo_that_was_stopped_goes_on_as_its_last_line_says(loop, tmp_path, monkeypatch, capsys):
    """With other settings, too. The same command would throw away what had been made afresh."""

    def full(training, folder, processes) -> None:
        raise UserError("no space left on device")

    loop()
    with monkeypatch.context() as patch:
        patch.setattr("train.train", full)
        with pytest.raises(SystemExit):
            loop("--train.rank", "16", "--redo", "train")
    said = " ".join(capsys.readouterr().err.split())
    left = "iter_1/train-extender,final/train-generator"
    assert said.endswith(f"run the same command again, but with --redo {left}")
    loop("--train.rank", "16", "--redo", left)
    for folder in ("iter_1/generator", "iter_1/extender", "final/generator"):
        assert read_sidecar(tmp_path / "r" / folder)["settings"]["rank"] == 16
    with monkeypatch.context() as patch:
        patch.setattr("train.train", full)
        with pytest.raises(SystemExit):
            loop("--train.rank", "16", "--redo", "iter_1/extend")
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("run the same command again, but without --redo")  # what stands on iter_1/extend is found


def test_what_a_larger_value_deletes_is_listed_before_anything_starts(loop, tmp_path):
    """Later iterations were written by what is trained again: their texts went without a word."""
    argv, folder = ["--iterations", "2"], tmp_path / "r"
    loop(*argv)
    assert "made afresh" not in loop(*argv)
    before, _, after = loop(*argv, "--extend.max-attempts", "9").partition("$ python")
    assert f"  {folder}/iter_2/responses.jsonl (iter_2/responses)" in before
    listed = re.findall(r"^  (\S+) \(\S+\)$", before, re.M)
    assert listed == re.findall(r"^\$ python .* --output (\S+) --overwrite$", after, re.M)
    assert "made afresh" not in loop(*argv, "--extend.max-attempts", "9")


def test_the_remedy_of_a_later_iteration_works_when_it_is_applied_literally(loop, monkeypatch, capsys):
    """It named that iteration's --redo: then the first one refused the flag."""
    loop("--iterations", "2")
    real = jobs.Job.finish

    def nothing(job, **stats):  # the second iteration's extensions all fail
        job.min_yield = 99 if "iter_2/extended" in str(job.output) else job.min_yield
        return real(job, **stats)

    with monkeypatch.context() as patch:
        patch.setattr(jobs.Job, "finish", nothing)
        with pytest.raises(SystemExit):
            loop("--iterations", "2", "--redo", "iter_2/extend")
    said = " ".join(capsys.readouterr().err.split())
    assert "(with --redo extend: afresh in every iteration, as the flag holds in all)" in said
    assert "--extend.max-attempts 6 (it goes on from what is there, in every iteration: what has learned" in said
    loop("--iterations", "2", "--extend.min-gain", "1.1", "--redo", "extend")


def test_more_iterations_say_at_once_what_was_made_with_fewer(loop, tmp_path, capsys):
    """It was said by the stage, after hours of the new iteration."""
    loop("--controls", "other-mode")  # one iteration: there is no such control
    capsys.readouterr()
    for count in ("2", "3"):
        argv = ["--iterations", count, "--controls", "other-mode"]
        with pytest.raises(UserError) as caught:
            loop(*argv)
        was, now = f"iter_{int(count) - 1}/generator", f"iter_{count}/generator"
        assert f"final/responses was made with {was}, this command says {now}" in caught.value.message
        assert ("controls/other-mode/train-generator was made with less" in caught.value.message) == (count == "3")
        assert "$ python" not in capsys.readouterr().err
        loop(*argv, *caught.value.hint.split()[:2])
        assert read_sidecar(tmp_path / "r/final/responses.jsonl")["info"]["adapter"].endswith(now)
    with pytest.raises(UserError, match=r"final/instructions .* iter_2/\S+, iter_3/\S+, this command says less"):
        loop("--iterations", "1")


def test_a_run_that_grows_ends_as_one_that_was_as_large_from_the_start(writer, tmp_path):
    """Killed while it grows, too. No near-duplicates here: one more instruction is the next one."""
    argv = [*SMALL, "--model", str(writer)]
    whole, grown = tmp_path / "whole" / "tiny", tmp_path / "grown" / "tiny"
    in_process.loop(["--run", str(whole), *argv, *MORE])
    in_process.loop(["--run", str(grown), *argv])
    small = files_of(grown)
    for writes in (5, 40):
        in_process.loop_until(["--run", str(grown), *argv, *MORE], writes)
    _, said = in_process.loop(["--run", str(grown), *argv, *MORE])
    ours, theirs = files_of(grown), files_of(whole)
    gone = "iter_1/extended.rejected.jsonl"  # has what was made of drafts that the new length bias drops, too
    assert set(theirs.pop(gone)) < set(ours.pop(gone)) and ours == theirs
    assert ours["iter_1/extended.jsonl"] != small["iter_1/extended.jsonl"]
    assert len(ours["eval/final/outputs.jsonl"]) == 3
    assert "iter_1/extended.jsonl is another one since this was made" in " ".join(said.split())
    assert read_sidecar(grown / "iter_1" / "extended.jsonl")["history"]["samples"] == [1, 2]
    _, said = in_process.loop(["--run", str(grown), *argv, *MORE])
    assert "another one" not in said and "device: " not in said  # nothing is left to do


def test_what_the_length_bias_had_dropped_is_on_disk_while_an_output_grows(tmp_path):
    """In one of the files at any time: a kill before the bias decides again must not lose it."""
    output = tmp_path / "x.jsonl"
    with Job("x", output, settings={"max_attempts": 1}, journal=True) as job:
        for id_ in "abc":
            job.accept({"id": id_})
        job.reject({"id": "r", "attempt": 0}, "gain")
        job.drop({"a": "length-bias"})
        job.finish()
    with Job("x", output, settings={"max_attempts": 2}, journal=True) as job:
        job.take_back([row for row in job.rejected if row["id"] == "r"])
        assert {row["id"] for row in records_in(output)} == {"a", "b", "c"}


def records_in(path):
    return [row for _, row in numbered_lines(path)]


def test_work_begun_on_another_text_is_not_continued(monkeypatch, tmp_path):
    """Killed before the first record; then the input is made afresh with the same ids."""
    asked = []

    class Half(Redraw):
        def request(self, draw, engine):
            return Asked((self.id, draw))

        def read(self, reply, engine):
            return {}, "gain"

    @dataclass
    class Asked:
        key: object

    @dataclass
    class Got:
        request: Asked
        error: str = ""
        num_tokens: int = 1

    class Engine:
        def __init__(self):
            self.queue = []

        def add(self, request):
            asked.append(request.key)
            self.queue.append(request)

        def run(self):
            yield Got(self.queue.pop(0))
            raise KeyboardInterrupt

        def progress(self):
            return ""

    source = tmp_path / "in.jsonl"
    for text in ("old", "new"):
        source.write_text(f'{{"id": "a", "prompt": "{text}"}}\n')
        with Job("x", tmp_path / "x.jsonl", inputs=[source], settings={"max_attempts": 3}, journal=True) as job:
            task = Half({"id": "a", "prompt": text, "attempt": -1}, 3)
            with pytest.raises(KeyboardInterrupt if text == "old" else UserError) as ended:
                run_tasks(job, [task], Engine, "things")
    assert "record a was begun with another text" in str(ended.value)
    assert len(asked) == 2  # both while the text was the old one


def test_redo_starts_a_stage_and_what_stands_on_it():
    steps = run.plan(run.parse_args(["--model", "m", "--iterations", "2", "--run", "r"]))
    labels = [s.label for s in standing_on(steps, run.chosen_by("iter_1/extend", steps))]
    assert labels[:3] == ["iter_1/extend", "iter_1/train-generator", "iter_1/train-extender"]
    assert "iter_2/responses" in labels and "iter_2/instructions" not in labels and "eval/base/evaluate" not in labels
    assert labels[-1] == "eval/final/evaluate"
    assert [s.label for s in run.chosen_by("answers", steps)] == ["final/responses"]
    with pytest.raises(UserError, match="no stage 'extnd'") as caught:
        run.chosen_by("extnd", steps)
    assert "iter_2/extend" in caught.value.hint


def test_hints_of_a_stage_name_the_flags_of_where_the_user_stands(monkeypatch):
    steps = {s.label: s for s in run.plan(run.parse_args(["--run", "r"]))}
    hint = "--max-attempts 40, another --model, --overwrite, or --count 3"
    assert cli.spelt(hint) == hint
    monkeypatch.setenv(cli.SPELLINGS, run.json.dumps(dict(steps["iter_1/extend"].spelt)))
    assert cli.spelt(hint).startswith("--extend.max-attempts 40, another --model, --redo iter_1/extend, or")
    for label, step in steps.items():
        known = {action.option_strings[0] for action in run.make_parser()._actions}
        named = {word for spelt in step.spelt.values() for word in spelt.split() if word.startswith("--")}
        assert named <= known, label


def test_every_hint_that_starts_a_step_afresh_names_that_step():
    """A control's, too: it named the method's stage that it was copied from, whose texts then went for nothing."""
    steps = run.plan(run.parse_args(["--run", "r", "--iterations", "2", "--controls"]))
    for step in steps:
        assert run.chosen_by(step.spelt["--overwrite"].removeprefix("--redo "), steps) == [step]


def test_a_step_is_stale_when_its_input_was_made_afresh_not_when_it_grew(tmp_path):
    source, part = tmp_path / "iter_1" / "responses.jsonl", tmp_path / "iter_1"

    def write(output: str, inputs: list[str], **more: object) -> None:
        with Job("x", output, inputs=inputs, settings={"samples": more.pop("samples", 1)}, min_yield=0, **more) as job:
            job.finish()

    step = run.Step("iter_1", "extend", ("extend.py",), {"input": [str(source)], "output": str(part / "e.jsonl")})
    write(str(source), [])
    write(step.output, [str(source)])
    assert stale(step) == ""
    write(str(source), [], samples=2)
    assert read_sidecar(source)["history"] == {"samples": [1, 2]} and stale(step) == ""
    write(str(source), [], overwrite=True)
    assert stale(step) == str(source)
    # So is one that must not repeat it: --redo takes it along, and a start after an interruption must, too.
    later = {"dedup_against": [str(source)], "output": step.output}
    later = run.Step("iter_2", "instructions", ("generate.py", "instructions"), later)
    assert stale(later) == str(source)


# ---------------------------------------------------------------------------------------------------------
# The length bias


def test_the_length_bias_never_takes_all_nor_leaves_fewer_than_the_yield():
    rows = [{"id": f"{i}", "language": "zh" if i == 9 else "en", "response_words": 10 * i} for i in range(10)]
    for seed in range(200):
        alone = length_bias_drops(rows[8:9], seed)  # its rank is 0.5: a quarter of the seeds dropped it
        assert alone == {}
        left = [r["id"] for r in rows if r["id"] not in length_bias_drops(rows, seed, 8)]
        assert len(left) >= 8 and "9" in left  # 9: the only Chinese one
        assert length_bias_drops(rows, seed, 11) == {}
    assert length_bias_drops([], 0) == {}


# ---------------------------------------------------------------------------------------------------------
# Where it runs


def test_a_figure_never_fails_a_run(tmp_path, monkeypatch, capsys):
    def broken() -> bytes:
        raise ValueError("no font\nat all")

    cli.save_figure(tmp_path / "a.png", broken)
    assert "no a.png: ValueError: no font at all" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "TkAgg"])
def test_a_notebooks_backend_does_not_matter(tmp_path, backend):
    code = f"""
from pathlib import Path
from lengthen import cli
from lengthen.training import steplog
entry = {{"step": 1, "loss": 1.0, "skipped": False, "epoch": 0}}
cli.save_figure(Path({str(tmp_path / "loss.png")!r}), lambda: steplog.plot_loss([entry], "t"))
"""
    # A folder of settings that cannot be made, as of a read-only home.
    env = {**os.environ, "MPLBACKEND": backend, "MPLCONFIGDIR": "/dev/null/no"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_locks_and_without_fsync_it_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(records, "_said", set())
    monkeypatch.setattr(fcntl, "flock", missing)
    monkeypatch.setattr(records.os, "fsync", missing)
    for name in ("a", "b"):
        with Job("x", tmp_path / f"{name}.jsonl", settings={}) as job:
            job.accept({"id": name, "response_words": 1})
            job.finish()
    said = capsys.readouterr().err
    assert said.count("has no locks") == 1 and said.count("cannot sync") == 1
    assert read_sidecar(tmp_path / "b.jsonl")["status"] == "done"
    monkeypatch.undo()
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(UserError, match="Input/output error"):
        jobs.Lock(tmp_path / "c.jsonl")


def test_without_fcntl_one_line_names_wsl():
    code = "import sys; sys.modules['fcntl'] = None; import lengthen"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and "wsl --install" in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/a/b\n", {"a/memory.max": "3000", "a/b/memory.max": "max"}, 3000),  # v2: the group above limits it
        ("0::/\n", {"memory.max": "5000"}, 5000),
        ("0::/docker/x\n", {"memory.max": "7000"}, 7000),  # its own group is mounted as the root
        ("5:cpu:/c\n4:memory:/m\n", {"memory/m/memory.limit_in_bytes": "2000"}, 2000),  # v1
        ("4:memory:/docker/x\n", {"memory/memory.limit_in_bytes": "4000"}, 4000),
        ("5:cpu:/c\n", {"c/memory.max": "1"}, 2**63),
        ("0::/\n", {"memory.max": "max"}, 2**63),
    ],
)
def test_a_containers_memory_limit_counts(tmp_path, groups, files, limit):
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{k}": v + "\n" for k, v in files.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert min(memory_limits(tmp_path)) == limit


def test_physical_memory_is_no_more_than_the_computers():
    assert 0 < physical_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_with_a_home_that_cannot_be_written_caches_go_elsewhere(tmp_path, monkeypatch, capsys):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is what it was afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(records, "_said", set())
    monkeypatch.setenv("HOME", str(tmp_path))
    cli.cache_elsewhere()
    assert "XDG_CACHE_HOME" not in os.environ
    monkeypatch.setenv("HOME", "/dev/null/nobody")
    cli.cache_elsewhere()
    assert "self-lengthen-" in os.environ["XDG_CACHE_HOME"] and "HF_HOME" not in os.environ
    assert "cannot be written" in capsys.readouterr().err


def test_a_home_that_may_not_be_looked_into_is_none(monkeypatch, capsys):
    """Another user's: pathlib raises PermissionError there, up to Python 3.13."""
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(records, "_said", set())
    monkeypatch.setenv("HOME", "/closed/home")
    real = os.stat

    def stat(path, **options):
        if str(path).startswith("/closed"):
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/")
    cli.cache_elsewhere()
    assert "self-lengthen-" in os.environ["XDG_CACHE_HOME"]


def test_devices_that_are_not_served_are_refused_by_name():
    with pytest.raises(UserError, match="'mps' is not served"):
        run.parse_args(["--device", "mps"])
    assert run.parse_args(["--device", "cuda:1"]).shared["device"] == "cuda:1"
