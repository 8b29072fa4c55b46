"""Bursts of decoding steps on static buffers, on a CPU step by step, against the sampler's own steps and generate.

    pytest tests/test_graphs.py

What this cannot show is the capture itself: that the steps do the same operations whatever is in the buffers, and
never ask the host, is checked operation by operation.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_attend import expect_little, generate, write_hopefully
from test_sampler import EOS, assert_every_page_came_back, break_forward, make_prompts, make_sampler, write
from tiny import FAMILIES, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from lengthen.records import UserError
from lengthen.sampling import attend, graphs
from lengthen.sampling import cache as caches
from lengthen.sampling.graphs import DecodeGraphs, Shape, buckets
from lengthen.sampling.request import Request, Sampling

OPTIONS = {"page_tokens": 16, "prefill_tokens": 64}


@pytest.fixture
def block_tables(monkeypatch):
    monkeypatch.setattr(caches, "on_gpu", lambda device: True)


@pytest.fixture
def bursts(monkeypatch) -> list[list[int]]:
    """Tokens per row of every burst."""
    sizes, own = [], DecodeGraphs.run

    def run(self, rows, ahead=False):
        result = own(self, rows, ahead)
        sizes.append([len(tokens) for tokens in result])
        return result

    monkeypatch.setattr(DecodeGraphs, "run", run)
    return sizes


def test_buckets():
    assert buckets(1) == [1]
    assert buckets(48) == [1, 2, 4, 8, 16, 24, 32, 48]
    assert buckets(200)[-5:] == [96, 128, 160, 192, 200]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generate_token_by_token(block_tables, bursts, family):
    """With the penalty; 7 ragged prompts through 5 rows (buckets 1, 2, 4 and 5: padded and full)."""
    model, prompts = tiny_model(family), make_prompts(7)
    greedy = Sampling(temperature=0, max_new_tokens=29)
    samples = write(model, [Request(i, p, i, greedy) for i, p in enumerate(prompts)], max_rows=5, **OPTIONS)
    for i, prompt in enumerate(prompts):
        assert samples[i].token_ids == generate(model, prompt, 29), i
    assert max(map(len, bursts)) == 5 and max(map(max, bursts)) == graphs.STEPS
    assert samples[None].notes.count("decoding steps are started one by one, not as CUDA graphs: there is no GPU") == 1


def test_logits_that_are_not_finite_end_a_burst(block_tables, bursts):
    sampler = make_sampler(tiny_model(), **OPTIONS)
    sampler.add(Request(0, make_prompts(1)[0], 0, Sampling(max_new_tokens=60)))
    sampler.step()  # the prompt; the rest would be bursts
    sampler.step()
    assert bursts
    break_forward(sampler, math.nan)
    with pytest.raises(UserError, match="logits are not finite"):
        list(sampler.run())


def mixed_requests() -> list[Request]:
    """Every setting that goes into the buffers, other rows beside other rows, texts that end early and late, two seeds
    beyond 63 bits, prompts that share their pages."""
    prompts = make_prompts(6, 60)
    settings = [
        Sampling(max_new_tokens=40),
        Sampling(temperature=0, max_new_tokens=17),
        Sampling(temperature=1.3, top_p=1, top_k=50, repetition_penalty=1, max_new_tokens=33),
        Sampling(top_k=1, repetition_penalty=1.5, max_new_tokens=9),
        Sampling(temperature=2.0, top_k=5, top_p=0.5, max_new_tokens=64),
        Sampling(min_new_tokens=30, max_new_tokens=50, temperature=1.5, top_k=60, top_p=1),
        Sampling(top_k=0, top_p=1, max_new_tokens=21),
        Sampling(top_k=0, top_p=0.9, temperature=1.2, max_new_tokens=23),
        Sampling(top_k=100, top_p=0.95, max_new_tokens=30),
    ]
    seeds = [3, -5, 2**63 + 9, 2**64 - 1, 0, 77, 8, -9, 10]
    return [
        Request((i, j), prompts[(i + j) % 6] * (1 + j), seeds[i] + j, s, penalty_from=3 * j)
        for i, s in enumerate(settings)
        for j in range(3)
    ]


ENDS = {EOS, *range(3, 60)}  # rare tokens that end texts in the middle of bursts


@pytest.fixture(scope="module")
def plain() -> dict:
    """The mixed requests step by step, as a CPU does."""
    samples = write(tiny_model("qwen3"), mixed_requests(), eos_ids=ENDS, max_rows=7, **OPTIONS)
    assert samples[None].graphs is None
    return samples


@pytest.mark.parametrize("options", [{"max_rows": 6}, {"max_rows": 9, "kv_tokens": 240, "context": 240}])
def test_bursts_write_what_single_steps_write(block_tables, bursts, plain, monkeypatch, options):
    """Sampled and greedy, token by token and in how they end; the second run has too few pages and preempts rows."""
    own, excess = DecodeGraphs._load, []

    def load(self, rows, shape):
        excess.append(shape.rows - len(rows))
        own(self, rows, shape)

    monkeypatch.setattr(DecodeGraphs, "_load", load)
    ours = write_hopefully(tiny_model("qwen3"), mixed_requests(), eos_ids=ENDS, **OPTIONS, **options)
    keys = [key for key in plain if key]
    for key in keys:
        assert (ours[key].token_ids, ours[key].finish) == (plain[key].token_ids, plain[key].finish), key
    assert {"eos", "length"} <= {ours[key].finish for key in keys}
    assert {0} < set(excess) and len(bursts) >= 10 and ("kv_tokens" not in options or ours[None].stats["preemptions"])
    sampler, made = ours[None], sum(ours[key].num_tokens for key in keys)
    assert sampler.stats["row_steps"] == plain[None].stats["row_steps"] == made
    assert_every_page_came_back(sampler)


def test_a_caller_may_take_pages_while_a_burst_is_in_flight(block_tables, plain):
    """`logprobs` between two samples: it preempts rows for its pages, whose draws that nobody has read must neither
    count nor be penalised. More requests come in meanwhile, too. The texts stay what they are."""
    sampler = make_sampler(tiny_model("qwen3"), eos_ids=ENDS, kv_tokens=304, context=300, **OPTIONS)
    expect_little(sampler)
    requests, in_flight, texts = mixed_requests(), [], {}
    for request in requests[:9]:
        sampler.add(request)
    later = requests[9:]
    for sample in sampler.run():
        texts[sample.request.key] = sample.token_ids
        in_flight.append(sampler.graphs.in_flight is not None)
        if len(texts) % 3 == 0:
            sampler.logprobs([([5] * 150, [6, 7])])
        if later:
            sampler.add(later.pop())
    assert any(in_flight) and sampler.stats["preemptions"]
    assert texts == {request.key: plain[request.key].token_ids for request in requests}
    assert_every_page_came_back(sampler)


def test_few_pages_make_short_bursts(block_tables, monkeypatch):
    """Two texts and 4 pages of 16: a burst takes no page that is not free, and its steps shrink to what there is."""
    model, own, shrunk = tiny_model(), DecodeGraphs._reserve, []

    def reserve(self, rows, ahead):
        steps = own(self, rows, ahead)
        shrunk.append(steps < min(graphs.STEPS, max(row.limit - len(row.ids) - ahead for row in rows)))
        return steps

    monkeypatch.setattr(DecodeGraphs, "_reserve", reserve)
    greedy = Sampling(temperature=0, max_new_tokens=30)
    requests = [Request(i, p, i, greedy) for i, p in enumerate(([5] * 14, [9] * 14))]
    samples = write_hopefully(model, requests, kv_tokens=64, context=64, max_rows=2, **OPTIONS)
    for i in (0, 1):
        assert samples[i].token_ids == generate(model, requests[i].prompt_ids, 30)
    assert any(shrunk) and samples[None].cache.num_pages == 4


def test_running_out_of_memory_in_a_burst_changes_no_text(block_tables, monkeypatch):
    """The third step ever fails; what the first two drew was never read, and their ids must not be penalised."""
    model, own, count = tiny_model(), DecodeGraphs._step, [0]
    requests = [Request(i, p, i, Sampling(temperature=0, max_new_tokens=20)) for i, p in enumerate(make_prompts(4))]

    def fails_once(self, shape):
        count[0] += 1
        if count[0] == 3:
            raise torch.OutOfMemoryError("no memory")
        own(self, shape)

    monkeypatch.setattr(DecodeGraphs, "_step", fails_once)
    samples = write(model, requests, **OPTIONS)
    assert count[0] > 10 and "out of memory: 2 rows at once from now on" in samples[None].notes
    for i, request in enumerate(requests):
        assert samples[i].token_ids == generate(model, request.prompt_ids, 20)


@pytest.mark.parametrize("works", [True, False])
def test_capturing_touches_no_text(block_tables, monkeypatch, plain, works):
    """A stand-in for the capture runs steps on what is in the buffers then, and buckets are captured while texts are
    running. Where it fails the step itself is the replay, which is said once."""
    captured = []

    def graph(self, shape):
        captured.append(shape)
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        for _ in range(3):
            self.step.zero_()
            self._step(shape)
        return SimpleNamespace(replay=partial(self._step, shape))

    monkeypatch.setattr(DecodeGraphs, "_graph", graph)
    sampler = make_sampler(tiny_model("qwen3"), eos_ids=ENDS, max_rows=7, **OPTIONS)
    sampler.graphs.eager = ""
    sampler.notes.clear()
    for request in mixed_requests()[: 27 if works else 8]:
        sampler.add(request)
    for sample in sampler.run():
        assert sample.token_ids == plain[sample.request.key].token_ids
    assert not works or {shape.draws for shape in captured} >= {"ranked", "wide"}
    failed = "capturing it failed (operation not permitted when stream is capturing)"
    said = [f"decoding steps are started one by one, not as CUDA graphs: {failed}"]
    assert (len(captured) > 2, sampler.notes) == ((True, []) if works else (False, said))


def test_running_out_of_memory_in_a_capture_is_no_reason_never_to_capture(block_tables, monkeypatch, plain):
    """As in a step: rows are given up, and what did not fit is captured later."""
    captured = []

    def graph(self, shape):
        captured.append(shape)
        if len(captured) == 1:
            try:
                raise torch.OutOfMemoryError("no memory")
            finally:  # as the capture's end does
                raise RuntimeError("operation failed due to a previous error during capture")
        return SimpleNamespace(replay=partial(self._step, shape))

    monkeypatch.setattr(DecodeGraphs, "_graph", graph)
    sampler = make_sampler(tiny_model("qwen3"), eos_ids=ENDS, max_rows=7, **OPTIONS)
    sampler.graphs.eager = ""
    for request in mixed_requests()[:8]:
        sampler.add(request)
    for sample in sampler.run():
        assert sample.token_ids == plain[sample.request.key].token_ids
    assert len(captured) > 1 and not sampler.graphs.eager
    assert [note for note in sampler.notes if note.startswith("out of memory")]


def test_a_draw_among_too_many_ties_is_left_to_the_caller(block_tables, bursts, monkeypatch):
    """A head that gives every 100 ids the same logit: top-k keeps ties, so 64 candidates are too few. The burst
    is cut there, the next step draws from the whole vocabulary, and the texts are those of single steps."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight[::100].repeat_interleave(100, 0)[: len(model.lm_head.weight)])
    requests = [Request(i, p, i, Sampling(max_new_tokens=20, top_p=1)) for i, p in enumerate(make_prompts(3))]
    ours = write(model, requests, **OPTIONS)
    assert any(0 in one for one in bursts)
    monkeypatch.setattr(caches, "on_gpu", lambda device: False)
    theirs = write(model, requests, **OPTIONS)
    assert all(ours[i].token_ids == theirs[i].token_ids for i in range(3))


