"""bench/on_gpu.py: no step stops the next, results are on disk at once, and every command it would give parses.

python -m pytest tests/test_on_gpu.py
"""

import json
import sys
import time

import pytest
from test_bench_training import load
from tiny import save_writer

PRINTS = "import json, sys; print(json.dumps({'tables': [], 'n': int(sys.argv[1])})); print('{cut'); print(1)"
CRASHES = "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
# Deaf to SIGTERM, and so is a child that holds its files open.
HANGS = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)\n"
HANGS += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"


@pytest.fixture
def bench():
    return load("on_gpu")


def read(out) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_neither_a_crash_nor_a_hang_stops_what_follows(bench, tmp_path):
    code = {"one": PRINTS, "crash": CRASHES, "hang": HANGS, "wrong": "raise SystemExit('no such card')", "two": PRINTS}
    steps = [bench.Step(name, [sys.executable, "-c", text, "7"], 60) for name, text in code.items()]
    steps[2].limit = 3.0
    began = time.monotonic()
    outcomes = bench.run_all(steps, tmp_path, 9, None)
    assert time.monotonic() - began < 300  # a hang's 600 s were not waited for
    assert [vars(one) for one in outcomes] == read(tmp_path)
    assert [one.ended for one in outcomes] == ["done", "exit code -9", "out of time, 3 s", "exit code 1", "done"]
    assert [one.figures.get("n") for one in outcomes] == [7, None, None, None, 7]  # the last whole JSON object
    assert outcomes[1].tail[-1] == "before" and outcomes[3].tail[-1] == "no such card" and not outcomes[0].tail
    report = (tmp_path / "report.md").read_text()
    assert "| hang | out of time, 3 s |" in report and "no such card" in report


def test_each_steps_result_is_on_disk_before_the_next_begins(bench, tmp_path):
    look = "import pathlib, sys; print('lines:', pathlib.Path(sys.argv[1]).read_text().count(chr(10)))"
    steps = [bench.Step("first", [sys.executable, "-c", "print(1)"], 60)]
    steps.append(bench.Step("second", [sys.executable, "-c", look, str(tmp_path / "results.jsonl")], 60))
    bench.run_all(steps, tmp_path, 9, None)
    assert "\nlines: 1\n" in (tmp_path / "log.txt").read_text() and len(read(tmp_path)) == 2


def test_what_does_not_fit_into_the_minutes_is_said_to_be_missing(bench, tmp_path):
    steps = [bench.Step("short", [sys.executable, "-c", ""], 1.0), bench.Step("long", [sys.executable, "-c", ""], 60)]
    steps.append(bench.Step("leaves room", [sys.executable, "-c", ""], 1.0, spare=60))
    outcomes = bench.run_all(steps, tmp_path, 12 / 60, None)
    assert [one.ended for one in outcomes] == ["done", "not started", "not started"]
    assert "s were left" in outcomes[1].tail[0]


def test_wheels_that_are_not_there_or_do_not_install_are_one_error(bench, tmp_path):
    with pytest.raises(SystemExit, match="no wheel in"):
        bench.environment_with(str(tmp_path), tmp_path)
    (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(SystemExit, match="were not installed"):
        bench.environment_with(str(tmp_path), tmp_path)


def test_wheels_are_what_the_steps_import(bench, tmp_path, monkeypatch):
    """A wheel made here by hand, as a package without an index."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "WHERE = 'the wheel'")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(sys, "path", list(sys.path))
    environment = bench.environment_with(str(tmp_path), tmp_path)
    code = "import carried, json; print(json.dumps({'from': carried.WHERE}))"
    [one] = bench.run_all([bench.Step("x", [sys.executable, "-c", code], 60)], tmp_path, 9, environment)
    assert one.figures == {"from": "the wheel"}, one.tail
    args = bench.parse_args(["--wheels", str(tmp_path)])
    assert bench.model_of(args) == str(tmp_path / "model.gguf")


@pytest.mark.parametrize("tiny", [[], ["--tiny"]])
def test_every_command_parses_and_names_files_that_exist(bench, tiny):
    args = bench.parse_args(["--out", "x", *tiny])
    steps = bench.steps_of(args, "smollm2")
    assert [step.name for step in steps][:3] == ["machine", "needs_cuda", "decode-64"]  # most valuable first
    assert steps[-1].name == "growth-so-far"
    for step in steps:
        python, first, *words = step.command
        assert python == sys.executable
        if first == "-m":
            files = [word for word in words if word.endswith(".py")]
            assert words[0] == "pytest" and files and all((bench.ROOT / "tests" / file).exists() for file in files)
        else:
            load(first.rpartition("/")[2].removesuffix(".py")).parse_args(words)
    only = bench.parse_args(["--out", "x", "--only", "decode", "loss"])
    assert [step.name for step in bench.steps_of(only, "")] == [
        *("decode-64", "decode-small", "decode-1", "decode-256", "loss")
    ]


def test_every_kernel_is_tested_compiled(bench):
    kernels = {path.name.removesuffix("_triton.py") for path in (bench.ROOT / "kernels").glob("*_triton.py")}
    assert len(kernels) >= 4 and kernels | {"gpu_layer"} <= {*bench.KERNEL_TESTS}


def test_figures_that_are_kept_say_what_commit_they_are_of(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.harness, "RESULTS", bench.ROOT / "bench" / "results")
    written = {}
    monkeypatch.setattr(bench.Path, "write_text", lambda path, text, *_: written.update({path.name: json.loads(text)}))
    result = {"tables": [{"name": "t"}], "machine": {"commit": ""}}
    rows = [{"step": "loss", "ended": "done", "figures": result}, {"step": "x", "ended": "out of time", "figures": {}}]
    file = tmp_path / "results.jsonl"
    with open(file, "w") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    bench.keep(str(file))
    assert list(written) == ["on_gpu_loss.json"]
    assert written["on_gpu_loss.json"]["machine"]["commit"] == bench.harness.machine()["commit"] != ""


@pytest.mark.soak
def test_the_whole_proof_as_a_dry_run(bench, tmp_path, capsys):
    """Every step on its toy shape, by subprocess, on whatever this is; the growth study until its limit."""
    writer = save_writer(tmp_path / "writer")
    flags = ["--tiny", "--out", str(tmp_path / "out"), "--run", str(tmp_path / "run"), "--model", str(writer)]
    with pytest.raises(SystemExit):
        bench.main([*flags, "--minutes", "600"])
    outcomes = {one["step"]: one for one in read(tmp_path / "out")}
    for name, one in outcomes.items():
        assert one["ended"] == "done" or name.startswith("growth"), (name, one["ended"], one["tail"])
    tables = {name: one["figures"]["tables"] for name, one in outcomes.items() if "tables" in one["figures"]}
    assert {*tables} >= {"machine", "decode-64", "training", "loss", "attention", "lookup", "peers-sampling"}
    for name in ("decode-64", "training", "lookup", "peers-sampling"):
        assert "failed" not in json.dumps(tables[name]), tables[name]
    [line] = tables["training"][0]["rows"]
    assert line[0] == "ours" and float(line[3]) > 0 and line[7] == "True", line  # tokens/s; the lean layers serve it
    rows = {tuple(row[:2]): row for row in tables["lookup"][0]["rows"]}
    assert "100.0% of the tokens as scripted" in rows["d", "ours"][-1]
    lookup, none = (float(rows["d", name][-1].split()[0]) for name in ("ours", "ours, no lookup"))
    assert lookup > 1.1 > 1.0 >= none  # tokens per row and step
