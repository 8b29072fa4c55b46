"""A decoder layer for training in little memory: one autograd function, its backward pass written by hand.

Autograd keeps every intermediate result of a layer for the backward pass; checkpointing keeps none, and computes the
layer again. Between them, for a frozen layer with LoRA inside (Llama, Mistral, Qwen2 and Qwen3 families):

    q, k, v = rope(norm1(x) Wq), rope(norm1(x) Wk), norm1(x) Wv
    o = attention(q, k, v)
    h = x + o Wo
    y = h + (silu(norm2(h) Wg) * (norm2(h) Wu)) Wd

  1. "attention" keeps x and o (and o's log-sum-exp). The backward pass computes h, g, u and then q, k, v again, but
     neither attention nor the down-projection: d(down) needs its input and W, not its output. Of a step's products
     none is done a third time.
  2. All but attention works token by token: the MLP, whose vectors are the widest, runs in tiles of rows, forward and
     backward, so that its memory does not grow with the sequence.
  3. Gradients are written over what is no longer needed: dg over g, du over u, dh and dx over dy.
  4. What is kept may wait in host memory: a copy takes less time than a layer computes (7 KB a token and layer).
"none" keeps all of it (x, q, k, v, o, h, g, u), the norms and the activation are computed again, in one pass each;
"full" keeps x alone. All of them give the same numbers.

4-bit weights are dequantised once a layer and pass, LoRA's A of layers with one input is one matrix (three for q, k, v
read x once), and its dropout, where there is any, draws one mask for them. A layer is lent only where it gives what
the model's own code gives, which `apply` checks; all other models keep their code (packed.checkpointed).

The CUDA side (FlashAttention, streams, pinned memory, the Triton passes) has not run on a GPU yet.
"""

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels.layer_passes import rms_norm, rms_norm_backward_, rotate_, swiglu, swiglu_backward_
from lengthen.models.families import REBUILT_LAYERS
from lengthen.models.lora import LoraLinear
from lengthen.training import packed

CHECKPOINTS = ("none", "attention", "full")
SLAB = 16 << 20  # bytes of host memory taken at a time
MASK_ROWS = 1024  # dropout masks are drawn by blocks of rows, so that tiles of any size see the same ones

# T packed tokens, H hidden size, Hq and Hkv heads of size D, I size of the MLP, R rows of a tile.


@dataclass(frozen=True)
class Settings:
    """How the backward pass finds what it needs.

    checkpoint: what is kept for it: "none" all, "attention" x, o, log-sum-exp, "full" x. layers: how many, from the
    first, follow that, -1 = all; the others keep all. offload: what those layers keep waits in host memory.
    tile_rows: tokens that an MLP takes at a time, 0 = all.
    """

    checkpoint: str = "none"
    layers: int = -1
    offload: bool = False
    tile_rows: int = 0

    def __post_init__(self):
        assert self.checkpoint in CHECKPOINTS and self.tile_rows >= 0, self

    def __str__(self) -> str:
        some = f" in the first {self.layers} layers" if self.checkpoint != "none" and self.layers >= 0 else ""
        more = " --offload" * self.offload + f" --tile-rows {self.tile_rows}" * bool(self.tile_rows)
        return f"--checkpoint {self.checkpoint}{some}{more}"


# ---------------------------------------------------------------------------------------------------------
# Linear layers with one input


def dense(linear: nn.Linear) -> Tensor:
    """The weight [out, in], dequantised where it is stored in 4 bits."""
    weight = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes import functional as bnb

    if getattr(state, "packing_format_for_cpu", False):  # 0.50, after an evaluation on a CPU with AVX512-BF16
        weight.data, weight.quant_state = bnb._convert_weight_packed_for_cpu_inverse(weight.data, state)
    return bnb.dequantize_4bit(weight.data, weight.quant_state)


