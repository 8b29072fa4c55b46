"""Several processes that train one adapter: torchrun --nproc-per-node N train.py …

Each process holds the whole model and takes its share of a step's pairs; gradients are summed. A step has the same
pairs, and each pair the same weight, however many processes there are: the loss is divided by the target tokens of the
whole step before it is summed. One process ("the first") writes. Without torchrun all of this does nothing.
"""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from lengthen.records import UserError

PATIENCE = datetime.timedelta(hours=6)  # the others wait while the first encodes the pairs, or merges


@dataclass(frozen=True)
class Processes:
    """This process among all; `device` is what --device auto means here ("" = no GPU of its own)."""

    rank: int = 0
    count: int = 1
    device: str = ""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients by their sums over all processes, in one message; None counts as zero."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # a process without a pair in this step
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))

    def sum(self, numbers: list[float], device: torch.device) -> list[float]:
        """The sum of each over all processes."""
        if self.count == 1:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(values)
        return values.tolist()

    def most(self, value: float, device: torch.device) -> float:
        """The largest of what they give."""
        if self.count == 1:
            return value
        values = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.item()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in one of them."""
        return self.most(float(flag), device) > 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier()

    def share(self, lengths: Sequence[int]) -> list[int]:
        """Which of the pairs of a step are this process's: the longest first, each to whoever has fewest tokens."""
        loads, mine = [0] * self.count, []
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            lightest = loads.index(min(loads))
            loads[lightest] += lengths[index]
            if lightest == self.rank:
                mine.append(index)
        return sorted(mine)

    def stop(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


def start() -> Processes:
    """Join the processes that torchrun started; alone without it. NCCL on GPUs, gloo on CPUs."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count()
    if 0 < gpus <= local:
        raise UserError(
            f"process {rank} of {count} has no GPU: there are {gpus}", f"torchrun --nproc-per-node {gpus} …"
        )
    if gpus:
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if gpus else None
    dist.init_process_group("nccl" if gpus else "gloo", timeout=PATIENCE, device_id=device)
    return Processes(rank, count, f"cuda:{local}" if gpus else "")
