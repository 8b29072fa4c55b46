"""The GPU's code path on a CPU: block tables, slots and lengths go to the kernels that a CPU has.

    pytest tests/test_attend.py

Oracles: transformers' generate, one prompt at a time, and what a CPU does (tests/test_sampler.py).
"""

import sys

import pytest
import torch
from test_sampler import make_prompts, make_sampler, write
from tiny import FAMILIES, tiny_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import kernels.attention
import kernels.layer_passes
import kernels.sampling_tail
from kernels.attention import quantise
from lengthen.models import flash
from lengthen.models.flash import Bounds, Varlen, attend_chunks
from lengthen.records import UserError
from lengthen.sampling import cache as caches
from lengthen.sampling.cache import LayerShape, PagedCache, bytes_per_token
from lengthen.sampling.hook import Hook
from lengthen.sampling.request import Request, Sampling

GREEDY = Sampling(temperature=0, max_new_tokens=24)


@pytest.fixture
def block_tables(monkeypatch):
    """Caches and layers are a GPU's from here on; what nobody stored is nan, as it may be there."""
    own = PagedCache._allocate

    def poisoned(self, shape):
        pages = own(self, shape)
        for pool in pages:
            if pool is not None:
                pool.fill_(torch.nan)
        return pages

    monkeypatch.setattr(caches, "on_gpu", lambda device: True)
    monkeypatch.setattr(PagedCache, "_allocate", poisoned)


