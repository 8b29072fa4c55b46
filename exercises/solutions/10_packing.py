"""By id, a mask that leaves PAD out would leave out the EOS, and the model would never learn to stop. The mask of a row
of 16,384 tokens has 268 million numbers; FlashAttention takes the N + 1 positions at which the samples begin and end.
"""

import torch
from torch import Tensor


def pack(samples: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.tensor([len(ids) for ids in samples])
    positions = torch.cat([torch.arange(len(ids)) for ids in samples])
    return torch.tensor(sum(samples, [])), positions, torch.arange(len(samples)).repeat_interleave(lengths)


def may_see(sample_of: Tensor) -> Tensor:
    return (sample_of[:, None] == sample_of).tril()


def targets_of(pairs: list[tuple[list[int], int]]) -> tuple[list[int], list[int]]:
    index, targets, start = [], [], 0
    for ids, num_prompt in pairs:
        index += range(start + num_prompt - 1, start + len(ids) - 1)
        targets += ids[num_prompt:]
        start += len(ids)
    return index, targets
