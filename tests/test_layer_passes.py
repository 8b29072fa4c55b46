"""RMSNorm, SwiGLU and rotary positions: torch's passes and the Triton kernels (interpreted) against float64 autograd.

    pytest tests/test_layer_passes.py

Shapes: a row per program and many rows per program of RMSNorm, ragged against every block.
"""

import pytest
import torch

from kernels import HAS_NUMBA, HAS_TRITON, layer_passes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_numba = pytest.mark.skipif(not HAS_NUMBA or DEVICE == "cuda", reason="numba is for a CPU, and not installed")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
PATHS = ["torch", pytest.param("numba", marks=needs_numba), pytest.param("triton", marks=needs_triton)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
# One rounding of the result, and fp32 sums: half a unit in the last place, doubled.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=PATHS)
def passes(request, monkeypatch):
    """The module's functions, by torch, by Numba where it has them, or by Triton (on a CPU: in its interpreter)."""
    if request.param != "triton":
        monkeypatch.setattr(layer_passes, "_fast", lambda x: False)
        if request.param == "torch":
            monkeypatch.setattr(layer_passes, "_on_numba", lambda x: False)
        return layer_passes
    from kernels import layer_passes_triton

    return layer_passes_triton


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(ours: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """Off by rounding at the scale of its own number, plus fp32's error at the scale of the largest."""
    bound = ROUNDING[dtype] * truth.abs() + 2e-6 * truth.abs().max()
    error = (ours.double() - truth).abs()
    assert ours.dtype == dtype and bool((error <= bound).all()), (error - bound).max().item()


def norm64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The definition, by float64 autograd."""
    return weight.double() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 96), (3, 4100), (2, 7, 20)])
def test_rms_norm(passes, shape, dtype):
    x, weight, dn, dx = (random(*s, dtype=dtype) for s in (shape, shape[-1:], shape, shape))
    x64 = x.double().requires_grad_()
    truth = norm64(x64, weight)
    truth.backward(dn.double())
    close(passes.rms_norm(x, weight, EPS), truth.detach(), dtype)
    before = dx.double()
    added = passes.rms_norm_backward_(dn.clone(), x, weight, EPS, dx)
    assert added is dx
    close(dx, before + x64.grad, dtype)
    alone = dn.clone()
    assert passes.rms_norm_backward_(alone, x, weight, EPS) is alone
    close(alone, x64.grad, dtype)


def test_rms_norm_of_zeros_is_zero(passes):
    """The padding of nothing, but a token may be embedded as zeros: no division by zero."""
    x, weight = torch.zeros(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    assert not passes.rms_norm(x, weight, EPS).any()
    assert passes.rms_norm_backward_(random(2, 8), x, weight, EPS).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_swiglu(passes, scale, dtype):
    """Scale 40: gates whose sigmoid is 0 or 1."""
    gate, up, da = (random(7, 300, dtype=dtype) for _ in range(3))
    gate *= scale
    g, u = (x.double().requires_grad_() for x in (gate, up))
    truth = torch.nn.functional.silu(g) * u
    truth.backward(da.double())
    close(passes.swiglu(gate, up), truth.detach(), dtype)
    a = passes.swiglu_backward_(gate, up, da)
    close(a, truth.detach(), dtype)
    close(gate, g.grad, dtype)
    close(up, u.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head"), [(3, 16), (20, 24)])
def test_rotation_is_transformers(passes, heads, head, dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, dy = random(6, heads, head, dtype=dtype), random(6, heads, head, dtype=dtype)
    angles = random(6, head // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    x64 = x.double().requires_grad_()
    query = x64.transpose(0, 1)[None]
    turned, _ = apply_rotary_pos_emb(query, query, cos.double()[None], sin.double()[None])
    truth = turned[0].transpose(0, 1)
    truth.backward(dy.double())
    assert passes.rotate_(x, cos, sin) is x
    close(x, truth.detach(), dtype)
    close(passes.rotate_(dy, cos, sin, back=True), x64.grad, dtype)


def test_nothing_is_written_past_the_end(passes):
    """The rows behind a tile belong to the next tile."""
    buffers = [torch.full((9, 100), float("nan"), device=DEVICE) for _ in range(3)]
    g, u, d = (b[2:5].copy_(random(3, 100)) for b in buffers)
    passes.swiglu_backward_(g, u, d)
    passes.rms_norm_backward_(g, u, torch.ones(100, device=DEVICE), EPS, d)
    passes.rotate_(u.view(3, 5, 20), *(random(3, 20) for _ in range(2)))
    for buffer in buffers:
        assert buffer[:2].isnan().all() and buffer[5:].isnan().all() and buffer[2:5].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_is_told_of_what_is_changed_in_place(dtype):
    """It sees torch's operations only: a second backward pass would have read gradients as if they were activations."""
    g, u, d, dn, heads = changed = [random(2, 3, 8, dtype=dtype) for _ in range(5)]
    before = [x._version for x in changed]
    layer_passes.swiglu_backward_(*(x.flatten(0, 1) for x in (g, u, d)))
    layer_passes.rms_norm_backward_(dn, random(2, 3, 8, dtype=dtype), random(8, dtype=dtype), EPS)
    layer_passes.rotate_(heads, *(random(2, 8, dtype=dtype) for _ in range(2)))
    assert all(x._version > version for x, version in zip(changed, before, strict=True))
