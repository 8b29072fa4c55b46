"""The shapes of the models that the benches stand for, and one of each with random weights: nothing is downloaded."""

from typing import Any, NamedTuple

import torch
from torch import nn

CONTEXT = 1 << 20  # tokens: no method stops at a length of its own
KEY_BIAS = 60.0  # standard deviation: the largest of a model is then about 240, as in Qwen2.5 (211 in the 0.5B)


class Shape(NamedTuple):
    family: str  # transformers' model_type
    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    keys: int  # heads of keys and values
    head_dim: int
    tied: bool = False  # the embedding is the head, too
    softcap: float | None = None  # of the logits


SHAPES = {
    "Qwen2.5-7B": Shape("qwen2", 152_064, 3584, 18_944, 28, 28, 4, 128),
    "Qwen3-0.6B": Shape("qwen3", 151_936, 1024, 3072, 28, 16, 8, 128, tied=True),
    "Llama-3.1-8B": Shape("llama", 128_256, 4096, 14_336, 32, 32, 8, 128),
    "Gemma-2-9B": Shape("gemma2", 256_000, 3584, 14_336, 42, 16, 8, 256, tied=True, softcap=30.0),
    "SmolLM2-135M": Shape("llama", 49_152, 576, 1536, 30, 9, 3, 64, tied=True),
    "tiny": Shape("qwen2", 4096, 64, 128, 2, 4, 2, 16),
}


def config_of(name: str, context: int = CONTEXT) -> Any:  # transformers.PretrainedConfig
    from transformers import AutoConfig

    shape = SHAPES[name]
    return AutoConfig.for_model(
        shape.family,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.keys,
        head_dim=shape.head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=shape.tied,
    )


def random_model(name: str, device: torch.device, nf4: bool, context: int = CONTEXT) -> Any:  # PreTrainedModel
    """In bf16 on CUDA, fp32 on a CPU. nf4: linear layers quantised one by one, so that no second copy is ever held."""
    from lengthen.models import lora
    from lengthen.training.shapes import meta_model

    torch.manual_seed(0)
    config, dtype = config_of(name, context), torch.bfloat16 if device.type == "cuda" else torch.float32
    model = meta_model(config, dtype)
    for place, linear in lora.decoder_linears(model).items() if nf4 else ():
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, quantised(linear, device, dtype))
    for place, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                scale = KEY_BIAS if leaf == "bias" and place.endswith("k_proj") else 0.02
                value = torch.randn(parameter.shape, device=device, dtype=dtype) * scale
                ones = parameter.dim() == 1 and leaf == "weight"  # norms
                setattr(module, leaf, nn.Parameter(torch.ones_like(value) if ones else value, requires_grad=False))
    model.tie_weights()
    decoder = model.get_decoder()
    with device:
        decoder.rotary_emb = type(decoder.rotary_emb)(config=config)  # its buffers were on meta, too
    return model.eval().requires_grad_(False)


def quantised(linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights of a linear layer's size in NF4, with double quantisation; its bias is still to be made."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    layer = Linear4bit(*sizes, bias, dtype, quant_type="nf4", device="meta")
    weight = torch.randn(linear.out_features, linear.in_features, device=device, dtype=dtype) * 0.02
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
    return layer
