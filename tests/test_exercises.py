"""pytest tests/test_exercises.py: every skeleton of exercises/ fails as it should, every solution passes its tests."""

import inspect
import re
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "exercises"
EXERCISES = sorted(FOLDER.glob("[0-9]*.py"))


def load(path: Path) -> ModuleType:
    spec = spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own(module: ModuleType, test: Callable[[str, Any], bool]) -> dict[str, Any]:
    """What is defined in the module itself and passes the test, by name."""
    inside = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    return {k: v for k, v in inside.items() if test(k, v)}


def tests_of(module: ModuleType) -> dict[str, Callable[[], None]]:
    return own(module, lambda name, _: name.startswith("test_"))


def to_be_written(module: ModuleType) -> dict[str, Any]:
    def missing(name: str, thing: Any) -> bool:
        return callable(thing) and inspect.getsource(thing).count("raise NotImplementedError") > 0

    return own(module, missing)


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)
def test_the_skeleton_fails_and_the_solution_passes(path: Path) -> None:
    exercise = load(path)
    tests, missing = tests_of(exercise), to_be_written(exercise)
    assert len(tests) >= 2 and missing
    for test in tests.values():
        with pytest.raises(NotImplementedError):  # and by nothing else: no import, no typing error
            test()
    # An answer that does nothing fails, too: no test passes by what it does not look at.
    for name, thing in missing.items():
        vars(exercise)[name] = (
            type(name, (), dict.fromkeys(vars(thing), lambda *_: None)) if isinstance(thing, type) else lambda *_: None
        )
    for test in tests.values():
        with pytest.raises((AssertionError, TypeError, AttributeError)):
            test()
    solution = load(FOLDER / "solutions" / path.name)
    for name, thing in missing.items():
        written = getattr(solution, name)
        if not isinstance(thing, type):
            ours, theirs = (list(inspect.signature(x).parameters) for x in (thing, written))
            assert ours == theirs, name
        vars(exercise)[name] = written
    for test in tests.values():
        test()


def test_each_exercise_says_what_it_is_and_how_to_run_it() -> None:
    listed = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", (FOLDER / "README.md").read_text(), re.M)
    assert [name for name, _ in listed] == [path.name for path in EXERCISES] and len(EXERCISES) >= 8
    for name, minutes in listed:
        text = (FOLDER / name).read_text()
        number = int(name[:2])
        assert re.match(rf'"""Exercise {number}, {minutes} minutes: ', text), name
        assert f"    python -m pytest -q exercises/{name}\n" in text and "\nLeads to: " in text
        for file in re.findall(r"\b(?:lengthen|kernels|exercises)/[\w/]+\.py\b", text):
            assert (FOLDER.parent / file).exists(), f"{name}: {file}"
    assert {path.name for path in (FOLDER / "solutions").iterdir() if path.suffix} == {path.name for path in EXERCISES}