class Products:
    """Linear layers with one input, opened for one pass: dense weights, LoRA's matrices in the dtype of x.

    y_i = x W_i^T + b_i + z_i B_i^T with z = drop(x) A^T; A holds the A of all of them, B is scaled already.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype):
        self.bases = [m.base if isinstance(m, LoraLinear) else m for m in modules]
        self.weights = [dense(base).to(dtype) for base in self.bases]
        self.loras = [(i, m) for i, m in enumerate(modules) if isinstance(m, LoraLinear)]
        self.A = torch.cat([m.A for _, m in self.loras]).to(dtype) if self.loras else None  # [sum of ranks, in]
        self.B = [(m.B * m.scale).to(dtype) for _, m in self.loras]  # [out, rank] each
        ends = [0]
        for _, m in self.loras:
            ends.append(ends[-1] + m.rank)
        self.slots = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]  # whose columns of z are whose
        self.dA = self.dB = None

    def __call__(self, x: Tensor, mask: Tensor | None, residual: Tensor | None = None, out=None) -> list[Tensor]:
        """x [R, in] -> [R, out] each, written into `out` where given; `residual` [R, out] is added to each."""
        ys = []
        for i, (weight, base) in enumerate(zip(self.weights, self.bases, strict=True)):
            y = None if out is None else out[i]
            start = base.bias if residual is None else residual
            turned = weight.t()
            y = torch.mm(x, turned, out=y) if start is None else torch.addmm(start.to(x.dtype), x, turned, out=y)
            if residual is not None and base.bias is not None:
                y += base.bias
            ys.append(y)
        if self.loras:
            z = _dropped(x, mask) @ self.A.t()  # [R, sum of ranks]
            for (i, _), B, slot in zip(self.loras, self.B, self.slots, strict=True):
                ys[i].addmm_(z[:, slot], B.t())
        return ys

    def rank_gradient(self, dys: Sequence[Tensor]) -> Tensor | None:
        """dy_i [R, out] each -> dz [R, sum of ranks]; None without LoRA."""
        if not self.loras:
            return None
        dz = dys[0].new_empty(len(dys[0]), len(self.A))
        for (i, _), B, slot in zip(self.loras, self.B, self.slots, strict=True):
            dz[:, slot] = dys[i] @ B
        return dz

    def input_gradient(self, dys: Sequence[Tensor], dz: Tensor | None, mask: Tensor | None, out=None) -> Tensor:
        """-> dx [R, in]."""
        dx = torch.mm(dys[0], self.weights[0], out=out)
        for dy, weight in zip(dys[1:], self.weights[1:], strict=True):
            dx.addmm_(dy, weight)
        if dz is not None:
            dx = dx.addmm_(dz, self.A) if mask is None else dx.addcmul_(dz @ self.A, mask)
        return dx

    def adapter_gradient(self, x: Tensor, dys: Sequence[Tensor], dz: Tensor | None, mask: Tensor | None) -> None:
        """Adds this tile's share to dA and dB, which are fp32 (fp64) like A and B."""
        if not self.loras:
            return
        if self.dA is None:
            self.dA = torch.zeros_like(self.A, dtype=self.loras[0][1].A.dtype)
            self.dB = [torch.zeros_like(m.B) for _, m in self.loras]
        dropped = _dropped(x, mask)
        z = dropped @ self.A.t()
        _add_outer(self.dA, dz, dropped)
        for (i, _), dB, slot in zip(self.loras, self.dB, self.slots, strict=True):
            _add_outer(dB, dys[i], z[:, slot])

    def gradients(self) -> list[Tensor]:
        """[dA, dB] of each layer that has LoRA, in their order."""
        found = []
        for (_, m), dB, slot in zip(self.loras, self.dB or (), self.slots, strict=True):
            found += [self.dA[slot], dB.mul_(m.scale)]
        return found


