"""plan.py: bytes against the profiler, numbers against the published ones.  python -m pytest tests/test_plan.py"""

import pytest
import torch
from test_train import some_pairs, with_lora
from tiny import tiny_config
from torch.profiler import ProfilerActivity, profile

import train
from lengthen import plan
from lengthen.packed import Recompute, examine
from lengthen.plan import Budget, Settings

WIDE = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "head_dim": 64}


def budget_of(family: str, dtype=torch.float32, cuda: bool = False, **changes) -> Budget:
    config = tiny_config(family, **changes)
    options = {"rank": 4, "targets": "all-linear", "dtype": dtype}
    return Budget(plan.facts_of(config, cuda=cuda, **options), plan.trace(config, **options))


def profiled_peak(work) -> int:
    """Most bytes alive at a time beyond what was there before, by torch's own profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        work()
    events = [e for e in traced.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("checkpoint", "layers"), [("none", -1), ("full", -1), ("full", 2)])
def test_the_plan_is_within_a_tenth_of_the_measured_peak(family, checkpoint, layers):
    """A whole step on the CPU: what the formulae add up to, and what torch's profiler sees."""
    model = with_lora(family, WIDE)
    abilities, (pair,) = examine(model), some_pairs(1000)
    recompute = Recompute(model, abilities.token_bytes, 1e12)
    settings = Settings(checkpoint, layers)
    k = 0 if checkpoint == "none" else 4 if layers < 0 else layers
    for i, layer in enumerate(recompute.layers):
        layer.gradient_checkpointing = i < k

    def step():
        train.row_loss(model, abilities, [pair])[0].backward()

    step()  # the gradients are there from the second step on
    measured = profiled_peak(step)
    parts = budget_of(family, **WIDE).activations(settings, 1000, len(pair.ids) - pair.num_prompt)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.1)
