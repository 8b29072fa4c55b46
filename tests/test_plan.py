"""training/budget.py and shapes.py: bytes against the profiler, numbers against the published ones.

pytest tests/test_plan.py
"""

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_config
from trainees import some_pairs, with_lora
from transformers import AutoConfig

import train
from bench.loss import peak_bytes
from lengthen.models import lora
from lengthen.models.loading import embeddings_to_host
from lengthen.records import UserError
from lengthen.training import budget as plan
from lengthen.training import lean_layer as lean
from lengthen.training import offload, shapes
from lengthen.training.budget import Budget
from lengthen.training.packed import checkpointed, examine
from lengthen.training.plan import measured_flops, speeds_of
from lengthen.training.policy import Memory, set_checkpointing
from lengthen.training.settings import CHECKPOINTS, MemoryFlags, Recompute

WIDE = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "head_dim": 64}


def budget_of(family: str, dtype=torch.float32, cuda: bool = False, **changes) -> Budget:
    config = tiny_config(family, **changes)
    shape = {"rank": 4, "targets": "all-linear", "dtype": dtype}
    return Budget(shapes.shape_of(shapes.meta_model(config, dtype), cuda=cuda, **shape), shapes.trace(config, **shape))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("lean_layers", "checkpoint", "layers", "tile_rows"),
    [
        *((False, *way, 0) for way in (("none", -1), ("full", -1), ("full", 2))),
        *((True, *way) for way in (("none", -1, 0), ("attention", -1, 0), ("attention", 2, 256), ("full", -1, 256))),
    ],
)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(family, lean_layers, checkpoint, layers, tile_rows):
    """A whole step on the CPU: what the formulae add up to, and what torch's profiler sees."""
    model = with_lora(family, WIDE)
    abilities, (pair,) = examine(model), some_pairs(1500)  # attention on a CPU has 2 MB of its own
    settings = Recompute(checkpoint, layers, tile_rows=tile_rows)
    if lean_layers:
        assert not lean.install(model, settings).why
    else:
        set_checkpointing(checkpointed(model), settings)

    def step():
        train.row_loss(model, abilities, [pair])[0].backward()

    step()  # the gradients are there from the second step on
    measured = peak_bytes(step, "cpu")
    budget = budget_of(family, **WIDE)
    budget = Budget(budget.shape, None if lean_layers else budget.traced)
    parts = budget.activations(settings, 1500, len(pair.ids) - pair.num_prompt)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.1)


@pytest.mark.needs_cuda
@pytest.mark.parametrize(
    ("lean_layers", "checkpoint"), [(False, "none"), (False, "full"), *((True, level) for level in CHECKPOINTS)]
)
def test_the_plan_is_within_a_tenth_of_the_gpus_peak(lean_layers, checkpoint):
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    sizes |= {"head_dim": 64, "num_hidden_layers": 8, "vocab_size": 32_000, "max_position_embeddings": 32_768}
    model = with_lora("llama", sizes).to("cuda", torch.bfloat16)
    for layer in lora.lora_layers(model).values():
        layer.A.data, layer.B.data = layer.A.data.float(), layer.B.data.float()
    abilities, (pair,) = examine(model), some_pairs(16_384)
    if lean_layers:
        assert not lean.install(model, Recompute(checkpoint)).why
    else:
        set_checkpointing(checkpointed(model), Recompute(checkpoint))
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train.row_loss(model, abilities, [pair])[0].backward()
    measured = torch.cuda.max_memory_allocated() - before
    budget = budget_of("llama", torch.bfloat16, cuda=True, **sizes)
    budget = Budget(budget.shape, None if lean_layers else budget.traced)
    parts = budget.activations(Recompute(checkpoint), 16_384, len(pair.ids) - pair.num_prompt)
    assert sum(parts.values()) - parts["reserve"] == pytest.approx(measured, rel=0.1)


# ---- published and derived numbers ----------------------------------------------------------------------

