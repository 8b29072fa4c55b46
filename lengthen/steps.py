"""Stage commands as data: a step's settings are its flags. Rendered as commands and as a shell script, and run.

Whoever plans commands (run.py, the study in bench/) makes and changes steps; `command_of` alone knows how they are
spelt. Everything that a stage writes to stderr is shown as it comes and kept in the run's folder, in run.log.
"""

import ctypes
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from lengthen import cli
from lengthen.jobs import EARLIER, GROWING, input_hashes, read_sidecar, sidecar_path
from lengthen.records import UserError, fingerprint, no_room

ROOT = Path(__file__).resolve().parent.parent
SHELL_WIDTH = 116  # columns of a line in a shell script, before the backslash
CLOCK = "%Y-%m-%d %H:%M:%S"  # local time, in run.log
CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # colours and movements of the cursor (ECMA-48, control sequences)


@dataclass(frozen=True)
class Step:
    """One stage command."""

    part: str  # the folder of the run it belongs to: iter_K, final, eval/NAME, controls/NAME
    name: str  # what it does there: instructions, train generator
    command: tuple[str, ...]  # script and subcommand: ("generate.py", "responses")
    settings: dict[str, Any]  # its flags, `output` among them: {"model": "smollm2", "max_new_tokens": 360, ...}
    control: str = ""  # the control it belongs to; the method itself has none
    launcher: str = "python"  # or "torchrun --nproc-per-node 8", for a training in several processes
    spelt: Mapping[str, str] = field(default_factory=dict)  # its flags -> what whoever planned it calls them

    @property
    def label(self) -> str:
        """iter_1/train-generator"""
        return f"{self.part}/{self.name.replace(' ', '-')}"

    @property
    def output(self) -> str:
        return self.settings["output"]


def moved(step: Step, part: str, control: str = "", **changes: Any) -> Step:
    """A copy of a step in another folder of the run, with other settings: what controls and studies are made of."""
    root, _, file = step.output.rpartition(step.part)
    settings = {name: value for name, value in (step.settings | changes).items() if name != "output"}
    copy = replace(step, part=part, control=control, settings={**settings, "output": f"{root}{part}{file}"})
    # Hints that start it afresh name the copy, not the step that it was copied from.
    return replace(copy, spelt={**step.spelt, "--overwrite": f"--redo {copy.label}"}) if step.spelt else copy


# ---------------------------------------------------------------------------------------------------------
# As commands


def command_of(step: Step) -> list[str]:
    """The words of a step's command, without the interpreter. A setting of "", False or [] leaves its flag out."""
    return [*step.command, *(word for name, value in step.settings.items() for word in flag_words(name, value))]


def flag_words(name: str, value: Any) -> list[str]:
    """("max_rows", 8) -> ["--max-rows", "8"], ("judge_margin", -inf) -> ["--judge-margin=-inf"]"""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, list):
        return [flag, *map(str, value)] if value else []
    if isinstance(value, tuple):  # one word: (50, 100) -> 50,100
        return [flag, ",".join(map(str, value))]
    word = str(value)
    if word.startswith("-"):  # argparse would take -inf for a flag
        return [f"{flag}={word}"]
    return [flag, word] if word else []


def as_shell(steps: Sequence[Step], made_by: str, heading: Callable[[Step], str], variables: Mapping[str, str]) -> str:
    """Steps as a shell script that works when pasted.

    made_by: the command that runs the same; heading: what stands above the commands of one part; variables: words, and
    beginnings of paths, that the script names once.
    """
    names = {name: value for name, value in variables.items() if shlex.quote(value) == value}  # safe without quotes

    def word(text: str) -> str:
        # runs/demo/iter_1 -> $RUN/iter_1, whatever else it holds in quotes of its own
        for name, value in names.items():
            if text == value or text.startswith(value + "/"):
                rest = text.removeprefix(value)
                return f"${name}" + (shlex.quote(rest) if rest else "")
        return shlex.quote(text)

    lines = ["#!/bin/sh", f"# {made_by}", "set -e", " ".join(f"{name}={value}" for name, value in names.items())]
    if Path.cwd() != ROOT:
        lines.insert(3, f"cd {shlex.quote(str(ROOT))}")
    # One line per command where it fits; a flag and its values stay together.
    for before, step in zip([None, *steps], steps, strict=False):
        if before is None or heading(before) != heading(step):
            lines.append(f"# {heading(step)}")
        line = f"{step.launcher} {' '.join(step.command)}"
        for name, value in step.settings.items():
            text = " ".join(map(word, flag_words(name, value)))
            if text and len(line) + len(text) > SHELL_WIDTH:
                lines.append(f"{line} \\")
                line = "   "
            line += f" {text}" if text else ""
        lines.append(line)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# Running them


