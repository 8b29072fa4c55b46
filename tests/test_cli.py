"""cli.py and the command lines of all stages.   python -m pytest tests/test_cli.py"""

import argparse
import importlib
import io
import itertools
import json
import os
import signal
import subprocess
import time
from functools import cache

import cold
import pytest
from rich.console import Console
from rich.table import Table

from lengthen import cli
from lengthen.records import LowYield, UserError

STAGES = ("generate", "extend", "train", "evaluate", "run")


def test_help_lines_are_there_and_unique_in_each_parser():
    """Copy-pasted help is how flags come to say what another one does."""
    for name in STAGES:
        for parser in parsers_of(name):
            # run.py has the flags of each stage under its name: --extend.rounds is `rounds` of "extend".
            helps = [(a.dest.rpartition(".")[0], a.help) for a in parser._actions if a.dest != "help"]
            assert all(help for _, help in helps), f"{name}: a flag without help"
            assert len(set(helps)) == len(helps), f"{name}: two flags with the same help"


def test_a_flag_means_the_same_in_every_stage():
    meaning = {}
    shared = ("model", "adapter", "language", "seed", "device", "quantize", "max_new_tokens", "overwrite")
    for name in ("generate", "extend", "train", "evaluate"):
        for parser in parsers_of(name):
            for action in parser._actions:
                if action.dest in shared:
                    assert meaning.setdefault(action.dest, action.help) == action.help, (name, action.dest)


def parsers_of(name: str) -> list[argparse.ArgumentParser]:
    """The parser of a stage, or those of its subcommands: caught in the act of parsing."""
    module, found = importlib.import_module(name), []
    real = argparse.ArgumentParser.parse_known_args

    def catch(self, *args, **kwargs):
        found.append(self)
        raise SystemExit

    argparse.ArgumentParser.parse_known_args = catch
    try:
        with pytest.raises(SystemExit):
            module.main([])
    finally:
        argparse.ArgumentParser.parse_known_args = real
    subs = [a for a in found[0]._actions if isinstance(a, argparse._SubParsersAction)]
    return [p for a in subs for p in a.choices.values()] or found


def test_unknown_and_abbreviated_flags_are_errors():
    parser = cli.make_parser("doc", "x.py")
    cli.add_flags(parser, "sampling", cli.SamplingFlags)
    for argv in (["--temprature", "1"], ["--temp", "1"], ["--top-p", "2"], ["--top-k", "x"], ["--temperature", "nan"]):
        with pytest.raises(UserError) as error:
            parser.parse_args(argv)
        assert error.value.hint == "python x.py --help"


def test_required_flags_are_not_empty_and_a_default_of_0_is_shown():
    parser = cli.make_parser("doc", "x.py")
    cli.add_flags(parser, "input", cli.InputFlags)
    cli.add_flags(parser, "output", cli.OutputFlags)
    for argv in (["--input", "a", "--output", ""], ["--input", "a", "", "--output", "b"]):
        with pytest.raises(UserError, match="must not be empty"):
            parser.parse_args(argv)
    shown = " ".join(parser.format_help().split())
    assert "this stage (default: 0)" in shown and "not finished --min-yield" in shown  # a switch has none


@pytest.mark.parametrize(
    "raised, code, text",
    [
        (UserError("no [such] file", "look [here]"), 2, "error: no [such] file\nhint:  look [here]\n"),
        (UserError("no hint"), 2, "error: no hint\n"),
        (LowYield("too few"), 3, "error: too few\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: memory ran out\nhint:  --quantize nf4"),
    ],
)
def test_mistakes_end_in_one_line_and_an_exit_code(monkeypatch, raised, code, text):
    shown = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=shown, highlight=False, soft_wrap=True))

    def main():
        raise raised

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == code and shown.getvalue().startswith(text)


@pytest.mark.parametrize("kind", [ZeroDivisionError, RuntimeError])
def test_a_bug_keeps_its_traceback(kind):
    def main():
        raise kind

    with pytest.raises(kind):
        cli.run(main)


def test_terminal_escapes_in_model_text_are_shown_not_obeyed(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=shown, highlight=False, soft_wrap=True))
    cli.say("a \x1b[31mred\x1b[0m [bold]word[/bold] \u202e end")
    assert shown.getvalue() == "a \\x1b[31mred\\x1b[0m [bold]word[/bold] \\u202e end\n"


def test_brackets_and_escapes_in_a_table_are_text(monkeypatch):
    shown = io.StringIO()
    table = Table(title=cli.shown("[b]title[/b]"), box=None, show_header=False)
    table.add_row(cli.shown("[/red] \x1b[31m \u200f"))
    Console(file=shown, width=60).print(table)
    assert "[b]title[/b]" in shown.getvalue() and "[/red] \\x1b[31m \\u200f" in shown.getvalue()


def test_emit_is_one_compact_line(capsys):
    cli.emit({"a": [1, 2], "b": "文\n"})
    assert capsys.readouterr().out == '{"a":[1,2],"b":"文\\n"}\n'


