"""Fresh processes for tests: `cold.run("evaluate.py", ...)` in place of `subprocess.run([sys.executable, ...])`.

A new interpreter spends 4 to 8 seconds of a core on importing torch and transformers. Here they are imported once per
test process, by a server that then forks a child per call: it has the modules, and none of the state, of any test. So
it proves what a process does, and not what it imports: for that, start a real interpreter (`cold.interpreter`), which
is cheap as long as the code under test does not import torch.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
HANG = 3600  # s; catches a process that hangs, however busy the machine is

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "lengthen",  # before torch: it sets how OpenMP's threads wait
        "torch",
        "transformers.models.llama.modeling_llama",
        "lengthen.models.loading",
        "lengthen.models.lora",
        "lengthen.sampling.engine",
        *(path.stem for path in sorted(ROOT.glob("*.py"))),
    ]
)


class Started:
    """A forked Python process that runs `args` as an interpreter would: `-c CODE ...` or `SCRIPT ...`."""

    def __init__(self, *args: object, cwd: Path = ROOT, env: dict[str, str] | None = None):
        self.args = [str(arg) for arg in args]
        self._files = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]  # stdout, stderr
        names = [file.name for file in self._files]
        environment = dict(os.environ if env is None else env)
        self._process = SERVER.Process(target=_child, args=(self.args, str(cwd), environment, names))
        self._process.start()
        self.pid = self._process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def running(self) -> bool:
        return self._process.is_alive()

    def text(self) -> tuple[str, str]:
        """What it has written so far -> (stdout, stderr)."""
        for file in self._files:
            file.seek(0)
        stdout, stderr = (file.read() for file in self._files)
        return stdout, stderr

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its exit code (minus the number of a signal that killed it) and all that it wrote."""
        self._process.join(HANG)
        assert self._process.exitcode is not None, f"{self.args} hangs"
        stdout, stderr = self.text()
        for file in self._files:
            file.close()
        return subprocess.CompletedProcess(self.args, self._process.exitcode, stdout, stderr)


def run(*args: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """As subprocess.run([sys.executable, *args], capture_output=True, text=True), by a fork with torch imported.

    `env` replaces the whole environment; what torch and OpenMP read when they are imported is fixed (one thread).
    atexit functions do not run.
    """
    return Started(*args, cwd=cwd, env=env).wait()


def interpreter(*args: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A real interpreter, which has imported nothing: for tests of what is imported, and when."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANG)


def _child(args: list[str], cwd: str, environment: dict[str, str], names: list[str]) -> None:
    for descriptor, name in enumerate(names, 1):
        target = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, descriptor)
        os.close(target)
    # The server ignores SIGINT, and so does whatever runs in the background of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        if args[0] == "-c":
            sys.argv = ["-c", *args[2:]]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(args[1], "<test>", "exec"), main.__dict__)
        else:
            sys.argv = args
            runpy.run_path(args[0], run_name="__main__")
    except SystemExit:
        raise  # multiprocessing makes an exit code of it, as the interpreter does
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
