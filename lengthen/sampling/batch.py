"""What attention is asked for in a forward pass of packed tokens: the interface that every backend has."""

from typing import NamedTuple, Protocol

from torch import Tensor


class Rule(NamedTuple):
    """How a layer's scores become weights; from the model, layer by layer."""

    scaling: float  # of q . k
    window: int = 0  # keys a token sees, itself included; 0 = every earlier one
    softcap: float | None = None  # c: scores become c tanh(s / c)
    sinks: Tensor | None = None  # [Hq] a learned score per query head that takes weight and gives nothing


class Batch(Protocol):
    """Which packed token belongs to which text, for one forward pass."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        """q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv], positions applied -> [T, Hq, Dv]. Stores k and v."""
