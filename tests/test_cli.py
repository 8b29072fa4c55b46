"""cli.py and the command lines of all stages.   python -m pytest tests/test_cli.py"""

import argparse
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from lengthen import cli
from lengthen.records import LowYield, UserError

ROOT = Path(__file__).parents[1]
STAGES = ("generate", "extend", "train", "evaluate", "run")


def test_help_lines_are_there_and_unique_in_each_parser():
    """Copy-pasted help is how flags come to say what another one does."""
    for name in STAGES:
        for parser in parsers_of(name):
            helps = [a.help for a in parser._actions if a.dest != "help"]
            assert all(helps), f"{name}: a flag without help"
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


@pytest.mark.parametrize(
    "raised, code, text",
    [
        (UserError("no [such] file", "look [here]"), 2, "error: no [such] file\nhint:  look [here]\n"),
        (UserError("no hint"), 2, "error: no hint\n"),
        (LowYield("too few"), 3, "error: too few\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
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


def test_a_bug_keeps_its_traceback():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
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
    shown = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=shown, highlight=False, soft_wrap=True))
    monkeypatch.setattr(cli, "PLAIN_SECONDS", 0.05)
    with cli.progress("draft", total=100) as ticker:
        for done in range(101):
            ticker.update(done, "12 tok/s")
            time.sleep(0.002)
    lines = shown.getvalue().splitlines()
    assert 2 <= len(lines) <= 40 and lines[-1].startswith("  draft 100/100 after") and "12 tok/s" in lines[0]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_exit_130(sent):
    code = "import time; from lengthen import cli; cli.run(lambda: (print('up', flush=True), time.sleep(30)))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    process.stdout.readline()
    os.kill(process.pid, sent)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and b"error: interrupted" in err and b"Traceback" not in err


@pytest.mark.parametrize("stage", STAGES)
def test_a_mistyped_command_is_two_lines_without_torch(stage):
    """No traceback, exit code 2, and no seconds spent on importing torch for it."""
    code = (
        f"import sys, runpy; sys.argv = ['{stage}.py', '--nonsense']; runpy.run_path('{stage}.py', run_name='__main__')"
    )
    process = subprocess.run([sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True)
    told = [line for line in process.stderr.splitlines() if not line.startswith("import time:")]
    assert process.returncode == 2 and len(told) == 2, told
    assert told[0].startswith("error:") and told[1].startswith("hint:")
    if stage == "train":
        return  # a training script without torch at its top would be hard to read
    assert not any(line.split("|")[-1].strip() == "torch" for line in process.stderr.splitlines())


def test_prints_help_quickly_and_completely():
    process = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and "python run.py --dry-run" in process.stdout
    assert "--adapter-mode" in process.stdout