def _add_outer(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [m, n] += a^T b for a [R, m], b [R, n]: tiles add up in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
    elif a.is_cuda:
        total += torch.mm(a.t(), b, out_dtype=total.dtype)
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype))


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def dropout_mask(seed: int, first: int, rows: int, width: int, share: float, like: Tensor) -> Tensor:
    """[rows, width] for the tokens from `first` on: 0 for a share of them, 1 / (1 - share) for the others."""
    blocks = []
    for block in range(first // MASK_ROWS, -(-(first + rows) // MASK_ROWS)):
        generator = torch.Generator(like.device).manual_seed(seed + 7919 * block)
        empty = torch.empty(MASK_ROWS, width, dtype=like.dtype, device=like.device)
        blocks.append(empty.bernoulli_(1 - share, generator=generator))
    start = first % MASK_ROWS
    return torch.cat(blocks)[start : start + rows] / (1 - share)


# ---------------------------------------------------------------------------------------------------------
# Attention within each sample, forward and backward apart


class Row(NamedTuple):
    """Where the tokens of a packed row are."""

    cos: Tensor  # [T, D]
    sin: Tensor  # [T, D]
    cu_seq_lens: Tensor  # int32 [N + 1]
    longest: int  # tokens of the longest sample


def attend(q: Tensor, k: Tensor, v: Tensor, row: Row, scaling: float, window: int) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k and v [T, Hkv, D] -> (o [T, Hq, D], log-sum-exp of the scores, [Hq, T] fp32).

    Causal, within each sample; window: a token sees itself and the window - 1 before it, 0 = all.
    """
    if q.is_cuda:
        return flash_attend(q, k, v, row, scaling, window)
    outs, sums = [], []
    for part, band in _samples(row, window, q):
        some = (x[part].transpose(0, 1)[None] for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *some, 0.0, band is None, attn_mask=band, scale=scaling
        )
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0])
    if len(outs) == 1:
        return outs[0], sums[0].contiguous()
    return torch.cat(outs), torch.cat(sums, 1)


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, row: Row, scaling: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq [T, Hq, D], dk and dv [T, Hkv, D]."""
    if q.is_cuda:
        return flash_attend_backward(do, q, k, v, o, lse, row, scaling, window)
    parts, groups = [], q.shape[1] // k.shape[1]
    for part, band in _samples(row, window, q):
        dout, some_q, out = (x[part].transpose(0, 1)[None] for x in (do, q, o))
        # torch's backward pass on a CPU knows no grouped heads: keys and values are repeated, their gradients summed
        some_k, some_v = (x[part].repeat_interleave(groups, 1).transpose(0, 1)[None] for x in (k, v))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(dout, some_q, some_k, some_v, out, lse[None, :, part], 0.0, band is None), attn_mask=band, scale=scaling
        )
        dq, dk, dv = (one[0].transpose(0, 1) for one in found)  # [n, Hq, D]
        parts.append((dq, *(one.unflatten(1, (-1, groups)).sum(2) for one in (dk, dv))))
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def flash_attend(q: Tensor, k: Tensor, v: Tensor, row: Row, scaling: float, window: int) -> tuple[Tensor, Tensor]:
    """The same by the FlashAttention inside torch, on a GPU: it takes packed samples, windows and grouped heads."""
    left = window - 1 if 0 < window < row.longest else -1
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(q, k, v, row.cu_seq_lens, row.cu_seq_lens, row.longest, row.longest, 0.0, left < 0, False),
        scale=scaling,
        window_size_left=left,
        window_size_right=0,
    )
    return out, lse


def flash_attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, row: Row, scaling: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    left = window - 1 if 0 < window < row.longest else -1
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        *(do, q, k, v, o, lse, row.cu_seq_lens, row.cu_seq_lens, row.longest, row.longest, 0.0, left < 0),
        *no_dropout,
        scale=scaling,
        window_size_left=left,
        window_size_right=0,
    )


def _samples(row: Row, window: int, like: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
    """Each sample's tokens, and the mask [n, n] (0 and -inf) of a window that is shorter than the sample."""
    bounds = row.cu_seq_lens.tolist()
    for start, stop in zip(bounds, bounds[1:], strict=False):
        band, n = None, stop - start
        if 0 < window < n:
            seen = torch.ones(n, n, dtype=torch.bool, device=like.device).tril().triu(1 - window)
            band = torch.zeros(n, n, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))
        yield slice(start, stop), band


# ---------------------------------------------------------------------------------------------------------
# Host memory


@dataclass
class Parcel:
    """Tensors of one layer that wait in host memory."""

    like: list[tuple[torch.Size, torch.dtype]]
    slabs: list[Tensor]
    before: "weakref.ref[Parcel] | None"  # the parcel that the backward pass will want next
    fetched: list[Tensor] | None = None  # back on the device
    arrived: object = None  # event: the copy back is done


