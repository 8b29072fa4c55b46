"""Which layout a weight gets on a CPU, and that it stays so. pytest -q tests/test_layouts.py"""

import json
import time

import pytest
import torch

from lengthen.sampling import layouts
from lengthen.sampling.layouts import kept, layout_of, measure, recorded

FIRST = "mkl" if torch.backends.mkl.is_available() else "columns"
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(layouts, "SMALL", 100)
    kept.cache_clear()
    yield
    kept.cache_clear()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "self-lengthen" / "layouts.json"


def clock(monkeypatch, seconds: dict[str, float]) -> None:
    """Products that take so long, by a clock that only they move."""
    now = [0.0]

    def lay_out(name, weight, bias):
        return lambda x: now.__setitem__(0, now[0] + seconds[name] * len(x))

    monkeypatch.setattr(layouts, "lay_out", lay_out)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


@pytest.mark.parametrize(
    "mkl,onednn,expected",
    [(1.0, 2.0, "mkl"), (2.0, 1.0, "onednn"), (1.0, 0.9, "mkl"), (1.0, 0.8, "onednn")],
    ids=["first", "another", "not clearly ahead", "clearly"],
)
def test_the_fastest_is_chosen_and_chance_does_not_choose(monkeypatch, mkl, onednn, expected):
    clock(monkeypatch, {"mkl": mkl, "onednn": onednn, "columns": 3.0})
    assert measure(8, 8, FP32, ("mkl", "onednn", "columns")) == expected


def test_a_choice_is_kept_by_machine_and_shape(monkeypatch, file):
    """A resumed job must not take another layout because a timing has changed."""
    answers = {(64, 32): "onednn", (32, 64): "columns"}
    monkeypatch.setattr(layouts, "measure", lambda out, width, *_: answers[out, width])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert [layout_of(64, 32, FP32), layout_of(32, 64, FP32)] == ["onednn", "columns"]
    answers.update({(64, 32): "mkl", (32, 64): "mkl"})
    kept.cache_clear()  # as in another process
    assert [layout_of(64, 32, FP32), layout_of(32, 64, FP32)] == ["onednn", "columns"]
    assert json.loads(file.read_text()) == {layouts.machine(): recorded()}
    assert recorded() == {"64 x 32": "onednn", "32 x 64": "columns"}
    monkeypatch.setattr(layouts, "machine", lambda: "another one")
    assert layout_of(64, 32, FP32) == "mkl"
    assert len(json.loads(file.read_text())) == 2


def test_a_large_weight_is_measured_by_a_part_and_a_small_one_not_at_all(monkeypatch):
    seen = []
    monkeypatch.setattr(layouts, "measure", lambda out, width, *_: seen.append((out, width)) or FIRST)
    monkeypatch.setattr(layouts, "LARGE", 1000)
    assert layout_of(9, 11, FP32) == layout_of(400, 10, FP32) == FIRST
    assert seen == [(100, 10)]


def test_where_nothing_can_be_kept_nothing_is_measured(tmp_path, monkeypatch):
    (tmp_path / "self-lengthen").write_text("a file where the folder should be")
    monkeypatch.setattr(layouts, "measure", lambda *_: pytest.fail("it could turn out otherwise the next time"))
    assert layout_of(64, 32, FP32) == FIRST


def test_a_damaged_file_is_measured_anew(monkeypatch, file):
    file.parent.mkdir()
    file.write_text("{ not json")
    monkeypatch.setattr(layouts, "measure", lambda *_: "columns")
    assert layout_of(64, 32, FP32) == "columns" and recorded() == {"64 x 32": "columns"}


def test_layouts_that_this_torch_lacks_are_not_taken(monkeypatch, file):
    """The same processor with another build of torch, or a file that was edited."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    file.parent.mkdir()
    file.write_text(json.dumps({layouts.machine(): {"64 x 32": "mkl"}}))
    assert layout_of(64, 32, FP32) == "columns"


def test_a_real_measurement_takes_one_of_them_and_no_random_numbers():
    state = torch.get_rng_state()
    assert layout_of(64, 32, FP32) in ("mkl", "onednn", "columns")
    assert torch.equal(state, torch.get_rng_state())


def test_bf16_is_measured_apart_and_takes_what_this_torch_multiplies(monkeypatch, file):
    """MKL packs fp32 only; oneDNN refuses bf16 on a processor without AVX-512."""
    asked = []
    monkeypatch.setattr(layouts, "measure", lambda out, width, dtype, names: asked.append((dtype, names)) or names[-1])
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(layouts, "bf16_is_served", lambda: True)
    layout_of(64, 32, FP32)
    assert layout_of(64, 32, BF16) == "columns"
    assert asked == [(FP32, ("mkl", "columns", "onednn")), (BF16, ("onednn", "columns"))]
    assert recorded() == {"64 x 32": "onednn", "64 x 32 bf16": "columns"}
    monkeypatch.setattr(layouts, "bf16_is_served", lambda: False)
    monkeypatch.setattr(layouts, "kept", lambda *_: pytest.fail("there is nothing to choose from"))
    assert layout_of(64, 32, BF16) == "columns"
