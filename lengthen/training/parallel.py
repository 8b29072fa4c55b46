"""Several processes that train one adapter: torchrun --nproc-per-node N train.py …

Each process holds the whole model and takes its share of a step's pairs; gradients are summed. A step has the same
pairs, and each pair the same weight, however many processes there are: the loss is divided by the target tokens of the
whole step before it is summed. One process ("the first") writes. Without torchrun all of this does nothing, and
imports no torch.
"""

import datetime
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lengthen.records import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

# The others wait so long while the first encodes the pairs, or merges: then something hangs.
LONGEST_WAIT = datetime.timedelta(hours=6)


@dataclass(frozen=True)
class Processes:
    """This process among all; `device` is what --device auto means here ("" = no GPU of its own)."""

    rank: int = 0
    count: int = 1
    device: str = ""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_gradients(self, parameters: "Sequence[nn.Parameter]") -> None:
        """Replace the gradients by their sums over all processes, in one message; None counts as zero."""
        if self.count == 1:
            return
        import torch
        import torch.distributed as dist

        # None: a process without a pair in this step
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for parameter, total in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = total.view_as(parameter)

    def sum(self, numbers: list[float], device: "torch.device") -> list[float]:
        """The sum of each over all processes."""
        if self.count == 1:
            return numbers
        import torch
        import torch.distributed as dist

        values = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(values)
        return values.tolist()

    def most(self, value: float, device: "torch.device") -> float:
        """The largest of what they give."""
        if self.count == 1:
            return value
        import torch
        import torch.distributed as dist

        values = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.item()

    def any(self, flag: bool, device: "torch.device") -> bool:
        """Whether the flag is set in one of them."""
        return self.most(float(flag), device) > 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            import torch.distributed as dist

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

    def check(self, per_row: int, accumulate: int, sidecar: dict[str, Any], output: str) -> None:
        """Each process needs a pair of every step, and a run goes on with as many as it began with (its sidecar)."""
        per_step = per_row * accumulate
        if per_step < self.count:
            raise UserError(
                f"a step of {per_step} pair{'s' * (per_step > 1)} cannot be shared by {self.count} processes",
                f"--accumulate {math.ceil(self.count / per_row)}: a step's pairs are divided among them",
            )
        count = sidecar.get("processes", self.count)
        if sidecar.get("status") != "done" and count != self.count:
            raise UserError(
                f"{output} was begun by {count} process{'es' * (count > 1)}, this command runs {self.count}",
                f"torchrun --nproc-per-node {count} train.py …, or --overwrite",
            )

    def stop(self) -> None:
        if self.count > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def start() -> Processes:
    """Join the processes that torchrun started; alone without it. NCCL on GPUs, gloo on CPUs."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    import torch
    import torch.distributed as dist

    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    gpus = torch.cuda.device_count()
    if 0 < gpus <= local:
        raise UserError(
            f"process {rank} of {count} has no GPU: there are {gpus}", f"torchrun --nproc-per-node {gpus} …"
        )
    if gpus:
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if gpus else None
    dist.init_process_group("nccl" if gpus else "gloo", timeout=LONGEST_WAIT, device_id=device)
    return Processes(rank, count, f"cuda:{local}" if gpus else "")
