"""From logits to a winner: Triton's kernels (interpreted, or on a GPU) against the plain-torch definitions, and those
against transformers' processors and float64.

    pytest tests/test_sampling_tail.py
"""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from kernels import HAS_TRITON, sampling_tail
from kernels.sampling_tail import END, NEVER, Noise, Rules, scores_of
from kernels.sampling_tail import gumbel_reference as gumbel
from lengthen.sampling.draw import top_candidates

PATHS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setattr(sampling_tail, "_fast", lambda x: request.param == "triton")
    return request.param


def make_case(n=4, V=300, dtype=torch.float32, Q=1):
    """n draws of which 0 is free, 1 greedy; every rule applies somewhere."""
    logits = (3 * torch.randn(n, V)).to(DEVICE, dtype)
    kinds = torch.zeros(V, dtype=torch.uint8, device=DEVICE)
    kinds[torch.randperm(V)[: V // 10]], kinds[[5, 7]] = NEVER, END
    seen = torch.rand(3, V, device=DEVICE) < 0.3
    line = torch.arange(n, device=DEVICE) // Q % 3
    drafts = None
    if Q > 1:
        drafts = torch.randint(V, (n // Q, Q), device=DEVICE)
        drafts[:, 0], drafts[0, 1] = -1, -1
    penalty = torch.linspace(1, 1.4, n, device=DEVICE)
    rules = Rules(kinds, torch.arange(n, device=DEVICE) % 2 == 0, seen, line, penalty, drafts)
    seeds = torch.tensor([3, -5, 2**62, -(2**63)] * n, device=DEVICE)[:n].contiguous()
    noise = Noise(torch.linspace(0.5, 1.5, n, device=DEVICE), seeds, torch.arange(n, device=DEVICE) * 1000)
    return logits, rules, noise, torch.arange(n, device=DEVICE) % 2 == 0


def penalised(logits, rules) -> torch.Tensor:
    """By transformers' processor, draw by draw."""
    out = []
    for i, x in enumerate(logits.float().cpu()):
        kinds = rules.kinds.cpu()
        x = x.masked_fill((kinds == NEVER) | ((kinds == END) & bool(rules.early[i])), float("-inf"))
        ids = set(rules.seen[rules.line[i]].nonzero()[:, 0].tolist())
        if rules.drafts is not None:
            b, j = divmod(i, rules.drafts.shape[1])
            ids |= set(rules.drafts[b, 1 : j + 1].tolist()) - {-1}
        processor = RepetitionPenaltyLogitsProcessor(float(rules.penalty[i]))
        out.append(processor(torch.tensor([sorted(ids)]), x[None].clone())[0])
    return torch.stack(out).to(DEVICE)


@pytest.mark.parametrize(
    ("V", "dtype", "Q"),
    # fewer ids than a column; ragged columns; whole columns in several tiles; drafts
    [(50, torch.float32, 1), (300, torch.bfloat16, 1), (4096, torch.float16, 1), (300, torch.float32, 4)],
)
def test_penalised_logits_and_winners(path, V, dtype, Q):
    logits, rules, noise, free = make_case(4 if Q == 1 else 8, V, dtype, Q)
    want = penalised(logits, rules)
    tokens, finite, got, maxima = sampling_tail.tail(logits, rules, noise, free)
    torch.testing.assert_close(got[:, :V], want, rtol=1e-6, atol=0)  # one rounding of a quotient
    assert torch.isneginf(got[:, V:]).all() and finite.all()
    if path == "triton":
        assert got.shape[1] % 64 == 0 and torch.equal(maxima, got.view(len(got), 64, -1).amax(1))
    ids = torch.arange(V, device=DEVICE)[None]
    noisy = scores_of(want, noise.temperature).double() + gumbel(noise.seeds, noise.positions, ids)
    assert torch.equal(tokens, torch.where(free, noisy.argmax(1), want.argmax(1)))
    # without the ranking nothing else changes
    alone = sampling_tail.tail(logits, rules, noise, free, ranked=False)
    assert torch.equal(alone.tokens, tokens) and torch.equal(alone.finite, finite)
    # rows of a wider matrix, as of a padded head
    wide = torch.cat([logits, logits], 1)[:, :V]
    assert torch.equal(sampling_tail.tail(wide, rules, noise, free, ranked=False).tokens, tokens)


def test_noise_is_that_of_the_definition(path):
    """Of candidates, and of ids that all draws share; seeds in a column of a table, as the eager draw has them."""
    _, _, noise, _ = make_case(4)
    seeds, positions = torch.stack([*noise[1:]], 1).T
    for ids in (torch.randint(150_000, (4, 70), device=DEVICE), torch.arange(70, device=DEVICE)[None]):
        got = sampling_tail.gumbel(seeds, positions, ids)
        torch.testing.assert_close(got, gumbel(seeds, positions, ids), rtol=1e-14, atol=1e-15)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_both_sides_have_the_same_constants():
    from kernels import sampling_tail_triton as fast

    assert (fast.COLUMN, fast.COLDEST) == (sampling_tail.COLUMN, sampling_tail.COLDEST)


def test_candidates_of_a_padded_row_are_those_of_the_row(path):
    logits, rules, noise, free = make_case(2, 4150)
    _, _, got, maxima = sampling_tail.tail(logits, rules, noise, free)
    values, ids = top_candidates(got, maxima)
    want = penalised(logits, rules)
    torch.testing.assert_close(values, want.topk(64).values, rtol=1e-6, atol=0)
    torch.testing.assert_close(want.gather(1, ids), values, rtol=1e-6, atol=0)


def test_of_equal_logits_the_lowest_id_wins(path):
    """As torch.argmax has it: ids 70 and 3 lie in other tiles, and in the other order, than their numbers say."""
    logits, rules, noise, _ = make_case(2, 4150)
    rules = rules._replace(kinds=torch.zeros_like(rules.kinds), seen=torch.zeros_like(rules.seen))
    logits.fill_(1.0)
    logits[0, [70, 4000, 3]], logits[1, [66, 65]] = 2.0, 2.0
    tokens = sampling_tail.tail(logits, rules, noise, torch.zeros(2, dtype=torch.bool, device=DEVICE)).tokens
    assert tokens.tolist() == [3, 65]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(path, bad):
    logits, rules, noise, free = make_case(4)
    rules = rules._replace(kinds=torch.zeros_like(rules.kinds), early=torch.zeros_like(rules.early))
    logits[0, 9], logits[1, 9], logits[2] = bad, bad, float("-inf")
    _, finite, got, _ = sampling_tail.tail(logits, rules, noise, free)
    assert finite.tolist() == [False, False, False, True]
    assert got[:2, :300].isposinf().sum(1).tolist() == [1, 1]  # of a ranking the highest, too


RECIPES = [(0, 0.8), (0, 0.3), (5, 1.0), (100, 0.9), (1000, 0.999), (0, 0.0), (0, 1.0)]  # top-k (0 = all), top-p


def test_what_stays_is_what_transformers_keeps(path):
    n, V = len(RECIPES), 300
    logits, temperature = 3 * torch.randn(n, V, device=DEVICE), torch.linspace(0.4, 1.5, n, device=DEVICE)
    logits[:, 7] = float("-inf")
    top_k = torch.tensor([k for k, _ in RECIPES], device=DEVICE)
    top_p = torch.tensor([p for _, p in RECIPES], device=DEVICE)
    wide = torch.ones(n, dtype=torch.bool, device=DEVICE)
    floors = sampling_tail.lowest(logits, temperature, top_k, top_p, wide)
    scores = scores_of(logits, temperature)
    for i, (k, p) in enumerate(RECIPES):
        want = scores[i][None].cpu()
        want = TopKLogitsWarper(k)(None, want) if k else want
        want = TopPLogitsWarper(p)(None, want) if p < 1 else want
        kept = (scores[i] >= floors[i]) & scores[i].isfinite()
        assert torch.equal(kept.cpu(), want[0].isfinite()), (k, p)


def test_equal_scores_stay_together(path):
    """All 300 tie: any share of them, or any number, is all of them."""
    logits, ones = torch.full((2, 300), 0.5, device=DEVICE), torch.ones(2, device=DEVICE)
    top_k, top_p = torch.tensor([70, 0], device=DEVICE), torch.tensor([1.0, 0.4], device=DEVICE)
    floors = sampling_tail.lowest(logits, ones, top_k, top_p, ones.bool())
    assert floors.tolist() == [0.5, 0.5]


def test_draws_above_a_floor_are_those_of_the_definition(path):
    logits, _, noise, _ = make_case(4, 320)
    scores = scores_of(logits, noise.temperature)
    floors = scores.sort(descending=True).values[:, 30].contiguous()
    wide = torch.tensor([True, False, True, True], device=DEVICE)
    drawn = sampling_tail.draw_above(logits, floors, noise, wide)
    noisy = scores.double() + gumbel(noise.seeds, noise.positions, torch.arange(320, device=DEVICE)[None])
    want = noisy.masked_fill(scores < floors[:, None], float("-inf")).argmax(1)
    assert torch.equal(drawn[wide], want[wide])
