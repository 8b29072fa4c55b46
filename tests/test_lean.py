"""The lean decoder layer against transformers + PEFT, against itself, and by what it computes and keeps.

pytest tests/test_lean.py
"""

import weakref
from collections import Counter
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace

import peft
import pytest
import torch
from tiny import FAMILIES, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from bench.loss import peak_bytes
from lengthen.models import lora
from lengthen.models.exact import dense_weight
from lengthen.models.loading import embeddings_to_host, load_model
from lengthen.training import lean_layer as lean
from lengthen.training import lean_linears, offload
from lengthen.training.budget import Budget, lean_backward, lean_kept
from lengthen.training.lean_linears import dropout_mask
from lengthen.training.offload import Host
from lengthen.training.packed import examine, pack
from lengthen.training.settings import CHECKPOINTS, Recompute
from lengthen.training.shapes import meta_model, shape_of

LEAN = ("llama", "qwen2", "qwen3", "mistral")
LENGTHS = (41, 1, 30, 9)  # tokens of the samples of a row; two are longer than tiny Mistral's window of 24
EVERY_WAY = [Recompute(c, -1, o, t) for c, o, t in product(CHECKPOINTS, (False, True), (0, 16))]


def random_model(family: str, **changes):
    """Norm weights and biases random as well: a new model's are ones and zeros, which would hide mistakes."""
    if family == "llama":
        changes = {"attention_bias": True, "mlp_bias": True, **changes}
    model = tiny_model(family, **{"initializer_range": 0.1, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.2, 0.2)
    return model.requires_grad_(False)


def give_lora(model, rslora: bool = False, **options) -> list[torch.nn.Parameter]:
    """LoRA layers whose B is not zero, so that all of their gradients count; rslora: as PEFT's adapters may have it."""
    parameters = lora.attach(model, **{"rank": 4, "alpha": 6, **options})
    for layer in lora.lora_layers(model).values():
        layer.rslora, layer.scale = rslora, layer.alpha / (layer.rank**0.5 if rslora else layer.rank)
    generator = torch.Generator().manual_seed(1)
    for layer in lora.lora_layers(model).values():
        layer.B.data.normal_(0, 0.2, generator=generator)
    return parameters


def lean_model(family: str, settings=None, limit: int = 0, **options):
    """-> (model in training mode, its lean layers)."""
    model = random_model(family)
    give_lora(model, **options)
    assert examine(model).packs
    installed = lean.install(model, settings or Recompute("attention"), limit)
    assert not installed.why and len(installed.layers) == 2
    return model.train(), installed


def facts(model):
    """The sizes that the plan's formulae take."""
    return shape_of(model, rank=4, dtype=torch.float32, cuda=False)


def some_ids(seed: int = 0, vocab: int = 400) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


def loss_of(model, samples: list[list[int]]) -> torch.Tensor:
    """The sum over all tokens but each sample's first, of one packed row."""
    logits = model(**pack(samples, model.device).keywords(), use_cache=False).logits[0]
    index, targets, start = [], [], 0
    for ids in samples:
        index += range(start, start + len(ids) - 1)
        targets += ids[1:]
        start += len(ids)
    kind = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits[index].to(kind), torch.tensor(targets), reduction="sum")


def gradients(model, samples=None, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(seed)
    parameters = lora.lora_parameters(model)
    for p in parameters:
        p.grad = None
    loss = loss_of(model, samples or some_ids())
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in parameters]


def alone(model, samples: list[list[int]]) -> torch.Tensor:
    """The oracle: transformers' own loss, one sample at a time."""
    total = 0.0
    for ids in samples:
        if len(ids) > 1:
            row = torch.tensor([ids])
            total = total + model(input_ids=row, labels=row, use_cache=False).loss * (len(ids) - 1)
    return total


def peft_gradients(base, folder, samples, dtype=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    theirs = peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    theirs = theirs if dtype is None else theirs.to(dtype)
    loss = alone(theirs, samples)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}