QWEN = {  # Qwen2.5-7B
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
LLAMA = {  # Llama-3.1-8B
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def seven_b(name: str, rank: int, lean: bool = True) -> Budget:
    family, sizes = ("qwen2", QWEN) if name == "qwen" else ("llama", LLAMA)
    config = AutoConfig.for_model(family, tie_word_embeddings=False, **sizes)
    shape = {"rank": rank, "targets": "all-linear", "dtype": torch.bfloat16}
    facts = shapes.shape_of(shapes.meta_model(config, torch.bfloat16), nf4=True, cuda=True, **shape)
    return Budget(facts, None if lean else shapes.trace(config, **shape))


def test_static_bytes_are_those_of_the_weights():
    """Llama-3.1-8B, counted by hand: 6.979 B linear weights at 4.127 bits, 1.05 GB each for embedding and head."""
    parts = seven_b("llama", 32).static()
    assert parts["linear weights"] == pytest.approx(3.60e9, rel=1e-3)
    assert parts["embedding and head"] == 2 * 2 * 128_256 * 4096
    assert parts["norms and biases"] == 2 * 65 * 4096
    assert parts["LoRA weights"] == parts["LoRA gradients"] == 4 * 83_886_080
    assert parts["optimizer moments"] == 8 * 83_886_080
    qwen = seven_b("qwen", 16).static()
    assert qwen["linear weights"] == pytest.approx(3.37e9, rel=2e-3) and qwen["LoRA weights"] == 4 * 40_370_176


def test_nf4_takes_the_bytes_that_bitsandbytes_stores():
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(512, 1024)
    data, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    stored = data.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert plan.NF4_BYTES * weight.numel() == pytest.approx(stored, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "rank", "gigabytes", "bar"),
    [("qwen", 16, 24, 120_000), ("llama", 32, 24, 100_000), ("llama", 32, 80, 300_000)],
)
def test_the_lean_layer_reaches_the_bars(name, rank, gigabytes, bar):
    assert seven_b(name, rank).longest(MemoryFlags(), 1e9 * gigabytes) >= bar


@pytest.mark.parametrize(
    ("name", "gigabytes", "expected"),
    [("qwen", 24.5, 29_000), ("qwen", 83, 130_000), ("llama", 24.5, 28_000), ("llama", 83, 128_000)],
)
def test_plain_checkpointing_reaches_what_was_derived_by_hand(name, gigabytes, expected):
    """The budget of a fused loss and ordinary checkpointing, r16, added up vector by vector for PEFT's layers; ours
    keep fewer vectors of an MLP, and the sum by hand holds no headroom of its own for the context."""
    longest = seven_b(name, 16, lean=False).longest(MemoryFlags(checkpoint="full"), 1e9 * gigabytes)
    assert longest == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(
    ("settings", "lean", "gflop"),
    [
        (Recompute("full"), False, 56.5),
        (Recompute("full"), True, 52.7),
        (Recompute("attention"), True, 49.4),
        (Recompute("none"), True, 40.0),
    ],
)
def test_flops_of_qwen_at_16k(settings, lean, gflop):
    """Qwen2.5-7B, rank 16, 16,384 tokens, causal attention halved, every token a target."""
    budget = seven_b("qwen", 16)
    budget.traced = None if lean else plan.Traced(*[plan.Linear(0, 0)] * 3)
    found = budget.flops_per_token(16_384, settings) / 1e9
    assert found == pytest.approx(gflop, abs=0.15) and (settings.checkpoint == "full" or found <= 49.5)


def test_flops_equal_torchs_own_count():
    """Oracle: torch's FlopCounterMode over a step of a tiny model; it counts the whole square of attention on a CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    model = with_lora("llama", WIDE)
    model.set_attn_implementation("eager")
    model.get_input_embeddings().requires_grad_(False)
    ids = torch.randint(3, 500, (1, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    budget = budget_of("llama", **WIDE)
    f = budget.shape
    ours = 64 * budget.flops_per_token(64, Recompute())
    square = 64 * 2 * 64 * f.query * f.layers * (2 * 3 - 3.5)  # twice the half square, and 2 x forward backward
    # torch computes no gradient for the input of the first layer: its q, k, v products have none backward
    first = 64 * 2 * f.hidden * (f.query + 2 * f.key) + 64 * 2 * 4 * 3 * f.hidden
    assert counter.get_total_flops() == pytest.approx(ours + square - first, rel=0.01)


# ---- the choice -----------------------------------------------------------------------------------------


def test_the_least_recomputation_that_fits_is_chosen():
    budget, tokens = seven_b("qwen", 16), 16_384
    assert budget.choose(MemoryFlags(), tokens, 80e9) == Recompute("none")  # 80 GB: nothing is recomputed
    for room in (12e9, 16e9, 24e9, 40e9):
        chosen = budget.choose(MemoryFlags(), tokens, room)
        assert budget.card_bytes(chosen, tokens) <= room
        cheaper = [s for s in budget.candidates(MemoryFlags(), tokens) if _flops(budget, s) < _flops(budget, chosen)]
        assert all(budget.card_bytes(s, tokens) > room for s in cheaper) and cheaper
    small = budget.choose(MemoryFlags(), tokens, 1e9)  # nothing fits: the smallest
    assert budget.card_bytes(small, tokens) == min(
        budget.card_bytes(s, tokens) for s in budget.candidates(MemoryFlags(), tokens)
    )


def _flops(budget: Budget, settings: Recompute) -> float:
    return budget.flops_per_token(16_384, settings)


def test_flags_override_the_choice():
    budget = seven_b("qwen", 16)
    assert budget.choose(MemoryFlags(checkpoint="none"), 100_000, 24e9).checkpoint == "none"
    assert {s.checkpoint for s in budget.candidates(MemoryFlags(checkpoint="full"), 1)} == {"full"}
    for checkpoint in ("none", "attention"):
        assert all(s.offload for s in budget.candidates(MemoryFlags(checkpoint, offload=True), 1))
    assert {s.tile_rows for s in budget.candidates(MemoryFlags(tile_rows=512), 1)} == {512}


def test_offloading_moves_bytes_to_the_host():
    budget = seven_b("llama", 32)
    here, moved = (budget.activations(Recompute("full", offload=o), 100_000) for o in (False, True))
    assert moved["offloaded (host memory)"] == 30 * 2 * 4096 * 100_000  # all layers but the two on their way
    everything = budget.activations(Recompute("none", offload=True), 100_000)["offloaded (host memory)"]
    assert everything == 30 / 32 * budget.activations(Recompute("none"), 100_000)["kept activations"]
    assert here["kept activations"] - moved["kept activations"] == moved["offloaded (host memory)"]


def test_no_more_is_offloaded_than_the_host_may_take():
    free, bound = (Budget(seven_b("llama", 32).shape, None, host_bytes=size) for size in (0.0, 10e9))
    moved, some = (b.activations(Recompute("full", offload=True), 100_000) for b in (free, bound))
    host, layers = offload.Host(torch.device("cpu"), int(10e9)), 0
    host._new_slab = lambda: torch.empty(0)  # counted, not taken
    while host._take(math.ceil(2 * 4096 * 100_000 / offload.SLAB)):
        layers += 1
        host.num_slabs = len(host.free) + layers * math.ceil(2 * 4096 * 100_000 / offload.SLAB)
    assert 0 < layers < 30 and some["offloaded (host memory)"] == layers * 2 * 4096 * 100_000
    assert moved["offloaded (host memory)"] > some["offloaded (host memory)"]
    assert sum(some[k] - moved[k] for k in ("kept activations", "offloaded (host memory)")) == pytest.approx(0)
    assert bound.longest(MemoryFlags(), 24e9) < free.longest(MemoryFlags(), 24e9)


def test_moments_of_8_bits_take_what_bitsandbytes_allocates():
    optimizers = pytest.importorskip("bitsandbytes").optim
    parameter = torch.nn.Parameter(torch.randn(64, 1024))
    parameter.grad = torch.ones_like(parameter)
    optimizer = optimizers.AdamW8bit([parameter])
    optimizer.step()
    state = {k: v for k, v in optimizer.state[parameter].items() if k != "step" and not k.startswith("qmap")}
    assert sum(v.nbytes for v in state.values()) == plan.MOMENT_BYTES[8] * parameter.numel()
    facts = seven_b("llama", 32).shape
    assert Budget(facts, None, adam_bits=8).static()["optimizer moments"] == plan.MOMENT_BYTES[8] * 83_886_080


def test_an_embedding_in_host_memory_is_not_on_the_card():
    facts = []
    for host in (False, True):
        model = shapes.meta_model(AutoConfig.for_model("llama", tie_word_embeddings=False, **LLAMA), torch.bfloat16)
        if host:
            embeddings_to_host(model)
        facts.append(shapes.shape_of(model, rank=32))
    assert facts[0].embedding - facts[1].embedding == 128_256 * 4096
    assert facts[0] == replace(facts[1], embedding=facts[0].embedding)  # nothing else is counted otherwise
    with pytest.raises(UserError, match="it is the head, too"):
        embeddings_to_host(shapes.meta_model(tiny_config("llama", tie_word_embeddings=True), torch.float32))


def test_what_only_the_lean_layer_can_do_is_refused_elsewhere():
    budget = budget_of("llama")
    for wanted in (MemoryFlags(checkpoint="attention"), MemoryFlags(offload=True), MemoryFlags(tile_rows=64)):
        plan.check_served(wanted, None)
        with pytest.raises(UserError, match="needs the memory-lean layer"):
            plan.check_served(wanted, budget.traced)
    plan.check_served(MemoryFlags(checkpoint="full"), budget.traced)


def test_rows_are_planned_one_by_one_and_shrink_when_told():
    budget, applied = budget_of("llama", **WIDE), []
    room = budget.card_bytes(Recompute(), 1000) + 1
    memory = Memory(budget, MemoryFlags(), room, 4000, applied.append)
    assert memory.free_tokens == 1000
    assert memory.set(10) == memory.set(1000) == Recompute("none")
    assert memory.set(1400).checkpoint == "full" and applied[-1] == memory.set(1400)
    sizes = [budget.card_bytes(memory.choice(1000), 1000)]
    while memory.shrink(1000):
        sizes.append(budget.card_bytes(memory.choice(1000), 1000))
        assert sizes[-1] < sizes[-2]
    assert len(sizes) > 2 and memory.free_tokens < 1000


def test_a_model_that_does_not_run_without_data_is_refused(monkeypatch):
    def fails(self, *args, **kwargs):
        raise NotImplementedError("nonzero is not known on meta")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", fails)
    with pytest.raises(UserError, match="no plan for a llama model: nonzero"):
        budget_of("llama")


def test_live_counts_each_storage_once_and_forgets_it():
    known = torch.ones(100)
    with shapes.Live([known]) as live:
        x = known + 1  # 400 bytes
        y = x.view(10, 10).t()
        assert (live.now, live.peak) == (400, 400)
        del x, y
        z = known.double()
        assert (live.now, live.peak) == (800, 800)
        del z
    assert live.now == 0


def test_cards_by_name():
    assert speeds_of(24).keys() >= {"RTX 4090", "L4"} and "H100" in speeds_of(80)
    assert all(measured_flops(dtype) > 0 for dtype in (torch.float32, torch.bfloat16))