@pytest.fixture
def shapes(monkeypatch) -> list[Shape]:
    """Of every step that bursts made."""
    seen, own = [], DecodeGraphs._step

    def step(self, shape):
        seen.append(shape)
        own(self, shape)

    monkeypatch.setattr(DecodeGraphs, "_step", step)
    return seen


RECIPES = {
    "all": [{"temperature": 0}, {"top_k": 1}, {"top_k": 0, "top_p": 1}, {"top_k": 0, "top_p": 1, "temperature": 2}],
    "ranked": [{}, {"top_k": 63, "top_p": 0.5}, {"top_k": 2, "top_p": 1}],
    "wide": [{"top_k": 0}, {"top_k": 64}, {"top_k": 500, "top_p": 1}, {"top_k": 0, "top_p": 0.1}],
}


@pytest.mark.parametrize("draws", RECIPES)
def test_every_recipe_is_drawn_in_bursts(block_tables, shapes, bursts, monkeypatch, draws):
    """Alone, in the step that does no more than it needs, and no draw is left to the host."""
    settings = [Sampling(max_new_tokens=12, **recipe) for recipe in RECIPES[draws] for _ in range(2)]
    prompts = make_prompts(len(settings))
    requests = [Request(i, p, i, s) for i, (p, s) in enumerate(zip(prompts, settings, strict=True))]
    model = tiny_model()
    ours = write(model, requests, max_rows=len(requests), **OPTIONS)
    assert {shape.draws for shape in shapes} == {draws} and all(0 not in one for one in bursts)
    monkeypatch.setattr(DecodeGraphs, "serves", lambda self, rows: False)
    theirs = write(model, requests, max_rows=len(requests), **OPTIONS)
    for request in requests:
        assert ours[request.key].token_ids == theirs[request.key].token_ids, request


