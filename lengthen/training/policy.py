"""How each row of a training is computed so that it fits: what is stored, recomputed and offloaded, and what happens
when memory runs out all the same.

training/budget.py has the arithmetic; here it meets the flags, the loaded model and the memory that there is.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lengthen import cli
from lengthen.records import UserError
from lengthen.training import lean_layer, shapes
from lengthen.training.budget import Budget, check_served, most_tokens
from lengthen.training.packed import Abilities, checkpointed
from lengthen.training.parallel import Processes
from lengthen.training.settings import LoraFlags, MemoryFlags, Recompute

CPU_ACTIVATION_GB = 3.0  # stored for the backward pass before layers are recomputed: SmolLM2 then stays below 6 GB

HELPS = {  # what makes a component smaller
    "linear weights": "--quantize nf4, or a smaller model",
    "embedding and head": "--embeddings host, or a smaller model",
    "LoRA weights": "a smaller --rank",
    "LoRA gradients": "a smaller --rank",
    "optimizer moments": "--adam-bits 8, or a smaller --rank",
    "kept activations": "--checkpoint full, or a smaller --max-length",
    "working set of a layer's backward": "a smaller --max-length",
    "loss": "a smaller --max-length",
    "reserve": "a smaller --max-length",
}


class Memory:
    """Chooses how each row is computed, and plans for less once memory ran out.

    room: bytes that a step may take in all. longest: tokens of the longest row to come. follow: makes the model's
    layers do what was chosen.
    """

    def __init__(
        self, budget: Budget, flags: MemoryFlags, room: float, longest: int, follow: Callable[[Recompute], None]
    ):
        self.budget, self.room, self.follow, self.auto_shrink = budget, room, follow, flags.auto_shrink
        self.candidates = budget.candidates(flags, longest)

    @property
    def free_tokens(self) -> int:
        """Tokens that samples may fill a row with: what fits with the first candidate, at least 1."""
        return max(1, most_tokens(lambda tokens: self.budget.card_bytes(self.candidates[0], tokens) <= self.room))

    def choice(self, tokens: int) -> Recompute:
        """For a row of so many tokens the candidate that computes least among those that fit; the smallest if none."""
        return self.budget.first_that_fits(self.candidates, tokens, self.room)

    def set(self, tokens: int) -> Recompute:
        """The same, and the model's layers follow it."""
        how = self.choice(tokens)
        self.follow(how)
        return how

    def shrink(self, tokens: int) -> bool:
        """A row of so many tokens did not fit: plan for a tenth less than it took, the static memory aside.

        False = no candidate is so small.
        """
        static = sum(self.budget.static().values())
        room = static + 0.9 * (self.budget.card_bytes(self.choice(tokens), tokens) - static)
        if all(self.budget.card_bytes(how, tokens) > room for how in self.candidates):
            return False
        self.room = min(self.room, room)
        return True

    def ran_out(self, tokens: int) -> None:
        """Memory ran out in a step whose longest row has so many tokens: --auto-shrink plans for less, or UserError."""
        how = self.choice(tokens)
        if self.auto_shrink and self.shrink(tokens):
            cli.say(f"out of memory in a row of {tokens:,} tokens with {how}: again with {self.choice(tokens)}")
            return
        name, size, helps = largest_component(self.budget, how, tokens)
        raise UserError(
            f"out of memory in a row of {tokens:,} tokens with {how}; the largest part: {name}, {size / 1e9:.2f} GB",
            (helps if self.auto_shrink else f"--auto-shrink recomputes more; or {helps}")
            + "; the last checkpoint is kept",
        )


def largest_component(budget: Budget, how: Recompute, tokens: int) -> tuple[str, float, str]:
    """(name, bytes, what helps) of what takes most of a step."""
    sizes = {**budget.static(), **budget.activations(how, tokens)}
    name = max((n for n in sizes if n in HELPS), key=sizes.__getitem__)
    if name == "kept activations" and how.checkpoint == "full":
        return name, sizes[name], HELPS["reserve"]
    return name, sizes[name], HELPS[name]


def memory_of(
    lora: LoraFlags,
    memory: MemoryFlags,
    adam_bits: int,
    model: Any,
    abilities: Abilities,
    longest: int,
    processes: Processes,
    *,
    nf4: bool,
) -> Memory:
    """Install memory-lean layers where the model can have them, and plan. longest: tokens of the longest row to come.

    model: a transformers.PreTrainedModel with LoRA, examined by packed.examine.
    """
    device, dtype = model.device, model.get_input_embeddings().weight.dtype
    lean = lean_layer.install(model, host_limit=int(1e9 * memory.host_gb))
    for line in lean.notes():
        cli.say(line)
    budget = budget_of(
        *(lora, memory, adam_bits, model, dtype),
        nf4=nf4,
        cuda=device.type == "cuda",
        lean=bool(lean.layers),
        abilities=abilities,
    )
    room = -processes.most(-room_of(memory, budget, device), device)  # the least of all
    follow = lean.set if lean.layers else functools.partial(set_checkpointing, checkpointed(model))
    return Memory(budget, memory, room, longest, follow)


def budget_of(
    lora: LoraFlags,
    memory: MemoryFlags,
    adam_bits: int,
    model: Any,
    dtype: torch.dtype,
    *,
    nf4: bool,
    cuda: bool,
    lean: bool,
    abilities: Abilities | None = None,
) -> Budget:
    """The sizes of the model, loaded or on the meta device, and the activations of its layers.

    abilities: of a loaded model, whose activations are measured if its layers do not run without data.
    """
    host_bytes = 1e9 * memory.host_gb
    shape = shapes.shape_of(model, rank=lora.rank, targets=lora.layers, dtype=dtype, nf4=nf4, cuda=cuda)
    if lean:
        return Budget(shape, None, adam_bits, host_bytes)
    try:
        traced = shapes.trace(model.config, rank=lora.rank, targets=lora.layers, dtype=dtype, dropout=lora.dropout)
    except UserError as error:
        if abilities is None:
            raise
        cli.say(f"{error.message}: its activations are measured instead")
        traced = shapes.measured(shape, model, abilities)
    check_served(memory, traced)
    return Budget(shape, traced, adam_bits, host_bytes)


def room_of(memory: MemoryFlags, budget: Budget, device: torch.device) -> float:
    """Bytes that a step may take in all: --vram, or what the device has."""
    if memory.vram:
        return 1e9 * memory.vram
    if device.type == "cuda":  # its context exists already: CONTEXT_BYTES counts it once more, for cuBLAS
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    return sum(budget.static().values()) + 1e9 * CPU_ACTIVATION_GB


def set_checkpointing(layers: Sequence[Any], how: Recompute) -> None:
    """Makes transformers' own layers store and recompute what a plan says; lean layers have LeanLayers.set."""
    count = 0 if how.checkpoint == "none" else len(layers) if how.layers < 0 else how.layers
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i < count
