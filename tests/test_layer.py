"""The decoder layer in few operations against the model's own code.

python -m pytest -q tests/test_layer.py
"""

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_tokenizer

from kernels import HAS_NUMBA
from lengthen.models import lora
from lengthen.sampling import layer
from lengthen.sampling.cache import PagedCache
from lengthen.sampling.engine import Sampler
from lengthen.sampling.hook import Hook
from lengthen.sampling.request import Request, Sampling

LEAN = ("llama", "qwen2", "qwen3", "mistral")


def random_model(family: str, **changes: object):
    """Every parameter random: a new model's norm weights are ones and its biases zeros, which would hide mistakes."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model


def logits(hook: Hook, ids: torch.Tensor) -> torch.Tensor:
    """Of a prompt's chunk."""
    cache, at = PagedCache(hook.shapes, 4, 32, torch.device("cpu"), hook.dtype), torch.arange(len(ids))
    with torch.no_grad():
        return hook.forward(cache.batch([], [([cache.take(), cache.take()], 0, len(ids))]), ids, at, at)


def one_by_one(hook: Hook, ids: torch.Tensor) -> torch.Tensor:
    """As a text is written: steps of one token."""
    cache, at = PagedCache(hook.shapes, 4, 32, torch.device("cpu"), hook.dtype), torch.arange(len(ids))
    table = [cache.take(), cache.take()]
    steps = [(ids[i : i + 1], at[i : i + 1], cache.batch([(table, i, 1)], [])) for i in range(len(ids))]
    with torch.no_grad():
        return torch.cat([hook.forward(batch, token, place, at[:1]) for token, place, batch in steps])


def usable(layout: str) -> bool:
    return (
        getattr(torch.backends, {"mkl": "mkl", "onednn": "mkldnn"}[layout]).is_available()
        if layout != "columns"
        else True
    )


LAYOUTS = [
    pytest.param(one, marks=pytest.mark.skipif(not usable(one), reason=f"torch was built without {one}"))
    for one in ("mkl", "onednn", "columns")
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family, layout, monkeypatch):
    monkeypatch.setattr(layer, "layout_of", lambda *_: layout)
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = random_model(family, **biases)
    ids = torch.randint(3, 400, (20,))
    with torch.no_grad():
        own = model(input_ids=ids[None]).logits[0]
    hook = Hook(model)
    layers = [forward for _, forward in hook.replaced if isinstance(forward, layer.Layer)]
    assert len(layers) == (model.config.num_hidden_layers if family in LEAN else 0)
    assert any(module is model.lm_head for module, _ in hook.replaced)
    for count in (1, 2, 20):
        torch.testing.assert_close(logits(hook, ids[:count]), own[:count], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not HAS_NUMBA, reason="the call is Numba's")