def by_pefts_names(model, grads: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    names = [f"base_model.model.{n}.lora_{part}.default.weight" for n in lora.lora_layers(model) for part in "AB"]
    return dict(zip(names, grads, strict=True))


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest distance of a tensor relative to its norm."""
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(ours, theirs, strict=True))


# ---- equality -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("family", LEAN)
@pytest.mark.parametrize("options", [{}, {"rslora": True, "targets": ["q_proj", "up_proj", "o_proj"]}])
def test_loss_and_gradients_are_pefts(tmp_path, family, options, checkpoint):
    model, _ = lean_model(family, Recompute(checkpoint, tile_rows=32), **options)
    lora.save_adapter(model, tmp_path, "base")
    loss, grads = gradients(model)
    expected_loss, expected = peft_gradients(random_model(family), tmp_path, some_ids())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    ours = by_pefts_names(model, grads)
    assert ours.keys() == expected.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5 * expected[name].abs().max().item())


@pytest.mark.parametrize("family", LEAN)
def test_every_way_gives_the_same_numbers(family, monkeypatch):
    """What is kept, where, and in which tiles changes no more than the order of sums; packed is each sample alone."""
    monkeypatch.setattr(offload, "SLAB", 4096)  # many slabs, and tensors across their borders
    model, installed = lean_model(family, Recompute("none"))
    loss, grads = gradients(model)
    for settings in EVERY_WAY:
        installed.set(settings)
        again, others = gradients(model)
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=0, msg=str(settings))
        assert apart(others, grads) < (1e-7 if not settings.tile_rows else 2e-6), settings
    installed.set(Recompute("full", 1, offload=True, tile_rows=7))  # the second layer keeps all
    assert apart(gradients(model)[1], grads) < 2e-6
    one_by_one = [gradients(model, [ids])[1] for ids in some_ids() if len(ids) > 1]
    assert apart([sum(parts) for parts in zip(*one_by_one, strict=True)], grads) < 2e-6


def test_offloaded_numbers_are_the_same_bits():
    model, installed = lean_model("qwen2", Recompute("attention", tile_rows=16))
    kept = gradients(model)
    installed.set(Recompute("attention", offload=True, tile_rows=16))
    loss, grads = gradients(model)
    assert torch.equal(loss, kept[0]) and all(map(torch.equal, grads, kept[1]))


WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def token_losses(logits: torch.Tensor, samples: list[list[int]]) -> torch.Tensor:
    """Of all tokens but each sample's first; logits [T, V] of the samples one behind the other."""
    parts = [x[:-1] for x in logits.split([len(ids) for ids in samples])]
    targets = torch.tensor([token for ids in samples for token in ids[1:]])
    kind = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(torch.cat(parts).to(kind), targets, reduction="none")


def error_ratios(tmp_path, family: str, quantize: bool) -> tuple[float, float]:
    """Root mean square errors against float64, ours as a multiple of PEFT's: of tokens' losses, of LoRA's gradients."""
    random_model(family, **WIDE).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )

    def load(**kind):
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **kind).requires_grad_(False)

    rounded = {"dtype": torch.bfloat16, "quantization_config": nf4 if quantize else None}
    ours, exact = load(**rounded), load(dtype=torch.float64)
    give_lora(ours)
    lora.save_adapter(ours, tmp_path / "adapter", "base")
    for name, linear in lora.decoder_linears(ours).items():
        exact.get_submodule(name).weight.data = dense_weight(linear).double()
    exact = peft.PeftModel.from_pretrained(exact, tmp_path / "adapter", is_trainable=True).eval().double()
    theirs = peft.PeftModel.from_pretrained(load(**rounded), tmp_path / "adapter", is_trainable=True).eval()
    assert examine(ours).packs and not lean.install(ours, Recompute("attention", tile_rows=32)).why
    errors = torch.zeros(2, 2, dtype=torch.float64)  # losses, gradients x ours, theirs
    for seed in range(4):
        samples, found = some_ids(seed), []
        for model in (exact, theirs, ours):
            model.zero_grad()
            if model is ours:
                logits = model(**pack(samples).keywords(), use_cache=False).logits[0]
            else:
                logits = torch.cat([model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in samples])
            losses = token_losses(logits, samples)
            losses.sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            if model is ours:
                grads = by_pefts_names(model, [p.grad for p in lora.lora_parameters(model)])
            found.append((losses.detach(), torch.cat([grads[n].flatten() for n in sorted(grads)])))
        truth, their, our = found
        errors += torch.tensor([[(x[i] - truth[i]).square().sum() for x in (our, their)] for i in range(2)])
    return tuple((errors[:, 0] / errors[:, 1]).sqrt().tolist())


