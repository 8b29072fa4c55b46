"""OpenMP's threads on a CPU that others use, too: awake between two parallel regions, or asleep.

Two threads that wait awake make a decoding step 1.2 to 1.7 times as fast as one. But beside one busy process the same
step takes 3 to 8 times as long: the system takes a thread that spins for one that works, and lets it wait its turn.
So `Neighbours` looks once a second at what others leave of the processors, and has the threads sleep where that is
less than they need.

libgomp reads its settings once, but "when there are more managed threads than available CPUs" its threads do not wait
awake (its manual, GOMP_SPINCOUNT). So a helper holds a team of threads with nothing to do. Who computes what stays
the same, and so do results. Other runtimes (macOS, Windows) sleep anyway, by OMP_WAIT_POLICY (lengthen/__init__.py).
"""

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

EVERY = 1.0  # seconds between two looks; /proc/stat counts in hundredths
SLACK = 0.15  # processors that others may use without being a neighbour: the system's own work


class Usage(NamedTuple):
    """Seconds since the machine's start, and what became of them."""

    wall: float
    idle: float  # summed over the processors that this process may use
    own: float  # processor time of this process


def usage(stat: Path = Path("/proc/stat")) -> Usage | None:
    """None = the system does not tell."""
    try:
        allowed = {f"cpu{i}" for i in os.sched_getaffinity(0)}
        rows = [line.split() for line in stat.read_text().splitlines() if line.startswith("cpu")]
        ticks = sum(int(row[4]) + int(row[5]) for row in rows if row[0] in allowed)  # idle, waiting for a disk
        return Usage(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())
    except (AttributeError, OSError, ValueError, IndexError):
        return None


def crowded(before: Usage, now: Usage, threads: int) -> bool:
    """Whether others left fewer processors than `threads` in the time between."""
    left = (now.idle - before.idle + now.own - before.own) / (now.wall - before.wall)
    return left < threads - SLACK


def libgomps() -> list[Any]:
    """Those that are loaded: torch has its own, Numba the system's, with a team of threads each."""
    try:
        names = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
        return [ctypes.CDLL(name) for name in sorted({name for name in names if "libgomp" in name})]
    except OSError:
        return []


class Neighbours:
    """Has this process's threads sleep while they wait, as long as others are busy: `look` in a loop, `close` after."""

    def __init__(self) -> None:
        self.before = usage()
        self.helper: tuple[threading.Thread, threading.Event] | None = None

    def look(self) -> None:
        """Costs nothing but once a second, then a tenth of a millisecond."""
        if not self.before or time.monotonic() - self.before.wall < EVERY:
            return
        before, self.before = self.before, usage()
        if self.before:
            self.sleep(crowded(before, self.before, torch.get_num_threads()))

    def sleep(self, wanted: bool) -> None:
        if wanted and not self.helper:
            done = threading.Event()
            thread = threading.Thread(target=self._hold, args=(done,), daemon=True)
            self.helper = thread, done
            thread.start()
        elif self.helper and not wanted:
            thread, done = self.helper
            done.set()
            thread.join()  # its team goes with it
            self.helper = None

    def close(self) -> None:
        self.sleep(False)

    def _hold(self, done: threading.Event) -> None:
        """A team with more threads than there are processors; each calls a function that has no effect."""
        for lib in libgomps():
            lib.GOMP_parallel(ctypes.cast(lib.omp_get_num_procs, ctypes.c_void_p), None, lib.omp_get_num_procs() + 1, 0)
        done.wait()