def chosen_by(redo: str, steps: Sequence[Step]) -> list[Step]:
    """The steps that --redo names: by label, by part, by name, or by the name of their flags."""
    found: list[Step] = []
    for word in filter(None, redo.split(",")):
        named = {"answers": "final/responses"}.get(word, word)
        more = [s for s in steps if named in {s.label, s.part, s.name, s.name.split()[0], s.name.replace(" ", "-")}]
        if not more:
            raise UserError(f"--redo: this run has no stage {word!r}", f"one of {', '.join(s.label for s in steps)}")
        found += more
    return found


def standing_on(steps: Sequence[Step], chosen: Sequence[Step]) -> list[Step]:
    """The chosen steps and those that read what these write, in order."""
    found: list[Step] = []
    for step in steps:
        if step in chosen or any(before.output in words_of(step) for before in found):
            found.append(step)
    return found


def words_of(step: Step) -> set[Any]:
    """The values of a step's settings but its output, those in lists one by one: what it reads is among them."""
    values = (value for name, value in step.settings.items() if name != "output")
    return {word for value in values for word in (value if isinstance(value, list) else [value])}


def output_file(step: Step) -> Path:
    """What a step's sidecar belongs to."""
    return Path(step.output) / "outputs.jsonl" if step.name == "evaluate" else Path(step.output)


def sidecar_of(step: Step) -> dict[str, Any]:
    """The sidecar of what a step writes, {} before it starts."""
    try:
        return read_sidecar(output_file(step))
    except UserError as error:
        raise UserError(error.message, f"--redo {step.label} makes it afresh") from None


def stale(step: Step) -> str:
    """Why a step must be done afresh since it last ran: what of its inputs is another one; "" = it may go on.

    Only what other steps have written under the same name: another model, file or flag is the user's to decide, and the
    stage refuses it. An input that has only got more records is none: a stage that samples takes them up itself.
    """
    meta, own = sidecar_of(step), step.settings
    before, adapter, inputs = meta.get("settings", {}), own.get("adapter", ""), own.get("input", [])
    if not meta:
        return ""
    same_adapter = step.command[0] == "train.py" or meta.get("info", {}).get("adapter") == adapter
    if adapter and same_adapter and before.get("adapter") and before["adapter"] != fingerprint(adapter):
        return adapter
    made = meta.get("inputs_created", {})
    for path in sorted(made.keys() & words_of(step)):  # what it must not repeat (--dedup-against) is among them
        if made[path] != read_sidecar(path).get("created"):
            return path
    if step.command[0] == "train.py":
        now = input_hashes(inputs) if all(Path(path).exists() for path in inputs) else {}
        old = before.get("inputs", {})
        if now.keys() == old.keys() and now != old:
            return next(name for name in now if now[name] != old[name])
        if budget := own.get("budget_of"):
            tokens = read_sidecar(budget).get("summary", {}).get("target_tokens")
            if tokens and before.get("target_tokens") not in (None, tokens):
                return budget
    return ""


AFRESH, MORE, OTHER = "made afresh", "goes on with more", "was made otherwise"  # what becomes of a step, see `outlook`
APART = {"adapter", "inputs", "templates", "targets", "keep_lines"}  # recorded otherwise than as flags
Flags = Callable[[Step], Mapping[str, Any]]  # a step's settings, with the stage's defaults


def outlook(steps: Sequence[Step], flags: Flags, afresh: Sequence[Step] = ()) -> dict[str, str]:
    """{output: what becomes of it when the steps are run}, of those that are not simply finished or gone on with.

    afresh: those that are started over in any case. `stale` sees what has changed; this sees, before anything starts,
    what will have changed when the turn of a step comes. Of OTHER, the stage itself will refuse to go on.
    """
    fate: dict[str, str] = {}
    for step in steps:
        meta = {} if step in afresh else sidecar_of(step)
        touched, differing = words_of(step) & fate.keys(), differences(meta, flags(step))
        learns, adapter = step.command[0] == "train.py", step.settings.get("adapter")
        sources = touched & meta.get("inputs_created", {}).keys()
        if not meta or stale(step) or any(fate[path] != MORE for path in sources):
            fate[step.output] = AFRESH
        elif other_inputs(step):
            fate[step.output] = OTHER
        elif adapter in touched or (learns and touched):
            fate[step.output] = AFRESH
        elif differing - GROWING.keys():
            fate[step.output] = OTHER
        elif touched or differing or (meta["status"] != "done" and not learns):
            fate[step.output] = MORE
    return fate


def differences(meta: Mapping[str, Any], own: Mapping[str, Any]) -> set[str]:
    """The names of the settings that a step has with other values than its sidecar."""
    before = meta.get("settings", {}) | {"model": meta.get("base") or meta.get("info", {}).get("model")}
    now = {name: own[name] for name in before.keys() & own.keys() - APART}
    return {name for name, value in json.loads(json.dumps(now)).items() if before[name] != value}  # tuples are lists


