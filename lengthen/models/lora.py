"""LoRA on every linear layer of a decoder, in PEFT's file format.

    y = W x + scale * B A dropout(x)        A: [rank, in], B: [out, rank], B = 0 at the start

W is frozen (fp32, bf16, or NF4 through bitsandbytes), scale = alpha / rank (rsLoRA: alpha / sqrt(rank)). An adapter
is a folder with `adapter_model.safetensors` and `adapter_config.json`: PEFT, transformers and vLLM read ours, we read
theirs. What only PEFT implements (DoRA, trained biases, ranks that differ by layer, adapters on embeddings or on the
head) is refused by name: an adapter applied in part would be a different model.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lengthen.jobs import read_sidecar
from lengthen.records import UserError, replace_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight")

# Fields of adapter_config.json that we obey, or that say nothing about the arithmetic. `exclude_modules`,
# `layers_to_transform` and `layers_pattern` only choose layers, and the tensors in the file say which were chosen.
# Any other field with a value in it is a variant that we do not implement, today's or a later PEFT's.
UNDERSTOOD = {
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("use_rslora", "exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode", "peft_version"),
    *("revision", "auto_mapping", "megatron_core", "qalora_group_size", "loftq_config", "eva_config"),
}
# Ways to start A and B that leave the base alone. Others ("pissa", "olora", "loftq") train against a changed base.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """What B A is multiplied by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


class LoraLinear(nn.Module):
    """A frozen linear layer and its low-rank update. x: [..., in] -> [..., out], in the dtype of x.

    A and B are the fp32 masters that the optimizer updates; they are multiplied in the dtype of x.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        self.base, self.rank, self.alpha, self.dropout, self.rslora = base, rank, alpha, dropout, rslora
        self.scale = scale_of(rank, alpha, rslora)
        self.A = nn.Parameter(torch.zeros(rank, base.in_features, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    @property
    def weight(self) -> torch.Tensor:
        """The base weight: model code sometimes asks a layer for its dtype or device this way."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # [..., out]
        z = nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x
        z = nn.functional.linear(z, self.A.to(x.dtype)).flatten(0, -2)  # [T, rank]
        # One GEMM that adds to y while it writes: no [T, out] temporary for the update.
        return torch.addmm(y.flatten(0, -2), z, self.B.to(x.dtype).t(), alpha=self.scale).view_as(y)


# ---------------------------------------------------------------------------------------------------------
# Which layers


def decoder_linears(model: Any) -> dict[str, nn.Linear]:
    """Name -> linear layer, quantised or not; without the head, whose weight the loss reads past any LoRA layer."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is decoder)  # a vision tower is beside it
    linears = {}
    for name, module in decoder.named_modules(prefix=prefix):
        if isinstance(module, LoraLinear):
            linears[name] = module.base
        elif isinstance(module, nn.Linear) and module is not head and not name.endswith(".base"):
            linears[name] = module
    if not linears:
        raise UserError(f"{type(model).__name__} has no nn.Linear layer in its decoder: LoRA has nothing to attach to")
    return linears


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Name of the layer -> the LoRA layer in its place."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def select_targets(model: nn.Module, targets: str | list[str]) -> list[str]:
    """Names of the linear layers that `targets` means, by PEFT's rules.

    "all-linear"; a list of the last parts of layers' names ("q_proj"); or a regular expression for whole names.
    """
    names = list(decoder_linears(model))
    if targets == "all-linear":
        return names
    if isinstance(targets, str):
        chosen = [n for n in names if re.fullmatch(targets, n)]
    else:
        chosen = [n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)]
        unmatched = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
        if unmatched:
            raise UserError(
                f"LoRA target {unmatched[0]!r} is not a linear layer of this model's decoder", _layers_hint(names)
            )
    if not chosen:
        raise UserError(f"LoRA targets {targets!r} match no linear layer of this decoder", _layers_hint(names))
    return chosen


def _layers_hint(names: list[str]) -> str:
    return "its linear layers: " + ", ".join(sorted({n.rpartition(".")[2] for n in names}))


def _wrap(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def attach(
    model: nn.Module,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    seed: int = 0,
) -> list[nn.Parameter]:
    """Freeze the model, put fresh LoRA layers in place of its linear layers, return their (fp32, trainable) parameters.

    The start is PEFT's: A uniform in +-1/sqrt(in), B zero, so step 0 is the base model. A is drawn on the CPU: one seed
    is one adapter on every device.
    """
    assert rank > 0 and not lora_layers(model), (rank, "LoRA is attached already")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    linears = decoder_linears(model)
    for name in select_targets(model, targets):
        layer = LoraLinear(linears[name], rank, alpha, dropout)
        bound = 1 / math.sqrt(layer.in_features)
        start = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        layer.A.data.copy_(start)
        layer.train(model.training)
        _wrap(model, name, layer)
    return lora_parameters(model)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every layer, in the order of the layers."""
    return [p for layer in lora_layers(model).values() for p in (layer.A, layer.B)]


