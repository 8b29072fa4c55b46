"""Exercise 10, 45 minutes: several samples in one row, none seeing another.

Padding wastes what it fills. Samples can follow each other in one row instead, if positions start again at 0 in each
and a token attends to its own sample only, to itself and what stands before it. Everything else in a decoder works
token by token.

    ids        5 6 7 2 | 8 2 | 9 3 4 2        the last of each is its EOS
    positions  0 1 2 3 | 0 1 | 0 1 2 3

The loss counts the answers only: the hidden state at position i predicts token i + 1, so the last token of a prompt
predicts the answer's first, and the EOS predicts nothing.

1. Write `pack` and `may_see`.
2. Write `targets_of`, by position. Why not by id? Some trainers find the padding by its id and take no PAD as a target;
   in SmolLM2 PAD and EOS are one token.
3. FlashAttention never builds the mask of `may_see`. How many numbers would it have for a row of 16,384 tokens, and
   what is FlashAttention given instead?

Leads to: lengthen/training/packed.py, and `targets_of` and `row_loss` in train.py.

    python -m pytest -q exercises/10_packing.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import train as project
from lengthen.training import packed
from lengthen.training.pairs import Pair


def pack(samples: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of N samples -> (ids [T], positions [T], the sample of each token, counted from 0 [T])."""
    raise NotImplementedError


def may_see(sample_of: Tensor) -> Tensor:
    """bool [T, T]: whether token i attends to token j; causal within each sample."""
    raise NotImplementedError


def targets_of(pairs: list[tuple[list[int], int]]) -> tuple[list[int], list[int]]:
    """pairs: (ids of prompt and answer, how many are the prompt's) -> (positions in the row that predict a target, the
    targets' ids)."""
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------

EOS = 2  # and PAD
PAIRS = [([5, 6, 7, 2], 2), ([8, 2], 1), ([9, 3, 4, 11, 2, 2], 3)]  # the last answer has an EOS in it


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=16, num_key_value_heads=2, initializer_range=0.3, **sizes)
    return LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()


def logits_of_row(model: LlamaForCausalLM, samples: list[list[int]]) -> Tensor:
    ids, positions, sample_of = pack(samples)
    mask = torch.where(may_see(sample_of), 0.0, float("-inf"))[None, None]
    return model(input_ids=ids[None], position_ids=positions[None], attention_mask=mask).logits[0]


def test_the_row_is_the_projects():
    samples = [ids for ids, _ in PAIRS]
    ids, positions, sample_of = pack(samples)
    row = packed.pack(samples)
    assert ids.tolist() == row.input_ids[0].tolist() and positions.tolist() == row.position_ids[0].tolist()
    assert sample_of.bincount().cumsum(0).tolist() == row.cu_seq_lens[1:].tolist()


def test_no_sample_sees_another():
    model, samples = tiny_model(), [ids for ids, _ in PAIRS]
    alone = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in samples])
    torch.testing.assert_close(logits_of_row(model, samples), alone, rtol=1e-4, atol=1e-5)


def test_the_targets_are_the_projects():
    assert targets_of(PAIRS) == project.targets_of([Pair(*pair) for pair in PAIRS])


def test_the_loss_of_a_row_is_the_sum_over_its_samples():
    model = tiny_model()
    index, targets = targets_of(PAIRS)
    logits = logits_of_row(model, [ids for ids, _ in PAIRS])
    got = F.cross_entropy(logits[index], torch.tensor(targets), reduction="sum")
    want = torch.zeros(())
    for ids, num_prompt in PAIRS:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        want += F.cross_entropy(logits[num_prompt - 1 : -1], torch.tensor(ids[num_prompt:]), reduction="sum")
    torch.testing.assert_close(got, want)
