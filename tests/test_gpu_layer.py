"""The decoder layer that a GPU runs, on a CPU: against the model's own code, by torch and in Triton's interpreter.

    pytest tests/test_gpu_layer.py

Its parts have tests of their own: test_layer_passes.py, test_attention.py (`place`). How many kernels it is, is counted
on a fake GPU (test_fake_cuda.py's).
"""

import importlib.util

import pytest
import torch
from test_attend import generate
from test_layer import LEAN, random_model
from test_sampler import make_prompts, write
from tiny import FAMILIES

import kernels.attention
from kernels import layer_passes
from lengthen.models import lora
from lengthen.sampling import cache as caches
from lengthen.sampling import hook, layer
from lengthen.sampling.cache import PagedCache
from lengthen.sampling.hook import Hook
from lengthen.sampling.request import Request, Sampling


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """Pages and layers are a GPU's."""
    monkeypatch.setattr(caches, "on_gpu", lambda device: True)


def lent(hook: Hook) -> list[layer.Layer]:
    return [forward for _, forward in hook.replaced if isinstance(forward, layer.Layer)]


@torch.no_grad()
def logits(hook: Hook, texts: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
    """Of the last `counts` tokens of each text, in one pass over them: what comes before is in the pages."""
    cache = PagedCache(hook.shapes, 40, 16, torch.device("cpu"), hook.dtype)
    tables = [[cache.take() for _ in range(4)] for _ in texts]
    for table, ids, count in zip(tables, texts, counts, strict=True):
        if first := len(ids) - count:
            hook.forward(cache.batch([], [(table, 0, first)]), ids[:first], torch.arange(first), torch.tensor([0]))
    chunks = [(t, len(ids) - count, count) for t, ids, count in zip(tables, texts, counts, strict=True)]
    decode, prefill = ([c for c in chunks if (c[2] <= 8) == small] for small in (True, False))
    assert chunks == decode + prefill, "texts that decode come first"
    at = [torch.arange(first, first + count) for _, first, count in chunks]
    new = [ids[-count:] for ids, count in zip(texts, counts, strict=True)]
    return hook.forward(cache.batch(decode, prefill), torch.cat(new), torch.cat(at), torch.arange(sum(counts)))


def own_logits(model, texts: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=x[None]).logits[0, -n:] for x, n in zip(texts, counts, strict=True)])


def texts() -> list[torch.Tensor]:
    return [torch.randint(3, 400, (n,)) for n in (37, 30, 50)]


