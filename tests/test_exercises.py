"""pytest tests/test_exercises.py: every skeleton of exercises/ fails as it should, every solution passes its tests."""

import inspect
import re
import subprocess
import sys
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
    module = sys.modules[spec.name] = module_from_spec(spec)  # where inspect looks for a class's source
    spec.loader.exec_module(module)
    return module


def own(module: ModuleType, test: Callable[[str, Any], bool]) -> dict[str, Any]:
    """What is defined in the module itself and passes the test, by name."""
    inside = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    return {k: v for k, v in inside.items() if test(k, v)}


def checks_of(module: ModuleType) -> dict[str, Callable[[], None]]:
    return own(module, lambda name, _: name.startswith("test_"))


def to_be_written(module: ModuleType) -> dict[str, Any]:
    def missing(_: str, thing: Any) -> bool:
        own_code = inspect.isfunction(thing) or inspect.isclass(thing)
        return own_code and "raise NotImplementedError" in inspect.getsource(thing)

    return own(module, missing)


def does_nothing(thing: Any) -> Any:
    """The same function, or a class with the same methods, that returns None."""
    if inspect.isclass(thing):
        methods = [name for name, value in vars(thing).items() if inspect.isfunction(value)]
        return type(thing.__name__, (), dict.fromkeys(methods, lambda *_: None))
    return lambda *_: None


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)
def test_the_skeleton_fails_and_the_solution_passes(path: Path) -> None:
    exercise = load(path)
    tests, missing = checks_of(exercise), to_be_written(exercise)
    assert len(tests) >= 2 and missing
    for test in tests.values():
        with pytest.raises(NotImplementedError):  # and by nothing else: no import, no typing error
            test()
    # An answer that does nothing fails, too: no test passes by what it does not look at.
    vars(exercise).update({name: does_nothing(thing) for name, thing in missing.items()})
    for test in tests.values():
        with pytest.raises((AssertionError, TypeError, AttributeError, RuntimeError)):
            test()
    solution = load(FOLDER / "solutions" / path.name)
    for name, thing in missing.items():
        written = getattr(solution, name)
        if inspect.isfunction(thing):
            ours, theirs = (list(inspect.signature(x).parameters) for x in (thing, written))
            assert ours == theirs, name
        vars(exercise)[name] = written
    for test in tests.values():
        test()


def test_it_is_run_as_it_says() -> None:
    """One of them by the command in its docstring: collected, and failing."""
    command = [sys.executable, "-m", "pytest", "-q", f"exercises/{EXERCISES[0].name}"]
    process = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert process.returncode == 1 and "3 failed" in process.stdout and "NotImplementedError" in process.stdout


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
