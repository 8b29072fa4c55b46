"""What a training step takes in memory and time, before a weight is loaded, and the least recomputation that fits.

A step's peak (GB = 1e9 bytes) is the sum of

    weights       frozen: linear layers (NF4: 4.127 bits each), embedding and head, norms and biases
    dequantised   the largest matrix, for as long as it is multiplied (NF4 only)
    LoRA          fp32 weights, gradients and Adam's two moments: 16 bytes a parameter, 10 with moments of 8 bits; bf16
                  copies while they are used
    kept          what the forward pass leaves for the backward pass, by the level of --checkpoint
    working set   what the backward pass of one layer holds beside that, or the loss, whichever is more
    reserve       CUDA's context, cuBLAS's workspaces, and a tenth of the activations for what the allocator cannot join

and all but the activations are known from the shapes. For transformers' own layers, of any model, the activations are
not derived but counted: the decoder runs, one and two layers deep, on torch's meta device (shapes without data), where
`Live` sees each tensor appear and vanish; both grow linearly with the tokens and the layers. For a memory-lean layer
(the Llama family) they are added up vector by vector, `lean_kept` and `lean_backward`; per token and layer:

    level       kept                                                  recomputed
    none        X, q, k, v, out, lse, X', gate, up                    norms and activation, in one pass each
    attention   X, out, lse                                           q, k, v, o, gate, up; attention not
    full        X                                                     the same, and attention

--offload moves what is kept to pinned host memory, but for the two layers on their way, and --host-gb bounds that;
--embeddings host leaves the input embedding there, of which a row takes T lines; --tile-rows works through the
MLP so many tokens at a time. A plan may treat only the first layers this way: `Settings.layers`.

Time is the floor: FLOPs / the card's dense bf16 peak. Per token, N the weights of the linear layers, T the length:
    linear      2 N a pass: forward, gradient of the input, and what is recomputed (never the gradient of W: frozen)
    attention   2 T Q L a forward pass (two products, causal: half the square; less with a sliding window), 2.5 times
                that backward
    LoRA        2 a parameter and pass, and 2 for its own gradient
    loss        4 V H per target: the logits, and their product with the head
The formulae are those of "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), section 4,
with a frozen base, FlashAttention and a loss without logits.
"""

import copy
import math
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from kernels.linear_cross_entropy import CPU_TILE_ELEMENTS, TORCH_ROWS, WORKSPACE_BYTES
from lengthen.models import lora
from lengthen.models.cards import CARDS, card_named
from lengthen.records import UserError
from lengthen.training.lean_layer import CHECKPOINTS as LEVELS
from lengthen.training.lean_layer import SLAB, Settings

GENERIC_LEVELS = ("none", "full")  # what transformers' own layers can do
TILE_ROWS = 4096  # tokens of an MLP tile: large enough for full matrix products, 0.6 GB on an 8B model
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # 4 bits, a scale of 8 bits for 64 weights, an fp32 constant for 256 scales
MOMENT_BYTES = {32: 8, 8: 2 + 2 * 4 / 256}  # of AdamW, a parameter; 8 bits: and an fp32 scale for 256 of them
CONTEXT_BYTES = 1.0e9  # CUDA context, cuBLAS workspaces
SLACK = 0.10  # of the activations: blocks that the allocator holds and cannot join
BUFFERED_LAYERS = 2  # offloading: one layer on its way while another is in use


# ---------------------------------------------------------------------------------------------------------
# The model's sizes


@dataclass(frozen=True)
class Facts:
    """Sizes of a model and its LoRA layers, in elements unless named bytes; enough for every number of a plan."""

    layers: int
    hidden: int  # H
    query: int  # Q = heads x head size
    key: int  # K = key heads x head size
    heads: int
    normed: int  # Q + K where queries and keys have norms of their own, else 0
    intermediate: int  # I
    vocab: int
    linear: int  # weights of all linear layers of the decoder
    down: int  # of the MLPs' down projections among them: the one product that is never recomputed
    largest: int  # the largest of their matrices
    embedding: int  # embedding, and the head where it has its own; what is left in host memory is not counted
    rest: int  # norms, biases
    lora: int  # trained parameters
    lora_a: int  # of their first matrices, A
    lora_down: int  # of the down projections
    window: int  # tokens that one looks back at, itself included; 0 = all
    item: int  # bytes of an activation
    nf4: bool
    cuda: bool


