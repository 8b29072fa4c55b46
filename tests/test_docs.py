"""pytest tests/test_docs.py: the documents' commands parse, their links lead somewhere, the README keeps its size."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "prompts" / "README.md", ROOT / "exercises" / "README.md"]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = ("run", "generate", "extend", "train", "evaluate")
OTHER_TOOLS = {"--no-deps", "--dist", "--check", "--nproc-per-node"}  # pip, pytest, ruff, ...
OTHER_TOOLS |= {f"--{name}" for name in ("generation-config", "data-parallel-size", "api-server-count")}  # vLLM's
OTHER_TOOLS |= {f"--{name}" for name in ("enable-lora", "max-lora-rank", "max-num-seqs", "logits-processors")}
OTHER_TOOLS |= {f"--{name}" for name in ("repo-type", "include", "exclude")}  # hf's
IMAGE = re.compile(r'!\[[^\]]*\]\(([^)]+)\)|(?:src|srcset)="([^"]+)"')


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    return path.read_text("utf-8")


def code(text: str) -> list[str]:
    """What stands in a code block or span; a line that ends in a backslash, or a broken span, is joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(part.split()) for part in [*lines, *spans]]


def commands(text: str) -> list[list[str]]:
    """Every `python SCRIPT.py ...` of a document, split as a shell would, without the interpreter."""
    found = []
    for line in code(text):
        for match in re.finditer(r"(?:^|\s|/)python ((?:bench/)?\w+\.py\b[^|;&]*)", line):
            words = shlex.split(match[1], comments=True)
            found.append(["1" if word == "N" else word for word in words if word != "…"])
    return found


CASES = [(name(path), command) for path in DOCUMENTS for command in commands(text_of(path))]


@pytest.mark.parametrize("document, command", CASES, ids=[f"{path}: {' '.join(c)[:60]}" for path, c in CASES])
def test_every_command_parses(document, command):
    script, *flags = command
    assert (ROOT / script).exists(), script
    if script.startswith("bench/"):  # they import torch: their flags are looked up, not parsed
        handed_on = flags_of(importlib.import_module("run").make_parser()) if script == "bench/growth.py" else ()
        for flag in flags:
            known = not flag.startswith("--") or flag in handed_on or f'"{flag}"' in text_of(ROOT / script)
            assert known, f"{document}: {flag}"
        return
    module = importlib.import_module(script.removesuffix(".py"))
    module.make_parser().parse_args(flags)  # raises UserError
    if script == "run.py":
        module.main([*flags, "--dry-run"])  # also where nobody has the model or the servers: the plan is made


def test_the_test_finds_commands():
    text = "```bash\n.venv/bin/python run.py  # a\npython extend.py --rounds 1 \\\n    --stages N && ls\n```\n"
    text += "and `python\nx.py`"
    assert commands(text) == [["run.py"], ["extend.py", "--rounds", "1", "--stages", "1"], ["x.py"]]
    assert {name(README), "docs/results.md", "docs/study.md"} <= {document for document, _ in CASES}


def test_every_flag_that_is_mentioned_exists():
    """docs/log.md is history: a flag may have another name since."""
    known = set(OTHER_TOOLS)
    for script in SCRIPTS:
        known |= flags_of(importlib.import_module(script).make_parser())
    for path in (ROOT / "bench").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z][\w-]*)"', text_of(path)))
    for path in DOCUMENTS:
        if path.name != "log.md":
            for span in code(text_of(path)):
                mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", span))
                assert mentioned <= known, f"{name(path)}: {sorted(mentioned - known)}"


def flags_of(parser) -> set[str]:
    flags = set()
    for action in parser._actions:
        flags |= set(action.option_strings)
        if isinstance(action.choices, dict):  # subcommands
            for sub in action.choices.values():
                flags |= flags_of(sub)
    return flags


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_link_leads_somewhere(path):
    for link in links_of(path):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{name(path)}: {link}"
        assert not anchor or anchor in anchors(text_of(target)), f"{name(path)}: {link}"


