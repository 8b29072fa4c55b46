"""How fast a machine gets work done, and what it holds: seconds and bytes of the work that yields.py counts.

Sampling is bound by memory (the weights are read once for each step of the batch, the keys and values of its texts too)
and by arithmetic (two FLOPs per weight and token); a step is taken to need the sum of both, at a share of what the
machine can do at best. Training is bound by arithmetic, which training/budget.py counts. Those shares are assumptions
with names, like the yields; a run replaces them with what its first stages have reached.

`ask` finds out about model and machine. That needs torch, so it happens in a process that ends: run.py itself neither
holds that memory nor opens a GPU's context. No torch here otherwise.
"""

import argparse
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lengthen import cli
from lengthen.cli import ModelFlags
from lengthen.costs.yields import Assumption, Work
from lengthen.models.cards import CARDS, card_named, physical_memory
from lengthen.records import UserError
from lengthen.sampling.request import ROWS
from lengthen.training.settings import LoraFlags, MemoryFlags, OptimizerFlags

ROOT = Path(__file__).parents[2]
HERE = "here"  # instead of a card's name: the machine this runs on
OPENING, OPENING_BYTES = 6.0, 1e9  # seconds to import torch and build a model; bytes of weights read per second
RESERVE = 1e9  # bytes of a card that are neither weights nor keys and values while it samples
RECORD_BYTES = 12.0  # on disk per token drawn: 4.5 characters, and again in the files that follow
CHECKPOINTS = 1 + 2 * 3  # adapters' sizes in the folder of a training: the adapter; two states with AdamW's moments
FIXED = (
    f"a stage opens in {OPENING:.0f} s and reads its weights at {OPENING_BYTES / 1e9:g} GB/s; "
    f"{RECORD_BYTES:.0f} bytes on disk per token drawn"
)
TABLE_FROM = 128  # tokens: the shortest row whose training is looked up
SHARES = {
    "writing": Assumption(0.8, 0.5, 0.3, "share of the machine's best that drawing texts reaches", "2-core CPUs"),
    "reading": Assumption(0.9, 0.6, 0.35, "the same, of reading prompts", "2-core CPUs"),
    "training": Assumption(0.9, 0.65, 0.35, "the same, of training", "2-core CPUs"),
}


@dataclass(frozen=True)
class Machine:
    """What is known of a model on a machine: plain numbers, bytes and FLOPs."""

    name: str
    cuda: bool
    flops: float  # FLOP/s of matrix products in the model's dtype, at best
    bandwidth: float  # bytes/s of its memory
    memory: float  # bytes of it
    context: int  # of the model, tokens
    parameters: float
    linear: float  # weights of all linear layers of the decoder
    head: float  # vocabulary x hidden size
    weights: float  # bytes of the model in memory
    step: float  # bytes of weights that a decoding step reads (and, of NF4, writes and reads once more)
    kv: float  # bytes of a token's keys and values
    adapter: float  # bytes of an adapter on disk
    training: tuple[tuple[int, float, float], ...]  # (tokens of a row, FLOPs per token, bytes at the peak of its step)
    slower: float = 1.0  # times that drawing and training take longer, for what stays in fp32

    def rows(self, work: Work, flags: Mapping[str, Any]) -> float:
        """Texts that are decoded at a time."""
        rows = min(flags["max_rows"] or ROWS["cuda" if self.cuda else "cpu"], work.calls)
        if self.cuda:
            room = 0.9 * (self.memory - self.weights - RESERVE)  # of which a text takes pages as it grows
            rows = min(rows, room / self.token(flags) / max(1.0, work.length))
        return max(1.0, rows)

    def token(self, flags: Mapping[str, Any]) -> float:
        """Bytes of a token's keys and values."""
        return self.kv / 2 if flags["kv_cache"] == "fp8" else self.kv

    @property
    def opening(self) -> float:
        """Seconds until a stage has its model."""
        return OPENING + self.weights / OPENING_BYTES

    def seconds(self, work: Work, flags: Mapping[str, Any], level: int = 1) -> float:
        """Of a stage. level: 0, 1 or 2, where the shares are those of a cheap, a likely or a dear run."""
        share = {name: value.values[level] for name, value in SHARES.items()}
        if "rank" in flags:  # a training
            per_token = self.looked_up(work.length, 1) - 4 * (1 - work.targets) * self.head
            return self.opening + work.tokens * per_token * self.slower / self.flops / share["training"]
        # The longest chain of calls goes on when other texts have ended: steps with few texts cost as many weights.
        steps = max(work.tokens / self.rows(work, flags), min(work.serial, work.tokens))
        read = steps * self.step + work.tokens * work.length * self.token(flags)
        drawing = read / self.bandwidth + work.tokens * 2 * (self.linear + self.head) * self.slower / self.flops
        reading = work.read * 2 * self.linear / self.flops
        return self.opening + drawing / share["writing"] + reading / share["reading"]

    def bytes(self, work: Work, flags: Mapping[str, Any]) -> float:
        """In the memory of the card, or of this computer."""
        if "rank" in flags:
            return self.looked_up(work.longest, 2)
        return self.weights + self.rows(work, flags) * work.length * self.token(flags) + RESERVE

    def looked_up(self, tokens: float, column: int) -> float:
        """A column of `training` at so many tokens, on the line between its two neighbours."""
        below = [row for row in self.training[:-1] if row[0] <= tokens] or [self.training[0]]
        (low, *_), (high, *_) = a, b = below[-1], self.training[self.training.index(below[-1]) + 1]
        return a[column] + (b[column] - a[column]) * (tokens - low) / (high - low)

    def disk(self, work: Work, flags: Mapping[str, Any]) -> float:
        """Bytes on disk while a stage runs."""
        return CHECKPOINTS * self.adapter if "rank" in flags else RECORD_BYTES * work.tokens


