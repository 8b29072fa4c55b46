"""Bytes over seconds, and how they are shown.

python -m pytest -q tests/test_meter.py
"""

import math

import pytest
import torch
from tiny import tiny_model

from lengthen.sampling import meter
from lengthen.sampling.meter import MEMORY, Meter, Progress, bandwidth, weight_bytes


def test_the_share_is_bytes_over_what_memory_could_have_moved(monkeypatch):
    monkeypatch.setattr(meter, "bandwidth", lambda device: 1000.0)
    one = Meter()
    assert one.tokens_per_second == 0 and one.roofline(None) == 0  # before the first pass
    for _ in range(10):
        one.add(seconds=0.5, read=250, tokens=4)
    assert one.roofline(None) == pytest.approx(0.5) and one.tokens_per_second == pytest.approx(8)
    for _ in range(int(10 * MEMORY)):  # ten half-lives and more: what was before is forgotten
        one.add(seconds=1.0, read=100, tokens=3)
    assert one.roofline(None) == pytest.approx(0.1, rel=1e-3) and one.tokens_per_second == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_pass_reads_every_weight_but_the_rows_of_the_table_it_leaves_out(tied):
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    table = model.get_input_embeddings().weight
    everything = sum(p.numel() for p in model.parameters()) * 4
    assert weight_bytes(model) == everything - (0 if tied else table.numel() * 4)
    assert weight_bytes(model.to(torch.bfloat16)) == weight_bytes(model.to(torch.float32)) // 2


@pytest.mark.parametrize(
    "name,terabytes",
    [
        ("NVIDIA H100 80GB HBM3", 3.35),
        ("NVIDIA H100 PCIe", 2.0),
        ("NVIDIA H200", 4.8),
        ("NVIDIA A100-SXM4-80GB", 2.039),
        ("NVIDIA A100-PCIE-40GB", 1.555),
        ("NVIDIA GeForce RTX 4090", 1.008),
        ("NVIDIA L4", 0.3),
        ("NVIDIA L40S", 0.864),
    ],
)
def test_known_cards(name, terabytes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert bandwidth.__wrapped__(torch.device("cuda", 0)) == pytest.approx(terabytes * 1e12)


def test_what_is_not_known_is_measured():
    assert 1e8 < bandwidth.__wrapped__(torch.device("cpu")) < 1e13 and math.isfinite(bandwidth(torch.device("cpu")))


def test_the_progress_line_is_short():
    one = Progress(159.4, 0.314, 48, 0.125, 0, 0.0)
    assert str(one) == "159 tokens/s (31% of the memory's speed), 48 texts at once, KV cache 12% full"
    one = Progress(159.4, 0.314, 48, 0.125, 2, 1.25)
    assert str(one).endswith("12% full, 2 preempted, 1.2 draft tokens accepted per step")
    assert "left" not in str(one)  # the bar has a time left of its own: two that differed stood on one line
