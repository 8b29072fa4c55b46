"""LoRA against PEFT: same logits, same gradients, each other's files.  python -m pytest tests/test_lora.py"""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from tiny import tiny_model as any_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lengthen.models import lora
from lengthen.models.export import merge_to
from lengthen.records import UserError

IDS = torch.arange(3, 60).view(3, 19) * 7 % 500
SMALL = {"initializer_range": 0.1}  # logits of +-2: 1e-5 is then a bar for fp32, not below its rounding
EVERY_KIND = ("llama", "qwen2", "gemma2", "phi3")  # plain; biases; other norms and soft caps; fused qkv and gate-up


def tiny_model(family: str = "llama", **changes) -> nn.Module:
    return any_tiny_model(family, **{**SMALL, **changes})


def with_lora(family: str = "llama", **options) -> nn.Module:
    """A tiny model with LoRA layers whose B is not zero, so that they change the logits."""
    model = tiny_model(family)
    rslora = options.pop("rslora", False)  # only PEFT makes such adapters
    lora.attach(model, **{"rank": 4, "alpha": 6, **options})
    for layer in lora.lora_layers(model).values():
        layer.rslora, layer.scale = rslora, layer.alpha / (layer.rank**0.5 if rslora else layer.rank)
    generator = torch.Generator().manual_seed(1)
    for layer in lora.lora_layers(model).values():
        layer.B.data.normal_(0, 0.3, generator=generator)
    return model


def peft_adapter(folder: Path, family: str = "llama", **options) -> nn.Module:
    """A tiny model under PEFT with random adapter weights, saved by PEFT itself."""
    torch.manual_seed(5)
    options = {"r": 4, "lora_alpha": 7, "target_modules": "all-linear", "init_lora_weights": False, **options}
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    model.save_pretrained(folder)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def edit_config(folder: Path, **changes) -> None:
    path = folder / lora.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- each other's files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY_KIND)
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"targets": ["q_proj", "down_proj", "qkv_proj"]}])
def test_peft_loads_our_adapter_and_gives_the_same_logits(tmp_path, family, options):
    if "targets" in options:
        names = {n.rpartition(".")[2] for n in lora.decoder_linears(tiny_model(family))}
        options = {"targets": sorted(names & set(options["targets"]))}
    ours = with_lora(family, **options)
    lora.save_adapter(ours, tmp_path, "somewhere/base")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert (logits(ours) - logits(tiny_model(family))).abs().max() > 0.01
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "somewhere/base"


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["o_proj", "model.layers.1.mlp.down_proj"], "use_rslora": True},
        {"target_modules": r".*layers\.0.*(o|down)_proj"},
        {"target_modules": ["o_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    ],
)
def test_we_load_pefts_adapter_merged_and_attached(tmp_path, family, options):
    theirs = peft_adapter(tmp_path, family, **options)
    merged, attached = tiny_model(family), tiny_model(family)
    lora.merge_adapter(merged, tmp_path)
    lora.attach_adapter(attached, tmp_path)
    assert (logits(theirs) - logits(tiny_model(family))).abs().max() > 0.01
    # merged weights are other fp32 numbers, so the sums round differently
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(attached), logits(theirs), rtol=0, atol=1e-5)


def test_a_target_that_is_one_layer_is_saved_by_its_whole_name(tmp_path):
    lora.save_adapter(with_lora(targets=["model.layers.0.self_attn.q_proj"]), tmp_path, "base")
    assert json.loads((tmp_path / lora.CONFIG).read_text())["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    lora.save_adapter(with_lora(), tmp_path, "base")
    expected = [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]  # the head is not among them
    assert json.loads((tmp_path / lora.CONFIG).read_text())["target_modules"] == expected


# ---- training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY_KIND)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_are_pefts(tmp_path, family, dropout):
    ours = with_lora(family, dropout=dropout)
    lora.save_adapter(ours, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    for model in (ours, theirs):
        torch.manual_seed(3)  # the same masks: both draw one per layer, in the order of the layers
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for name, layer in lora.lora_layers(ours).items():
        for part, parameter in (("A", layer.A), ("B", layer.B)):
            grad = expected.pop(f"base_model.model.{name}.lora_{part}.default.weight")
            assert grad.abs().max() > 0
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-5 * grad.abs().max().item())
    assert not expected, "PEFT trains layers that we do not"
    assert all(p.grad is None for n, p in ours.named_parameters() if not n.endswith((".A", ".B")))


def test_a_fresh_adapter_is_the_base_model_and_its_seed_is_its_start():
    model = tiny_model()
    parameters = lora.attach(model, 8, 16, seed=3)
    assert torch.equal(logits(model), logits(tiny_model()))
    again, other = lora.attach(tiny_model(), 8, 16, seed=3), lora.attach(tiny_model(), 8, 16, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))
    assert not torch.equal(parameters[0], other[0])
    # PEFT's start: uniform within +-1/sqrt(in)
    bound = 64**-0.5
    assert 0.9 * bound < parameters[0].abs().max() <= bound and parameters[0].dtype == torch.float32
    assert [n for n, p in model.named_parameters() if p.requires_grad and not n.endswith((".A", ".B"))] == []