def ask(card: str, given: Mapping[str, Any]) -> Machine:
    """Model and machine, found out by a process of its own. UserError for a card or a model that is not known.

    given: flags of models and of trainings, by name; the others have their defaults.
    """
    if card != HERE and card_named(card) is None:
        raise UserError(f"--plan knows no card {card!r}", "one of " + ", ".join(CARDS))
    flags = argparse.Namespace(**given)
    model, lora, memory = (cli.take(flags, ModelFlags), cli.take(flags, LoraFlags), cli.take(flags, MemoryFlags))
    adam_bits = cli.take(flags, OptimizerFlags).adam_bits
    # The child starts without our threads, and ends with all that torch took; Ctrl-C ends it without a word.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); sys.path.insert(0, sys.argv[1]); "
    code += "from lengthen.costs.machine import answer; answer()"
    job = pickle.dumps((card, model, lora, memory, adam_bits))
    child = subprocess.run([sys.executable, "-c", code, str(ROOT)], input=job, stdout=subprocess.PIPE, check=False)
    if child.returncode:
        raise UserError("the process that looks at the model was ended, perhaps for want of memory")
    found = pickle.loads(child.stdout)
    if isinstance(found, UserError):
        raise found
    return found


def answer() -> None:
    """The child of `ask`: arguments of `find_out` on stdin, a Machine or a UserError on stdout, both pickled."""
    job = pickle.load(sys.stdin.buffer)
    stdout = os.dup(1)
    os.dup2(2, 1)  # what libraries print is not the answer
    try:
        found: Machine | UserError = find_out(*job)
    except UserError as error:
        found = error
    with os.fdopen(stdout, "wb") as file:
        pickle.dump(found, file)


def find_out(card: str, flags: ModelFlags, lora: LoraFlags, memory: MemoryFlags, adam_bits: int) -> Machine:
    """`ask`, in this process."""
    import torch

    from lengthen.models.loading import choose_dtype, memory_of
    from lengthen.sampling.meter import bandwidth
    from lengthen.training.budget import NF4_BYTES
    from lengthen.training.plan import measured_flops, outline_of, peak_flops

    known, slower = card_named(card), 1.0
    gpu = torch.device("cuda") if not known and torch.cuda.is_available() and flags.device != "cpu" else None
    if gpu:
        name, size = torch.cuda.get_device_name(gpu), float(memory_of(gpu))
        flops, speed = peak_flops(gpu, torch.bfloat16)[0], bandwidth(gpu)
    elif known:
        name, size, flops, speed = card, 1e9 * known.gigabytes, 1e12 * known.tflops, 1e12 * known.bandwidth
    else:
        name, size = f"this CPU, {torch.get_num_threads()} threads", float(physical_memory())
        asked, _ = choose_dtype(flags.dtype, torch.device("cpu"))
        flops, fp32 = (max(measured_flops(dtype) for _ in range(5)) for dtype in (asked, torch.float32))
        # Attention's softmax, norms and the loss are no faster in bf16, where products may be six times as fast.
        slower, speed = max(1.0, (1 + flops / fp32) / 2), bandwidth(torch.device("cpu"))
    if not flops:
        raise UserError(f"no plan for {name}: how fast it is with bf16 is not known", '--plan "A10", or another card')
    cuda = bool(gpu or known)
    device = torch.device("cuda" if cuda else "cpu")
    budget, context, _, quantize = outline_of(flags, lora, memory, adam_bits, device, size * cuda)
    shape, static, room = budget.shape, budget.static(), 1e9 * memory.vram or size
    head = float(shape.vocab * shape.hidden)
    lengths = [TABLE_FROM << i for i in range(20) if i < 2 or TABLE_FROM << i < 2 * context]  # a line has two ends
    chosen = [(tokens, budget.choose(memory, tokens, room)) for tokens in lengths]
    return Machine(
        name=name,
        cuda=cuda,
        flops=flops,
        bandwidth=speed,
        memory=size,
        context=context,
        parameters=float(shape.linear + shape.embedding + shape.rest),
        linear=float(shape.linear),
        head=head,
        weights=sum(static[part] for part in ("linear weights", "embedding and head", "norms and biases")),
        step=shape.linear * (NF4_BYTES + 2 * shape.item if quantize == "nf4" else shape.item) + head * shape.item,
        kv=2.0 * shape.layers * shape.key * shape.item,
        adapter=4.0 * shape.lora,
        training=tuple((n, budget.flops_per_token(n, how), budget.card_bytes(how, n)) for n, how in chosen),
        slower=slower,
    )
