"""What a training step takes in memory and time: arithmetic on the shape of a model, before a weight is loaded.

A step's peak (GB = 1e9 bytes) is the sum of

    weights       frozen: linear layers (NF4: 4.127 bits each), embedding and head, norms and biases
    dequantised   the largest matrix, for as long as it is multiplied (NF4 only)
    LoRA          fp32 weights, gradients and Adam's two moments: 16 bytes per parameter, 10 with moments of 8 bits;
                  bf16 copies while they are used
    kept          what the forward pass leaves for the backward pass, by the level of --checkpoint
    working set   what the backward pass of one layer holds beside that, or the loss, whichever is more
    reserve       CUDA's context, cuBLAS's workspaces, and a tenth of the activations for allocator fragmentation

and all but the activations are known from the shapes. For transformers' own layers, of any model, the activations are
not derived but counted (lengthen/training/shapes.py, `trace`): both sums are linear in the tokens and the layers. For a
memory-lean layer (the Llama family) they are added up vector by vector, `lean_kept` and `lean_backward`; per token and
layer:

    level       kept                                                  recomputed
    none        X, q, k, v, out, lse, X', gate, up                    norms and activation, in one pass each
    attention   X, out, lse                                           q, k, v, o, gate, up; attention not
    full        X                                                     the same, and attention

--offload moves what is kept to pinned host memory, except for the two layers being copied, and --host-gb bounds that;
--embeddings host leaves the input embedding there, of which a row needs T lines; --tile-rows computes the MLP so many
tokens at a time. A plan may treat only the first layers this way: `Recompute.layers`.

Time is the floor: FLOPs / the card's dense bf16 peak. Per token, N the weights of the linear layers, T the length:
    linear      2 N per pass: forward, gradient of the input, and what is recomputed (never the gradient of W: frozen)
    attention   2 T Q L per forward pass (two products, causal: half the square; less with a sliding window), 2.5 times
                that backward
    LoRA        2 per parameter and pass, and 2 for its own gradient
    loss        4 V H per target: the logits, and their product with the head
The formulae are those of "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), section 4,
with a frozen base, FlashAttention and a loss without logits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from kernels import HAS_NUMBA
from kernels.linear_cross_entropy import CPU_TILE_ELEMENTS, TORCH_ROWS, WORKSPACE_BYTES
from lengthen.records import UserError
from lengthen.training import offload
from lengthen.training.settings import CHECKPOINTS, MemoryFlags, Recompute

GENERIC_CHECKPOINTS = ("none", "full")  # what transformers' own layers can do
TILE_ROWS = 4096  # tokens of an MLP tile: large enough for full matrix products, 0.6 GB on an 8B model
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # 4 bits, a scale of 8 bits for 64 weights, an fp32 constant for 256 scales
MOMENT_BYTES = {32: 8, 8: 2 + 2 * 4 / 256}  # AdamW's two, per parameter; 8 bits: and an fp32 scale for 256 of each
CONTEXT_BYTES = 1.0e9  # CUDA context, cuBLAS workspaces
SLACK = 0.10  # of the activations: free blocks of the allocator that are too small for what is asked for
SCORE_BYTES = 2**20  # of torch's attention on a CPU, backward: scores and their gradient, fp32 [256, 512], per thread
BUFFERED_LAYERS = 2  # offloading: one layer is copied while another is in use


# ---------------------------------------------------------------------------------------------------------
# What is known of a model


@dataclass(frozen=True)
class Shape:
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
    window: int  # tokens that a token attends to, itself included; 0 = all before it
    item: int  # bytes of an activation
    nf4: bool
    cuda: bool


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


# ---------------------------------------------------------------------------------------------------------
# Bytes


def lean_kept(shape: Shape, checkpoint: str) -> float:
    """Bytes per token that the memory-lean layer keeps."""
    h, q, k, i = (shape.item * n for n in (shape.hidden, shape.query, shape.key, shape.intermediate))
    lse = max(4, shape.item) * shape.heads
    return {"none": 2 * h + 2 * q + 2 * k + 2 * i + lse, "attention": h + q + lse, "full": h}[checkpoint]


def lean_backward(shape: Shape, tokens: int, how: Recompute) -> float:
    """Bytes of the working set of its backward pass: the MLP's tiles, or attention, whichever is more.

    In both there are dY [T, H] and dO [T, Q]. MLP, per tile: X' and its norm; gate, up and one gradient, overwritten
    (torch's own passes on a CPU, without Numba: two more). Attention: q, k, v and their gradients, those of k and v
    once per query head and then summed; FlashAttention 2 sums dQ in fp32, torch on a CPU copies dO where query heads
    share keys, and has scores of each thread. NF4: the weights of the half that is computed, dequantised. Where queries
    and keys have norms of their own, they are there twice.
    """
    f, level = shape, how.checkpoint
    h, q, k, i = (f.item * n for n in (f.hidden, f.query, f.key, f.intermediate))
    rows = min(tokens, how.tile_rows or tokens)
    if level == "none":  # q, k, v, X', gate and up are kept
        mlp, attention = rows * (h + i), 0
    else:
        mlp, attention = rows * (2 * h + 3 * i), tokens * (q + 2 * k)
    if level == "full":  # attention runs once more, first
        mlp, attention = mlp + tokens * (2 * q + 2 * k), attention + tokens * q
    attention += tokens * (3 * q + f.item * f.normed)
    if f.cuda:
        attention += tokens * (2 * k + 4 * f.query)
    else:  # the copy is gone when the sums come
        mlp += 0 if HAS_NUMBA else rows * 2 * i
        attention += max(tokens * 2 * k, tokens * q + SCORE_BYTES * torch.get_num_threads())
    if f.nf4:
        mlp += 3 * f.hidden * i + f.hidden * q
        attention += f.hidden * (q + 2 * k)
    return max(mlp, attention) + tokens * (h + q)


def loss_bytes(shape: Shape, targets: int) -> float:
    """The hidden states of the targets, their gradient, and the workspace of kernels/linear_cross_entropy.py."""
    if shape.cuda:
        workspace = WORKSPACE_BYTES
    else:  # two tiles of logits; fp32 copies of the rows, the targets' weights and the gradient
        rows = min(TORCH_ROWS, targets)
        width = max(256, CPU_TILE_ELEMENTS // max(rows, 256) // 256 * 256)
        workspace = 4 * rows * (2 * min(width, shape.vocab) + 4 * shape.hidden)
    return 2 * targets * shape.hidden * shape.item + workspace


class Budget:
    """What a step of this model takes; `traced` = transformers' layers, None = the memory-lean layer.

    adam_bits: of AdamW's moments, 32 or 8. host_bytes: the most that --offload may move, 0 = all of it.
    """

    def __init__(self, shape: Shape, traced: Traced | None, adam_bits: int = 32, host_bytes: float = 0.0):
        self.shape, self.traced, self.adam_bits, self.host_bytes = shape, traced, adam_bits, host_bytes

    def static(self) -> dict[str, float]:
        """Component -> bytes that are there whatever the length."""
        f = self.shape
        components = {
            "linear weights": f.linear * (NF4_BYTES if f.nf4 else f.item),
            "embedding and head": float(f.embedding * f.item),
            "norms and biases": float(f.rest * f.item),
        }
        if f.nf4 and self.traced:  # the memory-lean layer counts its own
            components["dequantised weight"] = float(f.largest * f.item)
        each = {"LoRA weights": 4, "LoRA gradients": 4, "optimizer moments": MOMENT_BYTES[self.adam_bits]}
        return components | {name: float(f.lora * size) for name, size in each.items()}

    def activations(self, how: Recompute, tokens: int, targets: int = -1) -> dict[str, float]:
        """Component -> bytes that a row of so many tokens adds; targets: tokens that are learned (-1 = all).

        "offloaded (host memory)" is not on the card.
        """
        f = self.shape
        targets = tokens if targets < 0 else targets
        following = f.layers if how.layers < 0 else how.layers  # layers that follow how.checkpoint
        offloaded = 0.0
        if self.traced:
            each, all_kept = float(f.hidden * f.item * tokens), self.traced.layer(tokens)
            following = 0 if how.checkpoint == "none" else following
            kept = self.traced.outside(tokens) + (f.layers - following) * all_kept + following * each
            work = self.traced.backward(tokens)
            if f.cuda:  # inside FlashAttention's backward pass, where the count does not see it
                work += tokens * (4 * f.query + 2 * f.item * f.query * (f.key < f.query))
            if following == f.layers:
                work += all_kept  # the layer that is recomputed is whole again
        else:
            each = lean_kept(f, how.checkpoint) * tokens
            kept = (f.layers - following) * lean_kept(f, "none") * tokens + following * each
            if how.offload:
                moved = float(following - BUFFERED_LAYERS)
                if self.host_bytes:  # whole layers move, in whole slabs
                    moved = min(moved, self.host_bytes // offload.SLAB // math.ceil(each / offload.SLAB))
                offloaded = max(0, moved) * each
            work = lean_backward(f, tokens, how)
        loss = loss_bytes(f, targets)
        components = {"kept activations": kept - offloaded}
        components["working set of a layer's backward" if work >= loss else "loss"] = max(work, loss)
        components["reserve"] = (CONTEXT_BYTES + SLACK * sum(components.values())) if f.cuda else 0.0
        return {**components, "offloaded (host memory)": offloaded}

    def card_bytes(self, how: Recompute, tokens: int, targets: int = -1) -> float:
        """All that is on the card at the peak of a step."""
        components = self.activations(how, tokens, targets)
        return sum(self.static().values()) + sum(components.values()) - components["offloaded (host memory)"]

    # -- the choice ----------------------------------------------------------------------------------------

    def candidates(self, flags: MemoryFlags, tokens: int) -> list[Recompute]:
        """All that the flags leave open, the one that computes least over so many tokens first."""
        levels: Sequence[str] = GENERIC_CHECKPOINTS if self.traced else CHECKPOINTS
        if flags.checkpoint != "auto":
            levels = (flags.checkpoint,)
        ways = []
        for level in levels:
            counts = range(1, self.shape.layers + 1) if flags.checkpoint == "auto" and level != "none" else (-1,)
            ways += [Recompute(level, -1 if n == self.shape.layers else n) for n in counts]
        if not self.traced:
            tiles = (flags.tile_rows,) if flags.tile_rows else (0, TILE_ROWS)
            ways = [replace(way, tile_rows=rows) for way in ways for rows in tiles]
            # All that "none" keeps is more than a bus can carry while a layer computes: only where it is asked for.
            movable = [w for w in ways if w.layers < 0 and (w.checkpoint != "none" or flags.checkpoint == "none")]
            moved = [replace(way, offload=True) for way in movable]
            ways = moved if flags.offload else ways + moved
        return sorted(ways, key=lambda way: (self.flops_per_token(tokens, way), way.offload, bool(way.tile_rows)))

    def choose(self, flags: MemoryFlags, tokens: int, room: float) -> Recompute:
        """The first candidate that fits into `room` bytes; the smallest where none does."""
        return self.first_that_fits(self.candidates(flags, tokens), tokens, room)

    def first_that_fits(self, candidates: Sequence[Recompute], tokens: int, room: float) -> Recompute:
        fitting = (way for way in candidates if self.card_bytes(way, tokens) <= room)
        return next(fitting, None) or min(candidates, key=lambda way: self.card_bytes(way, tokens))

    def longest(self, flags: MemoryFlags, room: float) -> int:
        """The most tokens of a row that fit with any of the candidates, 0 = none."""
        ways = self.candidates(flags, 1)
        return most_tokens(lambda tokens: any(self.card_bytes(way, tokens) <= room for way in ways))

    def flops(self, lengths: list[int], targets: list[int], how: Recompute) -> float:
        """FLOPs of a step over samples of these lengths, of which so many tokens are learned."""
        return sum(n * self.flops_per_token(n, how, learned / n) for n, learned in zip(lengths, targets, strict=True))

    def flops_per_token(self, length: float, how: Recompute, target_share: float = 1.0) -> float:
        """FLOPs per token of a step whose samples have `length` tokens; target_share of them are learned."""
        f = self.shape
        share = 0.0 if how.checkpoint == "none" else 1.0 if how.layers < 0 else how.layers / f.layers
        linear, trained = f.linear, f.lora  # what is recomputed of a layer
        if not self.traced:  # the memory-lean layer needs no output of its last product
            linear, trained = linear - f.down, trained - f.lora_down
        products = 2 * (2 * f.linear + share * linear) + 2 * (3 * f.lora + share * trained)
        if not self.traced:
            products += 2 * f.lora_a  # B's gradient needs x A^T once more
        again = share * (how.checkpoint == "full")
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


def check_served(flags: MemoryFlags, traced: Traced | None) -> None:
    """Transformers' own layers know two levels: what only the memory-lean layer can do is refused by name."""
    if traced is None:
        return
    for flag, asked in (
        ("--checkpoint attention", flags.checkpoint == "attention"),
        ("--offload", flags.offload),
        ("--tile-rows", bool(flags.tile_rows)),
    ):
        if asked:
            raise UserError(f"{flag} needs the memory-lean layer, which does not serve this model", "--checkpoint full")
