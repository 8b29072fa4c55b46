"""Whether OpenMP's threads sleep while others are busy. pytest -q tests/test_threads.py"""

import os
import sys
import time

import cold
import pytest
import torch

from lengthen.models import threads
from lengthen.models.threads import Neighbours, Usage, crowded, usage

STAT = "cpu  9 9 9 9 9 9\n" + "".join(f"cpu{i} 500 1 20 {1000 * (i + 1)} 50 0 0\n" for i in range(4)) + "intr 1 2\n"


def test_idle_time_is_that_of_the_processors_we_may_use(tmp_path, monkeypatch):
    (tmp_path / "stat").write_text(STAT)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    assert usage(tmp_path / "stat").idle == (2000 + 50 + 4000 + 50) / 100


def test_no_counters_are_no_neighbours(tmp_path, monkeypatch):
    assert usage(tmp_path / "none") is None
    (tmp_path / "stat").write_text("cpu0 1 2\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert usage(tmp_path / "stat") is None
    monkeypatch.setattr(threads, "usage", lambda: None)
    neighbours = Neighbours()
    neighbours.look()
    assert neighbours.helper is None


@pytest.mark.parametrize(
    "idle,own,threads,expected",
    [
        (0.1, 1.9, 2, False),  # alone: what is not idle is ours
        (1.2, 0.8, 2, False),  # alone, one thread at work
        (0.0, 1.5, 2, True),  # a busy process has the rest
        (1.0, 0.0, 2, True),  # also before we begin
        (1.0, 0.0, 1, False),  # one thread needs one processor
        (6.0, 2.0, 8, False),
    ],
)
def test_crowded_is_when_others_leave_fewer_processors_than_threads(idle, own, threads, expected):
    assert crowded(Usage(5.0, 7.0, 3.0), Usage(7.0, 7.0 + 2 * idle, 3.0 + 2 * own), threads) is expected


# In a process of its own, for Numba starts its threads once; with more than the processors, which Numba would choose.
KERNEL = """
import os, numba, torch
from kernels import cpu
from lengthen.models.threads import libgomps
wanted = len(os.sched_getaffinity(0)) + 1
torch.set_num_threads(wanted)
cpu.swiglu(torch.zeros(400, 64), torch.zeros(400, 64))
print(torch.get_num_threads() - wanted, numba.threading_layer(), len(libgomps()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Numba has another pool here")
def test_numbas_threads_leave_torchs_number_alone_and_sleep_with_them():
    """Seen in CI: after the first kernel torch computed with as many threads as there are processors.

    And in bench/sampler.py: Numba has an OpenMP of its own, whose threads, awake, made a step four times as long.
    """
    pytest.importorskip("numba")
    done = cold.run("-c", KERNEL)
    assert done.returncode == 0, done.stderr
    more, layer, teams = done.stdout.split()
    assert int(more) == 0
    assert layer != "omp" or int(teams) == 2


@pytest.mark.skipif(not threads.libgomps(), reason="torch has another OpenMP runtime here")
def test_a_helper_team_comes_with_a_neighbour_and_goes_with_it(monkeypatch):
    """libgomp's own condition for sleeping: more of its threads than processors, and no longer when they are gone."""
    a = torch.randn(300, 300)
    a @ a  # torch's own team exists
    before = len(os.listdir("/proc/self/task"))
    busy = [True, True, False]
    monkeypatch.setattr(threads, "usage", lambda: Usage(0.0, 0.0, 0.0))  # long ago: each look is due
    monkeypatch.setattr(threads, "crowded", lambda *_: busy.pop(0))
    neighbours = Neighbours()
    neighbours.look()
    team = neighbours.helper
    assert team
    wait_until(lambda threads: threads > before + len(os.sched_getaffinity(0)) - 1)
    torch.testing.assert_close(a @ a, (a.double() @ a.double()).float(), rtol=1e-4, atol=1e-3)
    neighbours.look()
    assert neighbours.helper is team  # still busy: the same one
    neighbours.look()
    assert neighbours.helper is None
    wait_until(lambda threads: threads <= before)


def wait_until(right):
    """The beginning and the end of a thread take the system a moment."""
    for _ in range(1200):
        if right(len(os.listdir("/proc/self/task"))):
            return
        time.sleep(0.05)
    pytest.fail("the helper's team did not come, or did not go")