@pytest.mark.parametrize("quantize", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("family", LEAN)
@pytest.mark.usefixtures("same_nf4_on_every_cpu")
def test_rounded_numbers_are_no_worse_than_pefts(tmp_path, family, quantize):
    """304 tokens' losses, 60,000 gradients: enough that 1.2 times is far outside chance."""
    loss, gradient = error_ratios(tmp_path, family, quantize)
    assert loss <= 1.2 and gradient <= 1.2, (loss, gradient)


def saved_with_key_biases(folder, size: float):
    """A Qwen2 with key biases up to `size`, on disk in bf16: those of Qwen2.5-0.5B are up to 211."""
    model = random_model("qwen2", **WIDE)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.uniform_(-size, size)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def loaded_for_training(folder, quantize: bool):
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"dtype": torch.bfloat16, "quantization_config": nf4 if quantize else None}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).requires_grad_(False)
    give_lora(model)
    assert examine(model).packs
    return model


@pytest.mark.parametrize("quantize", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("size", [50, 150, 200])
@pytest.mark.usefixtures("same_nf4_on_every_cpu")
def test_large_key_biases_do_not_refuse_the_lean_layers(tmp_path, size, quantize):
    """Both codes are as far from fp32 then, and farther from each other than any bound on that would allow."""
    model = loaded_for_training(saved_with_key_biases(tmp_path, size), quantize)
    assert not lean.install(model).why


@pytest.mark.parametrize("size", [0, 50])
@pytest.mark.parametrize("wrong", ["scaling", "window", "norm", "order", "bias"])
def test_a_lean_layer_that_is_wrong_is_found_in_bf16(tmp_path, monkeypatch, wrong, size):
    """By what 16 bits can show: a scale of attention 10 % off, a window too small, another norm, half a bias, ..."""
    made = lean.LeanLayer.__init__

    def make(self, module, scaling, window, host):
        made(self, module, 1.1 * scaling if wrong == "scaling" else scaling, 8 if wrong == "window" else window, host)
        if wrong == "norm":
            self.norm2 = (1.03 * self.norm2[0], self.norm2[1])
        if wrong == "order":
            self.groups[2] = self.groups[2][::-1]  # gate and up change places

    monkeypatch.setattr(lean.LeanLayer, "__init__", make)
    if wrong == "bias":
        own = lean_linears.Linears.__call__

        def without(self, *args, **named):
            ys = own(self, *args, **named)
            return [
                y.sub_(0.5 * base.bias) if base.bias is not None else y for y, base in zip(ys, self.bases, strict=True)
            ]

        monkeypatch.setattr(lean_linears.Linears, "__call__", without)
    assert "differs" in lean.install(loaded_for_training(saved_with_key_biases(tmp_path, size), False)).why


@pytest.mark.parametrize(
    "settings", [Recompute("none"), Recompute("attention", tile_rows=16), Recompute("full", offload=True)]
)
def test_dropout_draws_one_mask_for_forward_and_backward(settings, monkeypatch):
    """float64 differences along a random direction, under a fixed seed, are the gradient's."""
    monkeypatch.setattr(lean_linears, "MASK_ROWS", 8)  # masks cross the borders of tiles
    model, installed = lean_model("qwen3", settings, dropout=0.3)
    for layer in installed.layers:
        del layer.module.forward
    installed = lean.install(model.double(), settings)
    row, parameters = pack(some_ids()), lora.lora_parameters(model)
    x, upstream = torch.randn(2, 1, sum(LENGTHS), 64, dtype=torch.float64)
    positions = [one.double() for one in model.model.rotary_emb(x, row.position_ids)]

    def value(seed: int) -> torch.Tensor:
        """Through the layers alone: transformers' last norm computes in fp32 whatever it is given."""
        torch.manual_seed(seed)
        y = x
        for layer in installed.layers:
            y = layer(y, positions, row.cu_seq_lens, row.longest)
        return (y * upstream).sum()

    grads = torch.autograd.grad(value(5), parameters)
    directions = [torch.randn_like(g) for g in grads]
    assert value(5) == value(5) != value(6)
    step, ends = 1e-5, []
    for sign in (1, -2):
        for p, d in zip(parameters, directions, strict=True):
            p.data += sign * step * d
        ends.append(value(5))
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-6, atol=0)