# Texts that decode one token each; with drafts; beside the chunk of a prompt, whose beginning is in its pages or is
# not.
COUNTS = [[1, 1, 1], [3, 1, 8], [1, 2, 30], [1, 1, 50]]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family, counts):
    model = random_model(family, **({"attention_bias": True, "mlp_bias": True} if family == "llama" else {}))
    some = texts()
    own = own_logits(model, some, counts)
    hook = Hook(model)
    assert len(lent(hook)) == (model.config.num_hidden_layers if family in LEAN else 0)
    assert (model.model.norm in [module for module, _ in hook.replaced]) == (family in LEAN)
    torch.testing.assert_close(logits(hook, some, counts), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_bf16_is_as_near_to_fp32_as_the_models_own_code(family):
    model, some, counts = random_model(family), texts(), [1, 2, 30]
    exact = own_logits(model, some, counts)
    model = model.to(torch.bfloat16)
    own, ours = own_logits(model, some, counts), logits(hook := Hook(model), some, counts)
    assert lent(hook) and ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.1 * (own - exact).norm()  # sums are rounded less often


@pytest.fixture
def sharp():
    """A model of 16 bits whose key biases are Qwen2.5's: its logits in two roundings are further apart than any bound
    that would find a mistake."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8, "head_dim": 64}
    model = random_model("qwen2", **sizes, num_attention_heads=4, num_key_value_heads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.normal_(std=60)
    return model.to(torch.bfloat16)


def test_large_key_biases_keep_the_layers_that_are_lent(sharp, monkeypatch):
    judged, own = [], Hook._as_near
    monkeypatch.setattr(Hook, "_as_near", lambda self, *given: judged.append(own(self, *given)) or judged[-1])
    ours = Hook(sharp)
    assert judged and all(judged) and len(lent(ours)) == 8 and not ours.notes


def test_a_wrong_layer_is_found_among_large_key_biases(sharp, monkeypatch):
    own = layer.Layer.__call__

    def wrong(self, x, **known):
        return own(self, x, **known) * (1.1 if self.index == 3 else 1)

    monkeypatch.setattr(hook, "BOUND_16_BITS", 1e-3)
    monkeypatch.setattr(layer.Layer, "__call__", wrong)
    ours = Hook(sharp)
    assert not lent(ours)
    assert ours.notes and ours.notes[0].startswith("8 layers run on the model's own code, which is slower: the logits")


def test_the_joint_matrices_are_the_models_weights():
    """The same numbers, no more memory, and not moved again for the next sampler."""
    model = random_model("qwen2")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    (first, *_) = lent(Hook(model))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    qkv, gate_up = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
    for product, layers in ((first.qkv, qkv), (first.gate_up, gate_up)):
        assert torch.equal(product.weight, torch.cat([layer.weight for layer in layers]))
        assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {product.weight.data_ptr()}
        assert product.weight.untyped_storage().nbytes() == 4 * sum(layer.weight.numel() for layer in layers)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    (again, *_) = lent(Hook(model))
    assert again.qkv.weight.data_ptr() == first.qkv.weight.data_ptr()
    assert again.out.weight.data_ptr() == attention.o_proj.weight.data_ptr()


def test_without_memory_to_join_the_weights_each_is_a_product(monkeypatch):
    model, some, counts = random_model("qwen2"), texts(), [1, 2, 30]
    own, cat = own_logits(model, some, counts), torch.cat

    def fails(tensors, *rest, **named):
        if any(isinstance(x, torch.Tensor) and x.data_ptr() in weights for x in tensors):
            raise torch.OutOfMemoryError("no memory")
        return cat(tensors, *rest, **named)

    weights = {layer.mlp.gate_proj.weight.data_ptr() for layer in model.model.layers}
    monkeypatch.setattr(torch, "cat", fails)
    hook = Hook(model)
    assert len(lent(hook)) == model.config.num_hidden_layers
    assert all(layer.gate_up.weight is None and layer.qkv.weight is not None for layer in lent(hook))
    torch.testing.assert_close(logits(hook, some, counts), own, rtol=1e-4, atol=1e-4)


def test_a_model_is_saved_as_before(tmp_path):
    from safetensors.torch import load_file

    model = random_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert lent(Hook(model))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in saved)


def test_the_model_is_itself_again_after_a_pass():
    model, ids = random_model("qwen3"), torch.randint(3, 400, (9,))
    before = own_logits(model, [ids], [9])
    logits(Hook(model), [ids], [9])
    assert torch.equal(own_logits(model, [ids], [9]), before)
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_a_layer_that_only_looks_like_a_known_one_keeps_its_code(monkeypatch):
    model, ids = random_model("llama"), torch.randint(3, 400, (20,))
    own = layer.Layer.__call__
    monkeypatch.setattr(layer.Layer, "__call__", lambda self, x, **known: own(self, x, **known) * 1.5)
    hook = Hook(model)
    assert not hook.replaced
    torch.testing.assert_close(logits(hook, [ids], [1]), own_logits(model, [ids], [1]), rtol=1e-4, atol=1e-4)


def test_other_activations_and_replaced_modules_keep_their_code():
    assert not Hook(random_model("llama", hidden_act="gelu")).replaced
    model = random_model("llama")
    down = model.model.layers[0].mlp.down_proj
    down.forward = down.forward  # as accelerate's hooks do
    assert len(lent(Hook(model))) == model.config.num_hidden_layers - 1
    model = random_model("llama")
    heard = []
    model.model.layers[1].mlp.register_forward_hook(lambda *given: heard.append(given))
    ours = Hook(model)
    assert len(lent(ours)) == model.config.num_hidden_layers - 1 and heard
    assert ours.notes[0].startswith("1 layers run on the model's own code")


@pytest.mark.parametrize("error", [AttributeError("no attribute"), ValueError("not enough values")])
def test_remote_code_with_the_name_of_a_known_layer_keeps_its_code(monkeypatch, error):
    def lacks(self, *given):
        raise error

    monkeypatch.setattr(layer.Layer, "__init__", lacks)
    assert not Hook(random_model("llama")).replaced


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
def test_lora_inside(targets):
    model = random_model("qwen2")
    lora.attach(model, rank=4, alpha=8, targets=targets)
    for adapted in lora.lora_layers(model).values():
        torch.nn.init.normal_(adapted.B, std=0.2)
    some, counts = texts(), [1, 2, 30]
    own = own_logits(model, some, counts)
    assert (own - own_logits(random_model("qwen2"), some, counts)).norm() > 0.1 * own.norm()
    hook = Hook(model)
    assert len(lent(hook)) == model.config.num_hidden_layers
    torch.testing.assert_close(logits(hook, some, counts), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_four_bit_weights(adapted, same_nf4_on_every_cpu):
    """Their layers are called as they are, one by one, and what they give is added to x."""
    from bitsandbytes.nn import Linear4bit

    model = random_model("qwen2", hidden_size=128, intermediate_size=128, head_dim=32)
    for one in model.model.layers:
        for name, old in [(n, m) for n, m in one.named_modules() if type(m) is torch.nn.Linear]:
            bias = old.bias is not None
            new = Linear4bit(old.in_features, old.out_features, bias, torch.float32, quant_type="nf4")
            new.load_state_dict(old.state_dict())
            parent, _, leaf = name.rpartition(".")
            setattr(one.get_submodule(parent), leaf, new.to("cpu"))
    if adapted:
        lora.attach(model, rank=4, alpha=8)
        for one in lora.lora_layers(model).values():
            torch.nn.init.normal_(one.B, std=0.2)
    some, counts = texts(), [1, 2, 30]
    own = own_logits(model, some, counts)
    hook = Hook(model)
    assert len(lent(hook)) == model.config.num_hidden_layers and lent(hook)[0].qkv.weight is None
    torch.testing.assert_close(logits(hook, some, counts), own, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels take no CPU tensors")
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_on_the_kernels_themselves(monkeypatch, family):
    """In Triton's interpreter: decoding, drafts, and a prompt's chunk."""
    model, some, counts = random_model(family), texts(), [1, 3, 40]
    own, hook = own_logits(model, some, counts), Hook(model)
    from kernels import attention_triton

    monkeypatch.setattr(kernels.attention, "_kernels", lambda *_: attention_triton)
    monkeypatch.setattr(layer_passes, "_fast", lambda x: True)
    torch.testing.assert_close(logits(hook, some, counts), own, rtol=1e-4, atol=1e-4)


def test_texts_are_generates():
    model, prompts = random_model("qwen3"), make_prompts(6)
    greedy = Sampling(temperature=0, max_new_tokens=24)
    samples = write(model, [Request(i, p, i, greedy) for i, p in enumerate(prompts)], page_tokens=16)
    assert lent(samples[None].hook)
    for i, prompt in enumerate(prompts):
        assert samples[i].token_ids == generate(model, prompt, 24), i


def test_a_closed_sampler_lends_nothing_more():
    """The base model is what is left of a model after its adapter: nothing computes with the old weights then."""
    model = random_model("qwen3")
    sampler = write(model, [Request(0, [5, 6, 7], 0, Sampling(max_new_tokens=3))], page_tokens=16)[None]
    assert sampler.hook.replaced and sampler.graphs
    sampler.close()
    assert not sampler.hook.replaced and sampler.graphs is None


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LEAN)
def test_gpu_logits_are_the_models_own(family, dtype):
    model, ids = random_model(family).cuda(), torch.randint(3, 400, (1, 40), device="cuda")
    with torch.no_grad():
        exact = model(input_ids=ids).logits[0]
        model = model.to(dtype)
        own = model(input_ids=ids).logits[0]
        hook = Hook(model)
        cache = PagedCache(hook.shapes, 4, 16, ids.device, dtype)
        table, at = [cache.take() for _ in range(3)], torch.arange(40, device="cuda")
        ours = [hook.forward(cache.batch([], [(table, 0, 30)]), ids[0, :30], at[:30], at[:30])]
        for i in range(30, 40):
            ours.append(hook.forward(cache.batch([(table, i, 1)], []), ids[0, i : i + 1], at[i : i + 1], at[:1]))
    assert len(lent(hook)) == model.config.num_hidden_layers
    assert (torch.cat(ours) - exact).norm() <= 1.1 * (own - exact).norm() + 1e-4 * exact.norm()
