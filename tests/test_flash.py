"""models/flash.py: FlashAttention is called by its contract, played by float64 stand-ins.  pytest tests/test_flash.py

The sampler's half, `attend_chunks` and which kernel serves which inputs, is tested with the sampler.
"""

import sys

import pytest
import torch
from trainees import alone, some_pairs, with_lora

import train
from lengthen.models import flash, flash_hopper
from lengthen.training.packed import examine


def attention(q, k, v, cu_seq_lens, scale, window):
    """Token i of a sample sees itself and the window - 1 before it, 0 = all. q [T, Hq, D] -> out, lse [Hq, T]."""
    sample = torch.bucketize(torch.arange(len(q)), cu_seq_lens[1:], right=True)
    back = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (sample[:, None] == sample) & (back >= 0) & ((back < window) | (window == 0))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~seen, float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


def flash_attn_varlen_func(
    q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap, return_attn_probs
):
    """flash-attn's: window_size (left, 0) or (-1, -1), always causal."""
    assert causal and return_attn_probs and torch.equal(cu_q, cu_k) and max_q == max_k == int(cu_q.diff().max())
    assert softcap == 0 and (window_size == (-1, -1) or window_size[1] == 0)
    return *attention(q, k, v, cu_q, softmax_scale, window_size[0] + 1), None


def flash_attention_forward(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, causal, debug, *, scale, window_size_left, window_size_right
):
    """torch's operator: left = -1 for no window, right always 0, always causal."""
    assert causal and not debug and torch.equal(cu_q, cu_k) and max_q == max_k == int(cu_q.diff().max())
    assert dropout_p == 0 and window_size_right == 0
    return *attention(q, k, v, cu_q, scale, window_size_left + 1), None, None, None