def test_dropout_is_the_same_in_every_way():
    model, installed = lean_model("llama", Recompute("none"), dropout=0.3)
    loss, grads = gradients(model)
    for settings in EVERY_WAY:
        installed.set(settings)
        again, others = gradients(model)
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
        assert apart(others, grads) < 2e-6, settings
    mask = dropout_mask(1, 0, 2000, 50, 0.3, torch.empty(0))
    assert set(mask.unique().tolist()) == {0.0, mask.max().item()} and mask.max().item() == pytest.approx(1 / 0.7)
    assert abs((mask == 0).float().mean() - 0.3) < 0.01  # 100,000 draws: 7 standard deviations
    assert torch.equal(dropout_mask(1, 900, 300, 50, 0.3, torch.empty(0)), mask[900:1200])


# ---- what is computed -----------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts matrix products by the weight in them, and floating-point operations; attention counts half (causal)."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters()}
        self.counts, self.flops = Counter(), 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            if layer := self.names.get(right.untyped_storage().data_ptr()):
                forward = right.stride(0) == 1 and right.shape[0] == right.stride(1)  # x W^T, not dy W
                self.counts[layer.split(".")[-3 if ".base." in layer else -2], "forward" if forward else "dx"] += 1
        if "flash_attention" in name:
            back = "backward" in name
            query = args[1] if back else args[0]
            self.counts["attention", "backward" if back else "forward"] += 1
            self.flops += (2.5 if back else 1) * 2 * query.numel() * query.shape[-2]
        return func(*args, **(kwargs or {}))


def counted(model, samples) -> Products:
    """Forward and backward of the decoder alone, without the head."""
    row, decoder = pack(samples), model.get_decoder()
    hidden = decoder(**row.keywords(), use_cache=False).last_hidden_state
    upstream = torch.randn_like(hidden)
    with Products(model) as seen:
        decoder(**row.keywords(), use_cache=False).last_hidden_state.backward(upstream)
    return seen


@pytest.mark.parametrize("family", LEAN)
def test_nothing_is_computed_three_times(family):
    """The leanest plan that recomputes little: the down-projection once forward, attention once, the rest twice."""
    model, installed = lean_model(family, Recompute("attention", offload=True))
    samples, layers = some_ids()[:1], 2
    counts = counted(model, samples).counts
    rest = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    assert counts["down_proj", "forward"] == layers == counts["attention", "forward"] == counts["attention", "backward"]
    assert {counts[name, "forward"] for name in rest} == {2 * layers}
    assert {counts[name, "dx"] for name in (*rest[3:], "down_proj")} == {layers}
    assert {counts[name, "dx"] for name in rest[:3]} == {layers - 1}  # nobody asks for the embeddings' gradient
    installed.set(Recompute("none"))
    counts = counted(model, samples).counts
    assert {counts[name, "forward"] for name in (*rest, "down_proj", "attention")} == {layers}
    installed.set(Recompute("full"))
    assert counted(model, samples).counts["attention", "forward"] == 2 * layers


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_formula_counts_what_is_computed(checkpoint):
    model, installed = lean_model("qwen2", Recompute(checkpoint))
    samples = [torch.arange(3, 67).tolist()]
    seen = counted(model, samples).flops / 64
    formula = Budget(facts(model), None).flops_per_token(64, Recompute(checkpoint), target_share=0)
    # the first layer's input has no gradient: three products and LoRA's part of them that the formula counts
    first = 2 * (64 * (64 + 32 + 32) + 3 * 4 * 64)
    assert seen + first == pytest.approx(formula, rel=1e-6)


