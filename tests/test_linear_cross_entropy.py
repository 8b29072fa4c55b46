"""kernels/linear_cross_entropy.py against float64, torch and Liger, on the torch path and in Triton's interpreter.

    pytest tests/test_linear_cross_entropy.py

Tolerances follow cut-cross-entropy: we may be as wrong as torch in the same dtype, plus an epsilon. Upstream gradients
are random, and the hidden states have peaks (`realistic`): noise would hide what happens to confident tokens.
"""

import cold
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.gradcheck import gradcheck
from torch.utils.flop_counter import FlopCounterMode

import kernels.linear_cross_entropy as lce
from kernels.linear_cross_entropy import Head, linear_cross_entropy, linear_cross_entropy_reference, plain_head

try:
    import kernels.linear_cross_entropy_triton as fast
except ModuleNotFoundError:  # no triton on this platform: the torch path is the whole module
    fast = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_paths = [
    pytest.param(path, marks=pytest.mark.skipif(fast is None, reason="triton is not installed"))
    for path in ("fused", "split")
]
all_paths = ["torch", *triton_paths]


def realistic(tokens, dim, vocab, dtype=torch.bfloat16, seed=0, low=-4.0, high=8.0):
    """Hidden states that peak as a trained model's do -> (hidden [T, H], weight [V, H], targets [T]).

    Rows of W are random, of length about 1. h is a sum of eight; the largest has coefficient log V + u, u uniform in
    [low, high], the others follow at exponential distances. So p_max runs from 0.02 to 0.999. The targets are drawn
    from softmax(h W^T): the loss equals the entropy, as in a calibrated model.
    """
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, dim, generator=g) / dim**0.5
    tops = torch.randint(0, vocab, (tokens, 8), generator=g)
    peak = torch.tensor(vocab).log() + low + (high - low) * torch.rand(tokens, 1, generator=g)
    gaps = torch.empty(tokens, 8).exponential_(0.5, generator=g).cumsum(1)
    hidden = ((peak - gaps + gaps[:, :1]).clamp(min=0)[:, :, None] * weight[tops]).sum(1)
    weight, hidden = weight.to(dtype), hidden.to(dtype)
    p = (hidden.float() @ weight.float().T).softmax(1)
    targets = torch.multinomial(p, 1, generator=g)[:, 0]
    return hidden.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE)


def truth(hidden, head, targets, upstream=1.0):
    """(loss, loss of each token, gradient of hidden, stats) in float64, by autograd through the definition."""
    x = hidden.detach().double().requires_grad_()
    weight, bias = (None if y is None else y.detach().double() for y in head[:2])
    losses, stats = linear_cross_entropy_reference(x, Head(weight, bias, *head[2:]), targets)
    loss = losses.sum()
    (loss * upstream).backward()
    return loss.detach(), losses.detach(), x.grad, stats


def ours(hidden, head, targets, upstream=1.0, **options):
    """The same of the function under test."""
    x = hidden.detach().clone().requires_grad_()
    loss, stats = linear_cross_entropy(x, targets=targets, return_stats=True, **head._asdict(), **options)
    (loss * upstream).backward()
    return loss.detach(), -stats.logprob, x.grad, stats


def torch_own(hidden, weight, targets):
    """The gradient of what everybody writes, in the dtype of the inputs."""
    x = hidden.detach().clone().requires_grad_()
    F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum").backward()
    return x.grad


def error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