def facts_of(
    model: nn.Module,
    *,
    rank: int,
    targets: str | list[str] = "all-linear",
    dtype: torch.dtype = torch.bfloat16,
    nf4: bool = False,
    cuda: bool = True,
) -> Facts:
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
    return Facts(
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


def meta_model(config: PretrainedConfig, dtype: torch.dtype, layers: int = 0) -> nn.Module:
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


@dataclass(frozen=True)
class Linear:
    """fixed + slope x tokens, in bytes."""

    fixed: float
    slope: float

    def __call__(self, tokens: int) -> float:
        return self.fixed + self.slope * tokens

    def __sub__(self, other: "Linear") -> "Linear":
        return Linear(self.fixed - other.fixed, self.slope - other.slope)


@dataclass(frozen=True)
class Traced:
    """Activations of transformers' own layers."""

    layer: Linear  # kept by one layer
    outside: Linear  # kept by what is not a layer: final norm, position codes
    backward: Linear  # the most that the backward pass of a layer holds beside what is kept


def from_saved_bytes(facts: Facts, token_bytes: float) -> Traced:
    """For a model that does not run without data: what examine() saw the loaded one keep, bytes a token."""
    layer = Linear(0.0, token_bytes / facts.layers)
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
            "its layers do not run without data: --activation-gb sets what may be kept",
        ) from None


# ---------------------------------------------------------------------------------------------------------
# Bytes


def lean_kept(facts: Facts, checkpoint: str) -> float:
    """Bytes a token that the memory-lean layer keeps."""
    h, q, k, i = (facts.item * n for n in (facts.hidden, facts.query, facts.key, facts.intermediate))
    lse = max(4, facts.item) * facts.heads
    return {"none": 2 * h + 2 * q + 2 * k + 2 * i + lse, "attention": h + q + lse, "full": h}[checkpoint]


def lean_backward(facts: Facts, tokens: int, settings: Settings) -> float:
    """Bytes that its backward pass works with beside what is kept: the MLP's tiles, or attention, whichever is more.

    Through both goes dY [T, H] and dO [T, Q]. MLP, a tile: X' and its norm; gate, up and one gradient, written over
    (torch's own passes on a CPU: two more). Attention: q, k, v and their gradients, those of k and v first once a query
    head; FlashAttention 2 sums dQ in fp32, torch on a CPU repeats k and v. NF4: the weights of the half that is at
    work, dequantised. Where queries and keys have norms of their own, they are there twice.
    """
    f, level = facts, settings.checkpoint
    h, q, k, i = (f.item * n for n in (f.hidden, f.query, f.key, f.intermediate))
    rows = min(tokens, settings.tile_rows or tokens)
    if level == "none":  # q, k, v, X', gate and up are kept
        mlp, attention = rows * (h + i), 0
    else:
        mlp, attention = rows * (2 * h + 3 * i), tokens * (q + 2 * k)
    if level == "full":  # attention runs once more, first
        mlp, attention = mlp + tokens * (2 * q + 2 * k), attention + tokens * q
    attention += tokens * (3 * q + 2 * k + f.item * f.normed)
    if f.cuda:
        attention += tokens * 4 * f.query
    else:
        mlp, attention = mlp + rows * 2 * i, attention + tokens * 2 * q
    if f.nf4:
        mlp += 3 * f.hidden * i + f.hidden * q
        attention += f.hidden * (q + 2 * k)
    return max(mlp, attention) + tokens * (h + q)


