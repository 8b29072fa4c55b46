"""The memory of a training: its flags, the plan for this model and this card, and the choice for each row.

training/budget.py has the numbers; here they meet --vram, --checkpoint, --offload and the memory that there is.
"""

import argparse
import functools
from collections.abc import Callable

import torch
from torch import nn

from lengthen import cli
from lengthen.models.loading import DTYPES, NF4_BELOW, context_length, embeddings_to_host, load_config, load_tokenizer
from lengthen.records import UserError
from lengthen.training import budget as plan
from lengthen.training import lean_layer as lean
from lengthen.training.budget import Budget, Settings, Wanted, most_tokens
from lengthen.training.packed import Abilities, checkpointed
from lengthen.training.parallel import Processes

CPU_ACTIVATION_GB = 3.0  # kept for the backward pass before layers are recomputed: SmolLM2 then stays below 6 GB in all


class Memory:
    """Chooses the settings of each row, and leaner ones once memory ran out.

    longest: tokens of the longest row to come. `apply` makes the model's layers follow the settings.
    """

    def __init__(self, budget: Budget, wanted: Wanted, room: float, longest: int, apply: Callable[[Settings], None]):
        self.budget, self.room, self.apply = budget, room, apply
        self.candidates = budget.candidates(wanted, longest)

    @property
    def free_tokens(self) -> int:
        """Tokens that samples may fill a row with: what fits with the first candidate, 1 at the least."""
        return max(1, most_tokens(lambda tokens: self.budget.card_bytes(self.candidates[0], tokens) <= self.room))

    def choice(self, tokens: int) -> Settings:
        """The settings for a row of so many tokens; the smallest where none fits."""
        fitting = (s for s in self.candidates if self.budget.card_bytes(s, tokens) <= self.room)
        return next(fitting, None) or min(self.candidates, key=lambda s: self.budget.card_bytes(s, tokens))

    def set(self, tokens: int) -> Settings:
        settings = self.choice(tokens)
        self.apply(settings)
        return settings

    def shrink(self, tokens: int) -> bool:
        """A row of so many tokens did not fit: plan for a tenth less than it took, the static part aside.

        False = no candidate is so small.
        """
        static = sum(self.budget.static().values())
        room = static + 0.9 * (self.budget.card_bytes(self.choice(tokens), tokens) - static)
        if all(self.budget.card_bytes(s, tokens) > room for s in self.candidates):
            return False
        self.room = min(self.room, room)
        return True


def show_plan(args: argparse.Namespace, most: int) -> None:
    """--plan: what this training would take, from the model's configuration alone. most: tokens of a row by default."""
    config = load_config(args.model, args.trust_remote_code)
    context, _ = context_length(config, load_tokenizer(args.model, args.trust_remote_code))
    has_gpu = torch.cuda.is_available() and args.device != "cpu"
    device = torch.device("cuda" if has_gpu else "cpu")
    cuda = has_gpu or args.vram > 0
    vram = args.vram or (torch.cuda.get_device_properties(device).total_memory / 1e9 if has_gpu else 0.0)
    dtype = DTYPES[args.dtype] if args.dtype != "auto" else torch.bfloat16 if cuda else torch.float32
    nf4 = args.quantize == "nf4" or (args.quantize == "auto" and cuda and vram < NF4_BELOW / 1e9)
    model = plan.meta_model(config, dtype)
    if args.embeddings == "host":
        embeddings_to_host(model)
    lean_layers = not lean.stands_against(model, "cuda" if cuda else "cpu", dtype)
    budget = budget_of(args, model, dtype, nf4, cuda, lean_layers)
    room, wanted = room_of(args, budget, device, vram), wanted_of(args)
    tokens = args.max_length or min(most, context)
    where = f"a card of {vram:g} GB" if cuda else "this CPU"
    kind = str(dtype).removeprefix("torch.")
    cli.say(f"{args.model} on {where}: rank {args.rank}, {'nf4, ' if nf4 else ''}{kind}, one row of {tokens:,} tokens")
    lines, record = plan.table(budget, wanted, tokens, room)
    peaks = plan.cards_of(vram) if args.vram or has_gpu else {}
    if not args.vram:
        flops, name = plan.peak_flops(device)
        peaks = {name: flops} if flops else peaks
    step = budget.flops([tokens], [tokens], budget.choose(wanted, tokens, room))
    for line in [*lines, *plan.time_lines(step, peaks)]:
        cli.say(line)
    if tokens > context:
        cli.say(f"warning: {args.model} takes {context:,} tokens: longer pairs are left out")
    cli.emit({"stage": "plan", "model": args.model, "rank": args.rank, "quantize": "nf4" if nf4 else "none", **record})


def memory_of(
    args: argparse.Namespace, model: nn.Module, abilities: Abilities, longest: int, processes: Processes, *, nf4: bool
) -> Memory:
    """Lends lean layers to a model that can have them, and plans. longest: tokens of the longest row to come."""
    device, dtype = model.device, model.get_input_embeddings().weight.dtype
    lent = lean.apply(model, host_limit=int(1e9 * args.host_gb))
    for line in lent.notes():
        cli.say(line)
    lean_layers = bool(lent.layers)
    budget = budget_of(args, model, dtype, nf4, device.type == "cuda", lean_layers, abilities.token_bytes)
    room = -processes.most(-room_of(args, budget, device, args.vram), device)  # the least of all
    apply = lent.set if lean_layers else functools.partial(follow, checkpointed(model))
    return Memory(budget, wanted_of(args), room, longest, apply)


def budget_of(
    args: argparse.Namespace, model, dtype: torch.dtype, nf4: bool, cuda: bool, lean_layers: bool, token_bytes=0
) -> Budget:
    """The sizes of the model, loaded or on the meta device, and the activations of its layers.

    token_bytes: what the loaded model was seen to keep, for layers that do not run without data.
    """
    limits = {"adam_bits": args.adam_bits, "host_bytes": 1e9 * args.host_gb}
    shape = {"rank": args.rank, "targets": args.targets, "dtype": dtype}
    facts = plan.facts_of(model, nf4=nf4, cuda=cuda, **shape)
    if lean_layers:
        return Budget(facts, None, **limits)
    try:
        traced = plan.trace(model.config, dropout=args.dropout, **shape)
    except UserError as error:
        if not token_bytes:
            raise
        cli.say(f"{error.message}: its activations are measured instead")
        traced = plan.from_saved_bytes(facts, token_bytes)
    plan.check_served(wanted_of(args), traced)
    return Budget(facts, traced, **limits)


def wanted_of(args: argparse.Namespace) -> Wanted:
    return Wanted(args.checkpoint, args.offload, args.tile_rows)


def room_of(args: argparse.Namespace, budget: Budget, device: torch.device, vram: float) -> float:
    """Bytes that a step may take in all: --activation-gb beside what is static, --vram, or what the device has."""
    static = sum(budget.static().values())
    if args.activation_gb:
        return static + 1e9 * args.activation_gb + (plan.CONTEXT_BYTES if budget.facts.cuda else 0)
    if vram:
        return 1e9 * vram
    if device.type == "cuda":  # its context exists already: CONTEXT_BYTES counts it once more, for cuBLAS
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    return static + 1e9 * CPU_ACTIVATION_GB


def follow(layers: list, settings: Settings) -> None:
    """Makes transformers' own layers keep and recompute what a plan says; lean layers have Lean.set."""
    count = 0 if settings.checkpoint == "none" else len(layers) if settings.layers < 0 else settings.layers
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i < count
