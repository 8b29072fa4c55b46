"""The shape of a model, read without its weights; for transformers' own layers, their activations counted.

A model is built on torch's meta device: shapes without data. There the decoder runs, one and two layers deep, forward
and backward, while `Live` sees each tensor appear and vanish; what is kept and what a backward pass works with both
grow linearly with the tokens and the layers, so four runs give every number (budget.Traced).
"""

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from lengthen.models import lora
from lengthen.records import UserError
from lengthen.training.budget import Linear, Shape, Traced
from lengthen.training.packed import Abilities, pack


def shape_of(
    model: Any,
    *,
    rank: int,
    targets: str | list[str] = "all-linear",
    dtype: torch.dtype = torch.bfloat16,
    nf4: bool = False,
    cuda: bool = True,
) -> Shape:
    """The sizes of a model, loaded or on the meta device, and of the LoRA layers that it has or would get."""
    linears = lora.decoder_linears(model)
    weights = {name: layer.in_features * layer.out_features for name, layer in linears.items()}
    down = {name for name in weights if name.endswith("down_proj")}
    tables = {m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    tables &= set(model.parameters())  # a HostEmbedding's is none
    counted = tables | {layer.weight for layer in linears.values()} | set(lora.lora_parameters(model))
    trained = {
        name: rank * (linears[name].in_features + linears[name].out_features)
        for name in lora.select_targets(model, targets)
    }
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query = text.num_attention_heads * head
    key = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head
    return Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=query,
        key=key,
        normed=(query + key) * any(name.endswith("q_norm") for name, _ in model.named_modules()),
        heads=text.num_attention_heads,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocab=text.vocab_size,
        linear=sum(weights.values()),
        down=sum(weights[name] for name in down),
        largest=max(weights.values()),
        embedding=sum(w.numel() for w in tables),
        rest=sum(p.numel() for p in model.parameters() if p not in counted),
        lora=sum(trained.values()),
        lora_a=sum(rank * linears[name].in_features for name in trained),
        lora_down=sum(n for name, n in trained.items() if name in down),
        window=(getattr(text, "sliding_window", None) or 0) if getattr(text, "use_sliding_window", True) else 0,
        item=dtype.itemsize,
        nf4=nf4,
        cuda=cuda,
    )


def meta_model(config: PretrainedConfig, dtype: torch.dtype, layers: int = 0) -> Any:
    """The model without data, of `layers` layers (0 = all). UserError where transformers cannot build it."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if layers:
        for name, value in list(vars(text).items()):  # lists with one entry a layer (layer_types) are cut alike
            if isinstance(value, list) and len(value) == text.num_hidden_layers:
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"no plan for a {text.model_type} model: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------------------------------------------------
# Counting on the meta device


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while it is on, and the most alive at a time.

    Works on any device; on "meta" nothing is computed. `known`: tensors that were there before and do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


class _ShapesOfFlash(torch.autograd.Function):
    """What FlashAttention keeps and makes, without computing it. q [1, n, T, D], k and v [1, m, T, D]."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


TRACED = "lengthen_traced"
AttentionInterface.register(TRACED, lambda module, q, k, v, mask, **more: (_ShapesOfFlash.apply(q, k, v), None))


def measured(shape: Shape, model: Any, abilities: Abilities) -> Traced:
    """For a model that does not run without data: what the loaded one, in training mode, keeps of a row."""
    tokens = 48  # any number: all that is kept grows with them
    row = pack([[0] * tokens], model.device)
    inputs = row.keywords() if abilities.packs else {"input_ids": row.input_ids}
    with Live([*model.parameters(), *model.buffers(), *row[:3]]) as live:
        hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state  # holds what it was made from
        layer = Linear(0.0, live.now / tokens / shape.layers)
    del hidden
    return Traced(layer, Linear(0.0, 0.0), layer)


def trace(
    config: PretrainedConfig, *, rank: int, targets: str | list[str], dtype: torch.dtype, dropout: float = 0.0
) -> Traced:
    """Run the decoder forward and backward on the meta device and count. UserError where it does not run there."""

    def measure(layers: int, tokens: int) -> tuple[float, float]:
        model = meta_model(config, dtype, layers)
        model.set_attn_implementation(TRACED)
        lora.attach(model, rank, 1.0, dropout, targets)
        model.train()
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        with Live([*model.parameters(), *model.buffers(), ids]) as live:
            hidden = model.get_decoder()(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state
            kept, live.peak = live.now, 0
            gradients = sum(p.numel() * p.itemsize for p in lora.lora_parameters(model)) / layers
            hidden.backward(torch.empty_like(hidden))
            return kept, live.peak - kept - gradients

    def line(layers: int, which: int) -> Linear:
        few, many = (measure(layers, n)[which] for n in (128, 256))
        return Linear(2 * few - many, (many - few) / 128)

    try:
        layer = line(2, 0) - line(1, 0)
        return Traced(layer, line(1, 0) - layer, line(2, 1))
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        text = config.get_text_config()
        raise UserError(
            f"no plan for a {text.model_type} model: {str(error).splitlines()[0]}",
            "leave --plan out: a training measures what its layers keep",
        ) from None
