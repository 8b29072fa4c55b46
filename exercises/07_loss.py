"""Exercise 7, 60 minutes: cross-entropy without the logits.

With 152,064 words and 16,384 tokens the logits take 10 GB in fp32, and a loss wants them three times over. They need
not be there at once. For a row h with target t, write z_j = h . W_j and take exponentials relative to the target:

    E_j  = e^(z_j - z_t) for j != t        S = sum_j E_j
    loss = log(1 + S)                      dh = (sum_j E_j W_j - S W_t) / (1 + S)

S and sum_j E_j W_j are sums over the vocabulary: they can be taken `tile` words at a time, for all rows at once.

1. Derive the two lines from loss = -log softmax(z)_t, without another look at docs/kernels.md. Why is log(1 + S) better
   than logsumexp(z) - z_t for a token that the model is sure of? (As log1p(S): in fp32, 1 + S itself loses a small S.)
2. Where another logit lies 89 above the target's, e^(z_j - z_t) is inf in fp32; and sum_j E_j W_j may be inf a little
   sooner than S is. `loss_and_gradient`, which is given, does rows of a loss from 60 on again, relative to their
   largest logit r: with E_j = e^(z_j - r) and sums that still leave out t, what do loss and dh become, and what has
   become of the 1?
3. Write `relative_to` for any r: with r = z_t it must be as exact as the lines above, which is what torch.log1p and
   torch.expm1 are for. No tensor that it makes may be larger than [T, tile], [tile, H] or [T, H], whichever is the
   largest: `test_no_logits_are_held` looks. Slices of `weight` are no new tensors.

Leads to: kernels/linear_cross_entropy.py, whose docstring is this page.

    python -m pytest -q exercises/07_loss.py
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.linear_cross_entropy import linear_cross_entropy


def loss_and_gradient(hidden: Tensor, weight: Tensor, targets: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """hidden [T, H], weight [V, H], targets [T] -> (the loss of each row [T], its gradient in hidden [T, H]).

    The sum of the losses is what is differentiated. tile: words of the vocabulary at a time.
    """
    zt = (hidden * weight[targets]).sum(1)
    loss, dh = relative_to(zt, zt, hidden, weight, targets, tile)
    again = (~(loss < 60)).nonzero()[:, 0]  # e^60 is far below fp32's e^88; nan compares false, so it is here too
    if len(again):
        h, t = hidden[again], targets[again]
        largest = torch.stack([(h @ weight[i : i + tile].T).amax(1) for i in range(0, len(weight), tile)]).amax(0)
        loss[again], dh[again] = relative_to(largest, zt[again], h, weight, t, tile)
    return loss, dh


def relative_to(
    r: Tensor, zt: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, tile: int
) -> tuple[Tensor, Tensor]:
    """The same, of exponentials relative to r [T]. zt [T]: the targets' logits."""
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the most numbers that a result has had while it was active."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.given:
                self.numbers = max(self.numbers, x.numel())
        return out

    def __init__(self, *given: Tensor):
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given}  # views of these cost nothing


def example(T: int = 37, V: int = 1000, H: int = 32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, H, generator=generator), torch.randn(V, H, generator=generator)
    return hidden, weight, torch.randint(V, (T,), generator=generator)


def truth(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64, with all logits."""
    h = hidden.double().requires_grad_()
    loss = F.cross_entropy(h @ weight.double().T, targets, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), h)[0]


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_it_is_torchs_loss_and_the_projects():
    hidden, weight, targets = example()
    for tile in (1000, 128, 7):
        loss, dh = loss_and_gradient(hidden, weight, targets, tile)
        close((loss, dh), truth(hidden, weight, targets))
    h = hidden.clone().requires_grad_()
    theirs = linear_cross_entropy(h, weight, targets)
    torch.testing.assert_close(loss.sum(), theirs.detach())
    torch.testing.assert_close(dh, torch.autograd.grad(theirs, h)[0], rtol=1e-4, atol=1e-5)


def test_no_logits_are_held():
    hidden, weight, targets = example()
    most = max(64 * len(hidden), 64 * hidden.shape[1], hidden.numel())
    with Largest(hidden, weight, targets) as largest:
        loss, dh = loss_and_gradient(hidden, weight, targets, 64)
    assert loss.shape == targets.shape and dh.shape == hidden.shape
    assert largest.numbers <= most
    with Largest(hidden, weight, targets) as largest:
        loss_and_gradient(hidden, weight, targets, len(weight))
    assert largest.numbers > most, "logits of all words at once are noticed"


def test_a_sure_token_keeps_its_digits():
    """Losses as small as 1e-25 and gradients to match, with a relative error below 1e-3: logsumexp(z) - z_t gives 0."""
    hidden, weight, targets = example()
    hidden = weight[targets] * 2
    z = hidden.double() @ weight.double().T
    z = (z - z.gather(1, targets[:, None])).scatter(1, targets[:, None], float("-inf"))
    E = z.exp()
    S = E.sum(1)
    want = S.log1p()
    want_dh = (E @ weight.double() - S[:, None] * weight[targets].double()) / (1 + S)[:, None]
    assert want.min() < 1e-9
    loss, dh = loss_and_gradient(hidden, weight, targets, 128)
    torch.testing.assert_close(loss.double(), want, rtol=1e-3, atol=0)
    assert ((dh - want_dh).norm(dim=1) <= 1e-3 * want_dh.norm(dim=1)).all()


def test_a_hopeless_token_does_not_overflow():
    hidden, weight, targets = example()
    hidden = -weight[targets] * 5
    want = truth(hidden, weight, targets)
    assert want[0].max() > 200
    close(loss_and_gradient(hidden, weight, targets, 128), want)


def test_at_the_edge_of_overflow():
    """The largest logit lies 85 to 90 above the target's: sum_j E_j W_j is inf before S is."""
    hidden, weight, targets = example()
    z = -weight[targets] @ weight.T
    above = z.max(1, keepdim=True).values - z.gather(1, targets[:, None])
    hidden = -weight[targets] / above * torch.linspace(85, 90, len(targets))[:, None]
    close(loss_and_gradient(hidden, weight, targets, 128), truth(hidden, weight, targets))