def test_bf16_model_trains_fp32_masters():
    model = tiny_model().bfloat16()
    lora.attach(model, 4, 8)
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = [layer.B.grad for layer in lora.lora_layers(model).values()]
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in grads)


# ---- merging --------------------------------------------------------------------------------------------


def test_merge_leaves_a_shared_weight_alone_elsewhere(tmp_path):
    lora.save_adapter(with_lora(targets=["model.layers.0.self_attn.q_proj"]), tmp_path, "base")
    model = tiny_model()
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    first.q_proj.weight = second.q_proj.weight
    before = second.q_proj.weight.clone()
    lora.merge_adapter(model, tmp_path)
    assert torch.equal(second.q_proj.weight, before)
    assert not torch.equal(first.q_proj.weight, before)


def test_merge_is_computed_in_fp32_and_rounded_once(tmp_path):
    source = with_lora()
    lora.save_adapter(source, tmp_path, "base")
    model = tiny_model().bfloat16()
    layer = lora.lora_layers(source)["model.layers.0.mlp.up_proj"]
    expected = (
        model.model.layers[0].mlp.up_proj.weight.double() + layer.scale * (layer.B @ layer.A).double()
    ).bfloat16()
    lora.merge_adapter(model, tmp_path)
    merged = model.model.layers[0].mlp.up_proj.weight
    # fp32 sums may fall on the other side of a rounding boundary in a few entries, by one bf16 step
    assert merged.dtype == torch.bfloat16 and (merged != expected).float().mean() < 0.01


@pytest.mark.parametrize("attached", [False, True])
def test_without_adapter_is_the_base_model_for_a_while(tmp_path, attached):
    lora.save_adapter(with_lora(), tmp_path, "tiny")
    base, model = tiny_model(), tiny_model()
    (lora.attach_adapter if attached else lora.merge_adapter)(model, tmp_path)
    adapted = logits(model)
    bar = 0 if attached else 1e-5
    with pytest.raises(KeyboardInterrupt), lora.without_adapter(model, tmp_path):
        assert not lora.lora_layers(model) and (logits(model) - logits(base)).abs().max() <= bar
        assert (logits(model) - adapted).abs().max() > 0.1
        raise KeyboardInterrupt
    assert (logits(model) - adapted).abs().max() <= bar


def test_a_merged_bf16_weight_comes_back_to_within_the_rounding_of_its_merged_value(tmp_path):
    lora.save_adapter(with_lora(), tmp_path, "tiny")
    base, model = tiny_model().bfloat16(), tiny_model().bfloat16()
    lora.merge_adapter(model, tmp_path)
    merged = {name: layer.weight.detach().clone() for name, layer in lora.decoder_linears(model).items()}
    with lora.without_adapter(model, tmp_path):
        for name, layer in lora.decoder_linears(model).items():
            off = (layer.weight.float() - base.get_submodule(name).weight.float()).abs()
            assert (off <= merged[name].float().abs() * 2**-8 + base.get_submodule(name).weight.abs() * 2**-8).all()


def test_merged_folder_gives_the_adapters_logits(tmp_path):
    ours = with_lora("qwen2")
    lora.save_adapter(ours, tmp_path / "adapter", "base")
    model = tiny_model("qwen2")
    lora.merge_adapter(model, tmp_path / "adapter")
    base = save_tiny(tmp_path / "base", "qwen2")
    merge_to(model, base, tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(reloaded), logits(ours), rtol=0, atol=1e-5)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "base", "merged"}  # no temporary folder stays


