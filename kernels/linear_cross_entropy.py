"""Cross-entropy of a language-model head without the logits: loss and hidden gradient in two matrix products.

It replaces
    z = logit_scale * F.linear(hidden, weight, bias)              # [T, V]
    z = softcap * torch.tanh(z / softcap)                         # Gemma-2
    loss = F.cross_entropy(z.float(), targets, reduction="sum")
and never holds z: at T = 16,384 tokens and V = 152,064 (Qwen2.5) z is 4.98 GB in bf16, 9.97 GB in fp32, and training
wants it three times over (logits, softmax, gradient). Here the extra memory is at most 0.35 GB at any T.

The mathematics, for one row h with target t. The head is frozen (LoRA adapts the decoder), so only dh is needed; and
since the target is known, the softmax can be taken relative to the target's own logit instead of the largest one:
    z_j  = h . W_j                         the logits (fp32)
    E_j  = exp(z_j - z_t),  j != t         no pass for the maximum, no rescaling when it moves
    S    = sum_{j != t} E_j
    loss = log(1 + S)                      = -log p_t, exact where p_t -> 1 (logsumexp(z) - z_t cancels there)
    dh   = (sum_j E_j W_j - S W_t) / (1 + S)
The last line is the usual sum_j (p_j - [j = t]) W_j, with p_t - 1 = -S / (1 + S) formed without a subtraction. A row's
dh is known as soon as its S is, so it is finished in the forward pass: two matrix products (z and E W), the floor for
an exact gradient. Bias, scale and softcap enter through z; dz/d(h.W) = logit_scale * (1 - (z / softcap)^2) multiplies
E_j and the target's term of dh.
exp overflows in fp32 where another logit lies 89 above the target's. Rows with S >= e^60 are flagged on the device, the
flag is read once after all work is queued, and those rows are computed again relative to their largest logit.

Shapes: hidden [T, H], weight [V, H], targets [T], all on one device; bf16, fp16, fp32 or fp64; the loss is fp32 (fp64
for fp64). Two Triton paths for bf16 on CUDA (linear_cross_entropy_triton.py), plain torch in cache-sized tiles
elsewhere, one contract. Sums run in a fixed order: the same bits every run.
Not supported: a trained head (refused), ignored rows (leave them out: hidden[rows]), weights of tokens or classes,
label smoothing, z-loss, double backward; a second backward through the same loss (dh is scaled in place, so as not to
hold it twice; fp64 keeps a copy, for gradcheck) raises.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import HAS_TRITON

MAX_EXPONENT = 60.0  # S >= e^60 is redone; far below fp32's e^88, so that E W cannot overflow either
WORKSPACE_BYTES = 340_000_000  # on a GPU, per call: everything but the inputs and the returned dh
TORCH_ROWS = 1024  # rows per chunk of the torch path
CPU_TILE_ELEMENTS = 1 << 21  # logits held at a time on a CPU: 8 MB in fp32 stay in its cache


class Head(NamedTuple):
    """What turns hidden states into logits: z = softcap * tanh(logit_scale * (h W^T + bias) / softcap)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    logit_scale: float = 1.0


class LossStats(NamedTuple):
    """Per token, [T]. No gradient flows through them."""

    logprob: Tensor  # log p of the target, in nats
    top1: Tensor  # bool: no other logit is larger than the target's


# ---- the specification -----------------------------------------------------------------------------------------------


def linear_cross_entropy_reference(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, LossStats]:
    """The definition in plain torch, with all logits in memory -> (loss [T], LossStats)."""
    t = targets[:, None]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(dtype) @ head.weight.to(dtype).T  # [T, V]
    z = head.logit_scale * (z if head.bias is None else z + head.bias.to(dtype))
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    target_logp = z.log_softmax(dim=1).gather(1, t)[:, 0]
    top1 = (z <= z.gather(1, t)).all(dim=1)
    return -target_logp, LossStats(target_logp.detach(), top1)


# ---- plain torch, tile by tile ---------------------------------------------------------------------------------------


