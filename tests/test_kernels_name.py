"""pytest tests/test_kernels_name.py: our folder `kernels` and Hugging Face's package of that name live side by side.

Each case is a process of its own. The other package is a stand-in with the real one's layout (names in `__init__`,
submodules, its own absolute and relative imports, metadata), and the real one too where it is installed.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What transformers takes out of `kernels` when it accepts the version (transformers/integrations/hub_kernels.py).
WANTED = (
    "CUDAProperties Device KernelizeFallback LayerRepository LocalLayerRepository Mode ROCMProperties kernelize "
    "register_kernel_mapping replace_kernel_forward_from_hub use_kernel_forward_from_hub use_kernel_mapping "
    "use_kernelized_func get_kernel"
).split()
BOTH_WORK = """
import kernels
assert importlib.util.find_spec("kernels.linear_cross_entropy").origin == OURS
from kernels import get_kernel, Mode
from kernels.layer.mode import Mode as same
assert Mode is same and get_kernel.__module__ == "kernels.load"
import kernels.layer, kernels.load
assert kernels.layer.Mode is Mode and kernels.__version__ == importlib.metadata.version("kernels")
"""


@pytest.fixture
def namesake(tmp_path: Path):
    """A distribution `kernels` of a chosen version, in a folder to be put on the path."""

    def make(version: str) -> Path:
        package = tmp_path / version / "kernels"
        (package / "layer").mkdir(parents=True)
        names = [n for n in WANTED if n not in ("Mode", "get_kernel")]
        (package / "__init__.py").write_text(
            "import importlib.metadata\nimport sys\n\n"
            '__version__ = importlib.metadata.version("kernels")\n'
            'sys.modules["namesake_was_run"] = sys\n'
            "from kernels.load import get_kernel\nfrom .layer import Mode\nfrom kernels._names import *\n"
        )
        (package / "_names.py").write_text(
            "def pass_through(*a, **k):\n    return lambda thing: thing\n\n"
            + "\n".join(f"{n} = pass_through if {n[0].islower()} else type({n!r}, (), {{}})" for n in names)
            + f"\n__all__ = {names!r}\n"
        )
        (package / "load.py").write_text(
            "from kernels.layer.mode import Mode\n\ndef get_kernel(*a, **k):\n    return Mode\n"
        )
        (package / "layer" / "__init__.py").write_text("from .mode import Mode\n")
        (package / "layer" / "mode.py").write_text("class Mode:\n    INFERENCE = 1\n")
        info = tmp_path / version / f"kernels-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
        (info / "top_level.txt").write_text("kernels\n")
        return package.parent

    return make


def run(code: str, path: list[Path], cwd: Path = ROOT) -> str:
    """Run code with exactly these folders in front on the path; its output. Fails with the process's own traceback."""
    ours = str(ROOT / "kernels" / "linear_cross_entropy.py")
    start = (
        f"import importlib.metadata, importlib.util, sys; sys.path[:1] = {[str(p) for p in path]!r}; OURS = {ours!r}"
    )
    code = f"{start}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_alone_it_is_an_ordinary_package_without_torch():
    out = run("import kernels; print('torch' in sys.modules, hasattr(kernels, 'get_kernel'))", [ROOT])
    installed = bool(list(importlib.metadata.distributions(name="kernels")))
    assert out.split() == ["False", str(installed)]


def test_nothing_of_the_other_one_runs_until_it_is_asked_for(namesake):
    code = """
import kernels
hasattr(kernels, "__wrapped__")
print("namesake_was_run" in sys.modules)
kernels.get_kernel
print("namesake_was_run" in sys.modules)
"""
    assert run(code, [ROOT, namesake("0.18.2")]).split() == ["False", "True"]


@pytest.mark.parametrize("version", ["0.18.2", "0.17.2"])
def test_both_work_with_the_other_one_behind(namesake, version):
    run(BOTH_WORK, [ROOT, namesake(version)])


def test_both_work_when_the_other_one_was_imported_first(namesake):
    run("import kernels, kernels.layer\nimport lengthen.models.loading\n" + BOTH_WORK, [namesake("0.18.2"), ROOT])


@pytest.mark.parametrize("order", ["behind", "before"])
def test_transformers_takes_its_names_from_the_other_one(namesake, order):
    """0.18.2 is a version that transformers 5.23 accepts: it then imports 14 names out of `kernels`."""
    code = """
import transformers.integrations.hub_kernels as hub
from transformers.utils.import_utils import KERNELS_MAX_VERSION, is_kernels_available
accepted = KERNELS_MAX_VERSION == "0.19.0"  # other releases accept other versions
assert is_kernels_available() or not accepted
assert not accepted or hub.LayerRepository.__module__ == "kernels._names"
"""
    other = namesake("0.18.2")
    if order == "before":
        run("import lengthen.models.loading\n" + code + BOTH_WORK, [other, ROOT])
    else:
        run(code + BOTH_WORK, [ROOT, other])


def test_transformers_does_not_take_ours_for_the_other_one():
    if list(importlib.metadata.distributions(name="kernels")):
        pytest.skip("the real one is installed")
    code = "from transformers.utils.import_utils import is_kernels_available as there\nassert not there()"
    run(code, [ROOT])


def test_transformers_and_bitsandbytes_load_beside_a_version_that_does_not_fit(namesake):
    run("import kernels, transformers.integrations.hub_kernels, bitsandbytes", [ROOT, namesake("0.17.2")])


def test_a_missing_name_is_an_import_error(namesake):
    code = "\nimport kernels\ntry:\n    from kernels import no_such_thing\nexcept ImportError:\n    print('refused')\n"
    assert run(code, [ROOT, namesake("0.18.2")]) == run(code, [ROOT]) == "refused\n"


def test_a_broken_one_harms_only_who_asks_for_it(namesake):
    """Its compiled part may not fit the machine."""
    folder = namesake("0.17.2")
    (folder / "kernels" / "load.py").write_text("raise ImportError('no such symbol')\n")
    code = """
import kernels
for _ in range(2):
    try:
        from kernels import get_kernel
    except ImportError as error:
        print(error)
"""
    assert run(code, [ROOT, folder]) == "no such symbol\n" * 2


@pytest.mark.skipif(not list(importlib.metadata.distributions(name="kernels")), reason="the real one is not installed")
def test_the_real_one():
    run(BOTH_WORK, [ROOT])