# ---- mixtures of experts --------------------------------------------------------------------------------

MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES = ("qwen3_moe", "mixtral", "olmoe", "qwen2_moe")


@pytest.mark.parametrize("family", MIXTURES)
def test_what_of_a_mixture_is_adapted_and_what_is_not_is_said(family):
    """transformers keeps the experts of a layer in one 3-D tensor, which is no linear layer."""
    model = any_tiny_model(family, **MOE)
    parameters = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    linears = {f"{name}.weight" for name in lora.decoder_linears(model)}
    rest = {n: p.numel() for n, p in parameters.items() if n not in linears and "embed" not in n and "lm_head" not in n}
    assert any("experts.gate_up_proj" in name for name in rest)
    lora.attach(model, 4, 8)
    note = lora.out_of_reach(model)
    share = sum(rest.values()) / (sum(rest.values()) + sum(parameters[n].numel() for n in linears))
    assert "mlp.experts.down_proj, mlp.experts.gate_up_proj, mlp.gate.weight stay as they are" in note
    assert f" {share:.0%} of the decoder's weights" in note
    assert lora.out_of_reach(tiny_model("llama")) == ""


def test_an_adapter_on_experts_gets_a_true_message(tmp_path):
    """PEFT's own for the 3-D tensors, and one of transformers 4, which had a linear layer per expert."""
    model = any_tiny_model("qwen3_moe", **MOE)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "fused")
    model = any_tiny_model("qwen3_moe", **MOE)
    with pytest.raises(UserError, match="uses target_parameters"):
        lora.merge_adapter(model, tmp_path / "fused")
    ours = with_lora("llama")
    lora.save_adapter(ours, tmp_path / "single", "base")
    tensors = load_file(tmp_path / "single" / lora.WEIGHTS)
    one = {f"base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_{m}.weight": tensors[
        f"base_model.model.model.layers.0.mlp.gate_proj.lora_{m}.weight"] for m in "AB"}  # fmt: skip
    save_file(one, tmp_path / "single" / lora.WEIGHTS)
    with pytest.raises(UserError, match="adapts single experts") as error:
        lora.merge_adapter(model, tmp_path / "single")
    assert "another model" not in error.value.message and "PEFT" in error.value.hint


def test_an_adapter_that_holds_nan_is_refused(tmp_path):
    ours = with_lora("llama")
    next(iter(lora.lora_layers(ours).values())).B.data[0, 0] = float("nan")
    lora.save_adapter(ours, tmp_path, "base")
    with pytest.raises(UserError, match="holds NaN or infinity in base_model.model.model.layers.0"):
        lora.merge_adapter(tiny_model("llama"), tmp_path)


# ---- NF4 on the CPU -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nf4_folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), hidden_size=128, intermediate_size=256, head_dim=32)


def nf4_model(folder: Path) -> nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def test_nf4_gradients_and_logits_are_pefts(tmp_path, nf4_folder):
    ours = nf4_model(nf4_folder)
    lora.attach(ours, 4, 8)
    for layer in lora.lora_layers(ours).values():
        layer.B.data.normal_(0, 0.1)
    lora.save_adapter(ours, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(nf4_model(nf4_folder), tmp_path, is_trainable=True)
    for model in (ours, theirs):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(logits(ours.eval()), logits(theirs.eval()), rtol=0, atol=1e-4)
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    layers = lora.lora_layers(ours)
    assert len(grads) == 2 * len(layers) == 28
    for name, layer in layers.items():
        grad = grads[f"base_model.model.{name}.lora_A.default.weight"]
        torch.testing.assert_close(layer.A.grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())


def test_nf4_weights_are_not_merged_into(tmp_path, nf4_folder):
    model = nf4_model(nf4_folder)
    lora.attach(model, 4, 8)
    lora.save_adapter(model, tmp_path, "base")
    with pytest.raises(UserError, match="quantised") as raised:
        lora.merge_adapter(nf4_model(nf4_folder), tmp_path)
    assert "--quantize none" in raised.value.hint


# ---- refused, by name -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "token_indices|token_adapter"),
    ],
)
def test_what_only_peft_implements_is_refused_by_name(tmp_path, options, named):
    peft_adapter(tmp_path, **options)
    for load in (lora.merge_adapter, lora.attach_adapter):
        with pytest.raises(UserError, match=named):
            load(tiny_model(), tmp_path)


