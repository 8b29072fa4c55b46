"""What a training works on: a frozen base model with LoRA, the paths that it can take, a memory plan, an optimizer."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lengthen import cli
from lengthen.cli import ModelFlags
from lengthen.models import hub, lora
from lengthen.models.export import check_target, merge_to
from lengthen.models.loading import embeddings_to_host, folder_of, load_model, stored_dtype
from lengthen.records import UserError
from lengthen.training.packed import Abilities, examine
from lengthen.training.parallel import Processes
from lengthen.training.policy import Memory, memory_of
from lengthen.training.settings import Training


@dataclass(frozen=True)
class Learner:
    model: Any  # transformers.PreTrainedModel with LoRA layers, in training mode
    abilities: Abilities  # whether samples can be packed, and the loss taken without logits
    memory: Memory  # what each row stores and recomputes
    optimizer: Any  # torch.optim.AdamW, or bitsandbytes' of 8 bits

    @property
    def parameters(self) -> list[Any]:
        """LoRA's A and B, fp32: all that is trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def prepare(training: Training, longest: int, processes: Processes) -> tuple[Learner, dict[str, Any]]:
    """(learner, what the sidecar keeps of it). Says what was chosen and why. longest: tokens of the longest pair."""
    flags, shape, bits = training.model, training.lora, training.optimizer.adam_bits
    # oneDNN keeps the matrix products that it has compiled, up to 1,024 of them. In bf16 on a CPU each length of a row
    # needs new ones and is rarely seen again: 0.6 GB after 40 steps. oneDNN reads this at its first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    loaded = load_model(
        flags.model,
        device=processes.device if flags.device == "auto" and processes.device else flags.device,
        dtype=flags.dtype,
        quantize=flags.quantize,
        trust_remote_code=flags.trust_remote_code,
        train=True,
    )
    for line in loaded.notes:
        cli.say(line)
    model = loaded.model
    if training.memory.embeddings == "host":
        embeddings_to_host(model)
    base_hash = lora.base_hash(model)  # tells apart models of one shape, when the adapter is loaded again
    if flags.adapter:
        lora.continue_adapter(model, flags.adapter, shape.rank, shape.alpha, shape.dropout, shape.layers)
    else:
        lora.attach(model, shape.rank, shape.alpha, shape.dropout, shape.layers, training.out.seed)
    abilities = examine(model)
    model.train()
    # Short pairs share a row only where that costs no recomputation, so the longest pair is the longest row, too.
    nf4 = loaded.quantize == "nf4"
    memory = memory_of(shape, training.memory, bits, model, abilities, longest, processes, nf4=nf4)
    parameters = lora.lora_parameters(model)
    for line in [*abilities.notes, *filter(None, [lora.out_of_reach(model)])]:
        cli.say(line)
    need = memory.budget.card_bytes(memory.choice(longest), longest)
    cli.say(
        f"LoRA: rank {shape.rank}, alpha {shape.alpha:g}: {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters"
    )
    cli.say(
        f"memory: rows of up to {memory.free_tokens:,} tokens keep all they need; the longest here, {longest:,}, goes "
        f"with {memory.choice(longest)}: {need / 1e9:.2f} of {memory.room / 1e9:.2f} GB by the plan"
    )
    dtype = str(loaded.dtype).removeprefix("torch.")
    info = {"device": str(loaded.device), "dtype": dtype, "packed": abilities.packs}
    facts = {"base": loaded.name, "base_hash": base_hash, "quantize": loaded.quantize, "info": info}
    return Learner(model, abilities, memory, adamw(parameters, training.optimizer.learning_rate, bits)), facts


def adamw(parameters: list[torch.nn.Parameter], rate: float, bits: int) -> Any:
    """AdamW without weight decay; bits 8: both moments in blocks of 256 with a scale (arXiv 2110.02861)."""
    if bits == 32:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--adam-bits 8 needs bitsandbytes", "pip install bitsandbytes, or --adam-bits 32") from None
    return AdamW8bit(parameters, lr=rate, weight_decay=0.0)


def check_exports(training: Training) -> None:
    """UserError where --merge-to or --gguf could not be written: found before hours of training."""
    model, out = training.model, training.runtime
    if out.merge_to:
        check_target(Path(out.merge_to), Path(model.model))
    if out.gguf:
        from lengthen.models.to_gguf import check_gguf

        check_gguf(out.gguf, folder_of(model.model), model.trust_remote_code)


def write_exports(training: Training) -> dict[str, str]:
    """What --merge-to and --gguf ask for of a finished training; their paths, for the summary."""
    model, out, written = training.model, training.runtime, {}
    if out.merge_to:
        check_exports(training)
        write_merged(model, training.out.output, out.merge_to)
        written["merged"] = out.merge_to
    if out.gguf:
        from lengthen.models.to_gguf import write_gguf

        write_gguf(out.merge_to, out.gguf, out.gguf_type, model.trust_remote_code)
        written["gguf"] = out.gguf
    return written


def write_merged(flags: ModelFlags, adapter: str, folder: str) -> None:
    """The adapter merged into the unquantised base model, read afresh: never into rounded 4-bit weights.

    In the dtype of the base's files, whatever it was trained in.
    """
    base = folder_of(flags.model)
    cli.say(f"merging into {folder}")
    merged = load_model(
        flags.model,
        adapter=adapter,
        device="cpu",
        dtype=stored_dtype(base),
        quantize="none",
        trust_remote_code=flags.trust_remote_code,
    )
    merge_to(merged.model, base, folder, hub.model_card(adapter, merged=True))