def test_operations_of_the_models_people_train():
    """The bar: 49.5 GFLOP a token for Qwen2.5-7B at 16K, where checkpointing takes 56.5 and keeping all 40."""
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = AutoConfig.for_model("qwen2", vocab_size=152_064, num_hidden_layers=28, **sizes)

    def operations(config, tokens: int, settings: Recompute) -> float:
        shape = shape_of(meta_model(config, torch.bfloat16), rank=16)
        return Budget(shape, None).flops_per_token(tokens, settings)

    found = {c: operations(config, 16_384, Recompute(c)) / 1e9 for c in CHECKPOINTS}
    assert 49.0 < found["attention"] <= 49.5
    assert 39.5 < found["none"] < 40.5 and 52.0 < found["full"] < 53.0
    window = AutoConfig.for_model("mistral", sliding_window=4096)
    assert operations(window, 4096, Recompute()) < operations(window, 65_536, Recompute())
    whole = AutoConfig.for_model("mistral", sliding_window=None)
    assert operations(window, 65_536, Recompute()) < 0.6 * operations(whole, 65_536, Recompute())


# ---- what is kept ---------------------------------------------------------------------------------------


def saved_bytes(model, samples) -> int:
    """What autograd keeps for the decoder's backward pass, each storage once, the model's own not."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def note(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()  # an operation that keeps its own output would else keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = model.get_decoder()(**pack(samples).keywords(), use_cache=False).last_hidden_state
    del out
    return sum(kept.values())


@pytest.mark.parametrize("family", LEAN)
def test_each_level_keeps_what_its_formula_says(family, monkeypatch):
    monkeypatch.setattr(offload, "SLAB", 64)
    model, installed = lean_model(family)
    samples, tokens = some_ids(), sum(LENGTHS)
    installed.set(Recompute("full", offload=True))
    rest = saved_bytes(model, samples)  # the final norm's
    for checkpoint in CHECKPOINTS:
        wanted = 2 * tokens * lean_kept(facts(model), checkpoint)
        installed.set(Recompute(checkpoint))
        assert saved_bytes(model, samples) - rest == wanted
        installed.set(Recompute(checkpoint, offload=True))
        installed.host = installed.layers[0].host = installed.layers[1].host = Host(model.device)
        assert saved_bytes(model, samples) == rest
        assert wanted <= installed.host.bytes < wanted + 2 * 64
        assert len(installed.host.free) == installed.host.num_slabs  # the graph is gone: everything is free again


BROAD = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 32, "num_hidden_layers": 1}


@pytest.mark.parametrize("settings", [Recompute("none"), Recompute("attention"), Recompute("full", tile_rows=64)])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_backward_pass_takes_what_its_formula_says(family, settings):
    model = random_model(family, **BROAD)
    give_lora(model)
    examine(model)
    installed = lean.install(model, settings)
    ids = torch.randint(3, 400, (4096,)).tolist()
    decoder, row = model.get_decoder(), pack([ids])

    def forward():
        x = decoder.embed_tokens(row.input_ids).requires_grad_()
        positions = decoder.rotary_emb(x, row.position_ids)
        y = installed.layers[0](x, positions, row.cu_seq_lens, row.longest)
        return x, y, torch.randn_like(y)

    x, y, dy = forward()
    torch.autograd.grad(y, x, dy)
    x, y, dy = forward()
    grads = []
    taken = peak_bytes(lambda: grads.append(torch.autograd.grad(y, [x, *lora.lora_parameters(model)], dy)), "cpu")
    formula = lean_backward(facts(model), 4096, settings) - dy.numel() * 4  # dy was there before
    assert 0.92 * formula < taken < 1.08 * formula, (taken, formula)


def test_tiles_keep_the_mlp_from_growing_with_the_sequence():
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = AutoConfig.for_model("qwen2", **sizes)
    shape = shape_of(meta_model(config, torch.bfloat16), rank=16, nf4=True)
    whole, tiled = (lean_backward(shape, 65_536, Recompute("attention", tile_rows=t)) for t in (0, 4096))
    assert tiled < 0.6 * whole


def test_the_first_layers_follow_the_settings_and_the_others_keep_all():
    model, installed = lean_model("llama")
    for count, levels in ((0, ["none", "none"]), (1, ["full", "none"]), (2, ["full"] * 2), (-1, ["full"] * 2)):
        installed.set(Recompute("full", count, tile_rows=8))
        assert [(x.how.checkpoint, x.how.tile_rows) for x in installed.layers] == [(one, 8) for one in levels]
        assert not any(layer.module.gradient_checkpointing for layer in installed.layers)


# ---- host memory ----------------------------------------------------------------------------------------


def test_beyond_the_limit_tensors_stay(monkeypatch):
    monkeypatch.setattr(offload, "SLAB", 4096)
    model, installed = lean_model("llama", Recompute("attention"))
    loss, grads = gradients(model)
    one = sum(LENGTHS) * lean_kept(facts(model), "attention")  # bytes of one layer
    limit = (one // 4096 + 1) * 4096
    installed.host.limit = limit
    installed.set(Recompute("attention", offload=True))
    for _ in range(2):  # the slabs come back: a second step offloads as much
        again, others = gradients(model)
        assert torch.equal(again, loss) and all(map(torch.equal, others, grads))
        assert 0 < installed.host.bytes <= limit and len(installed.host.free) == installed.host.num_slabs
    assert installed.host.full and any("limit" in line for line in installed.notes())


def test_memory_that_cannot_be_pinned_is_taken_pageable(monkeypatch):
    """As on WSL2, where the system pins a part of the memory only."""
    host, real = Host(torch.device("cpu")), torch.empty
    host.pinned, asked = True, []

    def empty(*args, pin_memory=False, **more):
        asked.append(pin_memory)
        if pin_memory and len(asked) > 1:
            raise RuntimeError("CUDA error: out of memory")
        return real(*args, **more)

    monkeypatch.setattr(offload.torch, "empty", empty)
    tensors = [torch.randn(3, 1 << 21), torch.arange(5.0)]  # 24 MiB: two slabs
    stored = host.put(tensors)
    assert not host.pinned and asked == [True, True, False]
    assert all(map(torch.equal, host.get(stored), tensors))


def test_offloaded_tensors_come_back_once_and_are_never_lost():
    host = Host(torch.device("cpu"))
    stored = [host.put([torch.full((4,), float(i))]) for i in range(3)]
    assert host.num_slabs == 3 and stored[2].before() is stored[1]
    assert host.get(stored[2])[0].tolist() == [2.0] * 4 and len(host.free) == 1
    with pytest.raises(AssertionError, match="second backward"):
        host.get(stored[2])
    gone = weakref.ref(stored.pop())
    del stored[0]  # a forward pass that was given up
    assert gone() is None and len(host.free) == 2 and host.get(stored[0])[0].tolist() == [1.0] * 4


class Streams:
    """CUDA's streams on paper: what is queued runs when `run` says so, one stream as late or as early as it may."""

    def __init__(self):
        self.queues = {"compute": [], "side": []}
        self.done, self.now = {"compute": 0, "side": 0}, "compute"

    def named(self, name):
        def event():
            return name, len(self.queues[name])

        def wait(event):
            self.queues[name].append(event)

        def wait_stream(other):
            wait(other.record_event())

        return SimpleNamespace(record_event=event, wait_event=wait, wait_stream=wait_stream, synchronize=lambda: None)

    @contextmanager
    def on(self, stream):
        self.now = "side"
        yield
        self.now = "compute"

    def run(self, first):
        second = {"compute": "side", "side": "compute"}[first]
        while any(self.done[name] < len(queue) for name, queue in self.queues.items()):
            name = next(n for n in (first, second) if self.ready(n))
            step = self.queues[name][self.done[name]]
            self.done[name] += 1
            if callable(step):
                step()

    def ready(self, name):
        if self.done[name] == len(self.queues[name]):
            return False
        step = self.queues[name][self.done[name]]
        return callable(step) or self.done[step[0]] >= step[1]


