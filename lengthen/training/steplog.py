"""What a training says of each step: a line for people, a record of train_log.jsonl, the curve. No torch at import."""

import resource
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from lengthen.training.pairs import Pair

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure


class Step(NamedTuple):
    """What an optimizer step did."""

    loss: float  # mean over the target tokens, nats
    norm: float  # of the gradient, before clipping
    accuracy: float  # share of the targets that were the likeliest token
    skipped: str  # why weights and optimizer were left alone, "" = they were not
    flops: float  # recomputed ones included; 0 = not known


def log_entry(
    step: int,
    per_epoch: int,
    result: Step,
    rate: float,
    batch: list[Pair],
    seconds: float,
    peak_flops: float,
    device: "torch.device",
) -> dict[str, Any]:
    """One record of train_log.jsonl; -1 = not known, or not finite.

    step from 0. rate: the learning rate. seconds: of the step. peak_flops: FLOP/s of all devices, 0 = unknown.
    """
    tokens, finite = sum(len(p.ids) for p in batch), result.skipped != "not finite"
    percent = 100 * result.flops / seconds / peak_flops if peak_flops else -1.0
    return {
        "step": step + 1,
        "epoch": step // per_epoch,
        "loss": result.loss if finite else -1.0,
        "accuracy": round(result.accuracy, 4) if finite else -1.0,
        "lr": rate,
        "grad_norm": result.norm if finite else -1.0,
        "tokens": tokens,
        "target_tokens": sum(p.num_targets for p in batch),
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_percent": round(percent, 2),  # of what the device's matrix products reach, by the plan's FLOPs
        "peak_gb": round(peak_bytes(device) / 1e9, 3),  # of this process so far; on a GPU what torch allocated
        "skipped": bool(result.skipped),
        "reason": result.skipped,
    }


def peak_bytes(device: "torch.device") -> int:
    """The most memory that this process held so far."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux


def step_line(result: Step, entry: dict[str, Any]) -> str:
    """The entry for people."""
    peak = f" | {entry['peak_percent']:.0f} % of peak" if entry["peak_percent"] >= 0 else ""
    return (
        f"loss {result.loss:.4f} | accuracy {result.accuracy:.1%} | lr {entry['lr']:.2e} | "
        f"grad norm {result.norm:.3f} | {entry['tokens_per_second']:,.0f} tok/s{peak} | {entry['peak_gb']:.2f} GB"
        + (f" | skipped: {result.skipped}" if result.skipped else "")
    )


def totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary's numbers of a run: losses of the first and the last tenth of the steps, tokens, seconds."""
    losses = [e["loss"] for e in entries if not e["skipped"]]
    tenth = max(1, len(losses) // 10)
    tokens, seconds = sum(e["tokens"] for e in entries), sum(e["seconds"] for e in entries)
    return {
        "skipped_steps": sum(e["skipped"] for e in entries),
        "first_loss": round(statistics.fmean(losses[:tenth]), 4) if losses else -1.0,
        "last_loss": round(statistics.fmean(losses[-tenth:]), 4) if losses else -1.0,
        "tokens": tokens,
        "target_tokens": sum(e["target_tokens"] for e in entries),
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds": round(seconds, 1),
    }


def plot_loss(entries: list[dict[str, Any]], title: str) -> "Figure":
    """The loss of each step and its running mean."""
    from matplotlib.figure import Figure

    steps = [e["step"] for e in entries if not e["skipped"]]
    losses = [e["loss"] for e in entries if not e["skipped"]]
    window = len(losses) // 20
    if window < 5:  # few steps: an epoch, in which every pair counts once
        window = max(1, sum(e["epoch"] == 0 for e in entries))
    smooth = [statistics.fmean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
    figure = Figure(figsize=(6, 3.5), dpi=110)
    axis = figure.subplots()
    axis.plot(steps, losses, color="#9ecae1", linewidth=1, label="step")
    axis.plot(steps, smooth, color="#08519c", linewidth=1.8, label=f"mean of {window}")
    axis.set(xlabel="step", ylabel="loss, nats per target token", title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    return figure
