"""pytest tests/test_imports.py: who may import whom, read from the source; and that the leaves load without torch."""

import ast
import importlib.util
import os
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import cold
import pytest

ROOT = Path(__file__).parent.parent
STAGES = {path.stem for path in ROOT.glob("*.py")}
# Who may import whom: a module imports from its own folder and from lower ranks, never from another folder of its rank.
RANKS = [
    {"lengthen.errors"},
    {"kernels", "lengthen.text"},
    {"lengthen.records", "lengthen.reading", "lengthen.jobs", "lengthen.cli", "lengthen.steps", "lengthen.endpoint"},
    {"lengthen.models"},
    {"lengthen.sampling", "lengthen.training"},
    {"lengthen.stage", "lengthen.tasks"},
    {"lengthen.evaluation"},
    {"lengthen.costs"},
    STAGES - {"run"},
    {"run"},  # the loop stands above the stages: it takes their flags from them
]
ONE_ROOM = [
    {"lengthen.records", "lengthen.reading", "lengthen.jobs", "lengthen.cli", "lengthen.steps", "lengthen.endpoint"},
    {"lengthen.stage", "lengthen.tasks"},
]
# What loads without torch, so that --help, a mistake in the input and a finished stage do not wait for it.
WITHOUT_TORCH = {
    *(f"lengthen.{name}" for name in ("records", "reading", "jobs", "cli", "steps", "endpoint", "stage", "tasks")),
    *("lengthen.models.cards", "lengthen.models.chat", "lengthen.models.families", "lengthen.models.hub"),
    "lengthen.sampling.request",
    *(f"lengthen.training.{name}" for name in ("settings", "pairs", "folder", "parallel", "steplog")),
    *("generate", "extend", "train", "evaluate", "run"),
    *(f"lengthen.sampling.{name}" for name in ("scheduler", "pages", "prefix_cache", "lookup", "stopping")),
}
FOLDERS_WITHOUT_TORCH = ("lengthen.text", "lengthen.evaluation", "lengthen.costs")
TORCH = {
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "triton",
    "accelerate",
    "peft",
    "kernels",
}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[len(ROOT.parts) :] if path.is_relative_to(ROOT) else parts[-1:]).removesuffix(".__init__")