@pytest.mark.parametrize("counts", [(1,), (2,), (1, 1), (1, 3), (1, 1, 1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("family", LEAN)
def test_a_step_of_few_tokens_is_one_call_and_the_models_own(family, counts, monkeypatch):
    """Texts of different lengths, with and without drafts; weights and a window that no number of threads divides."""
    from kernels import cpu

    calls, own_call = [], cpu.Layer.__call__
    monkeypatch.setattr(cpu.Layer, "__call__", lambda self, *given: calls.append(1) or own_call(self, *given))
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = random_model(family, **biases)
    hook = Hook(model)
    cache = PagedCache(hook.shapes, 12, 32, torch.device("cpu"), hook.dtype)
    texts = [torch.randint(3, 400, (37 + 3 * i + count,)) for i, count in enumerate(counts)]
    tables = [[cache.take(), cache.take()] for _ in texts]
    at = [torch.arange(len(ids) - count, len(ids)) for ids, count in zip(texts, counts, strict=True)]
    with torch.no_grad():
        for ids, table, new in zip(texts, tables, at, strict=True):
            before = torch.arange(new[0])
            hook.forward(cache.batch([], [(table, 0, len(before))]), ids[before], before, before)
        del calls[:]
        batch = cache.batch([(table, int(new[0]), len(new)) for table, new in zip(tables, at, strict=True)], [])
        every = torch.arange(sum(counts))
        got = hook.forward(batch, torch.cat([i[n] for i, n in zip(texts, at, strict=True)]), torch.cat(at), every)
        own = [model(input_ids=ids[None]).logits[0, new] for ids, new in zip(texts, at, strict=True)]
    assert len(calls) == (model.config.num_hidden_layers if sum(counts) <= 4 else 0)
    torch.testing.assert_close(got, torch.cat(own), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_product_serves_any_number_of_rows(layout, monkeypatch):
    """Laid out for one number of rows, used with others; sizes that no block divides."""
    monkeypatch.setattr(layer, "layout_of", lambda *_: layout)
    for out, width in ((5, 3), (771, 333), (960, 576)):
        one, two = torch.nn.Linear(width, out), torch.nn.Linear(width, 2 * out, bias=False)
        times = layer.Product([one, two], torch.float32, laid_out=True)
        alone = layer.Product([one], torch.float32, laid_out=True)
        for rows in (1, 2, 7, 48, 511, 512, 513, 1100):
            x = torch.randn(rows, width)
            with torch.no_grad():
                want = torch.cat([one(x), two(x)], 1)
            for given in (x, x.t().contiguous().t()):
                torch.testing.assert_close(torch.cat([*times(given)], 1), want, rtol=1e-4, atol=1e-4)
            alone.add_to(total := torch.ones(rows, out), x)
            torch.testing.assert_close(total, 1 + want[:, :out], rtol=1e-4, atol=1e-4)


def test_the_model_is_itself_again_after_a_pass():
    model = random_model("qwen3")
    ids = torch.randint(3, 400, (1, 9))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        logits(Hook(model), ids[0])
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_a_layer_that_only_looks_like_a_known_one_keeps_its_code(monkeypatch):
    """Where the logits are not the model's own, the sampler takes the model's own code, and the texts stay right."""
    model = random_model("llama")
    prompt, sampling = list(range(3, 20)), Sampling(temperature=0, max_new_tokens=12)

    def write() -> tuple[list[int], Sampler]:
        sampler = Sampler(model, tiny_tokenizer(), eos_ids={2}, context=256)
        sampler.add(Request(0, prompt, 0, sampling))
        return next(sampler.run()).token_ids, sampler

    right, sampler = write()
    assert sampler.hook.replaced
    own = layer.Layer.__call__
    monkeypatch.setattr(layer.Layer, "__call__", lambda self, x, **known: own(self, x, **known) * 1.5)
    ids, sampler = write()
    assert not sampler.hook.replaced
    assert ids == right


def test_lora_inside_a_layer_is_not_passed_over():
    """Layers over 4-bit weights hold LoRA modules: products of the bare weights would forget the adapter."""
    model = random_model("llama")
    lora.attach(model, rank=4, alpha=8)
    for adapted in lora.lora_layers(model).values():
        torch.nn.init.normal_(adapted.B, std=0.2)
    ids = torch.randint(3, 400, (12,))
    with torch.no_grad():
        own = model(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(logits(Hook(model), ids), own, rtol=1e-4, atol=1e-4)


def test_a_hook_inside_a_layer_is_still_called():
    """Ours calls no module inside: it stood in for layers that somebody listens to, too."""
    model, heard = random_model("llama"), []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
    hook = Hook(model)
    heard.clear()
    logits(hook, torch.randint(3, 400, (12,)))
    assert heard == [1]


def test_no_copies_of_a_model_that_fills_the_memory(monkeypatch):
    model = random_model("llama")
    """Its weights become views of the joint ones, as on a GPU."""
    ids = torch.randint(3, 400, (12,))
    with torch.no_grad():
        own = model(input_ids=ids[None]).logits[0]
    monkeypatch.setattr(layer, "physical_memory", lambda: 4 * 4 * model.num_parameters() - 4)
    monkeypatch.setattr(layer, "lay_out", None)
    hook = Hook(model)
    assert len(hook.replaced) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(logits(hook, ids), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", LEAN)
def test_bf16_is_as_near_to_fp32_as_the_models_own_code(family):
    model, ids = random_model(family).to(torch.bfloat16), torch.randint(3, 400, (64,))
    with torch.no_grad():
        own = model(input_ids=ids[None]).logits[0]
        hook = Hook(model)
        passes = logits(hook, ids), one_by_one(hook, ids)
        exact = model.double()(input_ids=ids[None]).logits[0]  # of the rounded weights
    assert sum(isinstance(forward, layer.Layer) for _, forward in hook.replaced) == model.config.num_hidden_layers
    for ours in passes:
        assert ours.dtype == torch.bfloat16
        ours_off, own_off = ((x - exact).square().mean().sqrt() for x in (ours, own))
        assert ours_off < 1.2 * own_off


def test_fp16_is_served_by_the_references():
    """Neither the kernels of a CPU nor its layouts know it."""
    model, ids = random_model("llama"), torch.randint(3, 400, (20,))
    with torch.no_grad():
        exact = model(input_ids=ids[None]).logits[0]
        own = model.to(torch.float16)(input_ids=ids[None]).logits[0]
    hook = Hook(model)
    assert len(hook.replaced) == model.config.num_hidden_layers + 1
    assert (logits(hook, ids) - exact).norm() < 1.2 * (own - exact).norm()


@pytest.mark.parametrize("sharp", [1.0, 60.0])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_attention_over_pages_whose_scores_lie_far_apart(family, sharp):
    """Scores of some hundred: a page's exponentials would overflow, or vanish beside another's."""
    model = random_model(family)
    with torch.no_grad():
        for one in model.model.layers:
            one.self_attn.q_proj.weight.mul_(sharp)
    ids = torch.randint(3, 400, (40,))  # longer than mistral's window of 24
    with torch.no_grad():
        own = model(input_ids=ids[None]).logits[0]
    hook = Hook(model)
    cache = PagedCache(hook.shapes, 8, 8, torch.device("cpu"), torch.float32)
    pages = [cache.take() for _ in range(8)]
    with torch.no_grad():
        hook.forward(cache.batch([], [(pages, 0, 30)]), ids[:30], torch.arange(30), torch.tensor([29]))
        for i in range(30, 40):
            got = hook.forward(cache.batch([(pages, i, 1)], []), ids[i : i + 1], torch.tensor([i]), torch.tensor([0]))
            torch.testing.assert_close(got[0], own[i], rtol=1e-3, atol=1e-3)