def check(got, want, dtype):
    for loss, loss64 in zip(got[:2], want[:2], strict=True):  # of all tokens, and of each
        assert ((loss - loss64).abs() <= 1e-5 * loss64.abs().clamp(min=1)).all()
    assert got[2].dtype == dtype and error(got[2], want[2]) <= (4e-3 if dtype == torch.bfloat16 else 1e-5)
    torch.testing.assert_close(got[3].logprob.double(), want[3].logprob.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(got[3].top1, want[3].top1)


# ---- right values ----------------------------------------------------------------------------------------------------

# aligned to every block, and to none; the interpreter runs one program at a time, so it gets few rows
SHAPES = {"torch": [(64, 64, 512), (70, 72, 517)], "fused": [(16, 64, 128), (19, 72, 197)]}
SHAPES["split"] = SHAPES["fused"]


@pytest.mark.parametrize("ragged", [0, 1])
@pytest.mark.parametrize("path", all_paths)
def test_frozen_head_bf16(path, ragged):
    hidden, weight, targets = realistic(*SHAPES[path][ragged])
    upstream = torch.randn((), device=DEVICE)
    got = ours(hidden, Head(weight), targets, upstream, path=path)
    check(got, truth(hidden, Head(weight), targets, upstream), torch.bfloat16)


@pytest.mark.parametrize("path", all_paths)
def test_all_options_at_once(path):
    tokens, dim, vocab = SHAPES[path][1]
    hidden, weight, targets = realistic(tokens, dim, vocab)
    head = Head(weight, torch.randn(vocab, device=DEVICE).bfloat16(), 12.0, 0.5)
    upstream = torch.randn((), device=DEVICE)
    got = ours(hidden, head, targets, upstream, path=path)
    check(got, truth(hidden, head, targets, upstream), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(dtype):
    hidden, weight, targets = realistic(70, 72, 517, dtype=dtype)
    head = Head(weight, torch.randn(517, device=DEVICE).to(dtype), 20.0, 0.5)
    # Not a random number: a small one takes the gradients of fp16 below its smallest normal number.
    upstream = torch.tensor(1.7, device=DEVICE)
    loss, losses, grad, stats = ours(hidden, head, targets, upstream)
    assert grad.dtype == dtype
    grad = grad.bfloat16() if dtype == torch.float16 else grad  # 11 bits are compared as bf16's 8
    check((loss, losses, grad, stats), truth(hidden, head, targets, upstream), grad.dtype)


def test_gradcheck():
    g = torch.Generator().manual_seed(1)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=g, device="cpu") for shape in ((5, 8), (11, 8), (11,))
    )
    targets = torch.tensor([0, 10, 0, 3, 4])

    def fn(h):
        return linear_cross_entropy(h, weight, targets, bias=bias, softcap=2.0, logit_scale=0.7)

    assert gradcheck(fn, (hidden.requires_grad_(),))


def test_a_head_that_is_trained_is_refused():
    """It would silently not learn, as LoRA on the head does in other raw-weight losses."""
    hidden, weight, targets = realistic(4, 8, 16, dtype=torch.float32)
    for name, frozen in (("weight", {}), ("bias", {"bias": torch.zeros(16, device=DEVICE).requires_grad_()})):
        given = weight.requires_grad_(name == "weight")
        with pytest.raises(ValueError, match=f"{name} must be frozen"):
            linear_cross_entropy(hidden, given, targets, **frozen)
        with torch.no_grad():  # scoring: nothing is learned
            assert linear_cross_entropy(hidden, given, targets, **frozen) > 0


@pytest.mark.parametrize("path", all_paths)
def test_bf16_accuracy_against_torch_and_liger(path):
    """The bar: dH no worse than torch's own bf16 path and half of Liger's error; the loss right to 1e-5."""
    hidden, weight, targets = realistic(24, 64, 1024, seed=3)
    loss64, _, grad64, _ = truth(hidden, Head(weight), targets)
    loss, _, grad, _ = ours(hidden, Head(weight), targets, path=path)
    assert abs(loss - loss64) <= 1e-5 * max(1, loss64)
    assert error(grad, grad64) <= error(torch_own(hidden, weight, targets), grad64)
    # Liger's arithmetic for the mean: logits rounded to bf16, dlogits (divided by N) rounded to bf16, two bf16 products
    p = F.linear(hidden, weight).float().softmax(1)
    p[torch.arange(24, device=DEVICE), targets] -= 1
    liger = (p / 24).bfloat16() @ weight
    assert error(grad, grad64) <= 0.5 * error(24 * liger.double(), grad64)


def test_bf16_accuracy_against_the_installed_liger():
    pytest.importorskip("triton")
    ops = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    hidden, weight, targets = realistic(12, 64, 512, seed=4)
    loss64, _, grad64, _ = truth(hidden, Head(weight), targets)
    x = hidden.clone().requires_grad_()
    result = ops.LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets)  # the mean
    liger = result[0] if isinstance(result, tuple) else result
    liger.backward()
    loss, _, grad, _ = ours(hidden, Head(weight), targets)
    assert abs(loss - loss64) <= abs(12 * liger.detach().double() - loss64)
    assert error(grad, grad64) <= 0.5 * error(12 * x.grad.double(), grad64)