def test_no_text_depends_on_the_recipes_beside_it(block_tables, plain):
    """Each of the mixed requests alone: other steps are captured for it than among the others."""
    model = tiny_model("qwen3")
    for request in mixed_requests()[::3]:
        alone = write(model, [request], eos_ids=ENDS, max_rows=7, **OPTIONS)
        assert alone[request.key].token_ids == plain[request.key].token_ids, request.key


@pytest.mark.parametrize("penalty", [1.0, 1.02])
def test_drafts_are_verified_in_captured_steps(block_tables, shapes, penalty):
    """By the texts without drafts; prompts that repeat themselves, rows with many drafts beside rows with none."""
    model = tiny_model("llama", initializer_range=0.05)  # repeats itself
    requests = [
        Request(i, p, i, Sampling(temperature=t, repetition_penalty=penalty, max_new_tokens=60, top_k=k))
        for i, (p, t, k) in enumerate(zip(make_prompts(6), [0, 0.05] * 3, [20, 20, 0] * 2, strict=True))
    ]
    without = write(model, requests, lookup=False, **OPTIONS)
    assert {shape.queries for shape in shapes} == {1}
    shapes.clear()
    passes = []
    sampler = make_sampler(model, **OPTIONS)
    own = sampler._forward
    sampler._forward = lambda step, *rest: (passes.append(step), own(step, *rest))[1]
    for request in requests:
        sampler.add(request)
    for sample in sampler.run():
        assert sample.token_ids == without[sample.request.key].token_ids, sample.request.key
    assert {1, 2, 4, 8} >= {shape.queries for shape in shapes} >= {1, 4}
    assert sampler.stats["accepted_tokens"] > 10 and not any(row.draft for step in passes for row, _ in step.decode)
    assert sampler.stats["decode_tokens"] == without[None].stats["decode_tokens"]
    assert_every_page_came_back(sampler)