@pytest.mark.parametrize("first", ["compute", "side"])
def test_copies_wait_for_what_they_must_and_the_last_two_layers_never_move_back(first, monkeypatch):
    """Five layers out and back. Memory that is given up is overwritten at once, as the allocator would let others."""
    streams, copies = Streams(), []
    copy = offload._copy

    def queued(tensors, slabs, out):
        given = list(tensors), list(slabs)
        copies.append(out)
        streams.queues[streams.now].append(lambda: copy(*given, out))

    monkeypatch.setattr(offload, "_copy", queued)
    monkeypatch.setattr(offload.torch.cuda, "current_stream", lambda device: streams.named("compute"))
    monkeypatch.setattr(offload.torch.cuda, "stream", streams.on)
    host = Host(torch.device("cpu"))
    host.stream, compute, seen = streams.named("side"), streams.queues["compute"], []
    stored, memory = [], []

    def overwrite(tensors):
        compute.append(lambda: [x.fill_(-1) for x in tensors])

    for i in range(5):
        memory.append([torch.zeros(3)])
        compute.append(lambda i=i: memory[i][0].fill_(i))  # the layer computes
        stored.append(host.put(memory[i]))
        assert [s.here is not None for s in stored] == [i - j < 2 for j in range(i + 1)]  # two layers are there
        if i >= 2:
            overwrite(memory[i - 2])
    for i in reversed(range(5)):
        back = host.get(stored[i])
        assert [s.here is not None for s in stored] == [j == i - 1 for j in range(5)]
        compute.append(lambda back=back: seen.append(back[0].tolist()))
        overwrite(back)
        del back
    streams.run(first)
    assert seen == [[float(i)] * 3 for i in reversed(range(5))]
    assert copies.count(True) == 4 and copies.count(False) == 3  # never the newest; all but the last two
    assert len(host.free) == host.num_slabs == 5