def test_a_field_of_a_later_peft_is_refused_by_name(tmp_path):
    peft_adapter(tmp_path)
    edit_config(tmp_path, use_tomorrows_variant=True)
    with pytest.raises(UserError, match="use_tomorrows_variant"):
        lora.merge_adapter(tiny_model(), tmp_path)


def test_other_kinds_of_adapter_are_refused(tmp_path):
    peft_adapter(tmp_path)
    edit_config(tmp_path, peft_type="IA3")
    with pytest.raises(UserError, match="IA3"):
        lora.read_adapter(tmp_path)


# ---- files that are wrong -------------------------------------------------------------------------------


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(UserError, match="adapter_config.json is missing"):
        lora.read_adapter(tmp_path)
    with pytest.raises(UserError, match="adapter"):
        lora.read_adapter(tmp_path / "nowhere")
    peft_adapter(tmp_path)
    (tmp_path / lora.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.safetensors is missing") as raised:
        lora.read_adapter(tmp_path)
    assert "pickle" in raised.value.hint


@pytest.mark.parametrize("file", [lora.WEIGHTS, lora.CONFIG])
def test_a_torn_file_is_named(tmp_path, file):
    peft_adapter(tmp_path)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        lora.read_adapter(tmp_path)


def test_a_rank_that_the_tensors_do_not_have(tmp_path):
    peft_adapter(tmp_path)
    edit_config(tmp_path, r=8)
    with pytest.raises(UserError, match="r = 8"):
        lora.read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 32}, "is for another model: model.layers.0"),
        ({"num_hidden_layers": 1}, "no linear layer model.layers.1"),
    ],
)
def test_an_adapter_for_another_shape(tmp_path, other, message):
    lora.save_adapter(with_lora(), tmp_path, "the/base")
    for load in (lora.merge_adapter, lora.attach_adapter):
        with pytest.raises(UserError, match=message) as raised:
            load(tiny_model(**other), tmp_path)
        assert "the/base" in raised.value.hint


def test_an_adapter_for_another_model_of_the_same_shape(tmp_path):
    lora.save_adapter(with_lora(), tmp_path, "the/base")
    (tmp_path / "meta.json").write_text(json.dumps({"base_hash": lora.base_hash(tiny_model())}))
    lora.merge_adapter(tiny_model(), tmp_path)
    lora.merge_adapter(tiny_model().bfloat16(), tmp_path)  # the same model at another dtype
    with pytest.raises(UserError, match="another model of the same shape"):
        lora.merge_adapter(tiny_model(seed=1), tmp_path)
    (tmp_path / "meta.json").write_text("{")  # used to switch the check off
    with pytest.raises(UserError, match="meta.json is damaged"):
        lora.merge_adapter(tiny_model(seed=1), tmp_path)


def test_base_hash_does_not_see_lora_nor_quantisation(nf4_folder):
    plain = AutoModelForCausalLM.from_pretrained(nf4_folder, dtype=torch.float32)
    assert lora.base_hash(plain) == lora.base_hash(nf4_model(nf4_folder))
    before = lora.base_hash(plain)
    lora.attach(plain, 4, 8)
    assert lora.base_hash(plain) == before


def test_targets_that_match_nothing_are_named():
    with pytest.raises(UserError, match="'c_attn'") as raised:
        lora.attach(tiny_model(), 4, 8, targets=["q_proj", "c_attn"])
    assert "q_proj" in raised.value.hint
    with pytest.raises(UserError, match="lm_head"):
        lora.attach(tiny_model(), 4, 8, targets=["lm_head"])


def test_of_a_vision_model_only_the_text_decoder_is_adapted():
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**text, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config={**text, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300}, vision_config=vision
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    lora.attach(model, rank=2, alpha=4)
    names = list(lora.lora_layers(model))
    assert len(names) == 14 and all(".language_model." in name for name in names)
    assert lora.out_of_reach(model) == ""
