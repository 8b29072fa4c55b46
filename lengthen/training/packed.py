"""Several samples in one row of tokens, none seeing another, and no padding.

A packed row is [1, T]: the samples one after the other, positions starting again at 0 in each, and `cu_seq_lens`
(int32 [N + 1]) saying where each begins. Everything in a decoder but attention works token by token, so packing is
exact when attention stays inside its sample: our attention function does that, and transformers calls it by name.

What attends in another way (linear attention, chunked attention, position codes that depend on the row's length)
would be wrong without any error. So `examine` compares packed with alone on the loaded model, before training, and
a model that fails gets one sample per row and its own attention.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels.linear_cross_entropy import Head, plain_head
from lengthen.models.families import PLAIN_LAYERS
from lengthen.models.flash import dense, flash_autograd
from lengthen.models.upload import upload
from lengthen.records import UserError

NAME = "lengthen_packed"


class Row(NamedTuple):
    """One packed row, on the model's device."""

    input_ids: Tensor  # int64 [1, T]
    position_ids: Tensor  # int64 [1, T], from 0 in each sample
    cu_seq_lens: Tensor  # int32 [N + 1]
    longest: int  # tokens of the longest sample

    def keywords(self) -> dict[str, Any]:
        """As transformers passes packed rows through a model to its attention function."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.cu_seq_lens,
            "cu_seq_lens_k": self.cu_seq_lens,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def pack(samples: list[list[int]], device: torch.device | str = "cpu") -> Row:
    """Token ids of N samples -> one row."""
    lengths = [len(s) for s in samples]
    positions = np.concatenate([np.arange(n) for n in lengths])
    device = torch.device(device)
    ids, places = upload(np.stack([np.concatenate(samples), positions]), torch.long, device)
    ends = upload(np.cumsum([0, *lengths]), torch.long, device)
    return Row(ids[None], places[None], ends.int(), max(lengths))


# ---------------------------------------------------------------------------------------------------------
# Attention


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **more,
) -> tuple[Tensor, None]:
    """Causal attention within each sample. query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D].

    sliding_window: a token sees itself and the window - 1 before it. softcap: scores become c tanh(scores / c).
    """
    if more.get("s_aux") is not None or more.get("position_bias") is not None:
        raise UserError(f"{type(module).__name__} has attention sinks or biases: packed attention carries none")
    assert cu_seq_lens_q is not None and query.shape[0] == 1, "packed attention needs a packed row"
    window = sliding_window if sliding_window and sliding_window < max_length_q else 0
    scaling = scaling or query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    out = flash_autograd(q, k, v, cu_seq_lens_q, max_length_q, scaling, window, softcap, dropout)
    if out is not None:
        return out[None], None
    bounds = cu_seq_lens_q.tolist()
    outs = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        q, k, v = (x[0, :, start:stop] for x in (query, key, value))  # [heads, n, D]
        outs.append(dense(q, k, v, 0, scaling, window, softcap, None, dropout))
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 1)).transpose(0, 1)[None], None


AttentionInterface.register(NAME, packed_attention)


# ---------------------------------------------------------------------------------------------------------
# What a loaded model can do


@dataclass
class Abilities:
    """What training may use of a loaded model. `notes` are lines for people."""

    packs: bool  # several samples per row, exactly
    head: Head | None  # for the loss without logits; None = the model computes its own
    notes: list[str] = field(default_factory=list)


def examine(model: PreTrainedModel) -> Abilities:
    """Compare, on 48 random tokens, what training would compute with what the model computes; choose the paths.

    Leaves the model with packed attention switched on where that is exact.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (48,), generator=generator).tolist()
    samples = [ids[:5], ids[5:6], ids[6:]]
    decoder, own = model.get_decoder(), model.config._attn_implementation
    was_training = model.training
    model.eval()
    with torch.no_grad():
        alone = [torch.tensor([s], device=model.device) for s in samples]
        hidden = torch.cat([decoder(input_ids=x, use_cache=False).last_hidden_state[0] for x in alone])
    head, why_not = plain_head(model)
    notes = [f"loss through the model's own logits, which takes more memory: {why_not}"] if why_not else []
    why = cannot_pack(model)
    if not why:
        model.set_attn_implementation(NAME)
        try:
            with torch.no_grad():
                packed = decoder(**pack(samples, model.device).keywords(), use_cache=False).last_hidden_state[0]
            why = "" if _close(packed, hidden) else "packed samples came out different from the same samples alone"
        except (UserError, TypeError, AssertionError, RuntimeError, ValueError) as error:
            why = str(error).splitlines()[0]
    if why:
        model.set_attn_implementation(own)
        notes.append(f"one sample per row through {own} attention: {why}")
    model.train(was_training)
    return Abilities(not why, head, notes)


def cannot_pack(model: PreTrainedModel) -> str:
    """What 48 tokens would not show: rules that begin to differ only in long rows. "" = none."""
    config = model.config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - PLAIN_LAYERS
    if other or getattr(config, "attention_chunk_size", None):
        return f"it attends by other rules ({', '.join(sorted(other)) or 'chunks'})"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in [rope, *rope.values()] if isinstance(r, dict)}
    if kinds & {"longrope", "dynamic"}:
        return "its position codes depend on the length of the row"
    return ""


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding; a sample that sees its neighbour is off by far more."""
    tolerance = 1e-4 if a.dtype == torch.float32 else 5e-2
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max())


def checkpointed(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers; one with `gradient_checkpointing` set keeps its input only, and is recomputed."""
    if model.supports_gradient_checkpointing:
        # transformers 5.23 calls it activation checkpointing, and warns of the name that 5.17 has.
        prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(model, f"{prefix}_checkpointing_enable")
        enable(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