def test_a_second_backward_pass_is_refused():
    for settings in (Recompute("none"), Recompute("attention", offload=True)):
        model, _ = lean_model("llama", settings)
        loss = loss_of(model, some_ids())
        loss.backward(retain_graph=True)
        with pytest.raises((RuntimeError, AssertionError), match="in-?place|second backward"):
            loss.backward()


# ---- installing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_installed_in_the_families_it_is_written_for(family):
    model = random_model(family)
    give_lora(model)
    examine(model)
    installed = lean.install(model)
    assert bool(installed.layers) == (family in LEAN) and bool(installed.why) == (family not in LEAN)
    loss, grads = gradients(model)
    own = random_model(family)
    give_lora(own)
    examine(own)
    expected = gradients(own)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    assert apart(grads, expected[1]) < 1e-5


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 1024},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *ROPES])
def test_the_plan_promises_what_loading_gives(family, dtype):
    config = tiny_config("llama", rope_parameters=ROPES[family]) if family in ROPES else tiny_config(family)
    planned = not lean.stands_against(meta_model(config, dtype), torch.device("cpu"), dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    give_lora(model)
    examine(model)
    assert bool(lean.install(model).layers) == planned == (family in (*LEAN, "yarn"))


def test_a_layer_that_only_looks_like_a_known_one_keeps_its_code(monkeypatch):
    model = random_model("llama")
    give_lora(model)
    examine(model)
    own = type(model.model.layers[1]).forward
    monkeypatch.setattr(type(model.model.layers[1]), "forward", lambda self, x, **named: 1.01 * own(self, x, **named))
    installed = lean.install(model)
    assert "differs" in installed.why and not installed.layers and "forward" not in vars(model.model.layers[0])


def test_without_memory_to_check_it_the_model_keeps_its_code(monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(lean, "_agrees", fails)
    model = random_model("qwen2")
    give_lora(model)
    examine(model)
    assert lean.install(model).why == "no memory is left to check it"


def test_what_stands_against_it_is_said():
    def why(change) -> str:
        model = random_model("qwen2")
        give_lora(model)
        examine(model)
        change(model)
        installed = lean.install(model)
        assert not installed.layers
        return installed.why

    assert "packed" in why(lambda m: m.set_attn_implementation("sdpa"))
    assert "changed" in why(lambda m: m.model.layers[1].mlp.register_forward_hook(lambda *_: None))
    assert "more than LoRA" in why(lambda m: m.model.layers[0].input_layernorm.requires_grad_(True))
    assert "SiLU" in why(lambda m: setattr(m.config, "hidden_act", "gelu"))
    assert "dropout" in why(lambda m: setattr(next(iter(lora.lora_layers(m).values())), "dropout", 0.5))

    class Other(torch.nn.Linear):
        pass

    def replace(m):
        m.model.layers[0].mlp.up_proj.base.__class__ = Other

    assert "linear" in why(replace)
    assert lean.install(tiny_model("gemma2")).notes()[0].startswith("layers: the model's own")


def test_what_is_no_packed_row_takes_the_models_own_code():
    """Evaluation, generation: anything but a row of a training step."""
    model, _ = lean_model("qwen3")
    ids = torch.randint(3, 400, (2, 7))
    own = random_model("qwen3")
    give_lora(own)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(model(input_ids=ids).logits, own(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(
            model.generate(ids, max_new_tokens=5, do_sample=False), own.generate(ids, max_new_tokens=5, do_sample=False)
        )


def test_an_embedding_in_host_memory_leaves_the_lean_layers(monkeypatch):
    """The model's first parameter is LoRA's then, in fp32: a bf16 model was taken for an fp32 one, which
    FlashAttention does not serve."""
    model, asked = tiny_model("llama").to(torch.bfloat16), []
    embeddings_to_host(model)
    lora.attach(model, 4, 8)
    examine(model)
    assert model.dtype == torch.float32
    monkeypatch.setattr(lean, "stands_against", lambda model, device, dtype: asked.append(dtype) or "enough")
    lean.install(model)
    assert asked == [torch.bfloat16]


# ---- on a GPU -------------------------------------------------------------------------------------------


@pytest.mark.needs_cuda
@pytest.mark.parametrize("family", LEAN)
def test_on_a_gpu_every_way_gives_the_models_numbers(family):
    model = random_model(family).to("cuda", torch.bfloat16)
    give_lora(model)
    examine(model)

    def found() -> list[torch.Tensor]:
        torch.manual_seed(0)
        hidden = model.get_decoder()(**pack(some_ids(), "cuda").keywords(), use_cache=False).last_hidden_state
        return torch.autograd.grad(hidden, lora.lora_parameters(model), torch.randn_like(hidden))

    own = found()
    installed = lean.install(model)
    assert not installed.why
    for settings in EVERY_WAY:
        installed.set(settings)
        assert apart(found(), own) < 5e-2, settings
    torch.cuda.synchronize()


@pytest.mark.real_model
def test_smollm2_has_lean_layers():
    """In fp32: a bound of 1e-4 refused it for a LoRA gradient that nearly cancels, and said so in a note only."""
    loaded = load_model("smollm2", train=True, dtype="float32")
    lora.attach(loaded.model, rank=8, alpha=16)
    examine(loaded.model)
    loaded.model.train()
    assert len(lean.install(loaded.model).layers) == 30
