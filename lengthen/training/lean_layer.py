"""A decoder layer for training in little memory: one autograd function, its backward pass written by hand.

Autograd keeps every intermediate result of a layer for the backward pass; activation checkpointing keeps none, and
computes the layer again. Between them, for a frozen layer with LoRA inside (Llama, Mistral, Qwen2, Qwen3 families):

    q, k, v = rope(norm1(x) Wq), rope(norm1(x) Wk), norm1(x) Wv
    o = attention(q, k, v)
    h = x + o Wo
    y = h + (silu(norm2(h) Wg) * (norm2(h) Wu)) Wd

  1. "attention" keeps x and o (and o's log-sum-exp). The backward pass computes h, g, u and then q, k, v again, but
     neither attention nor the down-projection: d(down) needs its input and W, not its output. No product of a step is
     computed a third time.
  2. All but attention works token by token: the MLP, whose vectors are the widest, is computed in tiles of rows,
     forward and backward, so that its memory does not grow with the sequence.
  3. Gradients overwrite what is no longer needed: dg replaces g, du replaces u, dh and dx replace dy.
  4. What is kept may be offloaded to host memory: a copy takes less time than a layer computes (7 KB per token and
     layer).
"none" keeps everything (x, q, k, v, o, h, g, u); the norms and the activation are computed again, in one pass each;
"full" keeps x alone. All of them give the same numbers.

A layer is replaced only where the lean one is as close to the model's own code in fp32 as that code is in the model's
dtype, which `install` checks; all other models keep their code (packed.checkpointed). Its parts: the products in
lean_linears.py, the passes between them in kernels/layer_passes.py, attention in models/flash.py, host memory in
offload.py.

The CUDA side (FlashAttention, streams, pinned memory, the Triton passes) has not run on a GPU yet.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels.layer_passes import rms_norm, rms_norm_backward_, rotate_, swiglu, swiglu_backward_
from lengthen.errors import out_of_memory
from lengthen.models.exact import WIDER, as_near, given_in, in_dtype, squared_errors
from lengthen.models.families import REBUILT_LAYERS, has_known_linears, is_untouched
from lengthen.models.flash import attend_backward, attend_saving_lse, unserved
from lengthen.models.lora import LoraLinear
from lengthen.training import packed
from lengthen.training.lean_linears import Linears, dropout_mask
from lengthen.training.offload import Host
from lengthen.training.settings import Recompute

DRAWS = 16  # most draws by which a layer of 16 bits is judged

# T packed tokens, H hidden size, Hq and Hkv heads of size D, I size of the MLP, R rows of a tile.


class Positions(NamedTuple):
    """Where the tokens of a packed row are."""

    cos: Tensor  # [T, D]
    sin: Tensor  # [T, D]
    cu_seq_lens: Tensor  # int32 [N + 1]
    longest: int  # tokens of the longest sample


class LeanLayer:
    """Replaces a decoder layer's forward. module: the layer; scaling, window: of its attention (window 0 = all)."""

    def __init__(self, module: Any, scaling: float, window: int, host: Host):
        attention, mlp = module.self_attn, module.mlp
        self.module, self.scaling, self.window, self.host = module, scaling, window, host
        self.norm1, self.norm2 = (
            (norm.weight, norm.variance_epsilon) for norm in (module.input_layernorm, module.post_attention_layernorm)
        )
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]  # Qwen3
        self.head_norms = [(norm.weight, norm.variance_epsilon) for norm in norms if norm is not None]
        self.head_size: int = attention.head_dim
        self.qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        # Linear layers by their input; a group's index picks its dropout mask.
        self.groups = [self.qkv, [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
        self.how = Recompute()

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
        """hidden_states [1, T, H] -> [1, T, H]. Anything but a packed row of a training step: the model's own code."""
        if cu_seq_lens_q is None or past_key_values is not None or hidden_states.shape[0] != 1:
            more |= {"position_embeddings": position_embeddings, "past_key_values": past_key_values}
            if cu_seq_lens_q is not None:
                more |= {"cu_seq_lens_q": cu_seq_lens_q, "max_length_q": max_length_q}
            return type(self.module).forward(self.module, hidden_states, **more)
        assert position_embeddings is not None
        cos, sin = (codes[0].contiguous() for codes in position_embeddings)
        row = Positions(cos, sin, cu_seq_lens_q, max_length_q)
        shares = [m.dropout for m in self.loras if m.training]
        seed = int(torch.randint(1 << 40, ())) if any(shares) else 0  # torch's own generator: a seeded step repeats
        matrices = [matrix for m in self.loras for matrix in (m.A, m.B)]
        keep = torch.is_grad_enabled()
        return _LayerFunction.apply(hidden_states, self, row, self.how, seed, keep, *matrices)

    # -- what both passes do, on [T, H] ----------------------------------------------------------------------

    def _mask(self, group: int, x: Tensor, first: int, seed: int) -> Tensor | None:
        """LoRA's dropout for the tokens from `first` on; one mask for the layers that read x."""
        shares = [m.dropout for m in self.groups[group] if isinstance(m, LoraLinear) and m.training]
        if not any(shares):
            return None
        return dropout_mask(4 * seed + group, first, len(x), x.shape[1], max(shares), x)

    def _place(self, q: Tensor, k: Tensor, row: Positions) -> tuple[Tensor, Tensor]:
        """Raw queries and keys -> with norms and positions; in place where there are no norms."""
        if self.head_norms:
            q, k = (rms_norm(x, *norm) for x, norm in zip((q, k), self.head_norms, strict=True))
        return rotate_(q, row.cos, row.sin), rotate_(k, row.cos, row.sin)

    def _project(self, x: Tensor, qkv: Linears, tile_rows: int, seed: int) -> list[Tensor]:
        """x [T, H] -> raw q [T, Hq, D], k and v [T, Hkv, D]."""
        heads = [x.new_empty(len(x), base.out_features) for base in qkv.bases]
        for tile in _tiles(len(x), tile_rows):
            n = rms_norm(x[tile], *self.norm1)
            qkv(n, self._mask(0, n, tile.start, seed), out=[y[tile] for y in heads])
        return [y.unflatten(1, (-1, self.head_size)) for y in heads]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, row: Positions) -> tuple[Tensor, Tensor]:
        """-> (o [T, Hq D], log-sum-exp [Hq, T])."""
        o, lse = attend_saving_lse(q, k, v, row.cu_seq_lens, row.longest, self.scaling, self.window)
        return o.reshape(len(q), -1), lse

    # -- forward -------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, row: Positions, how: Recompute, seed: int, keep: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x [T, H] -> (y [T, H], what to keep for the backward pass)."""
        level, dtype = how.checkpoint, x.dtype
        keep_all = keep and level == "none"
        # 1) attention
        q, k, v = self._project(x, Linears(self.qkv, dtype), how.tile_rows, seed)
        kept = {"q": q, "k": k, "v": v} if keep_all else {}
        q, k = self._place(q, k, row)
        o, lse = self._attend(q, k, v, row)
        del q, k, v
        kept |= {"x": x} if level == "full" else {"x": x, "o": o, "lse": lse}
        # 2) the rest, by tiles
        out, gate_up, down = (Linears(group, dtype) for group in self.groups[1:])
        y = torch.empty_like(x)
        if keep_all:
            kept["h"] = torch.empty_like(x)
            kept["g"], kept["u"] = (x.new_empty(len(x), base.out_features) for base in gate_up.bases)
        for tile in _tiles(len(x), how.tile_rows):
            into = [kept[name][tile] for name in "hgu"] if keep_all else [None] * 3
            o_tile = o[tile]
            (h,) = out(o_tile, self._mask(1, o_tile, tile.start, seed), x[tile], into[:1])
            n = rms_norm(h, *self.norm2)
            g, u = gate_up(n, self._mask(2, n, tile.start, seed), out=into[1:])
            a = swiglu(g, u)
            del g, u, n
            down(a, self._mask(3, a, tile.start, seed), h, [y[tile]])
        return y, kept if keep else {}

    # -- backward ------------------------------------------------------------------------------------------

    def backward(
        self, dy: Tensor, kept: dict[str, Tensor], row: Positions, how: Recompute, seed: int, want_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dy [T, H], overwritten -> (dx in its memory, the gradients of LoRA's matrices)."""
        x, dtype, rows = kept["x"], dy.dtype, how.tile_rows
        raw: list[Tensor] | None = None
        if how.checkpoint == "full":
            raw = self._project(x, Linears(self.qkv, dtype), rows, seed)
            o, lse = self._attend(*self._place(raw[0], raw[1], row), raw[2], row)
        else:
            o, lse = kept["o"], kept["lse"]
            raw = [kept[name] for name in "qkv"] if "q" in kept else None
        # 1) the MLP and the output projection: dy becomes dh
        out, gate_up, down = (Linears(group, dtype) for group in self.groups[1:])
        do = torch.empty_like(o)
        for tile in _tiles(len(x), rows):
            self._backward_tile(tile, dy, do, o, kept, (out, gate_up, down), seed)
        for linears in (out, gate_up, down):
            linears.weights = []  # dequantised copies: not needed by attention
        # 2) attention
        qkv = Linears(self.qkv, dtype)
        placed = raw is not None and not self.head_norms  # positions were applied in place, in what was kept
        raw = self._project(x, qkv, rows, seed) if raw is None else raw
        q, k = raw[:2] if placed else self._place(raw[0], raw[1], row)
        shape = (len(x), -1, self.head_size)
        saved = (do.view(shape), q, k, raw[2], o.view(shape), lse)
        dq, dk, dv = attend_backward(*saved, row.cu_seq_lens, row.longest, self.scaling, self.window)
        del saved, do, q, k, o
        for i, gradient in enumerate((dq, dk)):
            rotate_(gradient, row.cos, row.sin, back=True)
            if self.head_norms:
                rms_norm_backward_(gradient, raw[i], *self.head_norms[i])
        del raw, gradient
        # 3) the projections, by tiles: dh becomes dx
        heads = [gradient.flatten(1) for gradient in (dq, dk, dv)]
        del dq, dk, dv
        for tile in _tiles(len(x), rows):
            n, dys = rms_norm(x[tile], *self.norm1), [gradient[tile] for gradient in heads]
            mask = self._mask(0, n, tile.start, seed)
            dz = qkv.rank_gradient(dys)
            if want_dx:
                dn = qkv.input_gradient(dys, dz, mask)
                rms_norm_backward_(dn, x[tile], *self.norm1, dx=dy[tile])
            qkv.adapter_gradient(n, dys, dz, mask)
        gradients = [g for linears in (qkv, out, gate_up, down) for g in linears.gradients()]
        return (dy if want_dx else None), gradients

    def _backward_tile(
        self,
        tile: slice,
        dy: Tensor,
        do: Tensor,
        o: Tensor,
        kept: dict[str, Tensor],
        linears: tuple[Linears, Linears, Linears],
        seed: int,
    ) -> None:
        """The MLP and the output projection of one tile: dy[tile] becomes dh[tile], do[tile] is written."""
        out, gate_up, down = linears
        o_tile, dy_tile = o[tile], dy[tile]
        mask = self._mask(1, o_tile, tile.start, seed)
        h = kept["h"][tile] if "h" in kept else out(o_tile, mask, kept["x"][tile])[0]
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


def _tiles(rows: int, tile_rows: int) -> list[slice]:
    step = tile_rows or rows
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class _LayerFunction(torch.autograd.Function):
    """LeanLayer.forward and .backward, and in between what is kept: by autograd, or in host memory."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, layer: LeanLayer, row: Positions, how: Recompute, seed: int, keep: bool, *matrices
    ) -> Tensor:
        x = hidden[0].contiguous()
        y, kept = layer.forward(x, row, how, seed, keep)
        ctx.layer, ctx.row, ctx.how, ctx.seed, ctx.names = layer, row, how, seed, list(kept)
        ctx.offloaded = layer.host.put(list(kept.values())) if how.offload and kept else None
        if ctx.offloaded is None:
            ctx.save_for_backward(*kept.values())
        return y[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors if ctx.offloaded is None else ctx.layer.host.get(ctx.offloaded)
        kept = dict(zip(ctx.names, tensors, strict=True))
        del tensors
        # Overwritten: between the layers of a decoder nobody else holds it. A view of one number (expand) is copied.
        dx, gradients = ctx.layer.backward(
            dy[0].contiguous(), kept, ctx.row, ctx.how, ctx.seed, ctx.needs_input_grad[0]
        )
        return (None if dx is None else dx[None]), None, None, None, None, None, *gradients


# ---------------------------------------------------------------------------------------------------------
# Installing it in a model


class LeanLayers:
    """The lean layers that a model runs on; none where `why` says what prevents it."""

    def __init__(self, layers: list[LeanLayer], host: Host, why: str = ""):
        self.layers, self.host, self.why = layers, host, why

    def set(self, how: Recompute) -> None:
        """Before a forward pass (a step that broke off is cleared away)."""
        count = len(self.layers) if how.layers < 0 else how.layers
        for i, layer in enumerate(self.layers):
            layer.how = how if i < count else Recompute("none", tile_rows=how.tile_rows)
        self.host.settle()

    def notes(self) -> list[str]:
        """Which code runs, and what happened to the kept tensors, for people."""
        if not self.layers:
            return [f"layers: the model's own code, which takes more memory: {self.why}"]
        lines = [f"layers: {len(self.layers)} lean ones, whose results are the model's own"]
        if self.host.num_slabs:
            where = "pinned host memory" if self.host.pinned else "host memory"
            lines.append(f"{self.host.bytes / 1e9:.2f} GB of kept tensors in {where}")
        if self.host.device.type == "cuda" and not self.host.pinned:
            lines.append("the system refused to pin more host memory: copies run slower")
        if self.host.full:
            lines.append("the limit of host memory was reached: the rest stayed on the device")
        return lines


def install(model: Any, how: Recompute = Recompute(), host_limit: int = 0) -> LeanLayers:  # noqa: B008  frozen
    """Replaces all layers of a model with packed attention (packed.examine), or none.

    model: a transformers.PreTrainedModel. host_limit: most bytes of host memory for `offload`, 0 = as many as it takes.
    """
    decoder, host = model.get_decoder(), Host(model.device, host_limit)
    layers: list[Any] = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if why := _prevented(model, layers):
        return LeanLayers([], host, why)
    inputs, options = _watch(decoder, layers)
    lean: list[LeanLayer] = []
    for layer in layers:
        asked = options.get(layer.self_attn, {})
        if asked.get("softcap") or asked.get("s_aux") is not None or "scaling" not in asked:
            return LeanLayers([], host, "its attention is of another kind")
        lean.append(LeanLayer(layer, asked["scaling"], asked.get("sliding_window") or 0, host))
    was_training = model.training
    model.eval()  # dropout would draw other masks in the model's own code
    try:
        for replacement, given in zip(lean, inputs, strict=True):
            if not _agrees(replacement, given):
                return LeanLayers([], host, "a layer differs from what it looks like")
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return LeanLayers([], host, "no memory is left to check it")
    finally:
        model.train(was_training)
    for replacement in lean:
        replacement.module.forward, replacement.module.gradient_checkpointing = replacement, False
    installed = LeanLayers(lean, host)
    installed.set(how)
    return installed


def stands_against(model: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Why a model cannot have lean layers there, as far as its classes and its configuration tell. "" = nothing.

    All that loading may refuse but for what somebody did to the loaded model: train.py --plan promises by it.
    """
    if why := packed.cannot_pack(model):
        return why
    layers: list[Any] = [m for m in model.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)]
    other = {type(layer).__name__ for layer in layers} - REBUILT_LAYERS
    if other or not layers:
        return f"its layers are of another kind ({', '.join(sorted(other)) or 'there are none'})"
    text = model.config.get_text_config()
    if getattr(text, "hidden_act", "silu") not in ("silu", "swish") or getattr(text, "attention_dropout", False):
        return "its activation is not SiLU, or its attention has dropout"
    return unserved(layers[0].self_attn.head_dim, dtype, device) if device.type == "cuda" else ""


def _prevented(model: Any, layers: list[Any]) -> str:
    """The same, and what can be seen of the loaded model without running it."""
    if model.config._attn_implementation != packed.NAME:
        return "its samples are not packed"
    # Not model.dtype, which is the first parameter's: with the embedding in host memory that is LoRA's, fp32.
    if why := stands_against(model, model.device, model.get_input_embeddings().weight.dtype):
        return why
    for layer in layers:
        if not is_untouched(layer):
            return "somebody has changed a module inside a layer"
        if not has_known_linears(layer):
            return "its linear layers are of another kind"
        loras = [m for m in layer.modules() if isinstance(m, LoraLinear)]
        matrices = {id(p) for m in loras for p in (m.A, m.B)}
        if any(p.requires_grad and id(p) not in matrices for p in layer.parameters()):
            return "more than LoRA is trained in it"
        if len({m.dropout for m in loras}) > 1:
            return "its LoRA layers differ in their dropout"
    return ""


Call = tuple[tuple, dict[str, Any]]  # positional and keyword arguments


@torch.no_grad()
def _watch(decoder: Any, layers: list[nn.Module]) -> tuple[list[Call], dict[nn.Module, dict[str, Any]]]:
    """A pass over 48 random tokens in three samples -> (what each layer was given, what it asks of attention)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (48,), generator=generator).tolist()
    row = packed.pack([ids[:5], ids[5:6], ids[6:]], decoder.device)
    inputs: list[Call] = []
    options: dict[nn.Module, dict[str, Any]] = {}
    own = AttentionInterface()[packed.NAME]

    def spy(module: nn.Module, *tensors: Any, **asked: Any) -> Any:
        options[module] = asked
        return own(module, *tensors, **asked)

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
    return inputs, options


def _agrees(layer: LeanLayer, given: Call) -> bool:
    """Whether output and gradients of `layer` are about as close to the truth as those of the model's own code.

    The truth is the model's own code in a wider dtype (models/exact.py). A few tokens make most of an error, and by
    chance one code's is twice the other's: errors are added up over up to DRAWS draws.
    """
    dtype, share = WIDER[given[0][0].dtype]
    twin = LeanLayer(in_dtype(layer.module, dtype), layer.scaling, layer.window, layer.host)
    wide, squares = given_in(dtype, given), torch.zeros(3, dtype=torch.float64)
    for draw in range(DRAWS):
        own, lean = (_results(f, layer.loras, given, draw) for f in (layer.module.forward, layer))
        exact = _results(twin.module.forward, twin.loras, wide, draw)
        squares = squares + squared_errors(lean, own, exact).cpu()
        if as_near(squares, share):
            return True
    return False


@torch.enable_grad()
def _results(forward: Callable[..., Tensor], loras: Sequence[LoraLinear], given: Call, draw: int) -> list[Tensor]:
    """[output, gradient of the input, of LoRA's matrices] under a random gradient; from the second draw on the tokens
    have changed places."""
    (hidden, *rest), named = given
    generator = torch.Generator().manual_seed(draw)
    order = torch.randperm(hidden.shape[1], generator=generator) if draw else torch.arange(hidden.shape[1])
    x = hidden.detach()[:, order.to(hidden.device)].requires_grad_()
    upstream = torch.randn(hidden.shape, generator=generator).to(hidden)
    y = forward(x, *rest, **named)
    gradients = torch.autograd.grad(y, [x, *(p for m in loras for p in (m.A, m.B))], upstream)
    return [y.detach(), *gradients]
