"""Exercise 6, 45 minutes: LoRA by hand, forward and backward.

    y = x W^T + scale * (x A^T) B^T        W [out, in] is frozen; A [rank, in] and B [out, rank] are trained

1. Write `forward`. In which order is the product of x, A^T and B^T cheap? Count the multiplications for 4,096 tokens,
   in = out = 3,584 and rank 8.
2. Derive dx, dA and dB from dy = dL/dy, and write `backward` without autograd. Full fine-tuning takes three products
   for each layer that are as large as x W^T. Which of them does LoRA not need?
3. Write `merge`. Why does the project never merge into 4-bit weights?

Leads to: `LoraLinear` in lengthen/models/lora.py, and `Linears` in lengthen/training/lean_linears.py, where the same
gradients are written for layers that share their input.

    python -m pytest -q exercises/06_lora.py
"""

import peft
import torch
from torch import Tensor, nn

from lengthen.models.lora import LoraLinear


def forward(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x [T, in] -> y [T, out]."""
    raise NotImplementedError


def backward(dy: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dy [T, out] -> (dx [T, in], dA [rank, in], dB [out, rank])."""
    raise NotImplementedError


def merge(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The weight [out, in] of a plain linear layer that computes the same."""
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------

RANK, ALPHA = 4, 8.0


def example() -> tuple[Tensor, LoraLinear]:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(24, 40, bias=False, dtype=torch.float64), RANK, ALPHA).double()
    layer.A.data.normal_()
    layer.B.data.normal_()
    return torch.randn(7, 24, dtype=torch.float64), layer


def test_the_forward_pass_is_the_projects_and_pefts():
    x, layer = example()
    got = forward(x, layer.weight, layer.A, layer.B, ALPHA / RANK)
    torch.testing.assert_close(got, layer(x))
    model = nn.Sequential(nn.Linear(24, 40, bias=False, dtype=torch.float64))
    model[0].weight.data.copy_(layer.weight)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    adapted = peft.inject_adapter_in_model(config, model)
    adapted[0].lora_A["default"].weight.data.copy_(layer.A)
    adapted[0].lora_B["default"].weight.data.copy_(layer.B)
    torch.testing.assert_close(got, adapted.double()(x))


def test_the_gradients_are_autograds():
    x, layer = example()
    x.requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    want = torch.autograd.grad(y, (x, layer.A, layer.B), dy)
    with torch.no_grad():
        got = backward(dy, x, layer.weight, layer.A, layer.B, ALPHA / RANK)
    for ours, autograds in zip(got, want, strict=True):
        torch.testing.assert_close(ours, autograds)


def test_a_merged_layer_computes_the_same():
    x, layer = example()
    torch.testing.assert_close(x @ merge(layer.weight, layer.A, layer.B, ALPHA / RANK).T, layer(x))