@pytest.mark.parametrize("installed", [True, False], ids=["flash-attn", "torch"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_packed_training_through_flash_attention_is_the_samples_alone(family, installed, monkeypatch):
    if installed:
        module = type("Module", (), {"flash_attn_varlen_func": staticmethod(flash_attn_varlen_func)})
        monkeypatch.setitem(sys.modules, "flash_attn", module)
    else:
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention_forward)
    kernel = flash._flash_attn if installed else flash._torch_flash
    monkeypatch.setattr(flash, "flash_kernel", lambda q, v, softcap: kernel)
    pairs, model = some_pairs(40, 2, 9, 61), with_lora(family)  # two are longer than the tiny models' window of 24
    abilities = examine(model)
    assert abilities.packs, abilities.notes
    loss, _ = train.row_loss(model, abilities, pairs)
    torch.testing.assert_close(loss, alone(with_lora(family), pairs), rtol=1e-5, atol=0)


@pytest.mark.parametrize("window", [0, 8])
def test_forward_and_backward_by_hand_are_autograds(window):
    """On a CPU, as the lean layer calls them: against autograd through the definition, in float64."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(30, heads, 16, dtype=torch.float64, generator=g).requires_grad_() for heads in (4, 2, 2))
    cu_seq_lens, dout = torch.tensor([0, 20, 30], dtype=torch.int32), torch.randn(30, 4, 16, dtype=torch.float64)
    want, want_lse = attention(q, k, v, cu_seq_lens, 0.25, window)
    with torch.no_grad():
        out, lse = flash.attend_saving_lse(q, k, v, cu_seq_lens, 20, 0.25, window)
        gradients = flash.attend_backward(dout, q, k, v, out, lse, cu_seq_lens, 20, 0.25, window)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse.double(), want_lse)
    for gradient, expected in zip(gradients, torch.autograd.grad(want, (q, k, v), dout), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("window", [0, 8])
def test_torchs_operators_are_called_by_their_signatures(window):
    """On tensors without data: torch checks the arguments, and says the shapes. The kernels need a GPU."""
    device = torch.device("meta")
    q, k, v = (torch.empty(30, heads, 16, device=device, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2))
    row = torch.empty(3, device=device, dtype=torch.int32), 20
    out, lse = flash.attend_saving_lse(q.detach(), k.detach(), v.detach(), *row, 0.25, window)
    assert out.shape == q.shape and lse.shape == (4, 30) and lse.dtype == torch.float32
    gradients = flash.attend_backward(out, q, k, v, out, lse, *row, 0.25, window)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
    # and through autograd, as packed training calls them
    out, _ = flash._torch_flash(q, k, v, flash.Varlen(row[0], row[0], 20, 20), 0.25, window)
    assert [x.shape for x in torch.autograd.grad(out, (q, k, v), torch.empty_like(out))] == [x.shape for x in (q, k, v)]


# ---- FlashAttention 3 and 4 ------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch, capsys):
    """A Hopper GPU on paper. hopper(FA3=..., FA4=...): what is installed, and what each computes -> what is used."""
    active, given = [None], {}

    def probe(device, head):
        result = given[active[0]] if active[0] else torch.tensor([1.0, -2.0])
        if isinstance(result, str):
            raise RuntimeError(result + "\nmore")
        return [result]

    def use(**installed):
        given.update(installed)
        return flash_hopper.activated(torch.device("cuda", 0), 128), active[0], capsys.readouterr().err

    monkeypatch.setattr(flash_hopper, "_probe", probe)
    monkeypatch.setattr(flash_hopper, "MODULES", dict(flash_hopper.MODULES))
    names = {module: name for name, (module, _) in flash_hopper.MODULES.items()}
    monkeypatch.setattr(flash_hopper, "importable", lambda module: names.get(module) in given)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    attention = flash_hopper.attention
    monkeypatch.setattr(attention, "activate_flash_attention_impl", lambda name: active.__setitem__(0, name))
    monkeypatch.setattr(attention, "restore_flash_attention_impl", lambda: active.__setitem__(0, None))
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: active[0])
    caches = flash_hopper.candidate, flash_hopper.activated  # also of what tests before this one have asked
    for cache in caches:
        cache.cache_clear()
    yield use
    for cache in caches:
        cache.cache_clear()


RIGHT = torch.tensor([1.01, -2.0])


def test_flash_attention_3_is_used_where_it_is_installed_and_right(hopper):
    assert hopper(FA3=RIGHT, FA4=RIGHT) == (True, "FA3", "")
    assert flash_hopper.activated(torch.device("cuda", 0), 64) and not flash_hopper.activated(torch.device("cpu"), 64)


def test_without_it_torchs_own_stays(hopper):
    assert hopper() == (False, None, "")


@pytest.mark.parametrize("wrong", [torch.tensor([1.1, -2.0]), torch.tensor([1.0, torch.nan]), "no kernel image"])
def test_one_that_fails_or_differs_is_given_up_and_that_is_said(hopper, wrong):
    used, active, said = hopper(FA3=wrong)
    assert not used and active is None
    assert "FA3 is installed and not used: " + ("no kernel image" if isinstance(wrong, str) else "it differs") in said
    assert "more" not in said


def test_after_flash_attention_3_failed_4_is_tried(hopper):
    used, active, said = hopper(FA3="undefined symbol", FA4=RIGHT)
    assert used and active == "FA4" and "FA3 is installed and not used: undefined symbol" in said


def test_what_is_compared_is_attention_with_and_without_a_window(monkeypatch):
    """The operators' stand-ins compute by the definition: the calls of the comparison keep their contract."""
    asked = []

    def backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, causal, seed, offset, **sides):
        asked.append(sides["window_size_left"])
        assert causal and dropout_p == 0 and torch.equal(cu_q, cu_k) and max_q == max_k == 257
        inputs = [x.double().requires_grad_() for x in (q, k, v)]
        want, _ = attention(*inputs, cu_q, sides["scale"], sides["window_size_left"] + 1)
        return torch.autograd.grad(want, inputs, dout.double())

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, *rest, **sides):
        if torch.equal(cu_q, cu_k):
            return flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, *rest, **sides)
        counts = cu_q.diff().tolist()  # of a sample's tokens the queries are the last
        assert counts == [17, 17, 1] and len(q) == 35 and max_q == 17 and max_k == 257
        assert q.stride(0) == k.stride(0) == v.stride(0) == 8 * 16  # parts of one matrix
        at = torch.cat([torch.arange(end - n, end) for end, n in zip(cu_k[1:].tolist(), counts, strict=True)])
        every = k.new_zeros(len(k), *q.shape[1:]).index_copy(0, at, q)
        out, lse = attention(every, k, v, cu_k, sides["scale"], sides["window_size_left"] + 1)
        return out[at], lse[:, at], None, None, None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    found = flash_hopper._probe(torch.device("cpu"), 16)
    assert len(found) == 12 and asked == [-1, 30] and all(x.isfinite().all() for x in found)
    assert not torch.allclose(found[0], found[5])  # the window is shorter than the longest sample