def test_emit_writes_what_would_act_as_an_escape(capsys):
    acting = {"\x1b[31m": "\x7f \x9b \u202e \ud83d \U000e0041"}
    cli.emit(acting)
    line = capsys.readouterr().out
    assert line.isascii() and line.rstrip("\n").isprintable() and json.loads(line) == acting


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    shown, clock = io.StringIO(), itertools.count()
    monkeypatch.setattr(cli, "console", Console(file=shown, highlight=False, soft_wrap=True))
    monkeypatch.setattr(cli.time, "monotonic", lambda: float(next(clock)))  # s; each look at the clock takes one
    with cli.progress("draft", total=100) as ticker:
        for done in range(101):
            ticker.update(done, "12 tok/s")
    lines = shown.getvalue().splitlines()
    assert cli.PLAIN_SECONDS == 10 and len(lines) == 11  # every 10 s, and one at the end
    assert "12 tok/s" in lines[0] and lines[-1].startswith("  draft 100/100 after 101 s")


def test_the_time_left_is_not_told_by_the_first_that_ends(monkeypatch):
    """Of 800 extensions the first ended after 667 s: "about 533135 s left"."""
    shown, clock = io.StringIO(), itertools.count(step=cli.PLAIN_SECONDS)
    monkeypatch.setattr(cli, "console", Console(file=shown, highlight=False, soft_wrap=True))
    monkeypatch.setattr(cli.time, "monotonic", lambda: float(next(clock)))
    for total, numbers in ((800, (0, 1, 9, 10)), (20, (0, 1, 2))):
        with cli.progress("x", total=total) as ticker:
            for done in numbers:
                ticker.update(done)
    lines = shown.getvalue().splitlines()
    assert ["left" in line for line in lines] == [False, False, False, True, False, False, True]
    assert "10/800 after 40 s, about 3160 s left" in lines[3]


def test_on_a_narrow_terminal_the_note_is_cut_and_not_the_count(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=shown, width=80, force_terminal=True, color_system=None))
    with cli.progress("instructions", total=5000) as ticker:
        ticker.update(134, "8 accepted, 134 texts written, 3201 tokens/s (8% of the memory's speed)")
    assert "134/5000" in shown.getvalue() and "8 accepted" in shown.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_texts_are_shown_side_by_side_on_a_terminal_and_line_by_line_elsewhere(monkeypatch, terminal):
    shown = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=shown, width=80, force_terminal=terminal, color_system=None))
    long = "[b]long[/b] " + "word " * 200
    cli.show_texts([("draft, 2 words", "A\n\nbell\x07."), ("extension, 201 words", long)])
    lines = shown.getvalue().splitlines()
    assert len(long) > 3 * cli.OPENING / 2 and "[…]" in shown.getvalue() and "\x07" not in shown.getvalue()
    if terminal:
        assert any("draft, 2 words" in line and "extension, 201 words" in line for line in lines)
        assert any("A bell\\x07." in line and "[b]long[/b] word" in line for line in lines)
    else:
        assert lines[0] == "  draft, 2 words: A bell\\x07." and "  extension, 201 words: [b]long[/b]" in lines[1]


def test_an_opening_ends_with_a_word_if_there_is_one():
    assert cli.opening("a b\n\nc") == "a b c"
    assert cli.opening("word " * 100) == ("word " * 64).strip() + " […]" and cli.OPENING == 320
    assert cli.opening("字" * 400) == "字" * 320 + " […]"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_exit_130(sent):
    started = cold.Started(
        "-c", "import time; from lengthen import cli; cli.run(lambda: (print('up', flush=True), time.sleep(3600)))"
    )
    while not started.text()[0]:
        time.sleep(0.01)
    started.send_signal(sent)
    done = started.wait()
    assert done.returncode == 130 and "error: interrupted" in done.stderr and "Traceback" not in done.stderr


@cache
def mistyped(stage: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """A stage with a flag that it does not have, in a new interpreter -> (what came of it, the modules it imported)."""
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print(*sys.modules)); "
        f"sys.argv = ['{stage}.py', '--nonsense']; runpy.run_path('{stage}.py', run_name='__main__')"
    )
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = cold.interpreter("-c", code, env=env)
    return done, done.stdout.split()


@pytest.mark.parametrize("stage", STAGES)
def test_a_mistyped_command_is_two_lines(stage):
    done, _ = mistyped(stage)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 2, lines
    assert lines[0].startswith("error:") and lines[1].startswith("hint:")


@pytest.mark.parametrize("stage", STAGES)
def test_a_mistyped_command_does_not_wait_for_torch(stage):
    assert "torch" not in mistyped(stage)[1]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_sets_how_threads_wait_before_torch_asks(stage):
    """The package sets it (tests/test_imports.py), so it must be imported first."""
    modules = mistyped(stage)[1]
    assert "lengthen" in modules and ("torch" not in modules or modules.index("lengthen") < modules.index("torch"))


def test_help_is_complete():
    done = cold.run("run.py", "--help")
    assert done.returncode == 0 and "python run.py --dry-run" in done.stdout and "--adapter-mode" in done.stdout
