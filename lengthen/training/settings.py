"""The settings of a training, typed: each flag of train.py is declared here once, and run.py passes it on by name.

A class for each concern; the machinery takes the ones that concern it. No torch here.
"""

from dataclasses import dataclass, field

from lengthen.cli import REQUIRED, InputFlags, ModelFlags, OutputFlags, at_least, between, flag
from lengthen.records import UserError

MAX_LENGTH = {"generator": 16384, "extender": 32768}  # tokens of prompt + answer; the release cuts both at 16,384
# What of a layer the backward pass computes again: "none" of it, all but "attention", or the "full" layer.
CHECKPOINTS = ("none", "attention", "full")


@dataclass(frozen=True)
class PairFlags:
    """Which samples are made of the records."""

    role: str = flag(REQUIRED, "which pairs are made", choices=("generator", "extender"))
    max_length: int = flag(
        0,
        "longest pair in tokens; 0 = 16384 generator, 32768 extender, or the context where that is less",
        at_least(0),
    )
    keep_lines: float = flag(0.8, "share of a draft's lines the Extender sees", between(0.01, 1))
    no_line_removal: bool = flag(False, "control: show the Extender whole drafts")

    @property
    def kept_lines(self) -> float:
        """keep_lines, or 1 in the control without line removal."""
        return 1.0 if self.no_line_removal else self.keep_lines

    def longest(self, context: int) -> int:
        """The longest pair, in tokens, of a model with that context."""
        return min(self.max_length or MAX_LENGTH[self.role], context)


@dataclass(frozen=True)
class LoraFlags:
    """The adapter."""

    rank: int = flag(8, "rank of each layer's update", at_least(1))
    alpha: float = flag(16, "the update is scaled by alpha / rank", at_least(0.001, float))
    dropout: float = flag(0.0, "share of a layer's inputs that LoRA does not see", between(0, 0.99))
    targets: list[str] = flag(["all-linear"], "layers by name (q_proj v_proj), or all-linear")

    @property
    def layers(self) -> str | list[str]:
        """The targets as lora.select_targets takes them."""
        return "all-linear" if self.targets == ["all-linear"] else sorted(self.targets)


@dataclass(frozen=True)
class OptimizerFlags:
    """Steps: how many, of how many pairs, how far each goes."""

    epochs: int = flag(4, "passes over the pairs", at_least(1))
    budget_of: str = flag("", "control: as many target tokens as that training, not --epochs", metavar="ADAPTER")
    learning_rate: float = flag(1e-4, "peak learning rate, reached after the warm-up", at_least(0, float))
    adam_bits: int = flag(32, "bits per AdamW moment: 32, or 8 through bitsandbytes", choices=(32, 8))
    batch_size: int = flag(1, "pairs packed into a row; memory may split it, the result stays the same", at_least(1))
    accumulate: int = flag(1, "packed rows per optimizer step, weighted by their tokens", at_least(1))

    @property
    def pairs_per_step(self) -> int:
        return self.batch_size * self.accumulate


@dataclass(frozen=True)
class MemoryFlags:
    """What a step may take, and what is left to the plan (training/policy.py)."""

    vram: float = flag(
        0.0,
        "GB to stay within; 0 = what the GPU has free, on a CPU 3 GB of activations beside the weights",
        at_least(0, float),
    )
    checkpoint: str = flag(
        "auto",
        "recompute nothing, all but attention, or whole layers; auto = the least that fits, row by row",
        choices=("auto", *CHECKPOINTS),
    )
    offload: bool = flag(False, "keep in host memory what waits for the backward pass")
    host_gb: float = flag(0.0, "GB of host memory that --offload may take; 0 = what it needs", at_least(0, float))
    embeddings: str = flag("device", "where the input embedding is stored", choices=("device", "host"))
    tile_rows: int = flag(0, "tokens that an MLP computes at a time; 0 = by the plan", at_least(0))
    auto_shrink: bool = flag(False, "out of memory: do the step again and recompute more")


@dataclass(frozen=True)
class RuntimeFlags:
    """What changes no result."""

    plan: bool = flag(False, "print what a step takes and the longest row that fits, and stop; loads no weights")
    save_every: int = flag(20, "optimizer steps between checkpoints", at_least(1))
    merge_to: str = flag("", "also write the merged model into this folder")
    gguf: str = flag("", "also write the merged model into this file, for llama.cpp and Ollama", metavar="FILE")
    gguf_type: str = flag("f16", "of the matrices in --gguf: q8_0 is half as large", choices=("f16", "q8_0"))

    def __post_init__(self) -> None:
        if self.gguf and not self.merge_to:
            raise UserError("--gguf is made of the merged model's folder", f"--merge-to FOLDER --gguf {self.gguf}")


GROUPS: dict[str, type] = {  # of the command line, in the order of Training's fields
    "input": InputFlags,
    "output": OutputFlags,
    "model": ModelFlags,
    "pairs": PairFlags,
    "LoRA": LoraFlags,
    "optimization": OptimizerFlags,
    "memory": MemoryFlags,
    "runtime": RuntimeFlags,
}


@dataclass(frozen=True)
class Training:
    """All settings of one training."""

    inputs: InputFlags
    out: OutputFlags
    model: ModelFlags
    pairs: PairFlags
    lora: LoraFlags = field(default_factory=LoraFlags)
    optimizer: OptimizerFlags = field(default_factory=OptimizerFlags)
    memory: MemoryFlags = field(default_factory=MemoryFlags)
    runtime: RuntimeFlags = field(default_factory=RuntimeFlags)

    def __post_init__(self) -> None:
        if self.model.dtype == "float16":
            raise UserError(
                "--dtype float16: gradients below 6e-8 would become 0 in it, and no loss scaling is done here",
                "--dtype bfloat16, or float32",
            )

    def recorded(self) -> dict[str, object]:
        """All that changes the result: a run that goes on must have the same."""
        return {
            "role": self.pairs.role,
            "language": self.out.language,
            "seed": self.out.seed,
            "quantize": self.model.quantize,
            "max_length": self.pairs.max_length,
            "keep_lines": self.pairs.kept_lines,
            "rank": self.lora.rank,
            "alpha": self.lora.alpha,
            "dropout": self.lora.dropout,
            "targets": self.lora.layers,
            "epochs": self.optimizer.epochs,
            "learning_rate": self.optimizer.learning_rate,
            "adam_bits": self.optimizer.adam_bits,
            "batch_size": self.optimizer.batch_size,
            "accumulate": self.optimizer.accumulate,
        }


@dataclass(frozen=True)
class Recompute:
    """How the backward pass of a row gets what it needs: what is stored, where, and what is computed again.

    checkpoint: one of CHECKPOINTS. layers: how many, from the first, follow that, -1 = all; the others store
    everything. offload: what those layers store waits in host memory. tile_rows: tokens that an MLP computes at a time,
    0 = all.
    """

    checkpoint: str = "none"
    layers: int = -1
    offload: bool = False
    tile_rows: int = 0

    def __post_init__(self) -> None:
        assert self.checkpoint in CHECKPOINTS and self.tile_rows >= 0, self

    def __str__(self) -> str:
        first = f" in the first {self.layers} layers" if self.checkpoint != "none" and self.layers >= 0 else ""
        more = " --offload" * self.offload + f" --tile-rows {self.tile_rows}" * bool(self.tile_rows)
        return f"--checkpoint {self.checkpoint}{first}{more}"
