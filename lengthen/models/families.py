"""Which models' decoder layers are rebuilt here: for decoding on a CPU or a GPU, and for memory-lean training.

All four compute h = x + attention(norm(x)), h + MLP(norm(h)), with RMSNorm, RoPE and a gated MLP. Qwen2 adds biases to
query, key and value; Qwen3 norms queries and keys head by head. What a rebuilt layer computes is compared with the
model's own code before it is used, so a class of the same name that does something else keeps its own.
"""

from typing import Any

REBUILT_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
PLAIN_LAYERS = {"full_attention", "sliding_attention"}  # layer types whose only rules are causality and the window


def is_untouched(layer: Any) -> bool:
    """Whether nobody has replaced the forward of a module inside, or listens to it."""
    return not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in layer.modules())


def has_known_linears(layer: Any) -> bool:
    """Whether its linear layers are the seven of a rebuilt one, plain or of 4 bits, with LoRA over them or without."""
    bases = [getattr(m, "base", m) for name, m in layer.named_modules() if name.endswith("_proj")]
    return len(bases) == 7 and {type(m).__name__ for m in bases} <= {"Linear", "Linear4bit"}


def is_known(layer: Any) -> bool:
    """Whether a rebuilt layer can stand in for it: nothing is inside that it does not call or know."""
    return type(layer).__name__ in REBUILT_LAYERS and has_known_linears(layer) and is_untouched(layer)