def test_more_drafts_than_a_captured_step_holds_are_verified_by_a_pass(block_tables, shapes, monkeypatch):
    monkeypatch.setattr(graphs, "DRAWS", 1)  # 4 rows: 4 draws
    model = tiny_model("llama", initializer_range=0.05)
    greedy = Sampling(temperature=0, repetition_penalty=1.0, max_new_tokens=60)
    requests = [Request(i, p, i, greedy) for i, p in enumerate(make_prompts(4))]
    ours = write(model, requests, **OPTIONS)
    assert all(shape.rows * shape.queries <= 4 for shape in shapes) and ours[None].stats["accepted_tokens"] > 10
    without = write(model, requests, lookup=False, **OPTIONS)
    assert all(ours[i].token_ids == without[i].token_ids for i in range(4))


def test_prompts_are_computed_beside_bursts(block_tables, plain, monkeypatch):
    """New prompts' passes are launched while a burst is in flight, before it is read; and the texts are the same."""
    sampler = make_sampler(tiny_model("qwen3"), eos_ids=ENDS, max_rows=4, **OPTIONS)
    beside, mixed, own = [], [], sampler._forward

    def forward(step, *rest):
        beside.append(sampler.graphs.in_flight is not None)
        mixed.append(bool(step.prefill) and any(row.written for row, _ in step.decode))
        return own(step, *rest)

    sampler._forward = forward
    for request in mixed_requests():
        sampler.add(request)
    for sample in sampler.run():
        assert sample.token_ids == plain[sample.request.key].token_ids
    assert sum(beside) > len(beside) // 2 and not any(mixed)
    assert_every_page_came_back(sampler)


def test_running_out_of_memory_beside_a_burst_changes_no_text(block_tables, plain, monkeypatch):
    """A prompt's pass fails while a burst is in flight: rows are given up, also such as the burst computes."""
    sampler = make_sampler(tiny_model("qwen3"), eos_ids=ENDS, max_rows=4, prefill_tokens=64, page_tokens=16)
    failed, own = [], sampler._forward

    def forward(step, *rest):
        if sampler.graphs.in_flight and len(failed) < 2:
            failed.append(len(sampler.scheduler.rows))
            sampler.scheduler.prefill_tokens = 64  # no smaller chunks: fewer rows
            raise torch.OutOfMemoryError("no memory")
        return own(step, *rest)

    sampler._forward = forward
    for request in mixed_requests()[:12]:
        sampler.add(request)
    for sample in sampler.run():
        assert sample.token_ids == plain[sample.request.key].token_ids
    assert len(failed) == 2 and failed[0] > 1 and sampler.stats["preemptions"]
    assert_every_page_came_back(sampler)


