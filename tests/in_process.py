"""The loop with its stages in one process: `run_command` takes the place of the one in lengthen/steps.py.

A stage that is a process of its own spends most of the tests' time on importing torch. What a process adds (signals,
exit codes, run.log) is tested in test_run.py and test_steps.py, and by the loop of test_end_to_end_real.py.
"""

import importlib
import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import BinaryIO

import cold

from lengthen import cli, records, steps
from lengthen.records import LowYield, UserError


def run_command(command: Sequence[str], log: BinaryIO) -> tuple[int, str]:
    """As lengthen.steps.run_command, by a call of the script's main."""
    stdout = io.StringIO()
    with redirect_stdout(stdout):
        try:
            importlib.import_module(command[0].removesuffix(".py")).main(list(command[1:]))
        except UserError as error:
            cli.say(f"error: {error.message}\nhint: {cli.spelt(error.hint)}")
            return (3 if isinstance(error, LowYield) else 2), stdout.getvalue()
    return 0, stdout.getvalue()


@contextmanager
def each_write(notice: Callable[[], None]) -> Iterator[None]:
    """`notice` is called before every write and every rename of a file of records."""
    write, replace = records._write, records._replace

    def noticed_write(descriptor: int, data: bytes) -> int:
        notice()
        return write(descriptor, data)

    def noticed_replace(source: Path, target: Path) -> None:
        notice()
        replace(source, target)

    records._write, records._replace = noticed_write, noticed_replace
    try:
        yield
    finally:
        records._write, records._replace = write, replace


def loop(argv: Sequence[str]) -> tuple[str, str]:
    """run.py with these flags; (its stdout, its stderr). With one thread, as in a child: two add up otherwise."""
    import torch

    import run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    real, steps.run_command = steps.run_command, run_command
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            run.main(list(argv))
    finally:
        steps.run_command = real
        torch.set_num_threads(threads)
    return stdout.getvalue(), stderr.getvalue()


def loop_until(argv: Sequence[str], writes: int) -> int:
    """The same in a child that sends itself a SIGKILL before that write; its exit code."""
    process = cold.SERVER.Process(target=_dying_loop, args=(list(argv), writes))
    process.start()
    process.join(cold.HANG)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _dying_loop(argv: list[str], writes: int) -> None:
    count = 0

    def die_in_time() -> None:
        nonlocal count
        count += 1
        if count == writes:
            os.kill(os.getpid(), signal.SIGKILL)

    with each_write(die_in_time):
        loop(argv)
