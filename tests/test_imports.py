"""pytest tests/test_imports.py: who may import whom, read from the source; and that the leaves load without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {path.stem for path in ROOT.glob("*.py")}
LEAVES = {"lengthen.records", "lengthen.text", "lengthen.demands", "lengthen.cli"}  # these never need torch
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
# Each may import what stands before it. A module that is not named here has no rank: it is refused until it gets one.
LAYERS = [
    {"kernels"},
    LEAVES,
    {"lengthen.chat", "lengthen.attention", "lengthen.checkpoint", "lengthen.packed", "lengthen.figures"},
    {"lengthen.lora"},
    {"lengthen.model", "lengthen.sampler"},
    {"lengthen.stage"},
    STAGES,
]


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[len(ROOT.parts) :] if path.is_relative_to(ROOT) else parts[-1:]).removesuffix(".__init__")


def sources(folder: str = "") -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


OURS = {module_name(path) for folder in ("", "lengthen", "kernels") for path in sources(folder)}


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


def layer(module: str) -> int:
    name = "kernels" if module.split(".")[0] == "kernels" else module
    found = [i for i, modules in enumerate(LAYERS) if name in modules]
    assert found, f"{module} has no layer: give it one in LAYERS"
    return found[0]


@pytest.mark.parametrize("path", sources() + sources("lengthen") + sources("kernels"), ids=module_name)
def test_nothing_imports_upward(path):
    name = module_name(path)
    if name == "lengthen":
        assert ast.get_docstring(ast.parse(path.read_text())) and not imports(path)
        return
    for imported in imports(path):
        if imported.split(".")[0] in {"tests", "bench", "tiny"}:
            pytest.fail(f"{name} imports {imported}")
        if imported in OURS - {"lengthen"}:
            same = {name.split(".")[0], imported.split(".")[0]} == {"kernels"} or {name, imported} <= LEAVES
            assert layer(imported) < layer(name) or same, f"{name} imports {imported}, which stands above or beside it"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_no_stage_imports_a_stage(stage):
    assert not imports(ROOT / f"{stage}.py") & STAGES


@pytest.mark.parametrize("module", sorted(LEAVES | {"lengthen.chat"}))
def test_leaves_never_import_torch(module):
    path = ROOT / (module.replace(".", "/") + ".py")
    assert not {name.split(".")[0] for name in imports(path, top_only=True)} & TORCH
    if module in LEAVES:
        assert not {name.split(".")[0] for name in imports(path)} & TORCH


def test_the_leaves_load_without_torch():
    """The same, as it runs: also what they import in turn."""
    code = f"import sys; import {', '.join(sorted(LEAVES))}, lengthen.chat; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"lengthen.cli", "lengthen.chat"} <= set(done.stdout.split())
    assert not {name.split(".")[0] for name in done.stdout.split()} & TORCH


def test_the_test_sees_every_kind_of_import(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import a, b.c\nfrom d import e\nfrom lengthen import text\nif True:\n    import f\n"
        "try:\n    import g\nexcept ImportError:\n    pass\n"
        "def h():\n    import i\nclass j:\n    def k(self):\n        from l.m import n\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import o\n"
    )
    always = {"a", "b.c", "d", "lengthen.text", "f", "g", "typing"}
    assert imports(path, top_only=True) == always
    assert imports(path) == always | {"i", "l.m", "o"}
