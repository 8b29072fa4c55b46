"""The real commands, by subprocess: the whole loop with a tiny model, killed and resumed.

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

import pytest

from lengthen.jobs import read_sidecar
from lengthen.records import read_jsonl

ROOT = Path(__file__).parents[1]
SMALL = """--instructions 6 --final-instructions 3 --samples 2 --max-attempts 3 --extend-samples 1 --extend-attempts 4
--rounds 1 --max-new-tokens 300 --long-words 50 --demand-min 20 --demand-max 2000 --demand-steps 10,20 --epochs 1
--language en --benchmark mini --limit 2 --evaluate ends --iterations 1""".split()


def loop(run: Path, *flags: str, timeout: float = 600) -> subprocess.CompletedProcess:
    command = [sys.executable, "run.py", "--run", str(run), *SMALL, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=one_thread())


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def files_of(run: Path) -> dict[str, list[str]]:
    """Every record of every JSONL file of the run (in any order), the logs of training aside."""
    found = {}
    for path in sorted(run.rglob("*.jsonl")):
        if path.stat().st_size and path.name != "train_log.jsonl":
            rows = read_jsonl(path, needs=())
            found[str(path.relative_to(run))] = sorted(json.dumps(r, sort_keys=True) for r in rows)
    return found


@pytest.fixture(scope="module")
def finished(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """One whole run of the loop on the tiny writer."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    return run, loop(run, "--model", str(writer))


def test_the_loop_runs_end_to_end(finished):
    run, process = finished
    assert process.returncode == 0, process.stderr[-3000:]
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
    run, process = finished
    last = json.loads(process.stdout.strip().splitlines()[-1])
    summary = json.loads((run / "summary.json").read_text())
    assert set(last["models"]) == set(summary["models"]) == {"base", "final"}
    for scores in summary["models"].values():
        for key in ("words_median", "words_p90", "eos_share", "loop_rate", "length_score", "rank_correlation"):
            assert key in scores
    extend = summary["extenders"]["iter_1"]
    assert 0 < extend["acceptance"] <= 1 and extend["gain_median"] > 1.2
    for stage in summary["stages"]:
        assert stage["seconds"] >= 0 and stage["stage"] and stage["part"]
    assert "What the models write" in process.stderr and "What it took" in process.stderr


def test_running_again_is_a_quick_no_op(finished):
    run, process = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != "summary.json"}
    again = loop(run, "--model", json.loads((run / "summary.json").read_text())["settings"]["model"])
    assert again.returncode == 0, again.stderr[-2000:]
    changed = [p for p, t in before.items() if p.exists() and p.stat().st_mtime_ns != t]
    assert not [p for p in changed if p.suffix == ".jsonl" or p.name.startswith("adapter")]
    assert "loading" not in again.stderr.lower()


def test_killed_anywhere_and_started_again_it_ends_with_the_same_records(finished, writer):
    """SIGKILL to run.py and its stage at three random moments; the seed is printed on failure."""
    clean, _ = finished
    run = clean.parent.parent / "killed" / clean.name  # the same NAME, so the same ids
    seconds = json.loads((clean / "summary.json").read_text())["seconds"]
    seed = random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    command = [sys.executable, "run.py", "--run", str(run), *SMALL, "--model", str(writer)]
    for _ in range(3):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=one_thread(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(rng.uniform(0.05, 0.5) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = loop(run, "--model", str(writer))
    assert process.returncode == 0, (seed, process.stderr[-3000:])
    assert files_of(run) == files_of(clean), seed