def test_fp32_accuracy_of_confident_tokens():
    """p_t > 0.999: torch's logsumexp(z) - z_t keeps few digits of such a loss."""
    hidden, weight, targets = realistic(256, 64, 2048, dtype=torch.float32, low=8.0, high=14.0)
    z = hidden.double() @ weight.double().T
    targets = z.argmax(1)
    _, loss64, grad64, _ = truth(hidden, Head(weight), targets)
    assert (loss64 < 1e-3).sum() > 20
    _, loss, grad, _ = ours(hidden, Head(weight), targets)
    own = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
    off, own_off = (loss - loss64).abs(), (own - loss64).abs()
    assert (off <= 1e-6 * z.abs().amax(1).clamp(min=1)).all()
    assert abs(loss.double().mean() - loss64.mean()) <= 1e-6
    assert off.mean() <= own_off.mean() and off[loss64 < 1e-3].max() <= own_off[loss64 < 1e-3].max()
    assert error(grad, grad64) <= 1e-5


# ---- hard inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", all_paths)
def test_extreme_logits_are_redone_exactly(path):
    """Logits up to +-200, targets at the arg-max and the arg-min: e^400 does not exist in fp32."""
    hidden, weight, _ = realistic(12, 64, 130)
    hidden = (hidden.float() * 200 / (hidden.float() @ weight.float().T).abs().amax(1, keepdim=True)).bfloat16()
    z = hidden.double() @ weight.double().T
    targets = torch.where(torch.arange(12, device=DEVICE) % 2 == 0, z.argmax(1), z.argmin(1))
    got = ours(hidden, Head(weight), targets, path=path)
    want = truth(hidden, Head(weight), targets)
    assert want[1].max() > 250 and want[1].min() < 1e-5
    check(got, want, torch.bfloat16)


@pytest.mark.parametrize("path", all_paths)
def test_nan_stays_in_its_row(path):
    hidden, weight, targets = realistic(6, 64, 130)
    clean = ours(hidden, Head(weight), targets, path=path)
    hidden[2, 5] = torch.nan
    _, loss, grad, _ = ours(hidden, Head(weight), targets, path=path)
    others = torch.arange(6, device=DEVICE) != 2
    assert loss[2].isnan() and grad[2].isnan().all()
    assert torch.equal(loss[others], clean[1][others]) and torch.equal(grad[others], clean[2][others])


@pytest.mark.parametrize("path", all_paths)
@pytest.mark.parametrize("rows", [1, 0])
def test_one_row_and_none(path, rows):
    """No row: a loss of 0, and an empty gradient."""
    hidden, weight, targets = (x[:rows] if i != 1 else x for i, x in enumerate(realistic(3, 64, 130)))
    head = Head(weight)
    check(ours(hidden, head, targets, path=path), truth(hidden, head, targets), torch.bfloat16)


@pytest.mark.parametrize("path", all_paths)
def test_real_vocabulary(path, monkeypatch):
    """V = 152,064 (Qwen2.5) is no power of two and no multiple of 4096."""
    if DEVICE == "cpu" and path == "fused":  # wide tiles: the interpreter's time goes by programs
        monkeypatch.setattr(fast, "tile_for", lambda arch, small: fast.Tile(16, 4096, 16, 4, 2))
    if DEVICE == "cpu" and path == "split":
        monkeypatch.setattr(fast, "EXP_BLOCK", 32768)
    hidden, weight, targets = realistic(3, 16, 152_064)
    check(ours(hidden, Head(weight), targets, path=path), truth(hidden, Head(weight), targets), torch.bfloat16)


@pytest.mark.parametrize("path", all_paths)
def test_offsets_beyond_2_to_31(path):
    """Views whose rows lie 2^31 elements apart; the memory between them is never touched."""

    def far(x):  # the rows of x, in a buffer of virtual memory
        step = 2**31 // (len(x) - 1) + 64
        view = torch.empty((len(x) - 1) * step + x.shape[1], dtype=x.dtype).as_strided(x.shape, (step, 1))
        return view.copy_(x)

    if DEVICE == "cuda":
        pytest.skip("4 GB of real memory each")
    hidden, weight, targets = realistic(3, 16, 5)
    plain = linear_cross_entropy(hidden, weight, targets, path=path)
    x = far(hidden).requires_grad_()
    loss = linear_cross_entropy(x, far(weight), targets, path=path)
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.equal(loss, plain)
    assert error(grad, truth(hidden, Head(weight), targets)[2]) < 4e-3