def test_a_row_at_its_limit_stands_still(block_tables):
    """Its position, too: longrope takes the longest of the batch, and would switch for all rows."""
    sampler = make_sampler(tiny_model(), **OPTIONS)
    sampler.add(Request(0, [5, 6, 7], 0, Sampling(temperature=0, max_new_tokens=3, min_new_tokens=3)))
    sampler.step()
    (row,), steps = sampler.scheduler.rows, sampler.graphs
    steps._reserve([row], 0)
    shape = Shape(2, 1, "all")
    steps._load([row], shape)
    with torch.no_grad():
        for _ in range(6):
            steps.step.zero_()
            steps._step(shape)
    assert steps.ints[1, :2].tolist() == [row.limit - 1, 0]  # and the line without a row


class Operations(TorchDispatchMode):
    """Notes every operation and the shapes of its results, but not those inside the kernels' references."""

    ASKS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "equal",
        "item",
        "is_nonzero",
        "repeat_interleave",
    )

    def __init__(self):
        super().__init__()
        self.seen, self.inside = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            name = func.overloadpacket.__name__
            assert not any(name.startswith(ask) for ask in self.ASKS), f"{name} asks the host"
            shapes = [
                tuple(x.shape)
                for x in (result if isinstance(result, (tuple, list)) else [result])
                if hasattr(x, "shape")
            ]
            assert name != "lift_fresh" or shapes == [()], "a tensor is made from a list: a copy from the host"
            self.seen.append((name, shapes))
        return result

    def opaque(self, function):
        def call(*args, **kwargs):
            self.inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False

        return call


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_does_the_same_operations_whatever_the_buffers_hold(block_tables, monkeypatch, family, queries):
    """So it can be captured: no host read, and neither the operations nor their shapes follow the data (texts of other
    lengths, with other settings, one beyond its limit, one row in excess)."""
    operations = Operations()
    for name in ("store_pages", "place", "paged_attention"):
        monkeypatch.setattr(attend, name, operations.opaque(getattr(attend, name)))
    monkeypatch.setattr(DecodeGraphs, "serves", lambda self, rows: False)
    sampler = make_sampler(tiny_model(family), **OPTIONS)
    recorded = []
    for lengths, settings in (
        ((3, 70), {}),
        ((20, 1), {"temperature": 0, "repetition_penalty": 1, "max_new_tokens": 3}),
    ):
        for i, n in enumerate(lengths):
            sampler.add(Request(i, [7] * n, i, Sampling(**settings)))
        sampler.step()
        sampler.step()
        rows, steps = sampler.scheduler.rows, sampler.graphs
        steps._reserve(rows, 0)
        for row, drafts in zip(rows, (3, 0), strict=True) if queries > 1 else ():
            row.draft = [9] * drafts
        steps._load(rows, shape := Shape(4, queries, "wide"))
        operations.seen = []
        with torch.no_grad(), operations:
            steps._step(shape)
            steps._step(shape)
        half = len(operations.seen) // 2
        assert half > 40 and operations.seen[:half] == operations.seen[half:]
        recorded.append(operations.seen)
        for row in list(rows):
            sampler.scheduler.finish(row)
    assert recorded[0] == recorded[1]


def test_the_check_sees_a_host_read():
    with pytest.raises(AssertionError, match="asks the host"), Operations():
        bool(torch.ones(1).any())
    with pytest.raises(AssertionError, match="copy from the host"), Operations():
        torch.tensor([1, 2])


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.needs_cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_graphs_write_what_generate_writes_in_fp32(family):
    model, prompts = tiny_model(family).cuda(), make_prompts(7)
    greedy = Sampling(temperature=0, max_new_tokens=29)
    samples = write(model, [Request(i, p, i, greedy) for i, p in enumerate(prompts)], max_rows=5, **OPTIONS)
    assert not samples[None].graphs.eager and samples[None].graphs.replays
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device="cuda")
        options = {"do_sample": False, "repetition_penalty": 1.1, "max_new_tokens": 29}
        want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        assert samples[i].token_ids == want, i


@pytest.mark.needs_cuda
def test_gpu_graphs_on_and_off_write_the_same(monkeypatch):
    model, requests = tiny_model("qwen3").cuda(), mixed_requests()
    ours = write(model, requests, max_rows=7, **OPTIONS)
    monkeypatch.setattr(DecodeGraphs, "serves", lambda self, rows: False)
    theirs = write(model, requests, max_rows=7, **OPTIONS)
    assert all(ours[r.key].token_ids == theirs[r.key].token_ids for r in requests)