def links_of(path: Path) -> list[str]:
    """Links and images, but those to the web."""
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", text_of(path), flags=re.S | re.M)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + [a or b for a, b in IMAGE.findall(text)]
    return [link for link in links if not re.match(r"https?:", link)]


def anchors(text: str) -> set[str]:
    """The headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_file_of_ours_that_is_named_exists(path):
    folders = "lengthen|kernels|prompts|bench|tests|recipes|docs"
    for span in code(text_of(path)):
        for file in re.findall(rf"(?:^|\s)((?:{folders})/[\w/.*{{}}-]+)", span):
            assert "{" in file or list(ROOT.glob(file)), f"{name(path)}: {file}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_name_said_to_be_in_a_file_is_there(path):
    for what, file in re.findall(r"`(\w+)` in\s+`([\w/]+\.py)`", text_of(path)):
        assert re.search(rf"^(def|class) {what}\b|^{what}\b.* = ", text_of(ROOT / file), re.M), f"{what} in {file}"


def test_contributing_names_every_room():
    tree = text_of(ROOT / "CONTRIBUTING.md").split("```")
    tree = next(part for part in tree if "lengthen/  " in part)
    rooms = [path for path in (ROOT / "lengthen").iterdir() if path.name[0] not in "_."]
    for path in [*rooms, *ROOT.glob("*.py")]:
        assert re.search(rf"^ *{re.escape(path.name)}(/|\b) ", tree, re.M), path.name


def test_the_readme_keeps_its_size():
    lines = text_of(README).splitlines()
    assert len(lines) <= 200
    for line in lines:
        assert len(re.sub(r"\(https?:[^)]*\)", "", line)) <= 110, line


def test_ci_runs_the_readmes_test_command():
    """.ci/run takes the block that installs requirements-dev.txt, and its last line as the tests."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    [block] = [block for block in blocks if "requirements-dev" in block]
    assert block.startswith("python3 -m venv .venv")
    assert block.rstrip().split("\n")[-1].startswith(".venv/bin/python -m pytest")


def test_the_readme_leads_to_every_document():
    """By itself, or by the reading order in docs/README.md, which lists all that lies beside it."""
    order = ROOT / "docs" / "README.md"
    linked = {(path.parent / link.partition("#")[0]).resolve() for path in (README, order) for link in links_of(path)}
    for path in DOCUMENTS[1:]:
        assert path in linked, name(path)
    assert f"]({name(order)})" in text_of(README)


def test_every_figure_is_shown_beside_the_command_that_made_it():
    shown = {}
    for path in DOCUMENTS:
        for section in re.split(r"^## ", text_of(path), flags=re.M):
            for link in (a or b for a, b in IMAGE.findall(section)):
                shown[(path.parent / link).resolve()] = section
    figures = [*ROOT.glob("docs/**/*"), *ROOT.glob("bench/**/*"), *ROOT.glob("*.*")]
    figures = [path for path in figures if path.suffix in {".png", ".svg", ".jpg", ".gif"}]
    assert figures
    for path in figures:
        assert path in shown, f"{name(path)} is shown nowhere"
        by_hand = path.suffix == ".svg" and "Drawn by hand" in text_of(path)
        assert by_hand or commands(shown[path]), f"{name(path)}: no command beside it"


def test_the_dark_figure_is_the_light_one_in_other_colours():
    light, dark = (text_of(ROOT / "docs" / f"pipeline{which}.svg") for which in ("", "-dark"))
    parts = [re.split(r"(<style>.*?</style>)", figure, flags=re.S) for figure in (light, dark)]
    assert [part[::2] for part in parts][0] == [part[::2] for part in parts][1]
    colour = r"#[0-9a-f]{6}\b"
    assert re.sub(colour, "", light) == re.sub(colour, "", dark) and light != dark
