"""A document as a notebook: its code blocks are run in order, as a reader runs them, each where the last has left off.

A ```bash block becomes a cell of the shell, a ```python block one of Python; what stands between them is text. So
tests/test_pages.py runs every command of the documents, and docs/tour.ipynb is docs/tour.md, run:

    python tests/pages.py      # about ten minutes; after every change of docs/tour.md
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode, v4

ROOT = Path(__file__).parent.parent
TOUR, NOTEBOOK = ROOT / "docs" / "tour.md", ROOT / "docs" / "tour.ipynb"
HANG = 3600  # seconds; of a cell
# What a machine may lack. A cell with one of these words is shown and not run.
LACKS = {
    "pip install": "a network",
    "hf upload": "a network",
    "llama-cli": "llama.cpp",
    "vllm serve": "vLLM and a GPU",
    "/v1": "a server that answers",
    "LENGTHEN_ENGINE_PYTHON": "vLLM",
    "runs/demo": "the demo's run",
    "Qwen/": "a network, or 15 GB of weights",
}
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
# Only in the notebook: it lies in docs/, and its commands start from the repository.
START = """import os

if not os.path.exists("run.py"):
    os.chdir("..")"""


def missing(code: str) -> str:
    """What this cell needs that a machine may not have; "" = nothing."""
    return next((what for word, what in LACKS.items() if word in code), "")


def notebook(text: str) -> NotebookNode:
    """The cells of a document in Markdown, not run yet."""
    cells = [v4.new_code_cell(START)]
    for i, part in enumerate(BLOCK.split(text)):
        code = part.strip()
        if i % 3 == 0 and code:  # text, language, code, text, ...
            cells.append(v4.new_markdown_cell(code))
        elif i % 3 == 1:
            language = part
        elif i % 3 == 2:
            cells.append(v4.new_code_cell("%%bash -e\n" * (language == "bash") + code))
            if missing(code):
                cells[-1].metadata["tags"] = ["skip-execution"]  # nbclient knows this tag
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # by default drawn at random
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return v4.new_notebook(cells=cells, metadata=kernel)


def run(book: NotebookNode, folder: Path) -> NotebookNode:
    """Run the cells in that folder; nbclient's CellExecutionError with the output of the one that fails."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{before}"  # `python` is this one
    try:
        # This Python's kernel, even where the user has installed another one under the same name.
        kernels = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
        client = NotebookClient(book, km=manager, timeout=HANG, resources={"metadata": {"path": folder}})
        return client.execute(cleanup_kc=True)
    finally:
        os.environ["PATH"] = before


def copy_of_the_tree(folder: Path) -> Path:
    """The repository without what git ignores: a document's commands write into it."""
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).exists():  # not one that was deleted and is listed still
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "tree" / name)
    return folder / "tree"


def tidied(book: NotebookNode) -> NotebookNode:
    """Without what differs from run to run and machine to machine (times, what stages say on stderr), lines cut."""
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
            for out in cell.outputs:
                if "text" in out:  # a stage's summary is one line, however long
                    out["text"] = re.sub(r"(?m)^(.{240}).{20,}$", r"\1 ...", out["text"])
    book.metadata.pop("language_info", None)
    return book


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """What was printed in one; a shell's output comes in parts of 100 characters."""
    kept: list[NotebookNode] = []
    for out in outputs:
        if kept and out.get("name") == kept[-1].get("name") == "stdout":
            kept[-1]["text"] += out["text"]
        elif out.get("name") != "stderr":
            kept.append(out)
    return kept


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        nbformat.write(tidied(run(notebook(TOUR.read_text("utf-8")), copy_of_the_tree(Path(name)))), NOTEBOOK)