def loss_bytes(facts: Facts, targets: int) -> float:
    """The hidden states of the targets, their gradient, and the workspace of kernels/linear_cross_entropy.py."""
    if facts.cuda:
        workspace = WORKSPACE_BYTES
    else:  # three tiles of logits; fp32 copies of the rows, the targets' weights and the gradient
        rows = min(TORCH_ROWS, targets)
        width = max(256, CPU_TILE_ELEMENTS // max(rows, 256) // 256 * 256)
        workspace = 4 * rows * (3 * min(width, facts.vocab) + 4 * facts.hidden)
    return 2 * targets * facts.hidden * facts.item + workspace


class Budget:
    """What a step of this model takes; `traced` = transformers' layers, None = the memory-lean layer.

    adam_bits: of AdamW's moments, 32 or 8. host_bytes: the most that --offload may move, 0 = all of it.
    """

    def __init__(self, facts: Facts, traced: Traced | None, adam_bits: int = 32, host_bytes: float = 0.0):
        self.facts, self.traced, self.adam_bits, self.host_bytes = facts, traced, adam_bits, host_bytes

    def static(self) -> dict[str, float]:
        """Component -> bytes that are there whatever the length."""
        f = self.facts
        parts = {
            "linear weights": f.linear * (NF4_BYTES if f.nf4 else f.item),
            "embedding and head": float(f.embedding * f.item),
            "norms and biases": float(f.rest * f.item),
        }
        if f.nf4 and self.traced:  # the memory-lean layer counts its own
            parts["dequantised weight"] = float(f.largest * f.item)
        each = {"LoRA weights": 4, "LoRA gradients": 4, "optimizer moments": MOMENT_BYTES[self.adam_bits]}
        return parts | {name: float(f.lora * size) for name, size in each.items()}

    def activations(self, settings: Settings, tokens: int, targets: int = -1) -> dict[str, float]:
        """Component -> bytes that a row of so many tokens adds; targets: tokens that are learned (-1 = all).

        "offloaded (host memory)" is not on the card.
        """
        f = self.facts
        targets = tokens if targets < 0 else targets
        some = f.layers if settings.layers < 0 else settings.layers  # layers that follow `checkpoint`
        offloaded = 0.0
        if self.traced:
            each, all_kept = f.hidden * f.item * tokens, self.traced.layer(tokens)
            some = 0 if settings.checkpoint == "none" else some
            kept = self.traced.outside(tokens) + (f.layers - some) * all_kept + some * each
            work = self.traced.backward(tokens)
            if f.cuda:  # inside FlashAttention's backward pass, where the count does not see it
                work += tokens * (4 * f.query + 2 * f.item * f.query * (f.key < f.query))
            if some == f.layers:
                work += all_kept  # the layer that is recomputed is whole again
        else:
            each = lean_kept(f, settings.checkpoint) * tokens
            kept = (f.layers - some) * lean_kept(f, "none") * tokens + some * each
            if settings.offload:
                moved = some - BUFFERED_LAYERS
                if self.host_bytes:  # whole layers move, in whole slabs
                    moved = min(moved, self.host_bytes // SLAB // math.ceil(each / SLAB))
                offloaded = max(0, moved) * each
            work = lean_backward(f, tokens, settings)
        loss = loss_bytes(f, targets)
        parts = {"kept activations": kept - offloaded}
        parts["working set of a layer's backward" if work >= loss else "loss"] = max(work, loss)
        parts["reserve"] = (CONTEXT_BYTES + SLACK * sum(parts.values())) if f.cuda else 0.0
        return {**parts, "offloaded (host memory)": offloaded}

    def card_bytes(self, settings: Settings, tokens: int, targets: int = -1) -> float:
        """All that is on the card at the peak of a step."""
        parts = self.activations(settings, tokens, targets)
        return sum(self.static().values()) + sum(parts.values()) - parts["offloaded (host memory)"]

    # -- the choice ----------------------------------------------------------------------------------------

    def candidates(self, wanted: "Wanted", tokens: int) -> list[Settings]:
        """All settings that the flags leave open, the one that computes least over so many tokens first."""
        levels = GENERIC_LEVELS if self.traced else LEVELS
        if wanted.checkpoint != "auto":
            levels = (wanted.checkpoint,)
        some = []
        for level in levels:
            counts = range(1, self.facts.layers + 1) if wanted.checkpoint == "auto" and level != "none" else (-1,)
            some += [Settings(level, -1 if n == self.facts.layers else n) for n in counts]
        if not self.traced:
            tiles = (wanted.tile_rows,) if wanted.tile_rows else (0, TILE_ROWS)
            some = [replace(s, tile_rows=rows) for s in some for rows in tiles]
            # All that "none" keeps is more than a bus can carry while a layer computes: only where it is asked for.
            movable = [s for s in some if s.layers < 0 and (s.checkpoint != "none" or wanted.checkpoint == "none")]
            moved = [replace(s, offload=True) for s in movable]
            some = moved if wanted.offload else some + moved
        return sorted(some, key=lambda s: (self.flops_per_token(tokens, s), s.offload, bool(s.tile_rows)))

    def choose(self, wanted: "Wanted", tokens: int, room: float, targets: int = -1) -> Settings:
        """The first candidate that fits into `room` bytes; the smallest where none does."""
        some = self.candidates(wanted, tokens)
        for settings in some:
            if self.card_bytes(settings, tokens, targets) <= room:
                return settings
        return min(some, key=lambda s: self.card_bytes(s, tokens, targets))

    def longest(self, wanted: "Wanted", room: float) -> int:
        """The most tokens of a row that fit with any of the settings left open, 0 = none."""
        some = self.candidates(wanted, 1)
        return most_tokens(lambda tokens: any(self.card_bytes(s, tokens) <= room for s in some))

    def flops(self, lengths: list[int], targets: list[int], settings: Settings) -> float:
        """FLOPs of a step over samples of these lengths, of which so many tokens are learned."""
        return sum(
            n * self.flops_per_token(n, settings, learned / n) for n, learned in zip(lengths, targets, strict=True)
        )

    def flops_per_token(self, length: float, settings: Settings, target_share: float = 1.0) -> float:
        """FLOPs per token of a step whose samples have `length` tokens; target_share of them are learned."""
        f = self.facts
        share = 0.0 if settings.checkpoint == "none" else 1.0 if settings.layers < 0 else settings.layers / f.layers
        linear, trained = f.linear, f.lora  # what is recomputed of a layer
        if not self.traced:  # the memory-lean layer needs no output of its last product
            linear, trained = linear - f.down, trained - f.lora_down
        products = 2 * (2 * f.linear + share * linear) + 2 * (3 * f.lora + share * trained)
        if not self.traced:
            products += 2 * f.lora_a  # B's gradient needs x A^T once more
        again = share * (settings.checkpoint == "full")
        seen = f.window * (1 - f.window / (2 * length)) if 0 < f.window < length else length / 2  # keys, on average
        attention = 4 * seen * f.query * f.layers * (3.5 + again)
        return products + attention + 4 * target_share * f.vocab * f.hidden


def most_tokens(fits: Callable[[int], bool]) -> int:
    """The largest number that fits (0 = not even 1), where all below a number that fits do; at most 2^30."""
    low, high = 0, 1
    while fits(high) and high < 1 << 30:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Wanted:
    """The flags: what the user fixed, and what is left to the plan."""

    checkpoint: str = "auto"
    offload: bool = False
    tile_rows: int = 0


def check_served(wanted: Wanted, traced: Traced | None) -> None:
    """Transformers' own layers know two levels: what only the memory-lean layer can do is refused by name."""
    if traced is None:
        return
    for flag, asked in (
        ("--checkpoint attention", wanted.checkpoint == "attention"),
        ("--offload", wanted.offload),
        ("--tile-rows", bool(wanted.tile_rows)),
    ):
        if asked:
            raise UserError(f"{flag} needs the memory-lean layer, which does not serve this model", "--checkpoint full")


# ---------------------------------------------------------------------------------------------------------
# Time


def peak_flops(device: torch.device) -> tuple[float, str]:
    """(FLOP/s at the best, where the number is from). 0 for a card that the table does not know."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        card = card_named(name)
        return (1e12 * card.tflops, f"{name}, dense bf16 by its data sheet") if card and card.tflops else (0.0, name)
    return measured_flops(), f"one matrix product on {torch.get_num_threads()} threads, measured"


def cards_of(gigabytes: float) -> dict[str, float]:
    """Name -> FLOP/s of the cards with about so much memory."""
    near = {name: card for name, card in CARDS.items() if abs(card.gigabytes - gigabytes) <= 0.1 * card.gigabytes}
    return {name: 1e12 * card.tflops for name, card in near.items() if card.tflops}


def measured_flops(size: int = 1024) -> float:
    """What fp32 matrix products reach on this CPU, FLOP/s."""
    x = torch.randn(size, size)
    x @ x
    started = time.perf_counter()
    x @ x
    return 2 * size**3 / (time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------------
# For people


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


def largest_component(budget: Budget, settings: Settings, tokens: int) -> tuple[str, float, str]:
    """(name, bytes, what helps) of what takes most of a step."""
    parts = {**budget.static(), **budget.activations(settings, tokens)}
    name = max((n for n in parts if n in HELPS), key=parts.__getitem__)
    if name == "kept activations" and settings.checkpoint == "full":
        return name, parts[name], HELPS["reserve"]
    return name, parts[name], HELPS[name]


def table(budget: Budget, wanted: Wanted, tokens: int, room: float) -> tuple[list[str], dict]:
    """(lines to print, the same as a record): the components, each level beside them, and what is chosen."""
    chosen = budget.choose(wanted, tokens, room)
    levels = GENERIC_LEVELS if budget.traced else LEVELS
    columns = [Settings(level) for level in levels]
    if chosen not in columns:
        columns.append(chosen)
    heads = [c.checkpoint if c in columns[: len(levels)] else "chosen" for c in columns]
    lines = [f"{'GB at ' + format(tokens, ',') + ' tokens':36}" + "".join(f"{h:>11}" for h in heads)]
    for name, size in budget.static().items():
        lines.append(f"  {name:34}" + f"{size / 1e9:11.2f}" * len(columns))
    parts = [budget.activations(c, tokens) for c in columns]
    for name in dict.fromkeys(n for p in parts for n in p):
        lines.append(f"  {name:34}" + "".join(f"{p.get(name, 0) / 1e9:11.2f}" for p in parts))
    totals = [budget.card_bytes(c, tokens) for c in columns]
    lines.append(f"  {'in all':34}" + "".join(f"{t / 1e9:11.2f}" for t in totals))
    longest, need = budget.longest(wanted, room), budget.card_bytes(chosen, tokens)
    fits = need <= room
    lines.append(f"chosen: {chosen}, {need / 1e9:.1f} of {room / 1e9:.1f} GB" + ("" if fits else ": DOES NOT FIT"))
    lines.append(f"the longest row that fits: {longest:,} tokens, with {budget.choose(wanted, longest, room)}")
    record = {
        "tokens": tokens,
        "room_gb": round(room / 1e9, 3),
        "checkpoint": chosen.checkpoint,
        "layers": chosen.layers,
        "offload": chosen.offload,
        "tile_rows": chosen.tile_rows,
        "fits": fits,
        "longest": longest,
        "gb": {n: round(b / 1e9, 3) for n, b in {**budget.static(), **budget.activations(chosen, tokens)}.items()},
        "gflop_per_token": round(budget.flops_per_token(tokens, chosen) / 1e9, 2),
    }
    return lines, record


def time_lines(flops: float, peaks: dict[str, float]) -> list[str]:
    """The floor of a step of so many FLOPs, one line a card (name -> FLOP/s)."""
    return [
        f"at least {flops / peak:,.2f} s a step at {peak / 1e12:,.3g} TFLOP/s: {name}" for name, peak in peaks.items()
    ]