def other_inputs(step: Step) -> str:
    """What a step was made with that other steps wrote and the plan no longer gives it; "" = nothing, it may go on."""

    def tails(paths: Iterable[str]) -> set[str]:  # as sidecars name inputs: the run's folder may have got another name
        return {"/".join(Path(path.split(EARLIER)[0]).parts[-2:]) for path in paths if path}

    meta, own, learns = sidecar_of(step), step.settings, step.command[0] == "train.py"
    if learns:
        before, now = tails(meta.get("settings", {}).get("inputs", [])), tails(own["input"])
    else:
        before = tails([*meta.get("inputs_created", {}), meta.get("info", {}).get("adapter", "")])
        now = tails([*own.get("input", []), *own.get("dedup_against", []), own.get("adapter", "")])
    lost, more = sorted(before - now), sorted(now - before)
    if not lost and not (learns and more):
        return ""
    return f"{', '.join(lost) or 'less'}, this command says {', '.join(more) or 'less'}"


def announce(steps: Sequence[Step], fate: Mapping[str, str], redo: str, afresh: Sequence[Step]) -> None:
    """Say what goes, before anything starts; UserError for what a stage would refuse when its turn comes, hours later.

    fate: by steps.outlook; afresh: what --redo starts over.
    """
    if refused := {s.label: why for s in steps if fate.get(s.output) == OTHER and (why := other_inputs(s))}:
        found = "; ".join(f"{label} was made with {why}" for label, why in refused.items())
        names = ",".join([*filter(None, [redo]), *refused])
        raise UserError(found, f"--redo {names} starts that afresh, and what stands on it")
    for step in afresh:
        there = "is made afresh" if Path(step.output).exists() else "is not there yet"
        cli.say(f"--redo: {step.output} {there} ({step.label})")
    if afresh:
        cli.say("stopped in the middle, go on without --redo, or as the last line says: what is afresh then stays")
    goes = [s for s in steps if fate.get(s.output) == AFRESH and s not in afresh and written_at(s)]
    if goes:
        cli.say("what these were made of has changed, or may by this command: then they are deleted and made afresh")
    for step in goes:
        cli.say(f"  {step.output} ({step.label})")


def execute(
    steps: Sequence[Step],
    run: str,
    named: Sequence[Step] = (),
    afresh: Sequence[Step] = (),
    told: Callable[[int], None] = lambda number: None,
) -> tuple[list[dict], list[str]]:
    """Run the steps in order; (their summaries with part and stage, the controls that came out with nothing).

    named: by --redo; afresh: these and those that stand on them, which do not go on from what is there. Nor do those
    whose inputs are other ones now. told: called after each step, with the number of those that are over.
    """
    results: list[dict] = []
    ended: list[str] = []
    path = Path(run) / "run.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab", buffering=0)  # unbuffered: a line is in it at once, or not at all
    except OSError as error:
        raise no_room(path, error) from error
    with file as log:
        for number, step in enumerate(steps, start=1):
            # What follows of a control would read what did not come out.
            if step.control in ended:
                continue
            cli.console.rule(f"{number}/{len(steps)}  {step.part}  {step.name}", align="left")
            # Of one that goes in any case nothing is read: its sidecar may be what is damaged.
            why = "" if step in afresh else stale(step)
            if why:
                cli.say(f"{why} is another one since this was made: it is made afresh")
            settings = {**step.settings, "overwrite": True} if why or step in afresh else step.settings
            cli.say(f"$ {step.launcher} {shlex.join(command_of(replace(step, settings=settings)))}")
            before = written_at(step)
            try:
                result = run_step(replace(step, settings=settings), log)
            except SystemExit as failed:
                # The same --redo would throw away what has just been made afresh. What stands on that is found.
                waiting = [s for s in steps[number - 1 :] if s in named and written_at(s)]
                left = [s.label for s in waiting if s is not step or written_at(s) == before]
                how = f", but with --redo {','.join(left)}" if left else ", but without --redo"
                say_how_to_go_on(step, failed.code, how if afresh else "")
                raise
            if result is None:
                ended.append(step.control)
            else:
                results.append({**result, "part": step.part, "stage": step.name})
            told(number)
    return results, ended


def written_at(step: Step) -> int:
    """When a step's sidecar was written, ns; 0 = there is none."""
    path = sidecar_path(output_file(step))
    return path.stat().st_mtime_ns if path.exists() else 0


def say_how_to_go_on(step: Step, code: Any, how: str) -> None:
    """The last line of a run that a stage has ended; `how`: what must be different the next time."""
    hints = {
        3: "too few records came out: the lines above count the reasons, and name a flag to add to this command",
        130: "to continue, run the same command again",
    }
    hint = hints.get(code, "what is finished is kept: fix that and run the same command again") + how
    cli.console.print(f"[bold]run.py:[/] {step.part} {step.name} ended with exit code {code}; {hint}", highlight=False)


