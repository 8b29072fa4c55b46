"""The whole loop with a tiny model, killed and resumed; its stages in one process, once more as processes.

python -m pytest tests/test_end_to_end.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import cold
import in_process
import pytest

from lengthen.jobs import read_sidecar
from lengthen.reading import read_jsonl

ROOT = Path(__file__).parents[1]
SMALL = """--instructions 6 --final-instructions 3 --iterations 1 --instructions.long-words 50 --extend.samples 1
--responses.samples 1 --responses.max-attempts 3 --extend.max-attempts 3 --extend.rounds 1 --answers.max-attempts 5
--extend.no-length-bias --constrain.demand-min 20 --constrain.demand-max 2000
--constrain.demand-steps 10,20 --constrain.max-attempts 1 --train.epochs 1 --language en --evaluate ends
--evaluate.limit 2 --evaluate.max-new-tokens 40 --responses.max-new-tokens 200 --extend.max-new-tokens 200
--answers.max-new-tokens 200""".split()


class Finished(NamedTuple):
    run: Path
    argv: list[str]
    stdout: str
    stderr: str
    writes: int  # writes and renames it took


@pytest.fixture(scope="module")
def finished(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One whole run of the loop on the tiny writer."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    argv, writes = [*SMALL, "--model", str(writer)], []
    with in_process.each_write(lambda: writes.append(1)):
        stdout, stderr = in_process.loop(["--run", str(run), *argv])
    return Finished(run, argv, stdout, stderr, len(writes))


def files_of(run: Path) -> dict[str, list[str]]:
    """Every record of every JSONL file of the run, in its order; of the logs of training the losses."""
    found = {}
    for path in sorted(run.rglob("*.jsonl")):
        if path.stat().st_size:
            rows = read_jsonl(path, needs=())
            if path.name == "train_log.jsonl":
                rows = [{"step": r["step"], "loss": round(r["loss"], 3)} for r in rows]
            found[str(path.relative_to(run))] = [json.dumps(r, sort_keys=True) for r in rows]
    return found


def test_the_loop_runs_end_to_end(finished):
    run = finished.run
    for name in ("instructions", "responses", "extended"):
        assert read_sidecar(run / "iter_1" / f"{name}.jsonl")["status"] == "done"
    for record in read_jsonl(run / "iter_1" / "extended.jsonl"):
        assert record["finish"] == "eos" and record["response_words"] > 1.2 * record["initial_words"]
    for role in ("iter_1/generator", "iter_1/extender", "final/generator"):
        assert (run / role / "adapter_model.safetensors").exists() and (run / role / "loss.png").exists()
        assert not (run / role / "checkpoint").exists()
    constrained = read_jsonl(run / "final" / "constrained.jsonl", needs=("query", "response"))
    assert {r["origin"] for r in constrained} <= {"extended", "response"}
    for name in ("base", "final"):
        assert len(read_jsonl(run / "eval" / name / "outputs.jsonl", needs=("query",))) == 2
        assert (run / "eval" / name / "scores.json").exists()


def test_stdout_ends_in_one_json_line_and_the_summary_has_the_table(finished):
    last = json.loads(finished.stdout.strip().splitlines()[-1])
    summary = json.loads((finished.run / "summary.json").read_text())
    assert set(last["models"]) == set(summary["models"]) == {"base", "final"}
    for scores in summary["models"].values():
        for key in ("words_median", "words_p90", "eos_share", "loop_rate", "length_score", "rank_correlation"):
            assert key in scores
    extend = summary["extenders"]["iter_1"]
    assert 0 < extend["acceptance"] <= 1 and extend["gain_median"] > 1.2
    for stage in summary["stages"]:
        assert stage["seconds"] >= 0 and stage["stage"] and stage["part"]
    assert summary["settings"]["instructions"] == 6 and summary["settings"]["extend.rounds"] == 1
    assert "What the models write" in finished.stderr and "What it took" in finished.stderr


def test_running_again_is_a_quick_no_op(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.run.rglob("*") if p.is_file() and p.name != "summary.json"}
    _, stderr = in_process.loop(["--run", str(finished.run), *finished.argv])
    changed = [p for p, t in before.items() if p.exists() and p.stat().st_mtime_ns != t]
    assert not [p for p in changed if p.suffix == ".jsonl" or p.name.startswith("adapter")]
    assert "device: " in finished.stderr and "device: " not in stderr  # what every stage says of the model it loads


def test_killed_anywhere_and_started_again_it_ends_with_the_same_records(finished):
    """SIGKILL before three random writes; the seed is printed on failure."""
    run = finished.run.parent.parent / "killed" / finished.run.name  # the same NAME, so the same ids
    argv = ["--run", str(run), *finished.argv]
    seed = random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    for _ in range(3):
        assert in_process.loop_until(argv, rng.randrange(2, finished.writes // 3)) == -signal.SIGKILL, seed
    in_process.loop(argv)
    assert files_of(run) == files_of(finished.run), seed


@pytest.mark.soak
def test_run_py_and_its_stage_killed_together_end_with_the_same_records(finished):
    """SIGKILL to both processes when a stage has begun its file: once in the iteration, once in the last stage."""
    run = finished.run.parent.parent / "processes" / finished.run.name
    command = [sys.executable, "run.py", "--run", str(run), *finished.argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for file in ("iter_1/extended.jsonl", "final/responses.jsonl"):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not (run / file).exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(cold.HANG) == -signal.SIGKILL
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=cold.HANG)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files_of(run) == files_of(finished.run)
