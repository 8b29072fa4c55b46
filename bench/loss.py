"""Loss of a frozen head: time, memory and error of kernels/linear_cross_entropy.py and of what else one could use.

    python bench/loss.py                       # on a GPU: the rows of the table in docs/results.md, minutes on an H100
    python bench/loss.py --device cpu           # small shapes: memory, accuracy, and the CPU path's time

Forward and backward of the mean loss, gradient of the hidden states only. Per method and length: milliseconds (median,
and first to third quartile), peak memory beyond the inputs and the returned gradient, and the time of the two matrix
products alone (logits and dH) as a share of the method's: 100 % is the floor for an exact gradient.
Errors are against float64 at 2,048 tokens (512 on a CPU): of the mean loss, and of dH relative to its norm.

Hidden states with peaks, because noise flatters kernels that skip small gradients: rows of W are random of length about
1; h is a sum of eight of them, the largest with coefficient log V + u, u uniform in [-4, 8], the others following at
exponential distances (mean 2); targets are drawn from softmax(h W^T), so that the loss equals the entropy, as in a
calibrated model. A method that is not installed or does not know a shape's softcap has no row; the reason is printed.
The table goes to stderr, the same data as one JSON line to stdout; --save keeps it (harness.py).
"""

import argparse
import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import harness

from kernels.linear_cross_entropy import linear_cross_entropy

# name: (vocabulary, hidden size, softcap)
SHAPES = {
    "Qwen2.5-7B": (152_064, 3584, None),
    "Llama-3.1-8B": (128_256, 4096, None),
    "Gemma-2-9B": (256_000, 3584, 30.0),
    "SmolLM2-135M": (49_152, 576, None),
}
GPU_SHAPES = ["Qwen2.5-7B", "Llama-3.1-8B", "Gemma-2-9B"]
GPU_TOKENS = [2048, 4096, 16_384, 32_768, 65_536]


def realistic(tokens: int, shape: tuple, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """The recipe of the docstring -> (hidden [T, H], weight [V, H], targets [T])."""
    vocab, dim, softcap = shape
    g = torch.Generator(device).manual_seed(0)
    weight = (torch.randn(vocab, dim, generator=g, device=device) / dim**0.5).to(dtype)
    hidden = torch.empty(tokens, dim, dtype=dtype, device=device)
    targets = torch.empty(tokens, dtype=torch.long, device=device)
    for rows in torch.arange(tokens, device=device).split(512):
        tops = torch.randint(0, vocab, (len(rows), 8), generator=g, device=device)
        peak = math.log(vocab) - 4 + 12 * torch.rand(len(rows), 1, generator=g, device=device)
        gaps = torch.empty(len(rows), 8, device=device).exponential_(0.5, generator=g).cumsum(1)
        coefficients = (peak - gaps + gaps[:, :1]).clamp(min=0).to(dtype)
        hidden[rows] = torch.einsum("tk,tkh->th", coefficients, weight[tops])
        z = (hidden[rows] @ weight.T).float()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        targets[rows] = torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]
    return hidden, weight, targets


# ---- the methods: f(hidden, weight, targets, softcap) -> mean loss ---------------------------------------------------


def eager(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    z = F.linear(hidden, weight)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z.float(), targets)