def _logits(h: Tensor, head: Head, start: int, stop: int) -> Tensor:
    """fp32 (fp64) logits of vocabulary [start, stop) for the rows h -> [n, stop - start], a fresh tensor."""
    weight = head.weight[start:stop]
    if h.is_cuda and h.dtype in (torch.bfloat16, torch.float16):
        z = torch.mm(h, weight.T, out_dtype=torch.float32)
    else:
        z = h.to(_acc(h)) @ weight.to(_acc(h)).T
    if head.bias is not None:
        z += head.bias[start:stop]
    if head.logit_scale != 1.0:
        z *= head.logit_scale
    return z if head.softcap is None else z.div_(head.softcap).tanh_().mul_(head.softcap)


def _acc(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tiles(h: Tensor, vocab: int):
    """Vocabulary ranges so that a tile of logits (and the fp32 copy of its weight rows) keeps within the workspace."""
    if h.is_cuda:
        width = WORKSPACE_BYTES // 2 // (8 * len(h) + 8 * h.shape[1])
    else:
        width = CPU_TILE_ELEMENTS // max(len(h), 256)
    width = max(256, width // 256 * 256)
    return [(start, min(start + width, vocab)) for start in range(0, vocab, width)]


def _target_logits(h: Tensor, head: Head, t: Tensor) -> tuple[Tensor, Tensor]:
    """-> (z_t [n], W_t [n, H]), both fp32 (fp64)."""
    weight_t = head.weight[t].to(_acc(h))
    z = (h.to(_acc(h)) * weight_t).sum(dim=1)
    if head.bias is not None:
        z = z + head.bias[t]
    z = z * head.logit_scale
    return (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)), weight_t


def _slope(z: Tensor, head: Head) -> Tensor | float:
    """dz / d(h.W) at the capped logit z."""
    return head.logit_scale if head.softcap is None else head.logit_scale * (1 - (z / head.softcap) ** 2)


def _zero_target(x: Tensor, t: Tensor, start: int) -> None:
    """x[row, t[row] - start] = 0 where the target lies in this tile; no host read."""
    column = t - start
    inside = (column >= 0) & (column < x.shape[1])
    column = column.clamp(0, x.shape[1] - 1)[:, None]
    x.scatter_(1, column, x.gather(1, column).masked_fill(inside[:, None], 0))


def _torch_chunk(h: Tensor, head: Head, t: Tensor, grad: bool, from_max: bool = False):
    """Rows h [n, H] with targets t [n] -> (sums [3, n], dh [n, H] or None), fp32 (fp64).

    The exponentials are relative to r: the target's logit, or with from_max the largest one, which cannot overflow but
    takes one more matrix product. sums = S, max_{j != t} E_j, z_t - r.
    dh = (sum_j E_j W_j - S W_t) / (e^(z_t - r) + S): for r = z_t the text on top.
    """
    vocab = len(head.weight)
    tiles = _tiles(h, vocab)
    zt, weight_t = _target_logits(h, head, t)
    r = zt
    if from_max:
        for start, stop in tiles:
            r = torch.maximum(r, _logits(h, head, start, stop).amax(dim=1))
    sums = zt.new_zeros(3, len(h))
    total, largest, offset = sums
    offset.copy_(zt - r)
    u = zt.new_zeros(h.shape if grad else (0,))  # sum_j E_j W_j

    for start, stop in tiles:
        x = _logits(h, head, start, stop)
        slope = None if head.softcap is None else _slope(x, head)
        e = x.sub_(r[:, None]).exp_()
        _zero_target(e, t, start)
        torch.maximum(largest, e.amax(dim=1), out=largest)
        total += e.sum(dim=1)
        if grad:
            if slope is not None:
                e *= slope
            u.addmm_(e, head.weight[start:stop].to(e.dtype))

    if grad:
        scale = 1 / (offset.exp() + total)
        slope_t = _slope(zt, head)
        if head.softcap is None:
            scale, slope_t = scale * slope_t, 1.0  # a constant, not yet in u either
        u = u.sub_((total * slope_t)[:, None] * weight_t).mul_(scale[:, None])
    return sums, u if grad else None


# ---- all rows --------------------------------------------------------------------------------------------------------


def _choose_path(path: str, hidden: Tensor, weight: Tensor) -> str:
    """What "auto" means here: "fused" or "split" (Triton) for bf16 on CUDA, else "torch". A named path, or an error."""
    if path == "torch":
        return path
    if HAS_TRITON and hidden.dtype == torch.bfloat16 and weight.stride(1) == 1:
        from . import linear_cross_entropy_triton as fast

        if path != "auto" and (hidden.is_cuda or fast.INTERPRET):
            return path
        if path == "auto" and hidden.is_cuda:
            return fast.choose_path(hidden.device, len(weight))
    if path != "auto":
        raise ValueError(f"linear_cross_entropy: path {path!r} needs triton, bf16 and a GPU (or TRITON_INTERPRET=1)")
    return "torch"


def _rows_per_chunk(num_rows: int, vocab: int, dim: int, path: str) -> int:
    """Even chunks of a multiple of 128 rows, within the workspace."""
    most = TORCH_ROWS
    if path != "torch":
        from . import linear_cross_entropy_triton as fast

        most = max(128, WORKSPACE_BYTES // fast.bytes_per_row(path, vocab, dim) // 128 * 128)
    chunks = max(1, math.ceil(num_rows / most))
    return max(128, math.ceil(num_rows / chunks / 128) * 128)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head: Head, targets, want_grad: bool, path: str):
        hidden = hidden.detach() if hidden.stride(1) == 1 else hidden.detach().contiguous()
        num_tokens, vocab = len(hidden), len(head.weight)

        # 1) a target out of range is clamped (an index error on a GPU kills the whole process) and reported in 3)
        t = targets.clamp(0, vocab - 1).long()
        bad_targets = (targets != t).any()

        # 2) chunks of rows; everything of a row is final when its chunk is done
        sums = torch.zeros(3, num_tokens, dtype=_acc(hidden), device=hidden.device)
        dh = torch.empty_like(hidden) if want_grad else None

        def by_torch(rows, **options):
            sums[:, rows], grad = _torch_chunk(hidden[rows], head, t[rows], want_grad, **options)
            if dh is not None:
                dh[rows] = grad.to(dh.dtype)

        if path != "torch":
            from .linear_cross_entropy_triton import run_chunk
        step = _rows_per_chunk(num_tokens, vocab, hidden.shape[1], path)
        for start in range(0, num_tokens, step):
            rows = slice(start, min(start + step, num_tokens))
            if path == "torch":
                by_torch(rows)
            else:
                run_chunk(path, hidden[rows], head, t[rows], sums[:2, rows], None if dh is None else dh[rows])

        # 3) the one host read
        overflow = ~(sums[0] < math.exp(MAX_EXPONENT))  # also catches NaN
        bad_targets, any_overflow = torch.stack([bad_targets, overflow.any()]).tolist()
        if bad_targets:
            raise ValueError(f"linear_cross_entropy: targets must lie in [0, {vocab})")
        if any_overflow:
            for rows in overflow.nonzero()[:, 0].split(256):
                by_torch(rows, from_max=True)

        # 4) what is returned; kept for the backward pass is dh alone
        total, largest, offset = sums  # offset = z_t - r is 0 but in redone rows
        log_d = torch.log1p(torch.expm1(offset) + total)  # expm1(0) = 0: confident tokens keep every digit
        loss = log_d - offset
        stats = LossStats(-loss, largest <= offset.exp())
        ctx.dh = dh
        ctx.mark_non_differentiable(*stats)
        return loss.sum(), *stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        if ctx.dh is None:
            raise RuntimeError(
                "linear_cross_entropy: backward was already run through this loss; its gradient was scaled in place"
            )
        if ctx.dh.dtype == torch.float64:
            dh = ctx.dh * grad
        else:
            dh, ctx.dh = ctx.dh.mul_(grad), None
        return dh, None, None, None, None


# ---- the public function ---------------------------------------------------------------------------------------------


def _check(hidden, weight, targets, softcap, bias, path) -> None:
    def need(ok, what):
        if not ok:
            raise ValueError(f"linear_cross_entropy: {what}")

    need(
        hidden.ndim == 2 and hidden.is_floating_point(),
        f"hidden must be floating point [T, H], not {hidden.dtype} {list(hidden.shape)}",
    )
    num_tokens, dim = hidden.shape
    need(
        weight.ndim == 2 and weight.shape[1] == dim and len(weight),
        f"weight must be [V, {dim}], not {list(weight.shape)}",
    )
    need(weight.dtype == hidden.dtype, f"weight is {weight.dtype}, hidden is {hidden.dtype}")
    need(targets.shape == (num_tokens,), f"targets must be [{num_tokens}], not {list(targets.shape)}")
    need(targets.dtype in (torch.int64, torch.int32), f"targets must be int64 or int32, not {targets.dtype}")
    if bias is not None:
        need(bias.shape == (len(weight),), f"bias must be [{len(weight)}], not {list(bias.shape)}")
        need(bias.dtype == hidden.dtype, f"bias is {bias.dtype}, hidden is {hidden.dtype}")
    for name, x in (("weight", weight), ("targets", targets), ("bias", bias)):
        need(
            x is None or x.device == hidden.device,
            f"{name} is on {x is not None and x.device}, hidden is on {hidden.device}",
        )
        # Better no loss than a head that silently does not learn.
        trained = x is not None and x.requires_grad and torch.is_grad_enabled()
        need(not trained, f"{name} must be frozen: only the hidden states get a gradient")
    need(path in ("auto", "torch", "fused", "split"), f"path must be auto, torch, fused or split, not {path!r}")
    need(softcap is None or softcap > 0, f"softcap must be positive, not {softcap}")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    bias: Tensor | None = None,
    return_stats: bool = False,
    path: str = "auto",
) -> Any:  # Tensor, or (Tensor, LossStats)
    """Cross-entropy of hidden [T, H] against targets [T] (int64) through the head `weight` [V, H], without its logits.

    -> the sum over the tokens, a scalar in fp32 (fp64 for fp64); with return_stats (loss, LossStats).
    path: "auto", or for tests and benches "torch", "fused", "split".
    ValueError, one line naming the argument, for wrong shapes, dtypes, devices and targets, and for a head that is
    trained.
    """
    _check(hidden, weight, targets, softcap, bias, path)
    path = _choose_path(path, hidden, weight)
    want_grad = torch.is_grad_enabled() and hidden.requires_grad
    head = Head(weight.detach(), None if bias is None else bias.detach(), softcap, logit_scale)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the logits to 16 bits
        value, *stats = _LinearCrossEntropy.apply(hidden, head, targets, want_grad, path)
    return (value, LossStats(*stats)) if return_stats else value


