"""Exercise 3, 60 minutes: from logits to a token.

The recipe of the method: repetition penalty 1.1, temperature 0.7, top-k 20, top-p 0.8, in this order. Each step works
on what the one before has left: top-p takes the probabilities among the tokens that top-k keeps.

    penalty       logits of ids that the text has are divided by it where positive, else multiplied by it; each once
    temperature   logits / temperature
    top-k         all below the k-th highest are out; 0 = off
    top-p         the smallest set of likeliest tokens stays whose probability reaches p; at least one stays
    draw          the argmax of log-probability + Gumbel noise, noise = -log(-log(uniform))

The draw needs no cumulative sum, and each token has noise of its own, which can be a hash of (seed, position, id): then
a text does not depend on its neighbours in a batch.

1. Write `penalise` and `probabilities`. For top-p sort upwards and sum from the least likely token, as Hugging Face
   does. From which sum on is a token kept? (Sums from the likeliest token down differ in their last bits, and may keep
   another set.)
2. Write `draw`. Why is the argmax distributed as the softmax? The proof is short; docs/kernels.md has it under "The
   draw".

Leads to: `keep` and `race` in lengthen/sampling/draw.py, which do this for many rows at once.

    python -m pytest -q exercises/03_top_p.py
"""

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lengthen.sampling import draw as project


def penalise(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    """logits [V] after the repetition penalty for the ids in `seen`, which may name an id several times."""
    raise NotImplementedError


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution [V] that the token is drawn from; 0 for what top-k and top-p leave out."""
    raise NotImplementedError


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor) -> int:
    """The token drawn with the numbers uniform [V] in (0, 1)."""
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------

RECIPES = [(0.7, 20, 0.8), (1.0, 0, 1.0), (1.3, 5, 1.0), (0.5, 0, 0.9), (0.7, 20, 0.01)]


def example(seed: int) -> Tensor:
    return 3 * torch.randn(200, generator=torch.Generator().manual_seed(seed))


def test_the_distribution_is_that_of_transformers():
    for seed in range(10):
        logits, seen = example(seed), [3, 7, 7, 150]
        for temperature, top_k, top_p in RECIPES:
            steps = [RepetitionPenaltyLogitsProcessor(1.1), TemperatureLogitsWarper(temperature)]
            steps += [TopKLogitsWarper(top_k)] if top_k else []
            steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
            want = LogitsProcessorList(steps)(torch.tensor([seen]), logits.clone()[None])[0].softmax(-1)
            got = probabilities(penalise(logits.clone(), seen, 1.1), temperature, top_k, top_p)
            torch.testing.assert_close(got, want)


def test_it_keeps_what_the_project_keeps():
    logits = example(1).sort(descending=True).values
    for temperature, top_k, top_p in RECIPES:
        settings = torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p])
        _, kept, _ = project.keep(logits[None], *settings)
        assert ((probabilities(logits, temperature, top_k, top_p) > 0) == kept[0]).all()


def test_each_token_has_noise_of_its_own():
    """The token with by far the largest noise is drawn, however unlikely it is, if it was not left out."""
    logits = example(3)
    possible = probabilities(logits.clone(), *RECIPES[0]).nonzero()[:, 0].tolist()
    assert len(possible) > 2
    for token in possible:
        uniform = torch.full((len(logits),), 0.5, dtype=torch.float64)
        uniform[token] = 1 - 1e-9
        assert draw(logits.clone(), *RECIPES[0], uniform) == token


def test_the_draws_have_that_distribution():
    """4,000 draws: each count is within five standard deviations, which fails by chance once in 20,000 runs; and the
    seed is fixed."""
    logits, count, generator = example(2), 4000, torch.Generator().manual_seed(0)
    want = probabilities(logits, *RECIPES[0])
    tokens = [draw(logits, *RECIPES[0], torch.rand(len(logits), generator=generator)) for _ in range(count)]
    share = torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count
    assert ((share - want).abs() <= 5 * (want * (1 - want) / count).sqrt()).all()
