"""Two processes train what one would.  python -m pytest tests/test_parallel.py"""

import json
import os
import subprocess
import sys
from pathlib import Path

import cold
import pytest
import torch
from tiny import save_tiny
from trainees import record, write

import train
from lengthen.models import lora
from lengthen.reading import read_jsonl
from lengthen.records import UserError
from lengthen.training.parallel import Processes

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    save_tiny(folder / "model", intermediate_size=128)
    write(folder / "extended.jsonl", [record(i) for i in range(7)])
    return folder


def command(folder: Path, output: str, *more: str) -> list[str]:
    """14 pairs a step of 3: the last step of an epoch has one pair, and one process none."""
    flags = ["--role", "generator", "--model", folder / "model", "--input", folder / "extended.jsonl"]
    flags += ["--output", folder / output, "--accumulate", 3, "--epochs", 2, "--save-every", 2]
    return [*map(str, flags), "--learning-rate", "5e-3", "--rank", "4", "--alpha", "8", *more]


DRIVER = """
import sys
sys.path.insert(0, {root!r})
import train
joined = train.parallel.start()  # once: gloo does not meet twice under one torchrun
train.parallel.start = lambda: joined
stop, train.Processes.stop = train.Processes.stop, lambda self: None
train.main({two!r})

original, calls = train.train_step, []
def interrupted(*args, **kwargs):
    calls.append(1)
    if len(calls) == 6:
        raise KeyboardInterrupt
    return original(*args, **kwargs)
train.train_step = interrupted
try:
    train.main({three!r})
except KeyboardInterrupt:
    pass
train.train_step = original
train.main({three!r})
stop(joined)
"""


def test_two_processes_train_what_one_does_and_go_on_where_they_were(folder, capsys):
    """Same losses, same adapter, one writer; interrupted in step 6, the same again; and one cannot go on for two."""
    train.main(command(folder, "one"))
    capsys.readouterr()
    code = DRIVER.format(root=str(ROOT), two=command(folder, "two"), three=command(folder, "three"))
    (folder / "driver.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder / "driver.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=cold.HANG,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summaries = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [s["steps"] for s in summaries] == [6, 6] and done.stderr.count("step 1/6 |") == 2, "one process speaks"
    assert "resuming after step 4 of 6" in done.stderr
    one = read_jsonl(folder / "one" / "train_log.jsonl", needs=())
    for name in ("two", "three"):
        log = read_jsonl(folder / name / "train_log.jsonl", needs=())
        assert [e["step"] for e in log] == list(range(1, 7))
        for ours, theirs in zip(log, one, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
            assert ours["target_tokens"] == theirs["target_tokens"]
        assert_same_adapters(folder / "one", folder / name, 1e-6)
        assert not [p.name for p in (folder / name).iterdir() if p.name.startswith((".", "checkpoint", "pairs"))]

    path = folder / "three" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "status": "running"}))
    with pytest.raises(UserError, match="begun by 2 processes, this command runs 1") as raised:
        train.main(command(folder, "three"))
    assert "--nproc-per-node 2" in raised.value.hint


def assert_same_adapters(first: Path, second: Path, tolerance: float) -> None:
    a, b = (lora.read_adapter(path)[1] for path in (first, second))
    for name in a:
        for x, y in zip(a[name], b[name], strict=True):
            assert y.abs().max() > 0
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


def test_pairs_are_shared_by_tokens():
    lengths = [100, 10, 90, 20, 30]
    shares = [Processes(rank, 2).share(lengths) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(5))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert loads == [130, 120] and Processes().share(lengths) == list(range(5))
    assert Processes(1, 2).share([5]) == []


def test_a_step_needs_a_pair_for_each():
    with pytest.raises(UserError, match="a step of 1 pair cannot be shared by 2 processes") as raised:
        Processes(0, 2).check(per_row=1, accumulate=1, sidecar={}, output="none")
    assert "--accumulate 2" in raised.value.hint