def sources() -> list[Path]:
    """All but tests and benches."""
    return sorted([*ROOT.glob("*.py"), *(ROOT / "lengthen").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


OURS = {module_name(path) for path in sources()}
WITHOUT_TORCH |= {name for name in OURS if name.startswith(FOLDERS_WITHOUT_TORCH)}


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Names of the modules that a file imports; `top_only`: only those that come with it (not inside functions, and
    not for type checkers alone)."""
    names = set()
    todo = list(ast.parse(path.read_text("utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names |= {f"{base}.{a.name}" if f"{base}.{a.name}" in OURS else base for a in node.names}
        elif top_only and isinstance(node, ast.FunctionDef):
            continue
        elif top_only and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        else:
            todo += ast.iter_child_nodes(node)
    return names


def room(module: str) -> str:
    """The folder of a module below lengthen/, or the module itself where it lies in none."""
    parts = module.split(".")
    return parts[0] if parts[0] == "kernels" else ".".join(parts[:2])


def rank(module: str) -> int:
    return next(i for i, rooms in enumerate(RANKS) if room(module) in rooms)


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_nothing_imports_upward_or_sideways(path):
    name = module_name(path)
    if name == "lengthen":
        return  # test_the_package_imports_nothing_of_ours
    for imported in imports(path):
        assert imported.split(".")[0] not in {"tests", "bench", "tiny"}, f"{name} imports {imported}"
        if imported not in OURS or imported == "lengthen":
            continue
        rooms = {room(name), room(imported)}
        beside = len(rooms) == 1 or any(rooms <= one for one in ONE_ROOM)
        assert rank(imported) < rank(name) or beside, f"{name} imports {imported}, which stands above or beside it"


def test_no_imports_in_a_circle():
    """Also through functions: a module that needs the one that needs it is one module."""
    graph = {module_name(path): imports(path) & OURS for path in sources()}
    order = list(TopologicalSorter({m: needs - {"kernels"} for m, needs in graph.items()}).static_order())
    assert order.index("lengthen.records") < order.index("lengthen.models.chat")
    assert order.index("lengthen.models.chat") < order.index("lengthen.models.loading")
    for module, needs in graph.items():
        if module.startswith("lengthen.sampling"):
            assert "lengthen.models.loading" not in needs, f"{module} works on any model: it must not load one"


def test_the_package_imports_nothing_of_ours():
    assert imports(ROOT / "lengthen" / "__init__.py") == {"fcntl", "os", "sys"}


def test_how_threads_wait_and_memory_is_paged_is_the_users_choice_first():
    """OpenMP reads its policy when torch loads it: threads that always spin made steps ten times as long beside other
    work. torch reads whether to ask for large pages. (Every stage imports `lengthen` before torch: tests/test_cli.py.)
    """
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")
    code = f"import os; import lengthen; print(*(os.environ.get(name) for name in {names}))"
    for given, want in (
        ({}, "PASSIVE 50000 1"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None 1"),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE 7 1"),
        ({"THP_MEM_ALLOC_ENABLE": "0"}, "PASSIVE 50000 0"),
    ):
        env = {k: v for k, v in os.environ.items() if k not in names} | given
        assert cold.interpreter("-c", code, env=env).stdout.strip() == want


@pytest.mark.parametrize("stage", sorted(STAGES - {"run"}))
def test_no_stage_imports_a_stage(stage):
    assert not imports(ROOT / f"{stage}.py") & STAGES


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH))
def test_what_must_not_import_torch_does_not(module):
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    assert not {name.split(".")[0] for name in imports(path, top_only=True)} & TORCH


def test_it_loads_without_torch():
    """The same, as it runs: also what they import in turn."""
    code = f"import sys; import {', '.join(sorted(WITHOUT_TORCH))}; print(*sys.modules)"
    done = cold.interpreter("-c", code)
    assert done.returncode == 0, done.stderr
    assert {"lengthen.cli", "lengthen.models.chat"} <= set(done.stdout.split())
    assert not {name.split(".")[0] for name in done.stdout.split()} & TORCH


def test_settings_below_the_scripts_are_typed():
    """A Namespace has whatever attributes a command line had: only cli.py, which makes settings of it, takes one."""
    wrong = []
    for path in sources():
        name = module_name(path)
        if name in STAGES or name == "lengthen.cli":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            types = [arg.annotation for arg in every if arg] + [node.returns]
            wrong += [f"{name}.{node.name}" for t in types if t and "Namespace" in ast.unparse(t)]
    assert wrong == []


def test_no_function_hands_a_value_on_through_its_module():
    """What a function needs is an argument: a batch kept in a module's global belongs to whoever called last."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            assert not isinstance(node, ast.Global), f"{module_name(path)} rebinds {', '.join(node.names)}"


def test_the_test_sees_every_kind_of_import(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import a, b.c\nfrom d import e\nfrom lengthen import cli\nif True:\n    import f\n"
        "try:\n    import g\nexcept ImportError:\n    pass\n"
        "def h():\n    import i\nclass j:\n    def k(self):\n        from l.m import n\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import o\n"
    )
    always = {"a", "b.c", "d", "lengthen.cli", "f", "g", "typing"}
    assert imports(path, top_only=True) == always
    assert imports(path) == always | {"i", "l.m", "o"}


@pytest.mark.parametrize("path", sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.stem)
def test_every_bench_finds_what_it_imports(path):
    """bench/sampler.py imported a function of extend.py that had got another name."""
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    assert path.stem == "models" or callable(module.main)
