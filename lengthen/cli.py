"""The command line: flags that mean the same in every stage, errors in one line, progress.

Everything for people goes to stderr; stdout's last line is one compact JSON summary, for scripts. No torch here.
"""

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from lengthen.records import LowYield, UserError

console = Console(stderr=True, highlight=False, soft_wrap=True)
PLAIN_SECONDS = 10.0  # without a terminal: one progress line every so many seconds


# ---------------------------------------------------------------------------------------------------------
# Flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message, f"python {self.prog} --help")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Docstrings as they are written, and each default shown."""


def make_parser(doc: str, prog: str) -> argparse.ArgumentParser:
    """A strict parser: no abbreviated flags, no unknown ones, errors raised as UserError."""
    return _Parser(prog=prog, description=doc, formatter_class=_Help, allow_abbrev=False)


def at_least(low: float, kind: type = int) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` not below `low`."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number") from None
        if not value >= low:  # also false for nan
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return value

    return number


def between(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
        return value

    return number


def add_io_flags(parser: argparse.ArgumentParser, several_inputs: bool = False, input_required: bool = True) -> None:
    """--input --output --language --seed --overwrite --allow-partial --min-yield."""
    group = parser.add_argument_group("input / output")
    if input_required:
        many = {"nargs": "+"} if several_inputs else {}
        group.add_argument("--input", required=True, help="JSONL file of the stage before, or your own", **many)
    group.add_argument("--output", required=True, help="what is written; run the same command again to go on with it")
    group.add_argument("--language", choices=("en", "zh", "both"), default="both", help="records of which language")
    group.add_argument("--seed", type=int, default=0, help="of every random draw in this stage")
    group.add_argument("--overwrite", action="store_true", help="start afresh instead of going on")
    group.add_argument("--allow-partial", action="store_true", help="accept an input whose stage has not finished")
    group.add_argument("--min-yield", type=at_least(0), default=1, help="fewer records than this end in exit code 3")


def add_model_flags(parser: argparse.ArgumentParser, adapter: bool = True, required: bool = True) -> None:
    """--model --adapter --device --dtype --quantize --trust-remote-code."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=required, help="hub id, local folder, .gguf file, or smollm2 (the demo's)")
    if adapter:
        group.add_argument("--adapter", default="", help="LoRA folder in PEFT's format; empty = the base model")
    group.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto = bf16 on CUDA, else fp32",
    )
    group.add_argument(
        "--quantize", choices=("auto", "none", "nf4"), default="auto", help="auto = nf4 on CUDA below 40 GB, else none"
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository brings")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """--temperature --top-p --top-k --repetition-penalty --max-new-tokens --max-rows --kv-cache, and their defaults:
    the release's constants."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=at_least(0, float), default=0.7, help="0 = greedy")
    group.add_argument("--top-p", type=between(0.001, 1), default=0.8, help="share of the probability kept")
    group.add_argument("--top-k", type=at_least(0), default=20, help="tokens kept; 0 = all")
    group.add_argument("--repetition-penalty", type=at_least(0.01, float), default=1.1, help="1 = none")
    group.add_argument(
        "--max-new-tokens", type=at_least(0), default=0, help="tokens a draw; 0 = min(16384, context - prompt)"
    )
    group.add_argument(
        "--max-rows", type=at_least(0), default=0, help="texts decoded at a time; 0 = what the device takes"
    )
    group.add_argument(
        "--kv-cache",
        choices=("auto", "fp8"),
        default="auto",
        help="auto = keys and values in the model's dtype; fp8 = in half of bf16's memory, on a GPU",
    )


def sampling_settings(args: argparse.Namespace) -> dict:
    """The flags of sampling that change the result (max_rows does not)."""
    return {k: getattr(args, k) for k in ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")}


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
        """`done` of the total are finished; `note` is shown behind (tokens/s, say)."""
        if self.bar:
            self.bar.update(self.task, completed=done, note=note)
            return
        if self.first is None:
            self.first = done
        now = time.monotonic()
        if now - self.shown < PLAIN_SECONDS and done < self.total:
            return
        if done >= self.total and now - self.started < PLAIN_SECONDS:
            return  # over before it needed a progress line
        self.shown = now
        rate = (done - self.first) / (now - self.started)
        left = f", {(self.total - done) / rate:.0f} s left" if rate > 0 and done < self.total else ""
        say(f"  {self.what} {done}/{self.total} after {now - self.started:.0f} s{left}{'  ' + note if note else ''}")


@contextmanager
def progress(what: str, total: int):
    """A rich bar with rate and time left on a terminal, else a plain line every 10 s. Yields `.update(done, note)`."""
    if not console.is_terminal:
        yield _Ticker(what, total, None)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield _Ticker(what, total, bar)


def run(main: Callable[[], None]) -> None:
    """Call `main`, end the process with 0, 2 (a mistake), 3 (too little yield) or 130 (Ctrl-C), without a traceback."""

    def terminated(*_: Any) -> None:
        raise KeyboardInterrupt  # a polite kill is treated as Ctrl-C: locks are freed, files closed

    signal.signal(signal.SIGTERM, terminated)
    try:
        main()
    except UserError as error:
        _report(error.message, error.hint)
        sys.exit(3 if isinstance(error, LowYield) else 2)
    except KeyboardInterrupt:
        _report("interrupted", "finished samples are on disk: run the same command again to go on")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output is gone: nothing to say, nobody to say it to
        sys.exit(1)


def _report(message: str, hint: str) -> None:
    console.print(f"[bold red]error:[/] {_escape(message)}")
    if hint:
        console.print(f"[bold]hint:[/]  {_escape(hint)}")


def _escape(text: str) -> str:
    return printable(" ".join(text.split())).replace("[", "\\[")