def out_of_reach(model: Any) -> str:
    """A line on the weights that no LoRA layer can be put over, a mixture's experts above all; "" = there are none."""
    reached = {id(p) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding) for p in m.parameters()}
    reached |= {id(p) for p in lora_parameters(model)}
    others = {name: p for name, p in model.get_decoder().named_parameters() if p.dim() > 1 and id(p) not in reached}
    if not others:
        return ""
    linear = sum(layer.in_features * layer.out_features for layer in decoder_linears(model).values())
    size = sum(p.numel() for p in others.values())
    names = sorted({re.sub(r".*\.\d+\.", "", name) for name in others})
    return (
        f"warning: LoRA reaches linear layers only; {', '.join(names)} stay as they are,"
        f" {size / (size + linear):.0%} of the decoder's weights"
    )


# ---------------------------------------------------------------------------------------------------------
# Files


def base_hash(model: Any) -> str:
    """16 hex digits over the norms and 64 rows of the embedding: tells apart models of one shape (instruct and base).

    Neither is ever quantised; rounded to bf16, both are the same at every --dtype but fp16 (then "").
    """
    embedding = model.get_input_embeddings().weight.detach()
    linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding) for p in m.parameters()}
    samples = [p.detach() for p in model.parameters() if p.dim() == 1 and id(p) not in linear]
    samples.append(embedding[:: max(1, len(embedding) // 64)][:64])
    if any(p.dtype == torch.float16 for p in samples):
        return ""
    total = hashlib.sha256()
    for p in samples:
        total.update(p.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return total.hexdigest()[:16]


def adapter_config(model: nn.Module, base_name: str) -> dict:
    """adapter_config.json of the LoRA layers in the model; PEFT's other fields are left at their defaults."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))  # all have the same rank, alpha and dropout
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": _shortest_targets(layers, decoder_linears(model)),
        "use_rslora": first.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _shortest_targets(layers: dict, linears: dict) -> list[str]:
    """Last parts of the names ("q_proj"), as vLLM and people read them; whole names where those would choose more."""
    leaves = {n.rpartition(".")[2] for n in layers}
    return sorted(leaves if all(n in layers for n in linears if n.rpartition(".")[2] in leaves) else layers)


def adapter_bytes(model: nn.Module) -> bytes:
    """adapter_model.safetensors of the LoRA layers in the model: fp32, PEFT's names."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        for matrix, value in (("A", layer.A), ("B", layer.B)):
            tensors[f"base_model.model.{name}.lora_{matrix}.weight"] = value.detach().float().cpu().contiguous()
    return save(tensors, metadata={"format": "pt"})


def save_adapter(model: nn.Module, folder: str | Path, base_name: str) -> None:
    """Write the adapter; each file whole or not at all, the config last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, adapter_bytes(model))
    replace_file(folder / CONFIG, json.dumps(adapter_config(model, base_name), indent=2, sort_keys=True) + "\n")


def read_adapter(folder: str | Path) -> tuple[dict, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """(adapter_config.json, {layer name: (A [rank, in], B [out, rank])}) of an adapter in PEFT's format.

    Raises UserError for a folder that holds none, and by name for what we do not implement.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        if (folder / "adapter_model.bin").exists():
            hint = "adapter_model.bin is a pickle, which can run code: save the adapter as safetensors with PEFT"
        else:
            hint = "an adapter is a folder that train.py or PEFT's save_pretrained wrote"
        raise UserError(f"{folder} holds no adapter: {Path(error.filename or WEIGHTS).name} is missing", hint) from None
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, NotADirectoryError) as error:
        raise UserError(f"the adapter {folder} cannot be read: {error}", "copy or train it again") from None
    _check_config(folder, config)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        match = KEY.fullmatch(key)
        if not match:
            raise UserError(
                f"the adapter {folder} holds {key!r}, which is not a LoRA matrix of a linear layer", _VARIANT_HINT
            )
        if not value.isfinite().all():
            raise UserError(f"the adapter {folder} holds NaN or infinity in {key}", "train it again, or copy it again")
        pairs.setdefault(match["layer"], {})[match["matrix"]] = value
    for layer, pair in pairs.items():
        if len(pair) < 2 or pair["A"].shape[0] != config["r"] or pair["B"].shape[-1] != config["r"]:
            shapes = {matrix: list(value.shape) for matrix, value in pair.items()}
            raise UserError(f"the adapter {folder} is inconsistent: r = {config['r']}, but {layer} has {shapes}")
    if not pairs:
        raise UserError(f"the adapter {folder} holds no matrix at all")
    return config, {layer: (pair["A"], pair["B"]) for layer, pair in pairs.items()}


_VARIANT_HINT = "only plain LoRA on the decoder's linear layers is applied here: merge with PEFT, pass the merged model"


def _check_config(folder: Path, config: dict) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        peft_type = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"the adapter {folder} is of type {peft_type!r}, not LORA", _VARIANT_HINT)
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(f"{folder / CONFIG} names no r or no lora_alpha")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise UserError(f"the adapter {folder} was started by {start!r}, which changes the base model", _VARIANT_HINT)
    for name, value in config.items():
        if name not in UNDERSTOOD | {"init_lora_weights"} and value not in (None, False, "", "none", [], {}):
            raise UserError(
                f"the adapter {folder} uses {name} = {value!r}, which is not implemented here", _VARIANT_HINT
            )


# ---------------------------------------------------------------------------------------------------------
# Adapter -> model


def _matched(model: Any, folder: str | Path) -> tuple[dict, dict, dict[str, nn.Linear]]:
    """The adapter, checked against the model: (config, tensors, linear layers)."""
    config, tensors = read_adapter(folder)
    linears = decoder_linears(model)
    hint = (
        f"it was trained on {config.get('base_model_name_or_path') or 'a model it does not name'}: --model must be that"
    )
    head = model.get_output_embeddings()
    for name, (A, B) in tensors.items():
        if name not in linears:
            other = dict(model.named_modules()).get(name)
            if other is not None and (other is head or isinstance(other, nn.Embedding)):
                raise UserError(f"the adapter {folder} adapts {name}, the head or an embedding", _VARIANT_HINT)
            experts = re.match(r"(.*\bexperts)\.", name)
            if experts and experts[1] in dict(model.named_modules()):
                raise UserError(
                    f"the adapter {folder} adapts single experts, {name} for one: transformers keeps those of a layer"
                    " in one tensor, which no LoRA layer is put over here",
                    "merge it with the PEFT and transformers that it was trained with, and pass the merged model",
                )
            raise UserError(f"the adapter {folder} is for another model: this one has no linear layer {name}", hint)
        ours, theirs = (linears[name].out_features, linears[name].in_features), (B.shape[0], A.shape[1])
        if ours != theirs:
            raise UserError(f"the adapter {folder} is for another model: {name} is {theirs} there, {ours} here", hint)
    trained_on, here = read_sidecar(folder).get("base_hash", ""), base_hash(model)  # only train.py writes one
    if trained_on and here and trained_on != here:
        raise UserError(f"the adapter {folder} was trained on another model of the same shape", hint)
    return config, tensors, linears


def attach_adapter(model: nn.Module, folder: str | Path, trainable: bool = False) -> list[nn.Parameter]:
    """Put LoRA layers that hold the adapter's matrices into the model, quantised or not; return their parameters.

    To train: fp32, the rest frozen. To sample: in the model's dtype, so that no step casts them again.
    """
    config, tensors, linears = _matched(model, folder)
    model.requires_grad_(False)
    for name, (A, B) in tensors.items():
        dropout, rslora = config.get("lora_dropout") or 0.0, bool(config.get("use_rslora"))
        layer = LoraLinear(linears[name], config["r"], config["lora_alpha"], dropout, rslora)
        dtype = torch.float32 if trainable else model.dtype
        layer.A = nn.Parameter(A.to(layer.A.device, dtype), requires_grad=trainable)
        layer.B = nn.Parameter(B.to(layer.B.device, dtype), requires_grad=trainable)
        layer.train(model.training)
        _wrap(model, name, layer)
    return lora_parameters(model)


def continue_adapter(
    model: Any, folder: str | Path, rank: int, alpha: float, dropout: float, targets: str | list[str]
) -> list[nn.Parameter]:
    """attach_adapter to train on, at the adapter's own rank, scale and layers: others asked for are a UserError."""
    parameters = attach_adapter(model, folder, trainable=True)
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    for name, theirs, ours in (("rank", first.rank, rank), ("alpha", first.alpha, alpha)):
        if theirs != ours:
            raise UserError(f"the adapter {folder} has {name} {theirs:g}, not {ours:g}", f"--{name} {theirs:g}")
    if set(layers) != set(select_targets(model, targets)):
        raise UserError(
            f"the adapter {folder} adapts other layers than --targets "
            + (targets if isinstance(targets, str) else " ".join(targets)),
            "--targets " + " ".join(sorted({n.rpartition(".")[2] for n in layers})),
        )
    for layer in layers.values():
        layer.dropout = dropout
    return parameters


def merge_adapter(model: nn.Module, folder: str | Path, sign: int = 1) -> None:
    """W <- W + scale * B A, computed in fp32, for every adapted layer of an unquantised model; sign -1 takes it out.

    The sum becomes a new parameter: a weight that two layers share, or that a file maps into memory, stays as it was.
    """
    config, tensors, linears = _matched(model, folder)
    scale = sign * scale_of(config["r"], config["lora_alpha"], bool(config.get("use_rslora")))
    for name, (A, B) in tensors.items():
        old = linears[name].weight
        if type(old) is not nn.Parameter:
            raise UserError(
                f"{name} is quantised ({type(old).__name__}): merging would round the adapter away",
                "load the model with --quantize none to merge",
            )
        update = scale * (B.to(old.device).float() @ A.to(old.device).float())
        linears[name].weight = nn.Parameter((old.detach().float() + update).to(old.dtype), requires_grad=False)


@contextmanager
def without_adapter(model: nn.Module, folder: str | Path) -> Iterator[None]:
    """The base model, for a while: LoRA layers are unhooked, a merged adapter is taken out of the weights and put back.

    A weight is then off by no more than the rounding of its merged value, in its own dtype, and nothing is held twice.
    """
    layers = lora_layers(model)
    if not layers:
        merge_adapter(model, folder, sign=-1)
    for name, layer in layers.items():
        _wrap(model, name, layer.base)
    try:
        yield
    finally:
        if not layers:
            merge_adapter(model, folder)
        for name, layer in layers.items():
            _wrap(model, name, layer)
