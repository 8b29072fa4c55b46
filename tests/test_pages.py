"""pytest tests/test_pages.py: the documents' commands run, and docs/tour.ipynb is docs/tour.md, run.

python -m pytest -m pages tests/test_pages.py
"""

import re
from pathlib import Path

import nbformat
import pages
import pytest
from nbclient.exceptions import CellExecutionError

DOCUMENTS = [pages.ROOT / "README.md", *sorted((pages.ROOT / "docs").glob("*.md"))]
WITH_CODE = [
    path
    for path in DOCUMENTS
    if any(not pages.missing(code) for _, code in re.findall(pages.BLOCK, path.read_text("utf-8")))
]


@pytest.mark.pages
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_every_command_runs(path: Path, tmp_path: Path) -> None:
    """In order, in a copy of the tree, from an empty runs/."""
    pages.run(pages.notebook(path.read_text("utf-8")), pages.copy_of_the_tree(tmp_path))


def test_a_command_that_fails_is_noticed(tmp_path: Path) -> None:
    text = "Text.\n\n```python\nx = 1\n```\n\nMore.\n\n```bash\npip install nothing\n```\n\n```bash\nfalse\ntrue\n```\n"
    book = pages.notebook(text)
    kinds = [cell.cell_type for cell in book.cells]
    assert kinds == ["code", "markdown", "code", "markdown", "code", "code"]
    (tmp_path / "run.py").touch()
    with pytest.raises(CellExecutionError, match="exit status 1"):
        pages.run(book, tmp_path)
    assert not book.cells[4].get("execution_count"), "what needs a network was run"


def test_the_notebook_is_the_tour() -> None:
    book = nbformat.read(pages.NOTEBOOK, 4)
    fresh = pages.notebook(pages.TOUR.read_text("utf-8"))
    assert [cell.source for cell in book.cells] == [cell.source for cell in fresh.cells], "python tests/pages.py"
    nbformat.validate(book)


def test_the_notebook_was_run_and_shows_no_machine() -> None:
    text, figures = pages.NOTEBOOK.read_text("utf-8"), 0
    assert len(text) < 400_000
    for cell in nbformat.reads(text, 4).cells:
        if cell.cell_type == "code" and "tags" not in cell.metadata:
            assert cell.execution_count, cell.source
            for out in cell.outputs:
                assert out.output_type != "error"
                figures += "image/png" in out.get("data", {})
                shown = out.get("text", "") + out.get("data", {}).get("text/plain", "")
                assert not re.search(r"(^|[\s'\"(=])/(home|root|tmp|work|opt|Users|usr|content)\b", shown), shown
    assert figures >= 3
