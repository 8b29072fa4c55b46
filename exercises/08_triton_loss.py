"""Exercise 8, 60 minutes: the loss of exercise 7 as one Triton kernel, run by Triton's interpreter.

Look at it once more: E = e^(h W^T - z_t), then E W. That is attention with the rows as queries and W as keys and values
alike, and it is computed the same way: a program takes BM rows, goes along the vocabulary BN words at a time, and keeps
two sums, S [BM] and U [BM, H].

1. Given: load the BM rows h [BM, H] once (BH = the next power of two of H; columns beyond H read as 0), their targets,
   and the rows W_t in the same way; multiply and add up, which is z_t.
2. For each tile of BN words: load W [BN, BH], masked in words and in columns, z = tl.dot(h, tl.trans(W)), E = e^(z -
   z_t), 0 for the target itself and for words beyond V (masked, they have z = 0, not -inf); then S += sum of E, U +=
   tl.dot(E, W).
3. Store log(1 + S) and (U - S W_t) / (1 + S). In fp32 1 + S loses a small S, and the interpreter has no log1p: below
   S = 1e-3 take S - S²/2 + S³/3.
4. Launch it: loss_kernel[(triton.cdiv(T, 16),)](tensors and numbers, BM=16, BN=32, BH=...), BH the next power of two
   (triton.next_power_of_2), but 16 at least: tl.dot wants no side below.
5. On paper: how much memory does the kernel read for T rows, when W does not fit the cache? What does BM change?

Of Triton you need no more than what stands there, tl.zeros, tl.dot, tl.trans, tl.where, tl.exp and tl.log, and a plain
`for start in range(0, V, BN)`. Its tutorials "Vector Addition" and "Matrix Multiplication" show them:
https://triton-lang.org/main/getting-started/tutorials/

Everything is in fp32 here, and no row of the tests overflows. Give tl.dot input_precision="ieee": else a GPU takes
TF32, with three digits (the interpreter does not). The loads of words at or after V are masked, and the loads and
stores of rows at or after T. A store without its mask writes into memory that is not its own, and Python may die of it
("free(): invalid next size"). A warning of an overflow, though, only comes from the branch of tl.where that is not
taken.

The project's kernel divides the vocabulary among programs as well, and stores E: see `_gemm_exp_kernel`.

Leads to: kernels/linear_cross_entropy_triton.py.

    python -m pytest -q exercises/08_triton_loss.py
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
import triton
import triton.language as tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def loss_kernel(
    h_ptr,  # fp32 [T, H]
    w_ptr,  # fp32 [V, H]
    t_ptr,  # int64 [T]
    loss_ptr,  # fp32 [T], out
    dh_ptr,  # fp32 [T, H], out
    T,
    V,
    H,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
):
    """BM rows."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, BH)
    inside = (row < T)[:, None] & (k < H)[None, :]
    h = tl.load(h_ptr + row[:, None] * H + k[None, :], mask=inside, other=0.0)
    t = tl.load(t_ptr + row, mask=row < T, other=0)
    wt = tl.load(w_ptr + t[:, None] * H + k[None, :], mask=inside, other=0.0)
    zt = tl.sum(h * wt, axis=1)
    # The loop is yours, and what is stored: now it is z_t, and h as it is.
    tl.store(loss_ptr + row, zt, mask=row < T)
    tl.store(dh_ptr + row[:, None] * H + k[None, :], h, mask=inside)


def loss_and_gradient(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [T, H], weight [V, H], targets [T], contiguous -> (loss [T], its gradient in hidden [T, H])."""
    raise NotImplementedError("launch loss_kernel: one program for each 16 rows, BN = 32")


# ---------------------------------------------------------------------------------------------------------


def example(T: int, V: int, H: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T)
    hidden, weight = torch.randn(T, H, generator=generator), torch.randn(V, H, generator=generator)
    weight = torch.cat([weight, torch.full((32, H), float("nan"))])[:V]  # nan lies behind the last word
    return hidden.to(DEVICE), weight.to(DEVICE), torch.randint(V, (T,), generator=generator).to(DEVICE)


def test_it_is_torchs_loss():
    """Shapes that are multiples of the tiles, and shapes that are not."""
    for T, V, H in ((16, 64, 16), (32, 96, 32), (1, 33, 20), (37, 101, 48)):
        hidden, weight, targets = example(T, V, H)
        loss, dh = loss_and_gradient(hidden, weight, targets)
        h = hidden.double().requires_grad_()
        want = F.cross_entropy(h @ weight.double().T, targets, reduction="none")
        torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-4, atol=1e-5)
        want_dh = torch.autograd.grad(want.sum(), h)[0]
        torch.testing.assert_close(dh.double(), want_dh, rtol=1e-4, atol=1e-5)


def test_a_sure_token_keeps_its_digits():
    hidden, weight, targets = example(16, 64, 32)
    hidden = weight[targets].contiguous()
    loss, dh = loss_and_gradient(hidden, weight, targets)
    z = hidden.double() @ weight.double().T
    E = (z - z.gather(1, targets[:, None])).scatter(1, targets[:, None], float("-inf")).exp()
    S = E.sum(1)
    torch.testing.assert_close(loss.double(), S.log1p(), rtol=1e-3, atol=0)
    want = (E @ weight.double() - S[:, None] * weight[targets].double()) / (1 + S)[:, None]
    assert ((dh - want).norm(dim=1) <= 1e-3 * want.norm(dim=1)).all()
