"""Proof that a function takes time in proportion to its input, on a machine that may be busy with other things."""

import time
from collections.abc import Callable
from typing import TypeVar

Input = TypeVar("Input")
TURNS = 20


def assert_linear(function: Callable[[Input], object], make: Callable[[int], Input], size: int) -> None:
    """An input of 16 times the size takes less than 64 times the processor time: quadratic work takes 256 times.

    Other processes slow a turn down (caches, clock rates), never speed it up: so the best turn counts, and there are
    more turns, up to 20, as long as the best ones do not show it.
    """
    short, long = make(size), make(16 * size)
    seconds = [float("inf"), float("inf")]
    for _ in range(TURNS):
        for i, given in enumerate((short, long)):
            start = time.process_time()
            function(given)
            seconds[i] = min(seconds[i], time.process_time() - start)
        if seconds[1] < 64 * max(seconds[0], 2e-4):  # below that the clock is too coarse
            return
    raise AssertionError(f"size {size}: {seconds[0]:.4f} s, 16 times as many: {seconds[1]:.4f} s")
