"""The command line: flags that mean the same in every stage, errors in one line, progress.

Everything for people goes to stderr; stdout's last line is one compact JSON summary, for scripts. No torch here.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from lengthen.errors import out_of_memory
from lengthen.records import LowYield, UserError, replace_file, say_once
from lengthen.text import languages

console = Console(stderr=True, highlight=False, soft_wrap=True)
PLAIN_SECONDS = 10.0  # without a terminal: one progress line every so many seconds
ENOUGH = 10  # finished ones from which the time left is told; of few, a tenth
OPENING = 320  # characters of a text that is shown while a stage runs


# ---------------------------------------------------------------------------------------------------------
# Flags
#
# A dataclass declares each flag once: its fields are the flags' names, types, defaults and help, and its instances are
# the typed settings that the machinery takes. `add_flags` puts them on a parser, `take` reads them back.

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"python {self.prog} --help")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Docstrings as they are written; each default shown, unless it is empty or off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if is_shown(action.default) else action.help


def is_shown(default: Any) -> bool:
    """Whether a default tells a reader something: 0 does, and is equal to False."""
    return default is not False and default not in (dataclasses.MISSING, None, "", [], ())


def make_parser(doc: str | None, prog: str) -> argparse.ArgumentParser:
    """A strict parser: no abbreviated flags, no unknown ones, errors raised as UserError."""
    return _Parser(prog=prog, description=doc, formatter_class=_Help, allow_abbrev=False)


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, help: str
) -> argparse.ArgumentParser:
    """A subcommand with the same strictness; `commands` is what `parser.add_subparsers` returned."""
    return commands.add_parser(name, help=help, description=help, formatter_class=_Help, allow_abbrev=False)


def at_least(low: float, kind: type = int, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` from `low` to `high`."""
    wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None
        if not low <= value <= high:  # also true for nan
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return number


def between(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""
    return at_least(low, float, high)


def not_empty(text: str) -> str:
    """An argparse type: --output "$OUT" with OUT unset is a mistake, not the folder one stands in."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def name_or_path(text: str) -> str:
    """An argparse type: a shell leaves the ~ of --model=~/m as it is."""
    return os.path.expanduser(not_empty(text))


def device(text: str) -> str:
    """An argparse type: auto, or a device that the sampler and the training serve."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not served: auto, cpu, cuda or cuda:N (an Apple GPU is not used)"
        )
    return text


def languages_asked(text: str) -> str:
    """An argparse type: languages of prompts/, or a group of them."""
    try:
        return languages.spelt(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


REQUIRED: Any = dataclasses.MISSING


def flag(default: Any, help: str, type: Callable[[str], Any] | None = None, **more: Any) -> Any:
    """A field of a dataclass of flags. default REQUIRED = the flag must be given; more: as add_argument takes it.

    The type is the field's own where none is given: a bool is a switch, a list takes one value or more.
    """
    extra = {"help": help, **({"type": type} if type else {}), **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=extra)
    return dataclasses.field(default=default, metadata=extra)


def add_flags(
    parser: argparse.ArgumentParser,
    title: str,
    kind: type,
    *,
    leave_out: Sequence[str] = (),
    prefix: str = "",
    given_only: bool = False,
) -> None:
    """Puts the flags of a dataclass on a parser, as a group of that title.

    prefix: "extend." makes --rounds --extend.rounds. given_only: a flag that is not given is not in the result, so that
    whoever passes flags on can tell (and none is required).
    """
    same = [group for group in parser._action_groups if group.title == title]  # several dataclasses, one heading
    group = same[0] if same else parser.add_argument_group(title)
    for field in dataclasses.fields(kind):
        if field.name in leave_out:
            continue
        options = dict(field.metadata)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING:
            options["required"] = not given_only
            options.setdefault("type", not_empty)
        else:
            options["default"] = default
        if given_only:
            options["default"] = argparse.SUPPRESS
            options["help"] += f" (default: {default})" if is_shown(default) else ""
        if field.type is bool:
            options["action"] = "store_true"
        elif typing.get_origin(field.type) is list:
            options.setdefault("nargs", "+")
            options.setdefault("type", typing.get_args(field.type)[0])
        elif isinstance(field.type, type):
            options.setdefault("type", field.type)
        if prefix and field.type is not bool and "choices" not in options:
            options.setdefault("metavar", field.name.upper())  # not once more with the prefix
        group.add_argument(f"--{prefix}{field.name.replace('_', '-')}", dest=f"{prefix}{field.name}", **options)


def take(args: argparse.Namespace, kind: type[T]) -> T:
    """The flags of a dataclass from a parsed command line; those left out of the parser have their defaults."""
    names = [field.name for field in dataclasses.fields(kind) if hasattr(args, field.name)]  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in names})


