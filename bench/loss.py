"""Loss of a frozen head: time, memory and error of kernels/linear_cross_entropy.py and of what else one could use.

    python bench/loss.py                       # on a GPU: Qwen2.5-7B's and Llama-3.1-8B's heads, a minute or two
    python bench/loss.py --device cpu           # small shapes: memory, accuracy, and the CPU path's time

Forward and backward of the mean loss, gradient of the hidden states only. Per method and length: milliseconds (median,
and first to third quartile), peak memory beyond the inputs and the returned gradient, and the floor, which is the time
of the two matrix products alone (logits and dH), as a share of the method's: 100 % is as fast as an exact gradient can
be. Errors are against float64 at 2,048 tokens (512 on a CPU): of the mean loss, and of dH relative to its norm.

    ours              fused, split: the two Triton paths; torch: the path of every other device
    torch eager       all logits in memory; F.linear_cross_entropy: torch's own in chunks (2.13 has it)
    Liger             its Triton kernel; Liger CuTe: that of its CuTe backend, for Hopper and Blackwell
    QuACK             chunked_linear_cross_entropy (pip install quack-kernels)
    TRL               the chunked loss that SFTTrainer takes by default
    CCE               cut-cross-entropy, exact and with its gradient filter

Hidden states with peaks, because noise flatters kernels that skip small gradients: rows of W are random of length about
1; h is a sum of eight of them, the largest with coefficient log V + u, u uniform in [-4, 8], the others following at
exponential distances (mean 2); targets are drawn from softmax(h W^T), so that the loss equals the entropy, as in a
calibrated model. What is not installed, does not know a shape's softcap or fails has no row; the reason is printed.
The table goes to stderr, the same data as one JSON line to stdout; --save keeps it (harness.py). No GPU has run this
yet.
"""

import argparse
import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import harness
from models import SHAPES, Shape

from kernels.linear_cross_entropy import linear_cross_entropy

GPU_SHAPES = ["Qwen2.5-7B", "Llama-3.1-8B"]
GPU_TOKENS = [4096, 16_384]