def run_step(step: Step, log: BinaryIO) -> dict | None:
    """Run one stage; its last line of stdout is the summary. Where it fails, so do we, with its exit code.

    None = a control came out with nothing (exit code 3): that is its result, and no reason to stop the others.
    """
    command, started, name = command_of(step), time.monotonic(), f"{step.part} {step.name}"
    # The header is on disk before the stage starts: a run that hangs says in which.
    keep(log, f"\n{time.strftime(CLOCK)}  {name}\n$ {step.launcher} {shlex.join(command)}\n")
    os.environ[cli.SPELLINGS] = json.dumps(dict(step.spelt))
    # Looked up when called: tests put a function in its place that runs the stage in this process.
    more = () if step.launcher == "python" else (step.launcher,)
    try:
        code, output = run_command(command, log, *more)
    finally:
        del os.environ[cli.SPELLINGS]
    keep(log, f"{time.strftime(CLOCK)}  {name}: exit code {code} after {time.monotonic() - started:.1f} s\n")
    if code == 3 and step.control:
        cli.say(f"the control {step.control} ends here: nothing came out of {step.name}")
        return None
    if code:
        sys.exit(code)
    return json.loads(output.strip().splitlines()[-1])


def launched(launcher: str) -> list[str]:
    """The words that start a script. A program is looked for beside our interpreter first."""
    if launcher == "python":
        return [sys.executable]
    try:
        program, *rest = shlex.split(launcher) or [""]
    except ValueError as error:
        raise UserError(f"--train-launcher {launcher}: {error}", '"torchrun --nproc-per-node 8"') from None
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if (found := shutil.which(program, path=places)) is None:
        raise UserError(
            f"--train-launcher: there is no program {program!r}", '--train-launcher "torchrun --nproc-per-node 8"'
        )
    return [found, *rest]


def run_command(command: Sequence[str], log: BinaryIO, launcher: str = "python") -> tuple[int, str]:
    """Run a script of ours; (its exit code, its stdout). Its stderr is shown as it comes, its lines are kept in `log`.

    Ctrl-C reaches the script by itself: both are in the terminal's foreground. SIGTERM is passed on.
    """

    def die_with_parent() -> None:
        # Should we be killed outright, the stage stops too (and resumes later), instead of holding the file's lock.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    # On a terminal the stage writes to one as well, as wide as ours, or it would draw no progress bars.
    ours, theirs = pty.openpty() if sys.stderr.isatty() else os.pipe()
    if os.isatty(theirs):
        tty.setraw(theirs)  # bytes pass as they are: the real terminal does the rest
    process = subprocess.Popen(
        [*launched(launcher), str(ROOT / command[0]), *command[1:]],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": str(cli.console.width)},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        preexec_fn=die_with_parent,
    )
    os.close(theirs)  # the stage has it now: reading ours ends when the stage does
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    showing = threading.Thread(target=show_and_keep, args=(ours, log), daemon=True)
    showing.start()
    while True:
        try:
            output, _ = process.communicate()
            break
        except KeyboardInterrupt:  # let the stage finish what it must
            continue
    signal.signal(signal.SIGTERM, before)
    showing.join(10)  # seconds: a process that the stage left running may hold its stderr open
    code = process.returncode
    return (128 - code if code < 0 else code), output


def show_and_keep(source: int, log: BinaryIO) -> None:
    """Copy what comes to our stderr, byte by byte; lines go to the log too, without what a progress bar drew over."""
    rest = b""
    with suppress(OSError), os.fdopen(source, "rb", buffering=0) as reader:  # EIO: the other end of a pty is closed
        while data := reader.read(1 << 16):
            with suppress(OSError):  # the terminal is gone: the log continues
                sys.stderr.buffer.write(data)
                sys.stderr.buffer.flush()
            # Whole lines only: a character of several bytes may come in two reads.
            *lines, rest = (rest + data).split(b"\n")
            keep(log, "".join(map(logged, lines)))
            rest = rest[rest.rfind(b"\r", 0, -1) + 1 :]  # what a bar has drawn over, for hours, is not kept
    if rest.strip():
        keep(log, logged(rest))


def keep(log: BinaryIO, text: str) -> None:
    """Append to the log. Where the disk is full, nothing: what the stage says of it must still reach the terminal."""
    with suppress(OSError):
        log.write(text.encode("utf-8", "backslashreplace"))


def logged(line: bytes) -> str:
    """A line as it stood on the screen at last: what comes after the return to its beginning, without colours."""
    text = line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2]
    return cli.printable(CODES.sub("", text).rstrip()) + "\n"
