"""Packed rows: no sample sees another, and what cannot be packed takes the plain path.  pytest tests/test_packed.py"""

from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, tiny_model
from trainees import alone, assert_same, gradients, learner_for, likeliest, some_pairs, with_lora
from transformers import AttentionInterface

import train
from lengthen.models import lora
from lengthen.training import packed, shapes
from lengthen.training.packed import checkpointed, examine


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_the_same_samples_alone(family):
    pairs = some_pairs(40, 2, 9, 61)  # two of them longer than the tiny models' sliding window of 24
    ours, theirs = with_lora(family), with_lora(family)
    abilities = examine(ours)
    assert abilities.packs and abilities.head is not None, abilities.notes
    (loss, hits), expected = train.row_loss(ours, abilities, pairs), alone(theirs, pairs)
    assert hits.item() == sum(likeliest(theirs, pair) for pair in pairs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    assert_same(gradients(ours), gradients(theirs), 5e-5)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_packed_on_a_gpu_is_the_same_samples_alone(family):
    pairs = some_pairs(40, 2, 9, 61)
    ours, theirs = (with_lora(family, targets="all-linear").to("cuda", torch.bfloat16) for _ in range(2))
    abilities = examine(ours)
    assert abilities.packs, abilities.notes
    loss = train.row_loss(ours, abilities, pairs)[0].item()
    theirs.set_attn_implementation("eager")
    expected = 0.0
    for pair in pairs:
        ids = torch.tensor([pair.ids], device="cuda")
        logits = theirs(input_ids=ids).logits[0, pair.num_prompt - 1 : -1].float()
        expected += torch.nn.functional.cross_entropy(logits, ids[0, pair.num_prompt :], reduction="sum").item()
    assert loss == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_give_the_same_gradients(dropout):
    pairs, found = some_pairs(33, 20), {}
    for layers in (0, 1, 2):
        model = with_lora(dropout=dropout)
        abilities = examine(model)
        for i, layer in enumerate(checkpointed(model)):
            layer.gradient_checkpointing = i < layers
        torch.manual_seed(0)
        train.row_loss(model, abilities, pairs)[0].backward()
        found[layers] = gradients(model)
    assert_same(found[1], found[0], 1e-6)
    assert_same(found[2], found[0], 1e-6)


@pytest.mark.parametrize("packs", [True, False])
def test_activations_are_measured(packs, monkeypatch):
    """Twice the intermediate size: gate, up, their activation and product grow; nothing else does."""
    if not packs:
        monkeypatch.setattr(packed, "cannot_pack", lambda model: "it attends by other rules")
    small, large = map(_kept_by_a_layer, (112, 224))
    assert 4 * 112 * 3 <= large - small <= 4 * 112 * 6  # fp32, 3 to 6 vectors of that size


def _kept_by_a_layer(intermediate: int) -> float:
    """Bytes per token."""
    model = tiny_model(intermediate_size=intermediate)
    lora.attach(model, 4, 8)
    shape = shapes.shape_of(model, rank=4, dtype=torch.float32)
    return shapes.measured(shape, model.train(), examine(model)).layer.slope


@pytest.mark.parametrize("why", ["head", "attention"])
def test_models_that_cannot_pack_or_fuse_take_the_plain_path(why, monkeypatch):
    pairs, ours, theirs = some_pairs(20, 30), with_lora(), with_lora()
    if why == "head":
        ours.lm_head.register_forward_hook(lambda module, args, output: 0.5 * output)
        theirs.lm_head.register_forward_hook(lambda module, args, output: 0.5 * output)
        theirs.loss_function = ours.loss_function
    else:
        monkeypatch.setattr(packed, "cannot_pack", lambda model: "it attends by other rules")
    learner = learner_for(ours, torch.optim.SGD(lora.lora_parameters(ours), lr=0.0))
    abilities = learner.abilities
    assert (abilities.head is None) == (why == "head") and abilities.packs == (why != "attention")
    assert len(abilities.notes) == 1
    loss, norm, accuracy, *_ = train.train_step(learner, pairs, 8)
    num_targets = sum(len(p.ids) - p.num_prompt for p in pairs)
    assert loss == pytest.approx(alone(theirs, pairs).item() / num_targets, rel=1e-5)
    assert accuracy == pytest.approx(sum(likeliest(theirs, pair) for pair in pairs) / num_targets)


def test_attention_that_leaks_between_samples_is_noticed(monkeypatch):
    """A model whose attention ignores where samples begin must not be packed."""
    model = with_lora()

    def leaks(module, query, key, value, *more, scaling, **keywords):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    AttentionInterface.register(packed.NAME, leaks)
    try:
        abilities = examine(model)
    finally:
        AttentionInterface.register(packed.NAME, packed.packed_attention)
    assert not abilities.packs and "different" in abilities.notes[0]
    assert model.config._attn_implementation == "sdpa"


def test_rules_that_only_long_rows_would_show_are_refused():
    for changes in (
        {"attention_chunk_size": 8192},
        {"layer_types": ["chunked_attention", "full_attention"]},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ):
        config = SimpleNamespace(get_text_config=lambda c=changes: SimpleNamespace(**c))
        assert packed.cannot_pack(SimpleNamespace(config=config))
    assert all(not packed.cannot_pack(tiny_model(family)) for family in FAMILIES)