def generate(model, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    options = {"do_sample": False, "repetition_penalty": 1.1, "max_new_tokens": count}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def expect_little(sampler) -> None:
    pages_for = sampler.cache.pages_for
    sampler.scheduler._expected_pages = lambda row: max(0, pages_for(len(row.ids) + 1) - len(row.pages))


def write_hopefully(model, requests, **options) -> dict:
    """`write` by a sampler that expects one more token of each, and so lets more texts in than its pages hold."""
    sampler = make_sampler(model, **options)
    expect_little(sampler)
    for request in requests:
        sampler.add(request)
    return {**{sample.request.key: sample for sample in sampler.run()}, None: sampler}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generate_token_by_token(block_tables, family):
    """8 ragged prompts through 4 rows in pages of 16; windows (24) are shorter than most texts, prompts come in chunks
    of at most 30 tokens, so that later chunks read their keys out of the pages."""
    model, prompts = tiny_model(family), make_prompts(8)
    samples = write(model, [Request(i, p, i, GREEDY) for i, p in enumerate(prompts)], page_tokens=16)
    assert isinstance(samples[None].cache, PagedCache)
    for i, prompt in enumerate(prompts):
        assert samples[i].token_ids == generate(model, prompt, 24), i


def test_sampled_texts_are_those_of_a_cpus_own_path(block_tables, monkeypatch):
    """Sampling, shared prompts, few pages (rows are preempted): the same tokens by both ways."""
    model, prompts = tiny_model("qwen3"), [p * 3 for p in make_prompts(5)]
    requests = [
        Request((i, j), p, 7 * i + j, Sampling(max_new_tokens=40)) for i, p in enumerate(prompts) for j in (0, 1)
    ]
    options = {"page_tokens": 16, "kv_tokens": 224, "context": 200}
    ours = write_hopefully(model, requests, **options)
    assert ours[None].stats["shared_tokens"] and ours[None].stats["preemptions"]
    monkeypatch.setattr(caches, "on_gpu", lambda device: False)
    theirs = write(model, requests, **options)
    for key in (request.key for request in requests):
        assert ours[key].token_ids == theirs[key].token_ids


def test_samples_of_a_prompt_share_its_pages(block_tables):
    """A prompt of 5 pages and a half, 6 samples: 5 pages in common, one of their own each; and the texts of each alone.
    A second prompt that differs on its fourth page shares three and copies the beginning of the fourth."""
    model, prompt = tiny_model("qwen3"), (make_prompts(1, 90)[0] * 90)[:88]
    other = [*prompt[:56], *(9 - prompt[56] % 2 for _ in range(30))]
    requests = [Request(i, prompt if i < 6 else other, i, Sampling(max_new_tokens=6)) for i in range(7)]
    sampler = make_sampler(model, page_tokens=16, max_rows=8, prefill_tokens=64, eos_ids=set())
    sampler.add(requests[0])
    seen, most, own, later, texts = [], [], sampler.scheduler.schedule, requests[1:], {}

    def watch(busy=()):
        step = own(busy)
        tables = {row.request.key: list(row.pages) for row, _ in step.work}
        seen.append(tables)
        most.append(len({page for table in tables.values() for page in table}))
        return step

    sampler.scheduler.schedule = watch
    for sample in sampler.run():
        texts[sample.request.key] = sample.token_ids
        while later:  # after the first, whose prompt is known by now
            sampler.add(later.pop(0))
    whole = next(tables for tables in seen if len(tables) == 6)
    assert len({tuple(table[:5]) for key, table in whole.items() if key < 6}) == 1
    assert len({table[5] for key, table in whole.items() if key < 6}) == 5
    assert whole[6][:3] == whole[1][:3] and whole[6][3] != whole[1][3] and max(most) == 5 + 5 + 3
    assert sampler.stats["shared_tokens"] == 5 * 87 + 56
    for request in requests:
        assert texts[request.key] == write(model, [request], page_tokens=16, eos_ids=set())[request.key].token_ids


def check_fp8(model) -> None:
    """Oracle: generate, with every key and value rounded to fp8 before the model's own attention sees it."""
    prompts = make_prompts(6)
    requests = [Request(i, p, i, GREEDY) for i, p in enumerate(prompts)]
    samples = write(model, requests, page_tokens=16, kv_dtype=torch.float8_e4m3fn)

    def rounded(module, query, key, value, *args, **options):
        own = sys.modules[type(module).__module__].eager_attention_forward
        pairs = [quantise(x) for x in (key, value)]
        return own(module, query, *(x.float() * scales[..., None] for x, scales in pairs), *args, **options)

    AttentionInterface.register("rounded", rounded)
    AttentionMaskInterface.register("rounded", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation("rounded")
    for i, prompt in enumerate(prompts):
        assert samples[i].token_ids == generate(model, prompt, 24), i


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_pages_are_a_model_that_rounds_its_keys_and_values(block_tables, family):
    check_fp8(tiny_model(family))


def test_fp8_texts_do_not_depend_on_their_neighbours(block_tables):
    """Shared prompts, copied pages, preemption, chunks, drafts, bursts: each text is what it is alone."""
    model, prompts = tiny_model("qwen3"), [p * 3 for p in make_prompts(5)]
    requests = [
        Request((i, j), p, 7 * i + j, Sampling(max_new_tokens=40)) for i, p in enumerate(prompts) for j in (0, 1)
    ]
    options = {"page_tokens": 16, "kv_tokens": 224, "context": 200, "kv_dtype": torch.float8_e4m3fn}
    together = write_hopefully(model, requests, **options)
    assert together[None].stats["shared_tokens"] and together[None].stats["preemptions"]
    for request in requests:
        alone = write(model, [request], **{**options, "prefill_tokens": 512, "lookup": False})
        assert together[request.key].token_ids == alone[request.key].token_ids


def test_fp8_pages_take_half_of_bf16s_memory_and_their_scales():
    shapes = {0: LayerShape(4, 128, 128, 0)}
    size = {d: bytes_per_token(shapes, d) for d in (torch.bfloat16, torch.float8_e4m3fn)}
    assert size == {torch.bfloat16: 4 * 256 * 2, torch.float8_e4m3fn: 4 * (256 + 8)}


def test_fp8_pages_are_refused_on_a_cpu():
    with pytest.raises(UserError, match="fp8 are for a GPU"):
        make_sampler(tiny_model("llama"), kv_dtype=torch.float8_e4m3fn)


def test_remembered_prompts_make_room_for_running_texts(block_tables):
    """One page is left beside a prompt that is remembered: it is forgotten before a row is preempted."""
    model, (first, second) = tiny_model(), (p * 2 for p in make_prompts(2, 40))
    sampler = make_sampler(model, page_tokens=16, kv_tokens=128, context=128, eos_ids=set())
    prefixes = sampler.scheduler.prefixes
    prefixes.room = 8
    for i, prompt in enumerate((first, second)):
        sampler.add(Request(i, prompt[:30], i, Sampling(max_new_tokens=90 if i else 4)))
        list(sampler.run())
        held = [node.page for node in prefixes.order]
        assert sorted([*sampler.cache.free, *held]) == list(range(8))
    assert not sampler.stats["preemptions"] and len(held) == 2  # the second's


def test_the_kernels_themselves_write_the_same(block_tables, monkeypatch):
    """The same sampler on the Triton kernels, interpreted."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("compiled kernels take no CPU tensors")
    from kernels import attention_triton

    model, prompts = tiny_model(), make_prompts(2, 20)
    greedy = Sampling(temperature=0, max_new_tokens=4)
    calls = []

    def interpreted(path, cuda, dtype):
        calls.append(path)
        return attention_triton

    monkeypatch.setattr(kernels.attention, "_kernels", interpreted)
    monkeypatch.setattr(kernels.layer_passes, "_fast", lambda x: True)
    monkeypatch.setattr(kernels.sampling_tail, "_fast", lambda x: True)
    sizes = {"page_tokens": 16, "context": 32, "max_rows": 2}  # few pages, few splits: few programs to interpret
    samples = write(model, [Request(i, p, i, greedy) for i, p in enumerate(prompts)], **sizes)
    assert len(calls) >= 10
    for i, prompt in enumerate(prompts):
        assert samples[i].token_ids == generate(model, prompt, 4), i


def test_a_batch_with_drafts_is_one_forward_pass(block_tables):
    """A text with two draft tokens, one with none, one with seven, and the second chunk of a prompt: the logits of one
    packed pass are those of whole texts."""
    model, ours = (m := tiny_model("gemma3")), Hook(m)
    cache = PagedCache(ours.shapes, 40, 16, torch.device("cpu"), torch.float32)
    texts = [[int(t) for t in torch.randint(3, 500, (n,))] for n in (40, 17, 30, 50)]
    tables = [[cache.take() for _ in range(4)] for _ in texts]
    known, new = [37, 16, 22, 20], [3, 1, 8, 30]

    early = [(table, 0, n) for table, n in zip(tables, known, strict=True)]
    ids = torch.tensor([t for text, n in zip(texts, known, strict=True) for t in text[:n]])
    at = torch.tensor([p for n in known for p in range(n)])
    ours.forward(cache.batch([], early), ids, at, torch.tensor([0]))

    late = [(table, n, count) for table, n, count in zip(tables, known, new, strict=True)]
    batch = cache.batch(late[:3], late[3:])
    assert batch.lengths.tolist() == [40, 17, 30] and batch.spread.tolist()[:8] == [0] * 5 + [0, 1, 2]
    ids = torch.tensor([t for text, n, c in zip(texts, known, new, strict=True) for t in text[n : n + c]])
    at = torch.tensor([p for n, c in zip(known, new, strict=True) for p in range(n, n + c)])
    got = ours.forward(batch, ids, at, torch.arange(len(ids)))
    want = [model(torch.tensor([text]), use_cache=False).logits[0, n:] for text, n in zip(texts, known, strict=True)]
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-3, atol=2e-4)


def oracle(q, k, v, bounds, scaling, window, softcap, sinks):
    """float64, one query at a time."""
    out = []
    for i in range(len(bounds.queries) - 1):
        first, last = bounds.queries[i : i + 2]
        keys, values = (x[slice(*bounds.keys[i : i + 2])].double().transpose(0, 1) for x in (k, v))
        for at in range(first, last):
            seen = keys.shape[1] - (last - 1 - at)
            low = max(0, seen - window) if window else 0
            some = keys[:, low:seen].repeat_interleave(q.shape[1] // k.shape[1], 0)
            scores = (some @ q[at].double()[..., None])[..., 0] * scaling
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None]], 1)
            weights = scores.softmax(1)[:, : some.shape[1]]
            out.append((weights[:, None] @ values[:, low:seen].repeat_interleave(q.shape[1] // k.shape[1], 0))[:, 0])
    return torch.stack(out)


PIECES = {"whole prompts": ([5, 1, 20], [5, 1, 20]), "after earlier chunks": ([5, 1, 20], [9, 30, 20])}
OPTIONS = [{}, {"window": 4}, {"softcap": 3.0}, {"sinks": True}, {"window": 4, "softcap": 3.0, "sinks": True}]


def make_pieces(pieces, dtype=torch.float32, device="cpu", D=32, sinks=False, window=0, softcap=None):
    g = torch.Generator().manual_seed(0)
    bounds = Bounds.make(*PIECES[pieces], torch.device(device))
    q = torch.randn(bounds.queries[-1], 6, D, generator=g)
    k, v = (torch.randn(bounds.keys[-1], 2, D, generator=g) for _ in range(2))
    sinks = torch.linspace(-1, 3, 6, device=device) if sinks else None
    return *(x.to(device, dtype) for x in (q, k, v)), bounds, D**-0.5, window, softcap, sinks


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pieces", PIECES)
def test_pieces_attend_to_all_their_keys(monkeypatch, pieces, options):
    """Also where a piece is computed 7 queries at a time, as long ones are."""
    case = make_pieces(pieces, **options)
    want = oracle(*case)
    for queries in (1024, 7):
        monkeypatch.setattr(flash, "QUERIES", queries)
        torch.testing.assert_close(attend_chunks(*case).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_flash_attention_is_called_as_it_wants(monkeypatch, options):
    """Its contract, played by a float64 stand-in: causal from the lower right, a window that leaves out its own token,
    the log of the sum per head and query. Sinks come in after it."""
    case = make_pieces("after earlier chunks", **options)

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap, return_attn_probs):
        assert causal and return_attn_probs and (max_q, max_k) == (20, 30)
        bounds = Bounds(cu_q.tolist(), cu_k.tolist(), Varlen(cu_q, cu_k, max_q, max_k))
        width = window_size[0] + 1
        assert window_size in ((3, 0), (-1, -1))
        out = oracle(q, k, v, bounds, softmax_scale, width, softcap, None)
        ones = torch.ones_like(v)
        zero = torch.zeros(q.shape[1])
        with_sink = oracle(q, k, ones, bounds, softmax_scale, width, softcap, zero)[..., 0]  # S / (S + 1)
        return out, torch.log(with_sink / (1 - with_sink)).T, None

    monkeypatch.setitem(sys.modules, "flash_attn", type("Module", (), {"flash_attn_varlen_func": stand_in}))
    monkeypatch.setattr(flash, "flash_kernel", lambda q, v, softcap: flash._flash_attn)
    torch.testing.assert_close(attend_chunks(*case), oracle(*case), rtol=1e-6, atol=1e-6)


def test_which_kernel_serves_which_inputs(monkeypatch):
    """CUDA tensors are played by shapes: this is the table of the docstring."""

    class Fake:
        device = torch.device("cuda", 0)

        def __init__(self, dim, dtype=torch.bfloat16):
            self.shape, self.dtype = (9, 4, dim), dtype

    monkeypatch.setattr(flash, "_ampere", lambda device: True)
    monkeypatch.setattr(flash.flash_hopper, "activated", lambda device, head: False)
    for installed in (True, False):
        monkeypatch.setattr(flash, "_has_flash_attn", lambda installed=installed: installed)
        own = flash._flash_attn if installed else flash._torch_flash
        assert flash.flash_kernel(Fake(128), Fake(128), None) is own
        assert flash.flash_kernel(Fake(128), Fake(128), 30.0) is (own if installed else None)
        for q, v in (
            (Fake(192), Fake(128)),
            (Fake(512), Fake(512)),
            (Fake(64, torch.float32), Fake(64, torch.float32)),
        ):
            assert flash.flash_kernel(q, v, None) is None
    monkeypatch.setattr(flash, "_ampere", lambda device: False)
    assert flash.flash_kernel(Fake(128), Fake(128), None) is None
    assert flash.flash_kernel(torch.zeros(9, 4, 64), torch.zeros(9, 4, 64), None) is None


@pytest.mark.needs_cuda
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pieces", PIECES)
def test_gpu_flash_attention_agrees(pieces, options):
    case = make_pieces(pieces, torch.bfloat16, "cuda", 64, **options)
    torch.testing.assert_close(attend_chunks(*case).double(), oracle(*case), rtol=0, atol=3e-2)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_greedy_is_generate_in_fp32(family):
    model, prompts = tiny_model(family).cuda(), make_prompts(8)
    samples = write(model, [Request(i, p, i, GREEDY) for i, p in enumerate(prompts)], page_tokens=16)
    for i, prompt in enumerate(prompts):
        assert samples[i].token_ids == generate(model, prompt, 24), i


@pytest.mark.needs_cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_fp8_pages_are_a_model_that_rounds_its_keys_and_values(family):
    check_fp8(tiny_model(family).cuda())