def defaults_of(kind: type) -> dict[str, Any]:
    """Flag -> its default, of a dataclass of flags; None for one that must be given."""
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        make = field.default_factory
        default = None if field.default is dataclasses.MISSING else field.default
        defaults[field.name] = default if make is dataclasses.MISSING else make()
    return defaults


@dataclass(frozen=True)
class OutputFlags:
    """Where a stage writes, and what it may do there."""

    output: str = flag(REQUIRED, "what is written; run the same command again to continue it")
    language: str = flag(
        languages.DEFAULT,
        "only records in these languages: codes or names with commas; both = the paper's two; all = all of prompts/",
        languages_asked,
    )
    seed: int = flag(0, "seed of every random draw in this stage")
    overwrite: bool = flag(False, "start afresh instead of continuing")
    allow_partial: bool = flag(False, "accept an input whose stage has not finished")
    min_yield: int = flag(1, "fewer records than this end with exit code 3", at_least(0))


@dataclass(frozen=True)
class InputFlags:
    """What a stage reads."""

    input: list[str] = flag(REQUIRED, "JSONL files of the stage before, or your own")


@dataclass(frozen=True)
class ModelFlags:
    """Which model a stage loads, and how."""

    model: str = flag(REQUIRED, "hub id, local folder, .gguf file, or smollm2 (the demo's model)", name_or_path)
    adapter: str = flag("", "LoRA folder in PEFT's format; empty = the base model", os.path.expanduser)
    device: str = flag("auto", "auto = cuda where there is one, else cpu", device)
    dtype: str = flag(
        "auto",
        "auto = bf16 on CUDA, else fp32; bfloat16 is faster on a CPU with AMX or AVX-512 BF16, and texts differ",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str = flag("auto", "auto = nf4 on CUDA below 40 GB, else none", choices=("auto", "none", "nf4"))
    trust_remote_code: bool = flag(False, "run code from the model's repository")


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are drawn; the defaults are the constants of the paper's release."""

    temperature: float = flag(0.7, "0 = greedy", at_least(0, float))
    top_p: float = flag(0.8, "probability mass kept; 1 = all", between(0.001, 1))
    top_k: int = flag(20, "tokens kept; 0 = all", at_least(0))
    repetition_penalty: float = flag(1.1, "1 = none", at_least(0.01, float))
    max_new_tokens: int = flag(0, "tokens per sample; 0 = min(16384, context - prompt)", at_least(0))
    max_rows: int = flag(
        0, "texts decoded at a time, per server; 0 = 96 on a CPU, else 256, less where memory is short", at_least(0)
    )
    kv_cache: str = flag(
        "auto", "auto = the model's dtype; fp8 = half the memory of bf16, on a GPU only", choices=("auto", "fp8")
    )
    endpoint: list[str] = flag(
        [],
        "sample through these vLLM servers, http://HOST:PORT/v1, instead of loading --model, which then names the"
        " tokenizer; a key: LENGTHEN_ENDPOINT_KEY of the environment",
        metavar="URL",
    )
    endpoint_path: list[str] = flag(
        [], "where the servers see folders of adapters, if not where they are here", metavar="LOCAL=REMOTE"
    )

    def recipe(self) -> dict[str, Any]:
        """The flags that decide which token comes next (max_rows does not)."""
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
        return {name: getattr(self, name) for name in names}


# ---------------------------------------------------------------------------------------------------------
# Output


# Characters that act instead of being seen: controls (ANSI escapes among them) but tab and newline, what is invisible
# or turns the direction of writing, halves of characters. Joiners stay: emoji and some scripts are spelt with them.
ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """Model or user text for a terminal: characters that act are spelled out as Python would write them."""
    return ACTING.sub(lambda match: ascii(match[0])[1:-1], text)


def shown(text: str) -> Text:
    """The same for a cell or a title of a table, where square brackets would be read as markup."""
    return Text(printable(text))


def say(text: str) -> None:
    """One line for people, on stderr."""
    console.print(printable(text), markup=False)


def show_texts(texts: Sequence[tuple[str, str]]) -> None:
    """(heading, text) of one text, or of several to be compared: their openings, side by side on a terminal."""
    openings = [(printable(heading), printable(opening(text))) for heading, text in texts]
    if not console.is_terminal:
        for heading, text in openings:
            say(f"  {heading}: {text}")
        return
    table = Table(expand=True, show_edge=False, pad_edge=False)
    for heading, _ in openings:
        table.add_column(Text(heading), ratio=1)
    table.add_row(*(Text(text) for _, text in openings))
    console.print(table)


def opening(text: str) -> str:
    """Its first words, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= OPENING else (line[:OPENING].rpartition(" ")[0] or line[:OPENING]) + " […]"


SPELLINGS = "SELF_LENGTHEN_SPELLINGS"  # {flag: what run.py calls it}, set by run.py for the stages that it starts


def spelt(text: str) -> str:
    """The flags in a hint as they are spelt where the user stands: --rounds is --extend.rounds in run.py.

    So is a remark in brackets, where another one holds there.
    """
    names = json.loads(os.environ.get(SPELLINGS, "{}"))
    remarks = "".join(f"{re.escape(name)}|" for name in names if name.startswith("("))
    return re.sub(rf"{remarks}--[a-z][a-z-]*[a-z]", lambda match: names.get(match[0], match[0]), text)


def save_figure(path: Path, draw: Callable[[], Any]) -> None:
    """Draw a matplotlib Figure and write it as PNG. What goes wrong with it is one line: hours of work do not fail."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own backend is not there in a script
    try:
        image = io.BytesIO()
        draw().savefig(image, format="png")
        replace_file(path, image.getvalue())
    except Exception as error:
        message = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        say(f"no {path.name}: {' '.join(message.split())}")


def emit(summary: dict) -> None:
    """The last line of stdout: one compact JSON document. What would act on a terminal is written as an escape."""
    line = json.dumps(summary, ensure_ascii=False, separators=(",", ":"))
    print(ACTING.sub(lambda match: json.dumps(match[0])[1:-1], line), flush=True)


class _Ticker:
    def __init__(self, what: str, total: int, bar: Progress | None):
        self.what, self.total, self.bar = what, total, bar
        self.task = bar.add_task(what, total=total, note="") if bar else None
        self.started = self.shown = time.monotonic()
        self.first: int | None = None

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are finished; `note` stands beside them (tokens/s, say)."""
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=done, note=note)
            return
        if self.first is None:
            self.first = done
        now = time.monotonic()
        if now - self.shown < PLAIN_SECONDS and done < self.total:
            return
        if done >= self.total and now - self.started < PLAIN_SECONDS:
            return  # finished before it needed a progress line
        self.shown = now
        finished, left = done - self.first, ""
        # One that ends early says nothing of when 800 will have ended.
        if finished >= max(1, min(ENOUGH, self.total // ENOUGH)) and done < self.total:
            left = f", about {(self.total - done) / finished * (now - self.started):.0f} s left"
        say(f"  {self.what} {done}/{self.total} after {now - self.started:.0f} s{left}{'; ' + note if note else ''}")


@contextmanager
def progress(what: str, total: int) -> Iterator[_Ticker]:
    """A rich bar with rate and time left on a terminal, else a plain line every 10 s. Yields `.update(done, note)`."""
    if not console.is_terminal:
        yield _Ticker(what, total, None)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        # What is left of the line: on 80 columns the note is cut, not the bar, the count and the times.
        TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True)),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        yield _Ticker(what, total, bar)


def run(main: Callable[[], None]) -> None:
    """Call `main`, end the process with 0, 2 (a mistake), 3 (too little yield) or 130 (Ctrl-C), without a traceback."""

    def terminated(*_: Any) -> None:
        raise KeyboardInterrupt  # a polite kill is treated as Ctrl-C: locks are freed, files closed

    signal.signal(signal.SIGTERM, terminated)
    cache_elsewhere()
    try:
        main()
    except UserError as error:
        _report(error.message, error.hint)
        sys.exit(3 if isinstance(error, LowYield) else 2)
    except KeyboardInterrupt:
        _report("interrupted", "finished samples are on disk: run the same command again to continue")
        sys.exit(130)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        _report("memory ran out", "--quantize nf4, a smaller --max-rows or --max-length, or a smaller model")
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output is gone: nothing to say, nobody to say it to
        sys.exit(1)


def cache_elsewhere() -> None:
    """Where the home cannot be written (a container's), caches go to the folder for temporary files."""
    if os.environ.get("XDG_CACHE_HOME"):
        return
    try:
        cache = Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        cache = Path("/dev/null")
    # os.path's, not pathlib's: a folder that may not be looked into is not there, and no PermissionError.
    there = next(folder for folder in (cache, *cache.parents) if os.path.exists(folder))
    if os.path.isdir(there) and os.access(there, os.W_OK):
        return
    elsewhere = Path(tempfile.gettempdir()) / f"self-lengthen-{os.getuid()}"
    say_once(f"{cache} cannot be written: caches are in {elsewhere}; XDG_CACHE_HOME names another folder")
    if os.path.isdir(cache / "huggingface"):  # models that are there already are still found
        os.environ.setdefault("HF_HOME", str(cache / "huggingface"))
    os.environ["XDG_CACHE_HOME"] = str(elsewhere)
    os.environ.setdefault("TRITON_CACHE_DIR", str(elsewhere / "triton"))


def _report(message: str, hint: str) -> None:
    hint = spelt(hint)
    console.print(f"[bold red]error:[/] {_escape(message)}")
    if hint:
        console.print(f"[bold]hint:[/]  {_escape(hint)}")


def _escape(text: str) -> str:
    return printable(" ".join(text.split())).replace("[", "\\[")