def guarded(shape, dtype, device="cpu", fill=None):
    """An uninitialised tensor between two guards of NaN -> (tensor, whole buffer)."""
    size = torch.Size(shape).numel()
    buffer = torch.full((size + 256,), torch.nan, dtype=dtype, device=device)
    view = buffer[128 : 128 + size].view(shape)
    return (view if fill is None else view.copy_(fill)), buffer


@pytest.mark.skipif(fast is None or DEVICE == "cuda", reason="needs the interpreter")
@pytest.mark.parametrize("path", ["fused", "split"])
def test_kernels_stay_inside_their_buffers(path, monkeypatch):
    """Guards of NaN around every buffer: a read past an end shows in the result, a write shows in the guard."""
    hidden, weight, targets = realistic(19, 72, 197)
    bias = torch.randn(197).bfloat16()
    want = truth(hidden, Head(weight, bias), targets)
    buffers = []

    def allocate(*shape, dtype=None, device=None, fill=None):
        view, buffer = guarded(shape, dtype, device, fill)
        buffers.append((buffer, view.numel()))
        return view

    hidden, weight, bias = (allocate(*x.shape, dtype=x.dtype, fill=x) for x in (hidden, weight, bias))
    sums, dh = allocate(2, 19, dtype=torch.float32), allocate(19, 72, dtype=torch.bfloat16)
    multiply = fast._mm_fp32
    monkeypatch.setattr(
        fast, "_mm_fp32", lambda a, b: allocate(len(a), b.shape[1], dtype=torch.float32, fill=multiply(a, b))
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", allocate)  # zt, E, partial sums
        fast.run_chunk(path, hidden, Head(weight, bias), targets, sums, dh)
    assert len(buffers) == 9
    for buffer, size in buffers:
        assert buffer[:128].isnan().all() and buffer[128 + size :].isnan().all()
    assert error(sums[0].log1p().sum(), want[0]) < 1e-6
    assert error(dh, want[2]) < 4e-3


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_a_gradient_takes_two_matrix_products_and_a_score_takes_one():
    hidden, weight, targets = realistic(100, 64, 512, dtype=torch.float32)
    inplace = {torch.ops.aten.addmm_: lambda u, e, w, **_: 2 * e[0] * e[1] * w[1]}  # not known to the counter
    with FlopCounterMode(display=False, custom_mapping=inplace) as counter:
        linear_cross_entropy(hidden.requires_grad_(), weight, targets).backward()
    assert counter.get_total_flops() == 2 * 2 * 100 * 64 * 512
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, targets)
    assert counter.get_total_flops() == 2 * 100 * 64 * 512


@pytest.mark.skipif(fast is None, reason="triton is not installed")
@pytest.mark.parametrize("vocab, dim", [(152_064, 3584), (128_256, 4096), (160_000, 8192), (49_152, 576)])
@pytest.mark.parametrize("path", ["fused", "split"])
def test_workspace_is_bounded_at_any_length(path, vocab, dim):
    for tokens in (1, 100, 2_048, 16_384, 131_072, 1_000_000):
        rows = lce._rows_per_chunk(tokens, vocab, dim, path)
        vectors = 40 * tokens  # sums, losses, targets
        assert rows % 128 == 0 and rows * fast.bytes_per_row(path, vocab, dim) + vectors <= 0.39e9
        if tokens <= 131_072:
            assert rows * fast.bytes_per_row(path, vocab, dim) + vectors <= 0.35e9


@pytest.mark.parametrize("path", all_paths)
def test_same_bits_every_run_and_same_values_in_every_chunking(path, monkeypatch):
    hidden, weight, targets = realistic(21, 32, 96)
    first = ours(hidden, Head(weight), targets, path=path)
    again = ours(hidden, Head(weight), targets, path=path)
    assert torch.equal(first[0], again[0]) and torch.equal(first[2], again[2])
    monkeypatch.setattr(lce, "_rows_per_chunk", lambda *args: 8)
    monkeypatch.setattr(lce, "CPU_TILE_ELEMENTS", 1)
    small = ours(hidden, Head(weight), targets, path=path)
    torch.testing.assert_close(first[0], small[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first[2], small[2], rtol=1e-2, atol=1e-6)


# ---- the contract ----------------------------------------------------------------------------------------------------


def test_backward_twice_is_refused_and_autocast_does_not_round():
    hidden, weight, targets = realistic(8, 32, 96, dtype=torch.float32)
    hidden.requires_grad_()
    plain = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), plain)
    plain.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was already run"):
        plain.backward()