# ---- which heads this is right for -----------------------------------------------------------------------------------


@torch.no_grad()
def plain_head(model: Any) -> tuple[Head | None, str]:
    """The head of a transformers causal LM -> (Head, ""), or (None, why the model must compute its own loss).

    model: a transformers.PreTrainedModel. loss = linear_cross_entropy(
        model.get_decoder()(...).last_hidden_state[0], targets=..., **head._asdict())
    Only an unquantised nn.Linear without adapter or hooks is accepted, with the scalings named below, and only if it
    reproduces the model's own logits on eight tokens: a scaling that is not known here is found by that.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:  # Linear4bit and LoRA layers are other types, some of them subclasses
        return None, f"its head is a {type(linear).__name__}, not a plain linear layer"
    if linear._forward_hooks or linear._forward_pre_hooks or hasattr(linear, "_hf_hook"):
        return None, "its head has forward hooks"
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma-2
    head = Head(linear.weight, linear.bias, softcap, scale)

    seen = []
    hook = model.get_decoder().register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        probe = torch.arange(8, device=linear.weight.device)[None] % len(linear.weight)
        logits = model(input_ids=probe, use_cache=False).logits[0].float()  # [8, V]
    finally:
        hook.remove()
    z = _logits(seen[0][0].to(linear.weight.dtype), head, 0, len(linear.weight))
    # the model rounds its logits to its dtype; a forgotten scaling is off by far more
    tolerance = 1e-3 if linear.weight.dtype == torch.float32 else 0.02
    if not torch.allclose(z, logits, rtol=0, atol=tolerance * logits.abs().max().item()):
        return None, f"{type(model).__name__} does something to its logits that is not known here"
    return head, ""