class RebuiltChunks(torch.autograd.Function):
    """The algorithm of torch 2.13's F.linear_cross_entropy, for a torch without it: chunks of rows, fp32 logits,
    gradient in the forward pass, elementwise passes one by one; 256 rows at T = 16,384 for Qwen2.5."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        wanted = max(1, len(hidden) // (2 * math.ceil(weight.shape[0] / weight.shape[1])))
        grad, loss = torch.empty_like(hidden), hidden.new_zeros((), dtype=torch.float32)
        for rows in torch.arange(len(hidden), device=hidden.device).split(2 ** math.ceil(math.log2(wanted))):
            h, t = hidden[rows[0] : rows[-1] + 1], targets[rows]
            z = torch.mm(h, weight.T, out_dtype=torch.float32) if h.is_cuda else (h @ weight.T).float()
            logp = z - z.logsumexp(1, keepdim=True)
            loss -= logp.gather(1, t[:, None]).sum()
            p = logp.exp_()
            p[torch.arange(len(t), device=t.device), t] -= 1
            grad[rows] = (p / len(hidden)).to(h.dtype) @ weight
        ctx.save_for_backward(grad)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None, None


def methods(device: str, dtype: torch.dtype, softcap: float | None) -> tuple[dict[str, Callable], dict[str, str]]:
    """-> (what can run here, why the rest cannot)."""

    def ours(path):
        return lambda h, w, t, cap: linear_cross_entropy(h, w, t, softcap=cap, path=path)

    have, missing = {}, {}
    if device == "cuda" and dtype == torch.bfloat16:
        have["ours, fused"], have["ours, split"] = ours("fused"), ours("split")
    else:
        missing["ours, fused / split"] = "Triton paths are for bf16 on CUDA"
    have["ours, torch"] = ours("torch")
    have["torch eager"] = eager
    if device == "cuda":
        have["torch.compile"] = torch.compile(eager)
    else:
        missing["torch.compile"] = "compared on a GPU only"

    if softcap is not None:
        missing["F.linear_cross_entropy"] = "has no softcap"
    elif hasattr(F, "linear_cross_entropy"):
        have["F.linear_cross_entropy"] = lambda h, w, t, cap: F.linear_cross_entropy(h, w, t)
    else:
        have["its algorithm (rebuilt)"] = lambda h, w, t, cap: RebuiltChunks.apply(h, w, t)

    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        missing["Liger"] = missing["cut-cross-entropy"] = "needs a GPU"
        return have, missing
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(softcap=softcap)
        have["Liger"] = lambda h, w, t, cap: liger(w, h, t)
    else:
        missing["Liger"] = "pip install liger-kernel"
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce

        have["CCE, exact"] = lambda h, w, t, cap: cce(h, w, t, softcap=cap, impl="cce_exact")
        have["CCE, filtered"] = lambda h, w, t, cap: cce(h, w, t, softcap=cap, impl="cce")
    else:
        missing["cut-cross-entropy"] = "pip install cut-cross-entropy from its repository"
    return have, missing


# ---- measuring -------------------------------------------------------------------------------------------------------


def run_once(method: Callable, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None):
    x = hidden.detach().requires_grad_()
    loss = method(x, weight, targets, softcap)
    loss.backward()
    return loss.detach(), x.grad


def milliseconds(work: Callable, device: str, repeats: int) -> list[float]:
    """[first quartile, median, third quartile] after two warm-up runs."""
    times = []
    for i in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(1000 * (time.perf_counter() - start))
    return statistics.quantiles(times, n=4)


def peak_bytes(work: Callable, device: str) -> int:
    """Most memory allocated at a time by `work`, beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def two_products(hidden: Tensor, weight: Tensor) -> None:
    """The floor: logits and dH in the input dtype, in chunks of 4,096 rows, nothing else."""
    for h in hidden.split(4096):
        torch.mm(torch.mm(h, weight.T), weight)