class Host:
    """Kept tensors wait in slabs of host memory, pinned where the machine allows it.

    On CUDA all copies run on a stream of their own. At most two layers are on their way out at a time, so that they
    hold no more device memory than that; on the way back the next layer's copy runs while one computes.
    """

    def __init__(self, device: torch.device, limit: int = 0):
        self.device, self.limit = device, limit  # limit: bytes, 0 = none
        self.free: list[Tensor] = []
        self.taken = 0  # slabs there are
        self.full = False  # the limit was reached: some tensors stayed on the device
        self.pinned = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.leaving: deque = deque()  # (event, the tensors it copies): alive until the compute stream has waited
        self.last: weakref.ref | None = None

    @property
    def bytes(self) -> int:
        return self.taken * SLAB

    def put(self, tensors: Sequence[Tensor]) -> Parcel | None:
        """Copies them out; None where the limit leaves no room: they stay where they are."""
        slabs = self._slabs(-(-sum(map(_bytes, tensors)) // SLAB))
        if slabs is None:
            self.full = True
            return None
        parcel = Parcel([(t.shape, t.dtype) for t in tensors], slabs, self.last)
        weakref.finalize(parcel, self._release, slabs)  # of a forward pass that has no backward pass
        self.last = weakref.ref(parcel)
        if self.stream is None:
            _copy(tensors, slabs, out=True)
            return parcel
        now = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            _copy(tensors, slabs, out=True)
            self.leaving.append((self.stream.record_event(), tensors))
        while len(self.leaving) > 2:
            now.wait_event(self.leaving.popleft()[0])
        return parcel

    def get(self, parcel: Parcel) -> list[Tensor]:
        """The tensors, on the device again, once; the copy of the layer before starts."""
        assert parcel.slabs, "a second backward pass through an offloaded layer"
        self._fetch(parcel)
        self.last = parcel.before
        if self.stream is not None:
            now = torch.cuda.current_stream(self.device)
            while self.leaving:  # the last two layers of the forward pass
                now.wait_event(self.leaving.popleft()[0])
            now.wait_event(parcel.arrived)
            before = parcel.before() if parcel.before else None
            if before is not None:
                self._fetch(before)
        self._release(parcel.slabs)  # whatever is written to them next is copied by the same stream, so later
        tensors, parcel.fetched = parcel.fetched, None
        return tensors

    def settle(self) -> None:
        """Before a step: nothing of the last one is under way, even where it broke off (out of memory)."""
        if self.stream is not None:
            self.stream.synchronize()
        self.leaving.clear()
        self.last = None

    def _fetch(self, parcel: Parcel) -> None:
        if parcel.fetched is not None:
            return
        parcel.fetched = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in parcel.like]
        if self.stream is None:
            _copy(parcel.fetched, parcel.slabs, out=False)
            return
        # The memory may still be in use by what was queued before: the copy waits for that, not for what comes.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            _copy(parcel.fetched, parcel.slabs, out=False)
            parcel.arrived = self.stream.record_event()

    def _slabs(self, count: int) -> list[Tensor] | None:
        missing = count - len(self.free)
        if self.limit and (self.taken + max(0, missing)) * SLAB > self.limit:
            return None
        for _ in range(missing):
            self.free.append(self._new_slab())
        return [self.free.pop() for _ in range(count)]

    def _release(self, slabs: list[Tensor]) -> None:
        self.free += slabs
        slabs.clear()

    def _new_slab(self) -> Tensor:
        self.taken += 1
        if self.pinned:
            try:
                return torch.empty(SLAB, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # the system pins no more (WSL2 allows a part of the memory): copies get slower
                self.pinned = False
        return torch.empty(SLAB, dtype=torch.uint8)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.itemsize


def _copy(tensors: Sequence[Tensor], slabs: Sequence[Tensor], out: bool) -> None:
    """Tensors <-> slabs, as one run of bytes."""
    at = 0
    for tensor in tensors:
        rest = tensor.view(-1).view(torch.uint8)
        while len(rest):
            slab, offset = divmod(at, SLAB)
            piece = rest[: SLAB - offset]
            place = slabs[slab][offset : offset + len(piece)]
            source, target = (piece, place) if out else (place, piece)
            target.copy_(source, non_blocking=True)
            at, rest = at + len(piece), rest[len(piece) :]


# ---------------------------------------------------------------------------------------------------------
# The layer


class Layer:
    """Stands in for a decoder layer's forward."""

    def __init__(self, layer: nn.Module, scaling: float, window: int, host: Host):
        attention, mlp = layer.self_attn, layer.mlp
        self.module, self.scaling, self.window, self.host = layer, scaling, window, host
        self.norm1, self.norm2 = (
            (norm.weight, norm.variance_epsilon) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]  # Qwen3
        self.head_norms = [(norm.weight, norm.variance_epsilon) for norm in norms if norm is not None]
        self.head = attention.head_dim
        self.qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.out, self.gate_up, self.down = [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
        self.settings = Settings()

    @property
    def groups(self) -> list[list[nn.Module]]:
        return [self.qkv, self.out, self.gate_up, self.down]

    @property
    def loras(self) -> list[LoraLinear]:
        return [m for group in self.groups for m in group if isinstance(m, LoraLinear)]

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int = 0,
        past_key_values: object = None,
        **more: object,
    ) -> Tensor:
        """hidden_states [1, T, H] -> [1, T, H]. What is no packed row of a training step takes the model's own code."""
        if cu_seq_lens_q is None or past_key_values is not None or hidden_states.shape[0] != 1:
            more |= {"position_embeddings": position_embeddings, "past_key_values": past_key_values}
            if cu_seq_lens_q is not None:
                more |= {"cu_seq_lens_q": cu_seq_lens_q, "max_length_q": max_length_q}
            return type(self.module).forward(self.module, hidden_states, **more)
        cos, sin = (one[0].contiguous() for one in position_embeddings)
        row = Row(cos, sin, cu_seq_lens_q, max_length_q)
        shares = [m.dropout for m in self.loras if m.training]
        seed = int(torch.randint(1 << 40, ())) if any(shares) else 0  # torch's own generator: a seeded step repeats
        matrices = [matrix for m in self.loras for matrix in (m.A, m.B)]
        keep = torch.is_grad_enabled()
        return _LayerFunction.apply(hidden_states, self, row, self.settings, seed, keep, *matrices)

    # ---- the passes, on [T, H]

    def _mask(self, group: int, x: Tensor, first: int, seed: int) -> Tensor | None:
        """LoRA's dropout for the tokens from `first` on; one mask for the layers that read x."""
        shares = [m.dropout for m in self.groups[group] if isinstance(m, LoraLinear) and m.training]
        if not any(shares):
            return None
        return dropout_mask(4 * seed + group, first, len(x), x.shape[1], max(shares), x)

    def _positions(self, q: Tensor, k: Tensor, row: Row) -> tuple[Tensor, Tensor]:
        """Raw queries and keys -> with norms and positions; in place where there are no norms."""
        if self.head_norms:
            q, k = (rms_norm(x, *norm) for x, norm in zip((q, k), self.head_norms, strict=True))
        return rotate_(q, row.cos, row.sin), rotate_(k, row.cos, row.sin)

    def _project(self, x: Tensor, open_qkv: Products, tile_rows: int, seed: int) -> list[Tensor]:
        """x [T, H] -> raw q [T, Hq, D], k and v [T, Hkv, D]."""
        heads = [x.new_empty(len(x), base.out_features) for base in open_qkv.bases]
        for tile in _tiles(len(x), tile_rows):
            n = rms_norm(x[tile], *self.norm1)
            open_qkv(n, self._mask(0, n, tile.start, seed), out=[one[tile] for one in heads])
        return [one.unflatten(1, (-1, self.head)) for one in heads]

    def forward(self, x: Tensor, row: Row, settings: Settings, seed: int, keep: bool) -> tuple[Tensor, dict]:
        """x [T, H] -> (y [T, H], what to keep)."""
        level, kind = settings.checkpoint, x.dtype
        all_kept = keep and level == "none"
        # 1) attention
        q, k, v = self._project(x, Products(self.qkv, kind), settings.tile_rows, seed)
        kept = {"q": q, "k": k, "v": v} if all_kept else {}
        q, k = self._positions(q, k, row)
        o, lse = attend(q, k, v, row, self.scaling, self.window)
        del q, k, v
        o = o.reshape(len(x), -1)
        kept |= {"x": x} if level == "full" else {"x": x, "o": o, "lse": lse}
        # 2) the rest, by tiles
        out, gate_up, down = (Products(group, kind) for group in self.groups[1:])
        y = torch.empty_like(x)
        if all_kept:
            kept["h"] = torch.empty_like(x)
            kept["g"], kept["u"] = (x.new_empty(len(x), base.out_features) for base in gate_up.bases)
        for tile in _tiles(len(x), settings.tile_rows):
            into = [kept[name][tile] for name in "hgu"] if all_kept else [None] * 3
            o_tile = o[tile]
            (h,) = out(o_tile, self._mask(1, o_tile, tile.start, seed), x[tile], into[:1])
            n = rms_norm(h, *self.norm2)
            g, u = gate_up(n, self._mask(2, n, tile.start, seed), out=into[1:])
            a = swiglu(g, u)
            del g, u, n
            down(a, self._mask(3, a, tile.start, seed), h, [y[tile]])
        return y, kept if keep else {}

    def backward(
        self, dy: Tensor, kept: dict, row: Row, settings: Settings, seed: int, want_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dy [T, H], overwritten -> (dx in its memory, the gradients of LoRA's matrices)."""
        x, kind, rows = kept["x"], dy.dtype, settings.tile_rows
        if settings.checkpoint == "full":
            raw = self._project(x, Products(self.qkv, kind), rows, seed)
            q, k = self._positions(*raw[:2], row)
            o, lse = attend(q, k, raw[2], row, self.scaling, self.window)
            o = o.reshape(len(x), -1)
            del q, k
        else:
            raw, o, lse = [kept[name] for name in "qkv"] if "q" in kept else None, kept["o"], kept["lse"]
        # 1) the MLP and the output projection, by tiles: dy becomes dh
        out, gate_up, down = (Products(group, kind) for group in self.groups[1:])
        do = torch.empty_like(o)
        for tile in _tiles(len(x), rows):
            o_tile, dy_tile = o[tile], dy[tile]
            mask = self._mask(1, o_tile, tile.start, seed)
            h = kept["h"][tile] if "h" in kept else out(o_tile, mask, x[tile])[0]
            n = rms_norm(h, *self.norm2)
            n_mask = self._mask(2, n, tile.start, seed)
            g, u = (kept["g"][tile], kept["u"][tile]) if "g" in kept else gate_up(n, n_mask)
            a_mask = self._mask(3, g, tile.start, seed)
            dz = down.rank_gradient([dy_tile])
            da = down.input_gradient([dy_tile], dz, a_mask)
            a = swiglu_backward_(g, u, da)  # g and u are dg and du now
            del da
            down.adapter_gradient(a, [dy_tile], dz, a_mask)
            del a
            dz = gate_up.rank_gradient([g, u])
            dn = gate_up.input_gradient([g, u], dz, n_mask)
            gate_up.adapter_gradient(n, [g, u], dz, n_mask)
            del g, u, n
            rms_norm_backward_(dn, h, *self.norm2, dx=dy_tile)
            del dn, h
            dz = out.rank_gradient([dy_tile])
            out.input_gradient([dy_tile], dz, mask, do[tile])
            out.adapter_gradient(o_tile, [dy_tile], dz, mask)
        for opened in (out, gate_up, down):
            opened.weights = []  # dequantised copies: not needed by attention
        # 2) attention
        qkv = Products(self.qkv, kind)
        placed = raw is not None and not self.head_norms  # positions were applied in place, in what was kept
        raw = self._project(x, qkv, rows, seed) if raw is None else raw
        q, k = raw[:2] if placed else self._positions(*raw[:2], row)
        shape = (len(x), -1, self.head)
        dq, dk, dv = attend_backward(
            *(do.view(shape), q, k, raw[2], o.view(shape), lse, row, self.scaling, self.window)
        )
        del do, q, k, o
        for which, one in enumerate((dq, dk)):
            rotate_(one, row.cos, row.sin, back=True)
            if self.head_norms:
                rms_norm_backward_(one, raw[which], *self.head_norms[which])
        del raw
        # 3) the projections, by tiles: dh becomes dx
        heads = [one.flatten(1) for one in (dq, dk, dv)]
        del dq, dk, dv
        for tile in _tiles(len(x), rows):
            n, parts = rms_norm(x[tile], *self.norm1), [one[tile] for one in heads]
            mask = self._mask(0, n, tile.start, seed)
            dz = qkv.rank_gradient(parts)
            if want_dx:
                dn = qkv.input_gradient(parts, dz, mask)
                rms_norm_backward_(dn, x[tile], *self.norm1, dx=dy[tile])
            qkv.adapter_gradient(n, parts, dz, mask)
        gradients = [one for opened in (qkv, out, gate_up, down) for one in opened.gradients()]
        return (dy if want_dx else None), gradients


def _tiles(rows: int, tile_rows: int) -> list[slice]:
    step = tile_rows or rows
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class _LayerFunction(torch.autograd.Function):
    """Layer.forward and Layer.backward, and in between what is kept: by autograd, or in host memory."""

    @staticmethod
    def forward(ctx, hidden, layer: Layer, row: Row, settings: Settings, seed: int, keep: bool, *matrices):
        x = hidden[0].contiguous()
        y, kept = layer.forward(x, row, settings, seed, keep)
        ctx.layer, ctx.row, ctx.settings, ctx.seed, ctx.names = layer, row, settings, seed, list(kept)
        ctx.parcel = layer.host.put(list(kept.values())) if settings.offload and kept else None
        if ctx.parcel is None:
            ctx.save_for_backward(*kept.values())
        return y[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        tensors = ctx.saved_tensors if ctx.parcel is None else ctx.layer.host.get(ctx.parcel)
        kept = dict(zip(ctx.names, tensors, strict=True))
        del tensors
        # Written over: between the layers of a decoder nobody else holds it. A view of one number (expand) is copied.
        dx, gradients = ctx.layer.backward(
            dy[0].contiguous(), kept, ctx.row, ctx.settings, ctx.seed, ctx.needs_input_grad[0]
        )
        return (None if dx is None else dx[None]), None, None, None, None, None, *gradients


# ---------------------------------------------------------------------------------------------------------
# Lending it to a model


class Lean:
    """The lean layers that a model runs on; none where `why` says what stands against it."""

    def __init__(self, layers: list[Layer], host: Host | None, why: str = ""):
        self.layers, self.host, self.why = layers, host, why

    def set(self, settings: Settings) -> None:
        """Before a forward pass (a step that broke off is cleared away)."""
        some = len(self.layers) if settings.layers < 0 else settings.layers
        for i, layer in enumerate(self.layers):
            layer.settings = settings if i < some else Settings("none", tile_rows=settings.tile_rows)
        if self.layers:
            self.host.settle()

    def restore(self) -> None:
        """The model's own code again."""
        for layer in self.layers:
            del layer.module.forward
        self.layers = []

    def notes(self) -> list[str]:
        """Which code runs, and what happened to the kept tensors, for people."""
        if not self.layers:
            return [f"layers: the model's own code, which takes more memory: {self.why or 'restored'}"]
        said = [f"layers: {len(self.layers)} lean ones, whose results are the model's own"]
        if self.host.taken:
            where = "pinned host memory" if self.host.pinned else "host memory"
            said.append(f"{self.host.bytes / 1e9:.2f} GB of kept tensors in {where}")
        if self.host.device.type == "cuda" and not self.host.pinned:
            said.append("the system refused to pin more host memory: copies run slower")
        if self.host.full:
            said.append("the limit of host memory was reached: the rest stayed on the device")
        return said


def apply(model: nn.Module, settings: Settings = Settings(), host_limit: int = 0) -> Lean:
    """Lends lean layers to a model with packed attention (packed.examine); all of its layers, or none.

    host_limit: most bytes of host memory for `offload`, 0 = as many as it takes.
    """
    decoder = model.get_decoder()
    layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if why := _cannot(model, layers):
        return Lean([], None, why)
    inputs, asked = _watch(decoder, layers)
    host = Host(model.device, host_limit)
    lent = []
    for layer in layers:
        told = asked.get(layer.self_attn, {})
        if told.get("softcap") or told.get("s_aux") is not None or "scaling" not in told:
            return Lean([], None, "its attention is of another kind")
        lent.append(Layer(layer, told["scaling"], told.get("sliding_window") or 0, host))
    was_training = model.training
    model.eval()  # dropout would draw other masks in the model's own code
    try:
        for layer, given in zip(lent, inputs, strict=True):
            if not _agrees(layer, given):
                return Lean([], None, "a layer differs from what it looks like")
    finally:
        model.train(was_training)
    for layer in lent:
        layer.module.forward, layer.module.gradient_checkpointing = layer, False
    lean = Lean(lent, host)
    lean.set(settings)
    return lean


def stands_against(model: nn.Module, device: str, dtype: torch.dtype) -> str:
    """Why a model cannot have lean layers there, as far as its classes and its configuration tell. "" = nothing."""
    layers = [m for m in model.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)]
    other = {type(layer).__name__ for layer in layers} - REBUILT_LAYERS
    if other or not layers:
        return f"its layers are of another kind ({', '.join(sorted(other)) or 'none found'})"
    text = model.config.get_text_config()
    if getattr(text, "hidden_act", "silu") not in ("silu", "swish") or getattr(text, "attention_dropout", 0):
        return "its activation is not SiLU, or its attention has dropout"
    if device not in ("cpu", "cuda"):
        return f"no attention with its log-sum-exp on {device}"
    if device == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        return "FlashAttention takes bf16 and fp16 only"
    return ""


def _cannot(model: nn.Module, layers: list[nn.Module]) -> str:
    """The same, and what can be seen of the loaded model without running it."""
    if model.config._attn_implementation != packed.NAME:
        return "its samples are not packed"
    # Not model.dtype, which is the first parameter's: with the embedding in host memory that is LoRA's, fp32.
    if why := stands_against(model, model.device.type, model.get_input_embeddings().weight.dtype):
        return why
    for layer in layers:
        inside = dict(layer.named_modules())
        if any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in inside.values()):
            return "somebody has changed a module inside a layer"
        bases = [m.base if isinstance(m, LoraLinear) else m for n, m in inside.items() if n.endswith("_proj")]
        if len(bases) != 7 or not {type(m).__name__ for m in bases} <= {"Linear", "Linear4bit"}:
            return "its linear layers are of another kind"
        matrices = {id(p) for m in inside.values() if isinstance(m, LoraLinear) for p in (m.A, m.B)}
        if any(p.requires_grad and id(p) not in matrices for p in layer.parameters()):
            return "more than LoRA is trained in it"
        if len({m.dropout for m in inside.values() if isinstance(m, LoraLinear)}) > 1:
            return "its LoRA layers differ in their dropout"
    return ""


@torch.no_grad()
def _watch(decoder: nn.Module, layers: list[nn.Module]) -> tuple[list[tuple], dict[nn.Module, dict]]:
    """One pass over 48 random tokens in three samples -> (what each layer was given, what it told attention)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (48,), generator=generator).tolist()
    row = packed.pack([ids[:5], ids[5:6], ids[6:]], decoder.device)
    inputs, asked = [], {}
    own = AttentionInterface()[packed.NAME]

    def spy(module, *tensors, **told):
        asked[module] = told
        return own(module, *tensors, **told)

    hooks = [
        layer.register_forward_pre_hook(lambda module, args, named: inputs.append((args, named)), with_kwargs=True)
        for layer in layers
    ]
    AttentionInterface.register(packed.NAME, spy)
    try:
        decoder(**row.keywords(), use_cache=False)
    finally:
        AttentionInterface.register(packed.NAME, own)
        for hook in hooks:
            hook.remove()
    return inputs, asked


def _agrees(layer: Layer, given: tuple[tuple, dict]) -> bool:
    """Output and gradients of the model's own code and of `layer` on the same inputs, up to rounding."""
    (hidden, *rest), named = given
    loose = hidden.dtype in (torch.bfloat16, torch.float16)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden)
    matrices = [p for m in layer.loras for p in (m.A, m.B)]
    found = []
    for forward in (layer.module.forward, layer):
        x = hidden.detach().clone().requires_grad_()
        with torch.enable_grad():
            y = forward(x, *rest, **named)
            found.append([y, *torch.autograd.grad(y, [x, *matrices], upstream.clone())])
    for own, ours in zip(*found, strict=True):
        error = (own.double() - ours.double()).norm()
        if not error <= (6e-2 if loose else 1e-4) * own.double().norm() + 1e-30:
            return False
    return True