@pytest.mark.parametrize(
    "change, name",
    [
        ({"hidden": torch.zeros(4, 2, 8)}, "hidden"),
        ({"weight": torch.zeros(16, 9)}, "weight"),
        ({"weight": torch.zeros(16, 8, dtype=torch.bfloat16)}, "weight"),
        ({"weight": torch.zeros(16, 8, device="meta")}, "weight"),
        ({"targets": torch.zeros(5, dtype=torch.long)}, "targets"),
        ({"targets": torch.zeros(4)}, "targets"),
        ({"targets": torch.tensor([0, 1, 2, 16])}, "targets"),
        ({"targets": torch.tensor([0, 1, 2, -100])}, "targets"),  # torch's mark of an ignored row
        ({"bias": torch.zeros(15)}, "bias"),
        ({"softcap": 0.0}, "softcap"),
        ({"path": "fused"}, "path"),  # fp32
    ],
)
def test_wrong_input_is_named_in_one_line(change, name):
    arguments = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(16, 8), "targets": torch.tensor([0, 1, 2, 15])}
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {name}[^\n]*$"):
        linear_cross_entropy(**{**arguments, **change})


def test_works_without_triton():
    code = """import sys
for name in [n for n in sys.modules if n.split(".")[0] in ("kernels", "triton")]: del sys.modules[name]
sys.modules["triton"] = None
import torch; from kernels.linear_cross_entropy import linear_cross_entropy as f
x = torch.randn(4, 8).bfloat16(); print(f(x, x, torch.arange(4)).item() > 0)
try: f(x, x, torch.arange(4), path="fused")
except ValueError as e: print(e)"""
    done = cold.run("-c", code)
    assert done.stdout.startswith("True\nlinear_cross_entropy: path 'fused' needs triton"), done.stderr


def test_plain_head_accepts_and_refuses():
    import tiny
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = torch.arange(40)[None] * 7
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    models = [tiny.tiny_model(family).float() for family in ("llama", "gemma2", "qwen2")]
    models[1].lm_head.weight.data *= 30  # logits far enough out for its cap of 30 to bite
    for name, extra in (("cohere", {"logit_scale": 0.3}), ("granite", {"logits_scaling": 7.0})):
        models.append(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **extra)).eval())
    for model in models:
        head, reason = plain_head(model.requires_grad_(False))
        assert head is not None and reason == "", reason
        with torch.no_grad():
            hidden = model.get_decoder()(ids).last_hidden_state[0]
            logits = model(ids).logits[0]
        loss = linear_cross_entropy(hidden[:-1], targets=ids[0, 1:], **head._asdict())
        torch.testing.assert_close(
            loss, F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"), rtol=1e-5, atol=1e-5
        )
    assert models[1].config.final_logit_softcapping == plain_head(models[1])[0].softcap == 30.0

    class Adapted(torch.nn.Linear):  # as PEFT's and bitsandbytes' layers are
        pass

    model = models[0]
    scale = model.register_forward_hook(lambda m, a, out: out.__setitem__("logits", out.logits * 1.5))
    assert plain_head(model) == (None, "LlamaForCausalLM does something to its logits that is not known here")
    scale.remove()
    hook = model.lm_head.register_forward_hook(lambda m, a, out: out)
    assert plain_head(model) == (None, "its head has forward hooks")
    hook.remove()
    model.lm_head = Adapted(64, model.config.vocab_size, bias=False)
    assert plain_head(model) == (None, "its head is a Adapted, not a plain linear layer")


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.needs_cuda
@pytest.mark.parametrize("path", ["fused", "split", "torch"])
def test_cuda_memory_and_host_reads(path):
    tokens, dim, vocab = 16_384, 3584, 152_064
    hidden = torch.randn(tokens, dim, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocab, dim, device="cuda") / dim**0.5).bfloat16()
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    linear_cross_entropy(hidden, weight, targets, path=path).backward()  # compile, cuBLAS workspace
    hidden.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as reads:
            loss = linear_cross_entropy(hidden, weight, targets, path=path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(w.message) for w in reads) <= 1
    loss.backward()
    extra = torch.cuda.max_memory_allocated() - before - tokens * dim * 2  # the returned dh
    assert extra <= 0.35e9, extra
    assert hidden.grad.isfinite().all()
