"""train.py --plan: what a training would take in memory and time, from the model's configuration alone."""

import time
from dataclasses import replace
from typing import Any

import torch

from lengthen import cli
from lengthen.cli import ModelFlags
from lengthen.models.cards import CARDS, card_named
from lengthen.models.loading import (
    check_rows,
    choose_device,
    choose_dtype,
    choose_quantize,
    context_length,
    embeddings_to_host,
    load_config,
    load_tokenizer,
    memory_of,
)
from lengthen.training import lean_layer, shapes
from lengthen.training.budget import GENERIC_CHECKPOINTS, Budget
from lengthen.training.policy import budget_of, room_of
from lengthen.training.settings import CHECKPOINTS, MAX_LENGTH, LoraFlags, MemoryFlags, Recompute, Training


def outline_of(
    flags: ModelFlags, lora: LoraFlags, memory: MemoryFlags, adam_bits: int, device: torch.device, size: float
) -> tuple[Budget, int, torch.dtype, str]:
    """What a training of the model takes there, as loading would make it: (budget, context, dtype, "none" or "nf4").

    size: bytes of a GPU's memory, 0 = a CPU. UserError as loading.
    """
    config = load_config(flags.model, flags.trust_remote_code)
    context, _ = context_length(config, load_tokenizer(flags.model, flags.trust_remote_code))
    dtype, _ = choose_dtype(flags.dtype, device)
    quantize, _ = choose_quantize(flags.quantize, device, size, config, flags.model)
    model = shapes.meta_model(config, dtype)
    if quantize == "nf4" and device.type == "cpu":
        check_rows(flags.model, model)
    if memory.embeddings == "host":
        embeddings_to_host(model)
    nf4, cuda, lean = quantize == "nf4", device.type == "cuda", not lean_layer.stands_against(model, device, dtype)
    budget = budget_of(lora, memory, adam_bits, model, dtype, nf4=nf4, cuda=cuda, lean=lean)
    return budget, context, dtype, quantize


def show_plan(training: Training) -> None:
    """Print it: lines for people on stderr, one JSON record on stdout. Loads no weights."""
    flags, memory = training.model, training.memory
    # With --vram any GPU of that size, which need not be in this machine: without an index.
    device = torch.device("cuda") if memory.vram else choose_device(flags.device)[0]
    cuda = device.type == "cuda"
    memory = replace(memory, vram=memory.vram or memory_of(device) / 1e9)
    adam_bits = training.optimizer.adam_bits
    budget, context, dtype, quantize = outline_of(flags, training.lora, memory, adam_bits, device, 1e9 * memory.vram)
    room = room_of(memory, budget, device)
    tokens = training.pairs.max_length or min(MAX_LENGTH[training.pairs.role], context)
    where = f"a card of {memory.vram:g} GB" if cuda else "this CPU"
    weights = ("nf4, " if quantize == "nf4" else "") + str(dtype).removeprefix("torch.")
    cli.say(f"{flags.model} on {where}: rank {training.lora.rank}, {weights}, one row of {tokens:,} tokens")

    lines, record = table(budget, memory, tokens, room)
    speeds = speeds_of(memory.vram) if cuda else {}
    if not training.memory.vram:
        flops, name = peak_flops(device, dtype)
        speeds = {name: flops} if flops else speeds
    step = budget.flops([tokens], [tokens], budget.choose(memory, tokens, room))
    lines += [f"at least {step / v:,.2f} s a step at {v / 1e12:,.3g} TFLOP/s: {name}" for name, v in speeds.items()]
    for line in lines:
        cli.say(line)
    if tokens > context:
        cli.say(f"warning: {flags.model} takes {context:,} tokens: longer pairs are left out")
    cli.emit({"stage": "plan", "model": flags.model, "rank": training.lora.rank, "quantize": quantize, **record})


def table(budget: Budget, flags: MemoryFlags, tokens: int, room: float) -> tuple[list[str], dict[str, Any]]:
    """(lines to print, the same as a record): the components, a column per level, and what is chosen."""
    chosen = budget.choose(flags, tokens, room)
    levels = GENERIC_CHECKPOINTS if budget.traced else CHECKPOINTS
    columns = [Recompute(level) for level in levels]
    if chosen not in columns:
        columns.append(chosen)
    heads = [c.checkpoint if c in columns[: len(levels)] else "chosen" for c in columns]
    lines = [f"{'GB at ' + format(tokens, ',') + ' tokens':36}" + "".join(f"{h:>11}" for h in heads)]
    for name, size in budget.static().items():
        lines.append(f"  {name:34}" + f"{size / 1e9:11.2f}" * len(columns))
    activations = [budget.activations(c, tokens) for c in columns]
    for name in dict.fromkeys(n for sizes in activations for n in sizes):
        lines.append(f"  {name:34}" + "".join(f"{sizes.get(name, 0) / 1e9:11.2f}" for sizes in activations))
    totals = [budget.card_bytes(c, tokens) for c in columns]
    lines.append(f"  {'in all':34}" + "".join(f"{t / 1e9:11.2f}" for t in totals))
    longest, need = budget.longest(flags, room), budget.card_bytes(chosen, tokens)
    fits = need <= room
    lines.append(f"chosen: {chosen}, {need / 1e9:.1f} of {room / 1e9:.1f} GB" + ("" if fits else ": DOES NOT FIT"))
    lines.append(f"the longest row that fits: {longest:,} tokens, with {budget.choose(flags, longest, room)}")
    sizes = {**budget.static(), **budget.activations(chosen, tokens)}
    record = {
        "tokens": tokens,
        "room_gb": round(room / 1e9, 3),
        "checkpoint": chosen.checkpoint,
        "layers": chosen.layers,
        "offload": chosen.offload,
        "tile_rows": chosen.tile_rows,
        "fits": fits,
        "longest": longest,
        "gb": {name: round(size / 1e9, 3) for name, size in sizes.items()},
        "gflop_per_token": round(budget.flops_per_token(tokens, chosen) / 1e9, 2),
    }
    return lines, record


# ---------------------------------------------------------------------------------------------------------
# How fast the device could be


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s at the best, where the number is from). 0 for a card that the table does not know. dtype: the model's."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        card = card_named(name)
        return (1e12 * card.tflops, f"{name}, dense bf16 by its data sheet") if card and card.tflops else (0.0, name)
    name = str(dtype).removeprefix("torch.")
    return measured_flops(dtype), f"one {name} matrix product on {torch.get_num_threads()} threads, measured"


def speeds_of(gigabytes: float) -> dict[str, float]:
    """Name -> FLOP/s of the cards with about so much memory."""
    near = {name: card for name, card in CARDS.items() if abs(card.gigabytes - gigabytes) <= 0.1 * card.gigabytes}
    return {name: 1e12 * card.tflops for name, card in near.items() if card.tflops}


def measured_flops(dtype: torch.dtype) -> float:
    """What matrix products reach on this CPU, FLOP/s."""
    x = torch.randn(1024, 1024).to(dtype)
    x @ x
    started = time.perf_counter()
    x @ x
    return 2 * 1024**3 / (time.perf_counter() - started)
