"""What a training says of each step: a line for people, a record of train_log.jsonl, TensorBoard, and the curve."""

import resource
import statistics
from pathlib import Path

import torch

from lengthen.records import UserError
from lengthen.training.pairs import Pair


def log_entry(
    step: int, per_epoch: int, result, rate: float, batch: list[Pair], seconds: float, peak: float, device
) -> dict:
    """One record of train_log.jsonl; -1 = not known, or not finite.

    step from 0. result: what train.train_step returns. seconds: of the step. peak: FLOP/s of all devices, 0 = unknown.
    """
    tokens, finite = sum(len(p.ids) for p in batch), result.skipped != "not finite"
    share = 100 * result.flops / seconds / peak if peak else -1.0
    return {
        "step": step + 1,
        "epoch": step // per_epoch,
        "loss": result.loss if finite else -1.0,
        "accuracy": round(result.accuracy, 4) if finite else -1.0,  # share of the targets that were the likeliest token
        "lr": rate,
        "grad_norm": result.norm if finite else -1.0,
        "tokens": tokens,
        "target_tokens": tokens - sum(p.num_prompt for p in batch),
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_percent": round(share, 2),  # of what the device's matrix products reach, by the plan's FLOPs
        "peak_gb": round(peak_bytes(device) / 1e9, 3),  # memory of this process so far; on a GPU the allocator's
        "padding": 0.0,  # share of padded positions: rows are packed, or one sample long
        "skipped": bool(result.skipped),
        "reason": result.skipped,
    }


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux


def step_line(result, entry: dict) -> str:
    """The entry for people."""
    peak = f" | {entry['peak_percent']:.0f} % of peak" if entry["peak_percent"] >= 0 else ""
    return (
        f"loss {result.loss:.4f} | accuracy {result.accuracy:.1%} | lr {entry['lr']:.2e} | "
        f"grad norm {result.norm:.3f} | {entry['tokens_per_second']:,.0f} tok/s{peak} | {entry['peak_gb']:.2f} GB"
        + (f" | skipped: {result.skipped}" if result.skipped else "")
    )


def open_tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package that is not installed", "pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"))


def plot_loss(entries: list[dict], path: Path, title: str) -> None:
    """The loss of each step and its running mean, as a small PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [e["step"] for e in entries if not e["skipped"]]
    losses = [e["loss"] for e in entries if not e["skipped"]]
    window = len(losses) // 20
    if window < 5:  # few steps: an epoch, in which every pair counts once
        window = max(1, sum(e["epoch"] == 0 for e in entries))
    smooth = [statistics.fmean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
    figure, axis = plt.subplots(figsize=(6, 3.5), dpi=110)
    axis.plot(steps, losses, color="#9ecae1", linewidth=1, label="step")
    axis.plot(steps, smooth, color="#08519c", linewidth=1.8, label=f"mean of {window}")
    axis.set(xlabel="step", ylabel="loss, nats per target token", title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(path)