def float64_truth(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Mean loss and dH by the textbook in float64, chunk by chunk."""
    w, losses, grads = weight.double(), [], []
    for h, t in zip(hidden.double().split(256), targets.split(256), strict=True):
        z = h @ w.T
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        logp = z.log_softmax(1)
        losses.append(-logp.gather(1, t[:, None])[:, 0])
        p = logp.exp()
        p[torch.arange(len(t), device=t.device), t] -= 1
        p = p if softcap is None else p * (1 - (z / softcap) ** 2)
        grads.append(p @ w / len(hidden))
    return torch.cat(losses).mean(), torch.cat(grads)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    p.add_argument("--dtype", default="", choices=["", "bfloat16", "float32"], help="default: both on a CPU, else bf16")
    p.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: the three 7-9B models; SmolLM2 on a CPU")
    p.add_argument("--tokens", nargs="+", type=int, help="sequence lengths; default 2K to 64K, on a CPU 512 and 2048")
    p.add_argument("--repeats", type=int, default=0, help="timed runs of each; default 20, on a CPU 5")
    harness.add_save(p)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cuda = args.device == "cuda"
    repeats = args.repeats or (20 if cuda else 5)
    rows = []
    for name in args.shapes or (GPU_SHAPES if cuda else ["SmolLM2-135M"]):
        for dtype in [args.dtype] if args.dtype else ["bfloat16"] if cuda else ["float32", "bfloat16"]:
            rows += bench_shape(name, getattr(torch, dtype), args, repeats)
    lines = []
    for row in rows:
        floor = f"{row['floor_ms'] / row['ms']:.0%}" if row["ms"] > 0 else ""
        errors = [f"{row[key]:.1e}" for key in ("loss_error", "dh_error")]
        cells = [row["method"], row["dtype"], f"{row['tokens']:,}", f"{row['ms']:.1f}", floor, f"{row['extra_gb']:.2f}"]
        lines.append([row["shape"], *cells, *errors])
    columns = ["", "method", "dtype", "tokens", "ms", "floor", "extra GB", "loss error", "dH error"]
    harness.finish("loss", argv, args.save, [harness.table("loss", columns, lines)], {"rows": rows})


def bench_shape(name: str, dtype: torch.dtype, args: argparse.Namespace, repeats: int) -> list[dict]:
    device, (_, dim, softcap), rows = args.device, SHAPES[name], []
    lengths = args.tokens or (GPU_TOKENS if device == "cuda" else [512, 2048])
    hidden, weight, targets = realistic(max(lengths), SHAPES[name], dtype, device)
    have, missing = methods(device, dtype, softcap)
    print(f"\n{name} {str(dtype)[6:]}: " + "; ".join(f"no {k}: {v}" for k, v in missing.items()), file=sys.stderr)
    print(
        f"{'':26}{'T':>7}{'ms':>9}  quartiles{'':9}{'floor':>6}{'extra GB':>10}{'loss err':>10}{'dH err':>9}",
        file=sys.stderr,
    )

    sample = min(2048 if device == "cuda" else 512, len(hidden))
    errors, (loss64, grad64) = {}, float64_truth(hidden[:sample], weight, targets[:sample], softcap)
    for method, f in have.items():
        loss, grad = run_once(f, hidden[:sample], weight, targets[:sample], softcap)
        relative = (grad.double() - grad64).norm() / grad64.norm()
        errors[method] = (loss.double() - loss64).abs().item(), relative.item()
    for length in lengths:
        h, t = hidden[:length], targets[:length]
        floor = milliseconds(lambda h=h: two_products(h, weight), device, repeats)[1]
        print(f"{'two matrix products':26}{length:>7}{floor:9.1f}", file=sys.stderr)
        for method, f in have.items():
            row = {"shape": name, "dtype": str(dtype)[6:], "method": method, "tokens": length, "floor_ms": floor}
            row["loss_error"], row["dh_error"] = errors[method]

            def work(f=f, h=h, t=t):
                return run_once(f, h, weight, t, softcap)

            try:
                low, row["ms"], high = milliseconds(work, device, repeats)
                row["quartiles_ms"] = [low, high]
                row["extra_gb"] = (peak_bytes(work, device) - length * dim * h.element_size()) / 1e9
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                print(f"{method:26}{length:>7}  out of memory", file=sys.stderr)
                rows.append({**row, "ms": -1, "quartiles_ms": [], "extra_gb": -1})
                continue
            rows.append(row)
            print(
                f"{method:26}{length:>7}{row['ms']:9.1f}  {low:8.1f} {high:8.1f}{100 * floor / row['ms']:6.0f} %"
                f"{row['extra_gb']:10.3f}{row['loss_error']:10.1e}{row['dh_error']:9.1e}",
                file=sys.stderr,
            )
    return rows


if __name__ == "__main__":
    main()