def realistic(tokens: int, shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """The recipe of the docstring -> (hidden [T, H], weight [V, H], targets [T])."""
    vocab, dim, softcap = shape.vocab, shape.hidden, shape.softcap
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
        return lambda h, w, t, cap: linear_cross_entropy(h, w, t, softcap=cap, path=path) / len(t)

    have, missing = {}, {}
    if device == "cuda" and dtype == torch.bfloat16:
        have["ours, fused"], have["ours, split"] = ours("fused"), ours("split")
    else:
        missing["ours, fused / split"] = "Triton paths are for bf16 on CUDA"
    have["ours, torch"] = ours("torch")
    have["torch eager"] = eager
    if softcap is not None:
        missing["F.linear_cross_entropy"] = "has no softcap"
    elif hasattr(F, "linear_cross_entropy"):
        have["F.linear_cross_entropy"] = lambda h, w, t, cap: F.linear_cross_entropy(h, w, t)
    else:
        have["its algorithm (rebuilt)"] = lambda h, w, t, cap: RebuiltChunks.apply(h, w, t)
    for name, (package, make) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            missing[name] = f"pip install {HOW.get(package, package)}"
        elif device != "cuda" and (name != "Liger" or os.environ.get("TRITON_INTERPRET") != "1"):
            missing[name] = "needs a GPU"
        else:
            try:
                have |= make(softcap)
            except Exception as error:  # a peer that does not import with this torch is no reason to stop
                missing[name] = reason(error)
    return have, missing


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def liger(softcap: float | None) -> dict[str, Callable]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    return {"Liger": lambda h, w, t, cap: first_of(Function.apply(h, w, t, *LIGER_DEFAULTS, softcap))}


def liger_cute(softcap: float | None) -> dict[str, Callable]:
    from liger_kernel.ops.cutedsl.ops import LigerFusedLinearCrossEntropyFunction as Function

    return {"Liger CuTe": lambda h, w, t, cap: first_of(Function.apply(h, w, t, *LIGER_DEFAULTS, softcap))}


LIGER_DEFAULTS = (None, None, -100, 0.0, 0.0, "mean")  # bias, weights, ignored, z-loss, smoothing, reduction


def first_of(result: Tensor | tuple) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def quack(softcap: float | None) -> dict[str, Callable]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return {} if softcap else {"QuACK": lambda h, w, t, cap: chunked_linear_cross_entropy(h, w, t)}


def trl(softcap: float | None) -> dict[str, Callable]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as ROWS

    def loss(h: Tensor, w: Tensor, t: Tensor, cap: float | None) -> Tensor:
        return -ChunkedLogProbFunction.apply(h, w, None, t, 1.0, ROWS, cap, 1.0, ("log_probs",))[0].mean()

    return {"TRL": loss}


def cce(softcap: float | None) -> dict[str, Callable]:
    from cut_cross_entropy import linear_cross_entropy as cut

    kinds = {"CCE, exact": "cce_exact", "CCE, filtered": "cce"}
    return {name: lambda h, w, t, cap, impl=impl: cut(h, w, t, softcap=cap, impl=impl) for name, impl in kinds.items()}


PEERS = {
    "Liger": ("liger_kernel", liger),
    "Liger CuTe": ("cutlass", liger_cute),
    "QuACK": ("quack", quack),
    "TRL": ("trl", trl),
    "CCE": ("cut_cross_entropy", cce),
}
HOW = {
    "liger_kernel": "liger-kernel",
    "cutlass": "liger-kernel nvidia-cutlass-dsl",
    "quack": "quack-kernels",
    "cut_cross_entropy": "cut-cross-entropy, from its repository",
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def run_once(method: Callable, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None):
    x = hidden.detach().requires_grad_()
    loss = method(x, weight, targets, softcap)
    loss.backward()
    return loss.detach(), x.grad


def milliseconds(work: Callable, device: str, repeats: int) -> list[float]:
    """[first quartile, median, third quartile] after two warm-up runs."""
    times = [1000 * harness.seconds(work, device == "cuda") for _ in range(repeats + 2)]
    return statistics.quantiles(times[2:], n=4)


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
    p.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: the 7B and the 8B; SmolLM2 on a CPU")
    p.add_argument("--tokens", nargs="+", type=int, help="sequence lengths; default 4K and 16K, on a CPU 512 and 2048")
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
    columns = ["", "method", "dtype", "tokens", "ms", "floor", "extra GB", "loss error", "dH error"]
    harness.finish("loss", argv, args.save, [harness.table("loss", columns, list(map(cells, rows)))], {"rows": rows})


def cells(row: dict) -> list[str]:
    took = f"{row['ms']:.1f}", f"{row['floor_ms'] / row['ms']:.0%}", f"{row['extra_gb']:.2f}"
    errors = (f"{row[key]:.1e}" if key in row else "" for key in ("loss_error", "dh_error"))
    which = row["shape"], row["method"], row["dtype"], f"{row['tokens']:,}"
    return [*which, *(took if row["ms"] > 0 else ("out of memory", "", "")), *errors]


def bench_shape(name: str, dtype: torch.dtype, args: argparse.Namespace, repeats: int) -> list[dict]:
    device, softcap, rows = args.device, SHAPES[name].softcap, []
    lengths = args.tokens or (GPU_TOKENS if device == "cuda" else [512, 2048])
    hidden, weight, targets = realistic(max(lengths), SHAPES[name], dtype, device)
    have, missing = methods(device, dtype, softcap)
    sample = min(2048 if device == "cuda" else 512, len(hidden))
    errors, (loss64, grad64) = {}, float64_truth(hidden[:sample], weight, targets[:sample], softcap)
    for method, f in list(have.items()):
        try:
            loss, grad = run_once(f, hidden[:sample], weight, targets[:sample], softcap)
        except Exception as error:  # a peer's kernel that does not compile here must not end the others
            if method.startswith("ours"):
                raise
            missing[method] = reason(error)
            del have[method]
            continue
        relative = (grad.double() - grad64).norm() / grad64.norm()
        errors[method] = {"loss_error": (loss.double() - loss64).abs().item(), "dh_error": relative.item()}
    print(f"\n{name} {str(dtype)[6:]}: " + "; ".join(f"no {k}: {v}" for k, v in missing.items()), file=sys.stderr)
    for length in lengths:
        h, t = hidden[:length], targets[:length]
        low, floor, high = milliseconds(lambda h=h: two_products(h, weight), device, repeats)
        same = {"shape": name, "dtype": str(dtype)[6:], "tokens": length, "floor_ms": floor}
        products = {"method": "two products", "ms": floor, "quartiles_ms": [low, high], "extra_gb": 0.0}
        rows.append(same | products)
        for method, f in have.items():
            row = same | {"method": method, "ms": -1.0, "quartiles_ms": [], "extra_gb": -1.0, **errors[method]}

            def work(f=f, h=h, t=t):
                return run_once(f, h, weight, t, softcap)

            try:
                low, row["ms"], high = milliseconds(work, device, repeats)
                row["quartiles_ms"] = [low, high]
                row["extra_gb"] = (peak_bytes(work, device) - h.nbytes) / 1e9
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
            rows.append(row)
            print(*cells(row), file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
