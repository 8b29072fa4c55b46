"""Paged decode attention: time and share of memory bandwidth, of kernels/attention.py and of what else one could use.

    python bench/attention.py                       # on a GPU: the 7B's shape at 1, 64 and 256 texts, a minute or two
    python bench/attention.py --device cpu --texts 2 --lengths 40 --shapes SmolLM2-135M --repeats 2    # the references

One layer, keys and values in bf16 (fp32 on a CPU), page 256. Per number of texts and length: microseconds (median of
--repeats), and the bytes of all keys and values divided by that time, as a share of what copying 1 GB reaches on the
same card: 100 % is a kernel that waits for memory only. "ragged": the lengths run from an eighth of the given one to
twice it, evenly, so that their sum is about the same. On a GPU each method is captured as a graph, as the sampler runs
it: starting kernels from Python takes longer than small ones run. The cache is overwritten before each replay.
Methods: ours; ours on fp8 pages (half the bytes: its share counts those); ours verifying 4 drafted tokens; flash-attn's
flash_attn_with_kvcache if installed; gathering the pages and torch's SDPA.

A second table: attention of a training row of one sample (--rows), forward and backward, as the lean layer calls it
(models/flash.py: torch's FlashAttention 2, or what flash_hopper.py put in its place) and by cuDNN through torch's SDPA.
"new length" is the first call at a length, after others: what making a plan for it costs.
The tables go to stderr, one JSON line to stdout; --save keeps it (harness.py). No GPU has run this yet.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import harness
from models import SHAPES, Shape

from kernels.attention import Pages, paged_attention, quantise
from lengthen.models.flash import attend_backward, attend_saving_lse

S = 256  # tokens in a page
TIMES = ("ms", "new_ms", "tflops")


def make_case(shape: Shape, lengths: list[int], dtype: torch.dtype, device: str) -> tuple[Pages, Tensor, Tensor]:
    """-> (pages, table, lengths); the pages of a text lie scattered over the pool."""
    counts = [-(-n // S) for n in lengths]
    order = torch.randperm(sum(counts)).int().split(counts)
    table = torch.nn.utils.rnn.pad_sequence(order, batch_first=True, padding_value=-1)
    pools = [torch.randn(sum(counts), shape.keys, S, shape.head_dim, dtype=dtype, device=device) for _ in range(2)]
    return Pages(*pools), table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


def methods(shape: Shape, case: tuple[Pages, Tensor, Tensor]) -> dict[str, tuple[Callable, int]]:
    """name -> (a call, bytes of keys and values that it must read)."""
    (pages, table, lengths), heads, dim = case, shape.keys, shape.head_dim
    dtype, device, B = pages.keys.dtype, pages.keys.device, len(lengths)
    q = torch.randn(B, 4, shape.heads, dim, dtype=dtype, device=device)
    bytes_ = 2 * int(lengths.sum()) * heads * dim * dtype.itemsize
    parts = [quantise(x) for x in pages[:2]]
    fp8 = Pages(parts[0][0], parts[1][0], parts[0][1], parts[1][1])
    fp8_bytes = 2 * int(lengths.sum()) * heads * (dim + 4)

    def ours(pages: Pages, queries: int) -> Callable:
        return lambda: paged_attention(q[:, :queries].contiguous(), pages, table, lengths, scale=dim**-0.5)

    def gathered() -> Tensor:
        k, v = (x[table.clamp(min=0)].transpose(1, 2).flatten(2, 3) for x in pages[:2])
        seen = (torch.arange(k.shape[2], device=device) < lengths[:, None])[:, None, None]
        return F.scaled_dot_product_attention(q[:, :1].transpose(1, 2), k, v, seen, enable_gqa=True)

    found = {"ours": (ours(pages, 1), bytes_), "ours, 4 drafts": (ours(pages, 4), bytes_)}
    found |= {"ours, fp8 pages": (ours(fp8, 1), fp8_bytes), "gather + SDPA": (gathered, bytes_)}
    if device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_with_kvcache

        k, v = (x.transpose(1, 2).contiguous() for x in pages[:2])  # its layout: [P, S, Hkv, D]
        keywords = {"cache_seqlens": lengths, "block_table": table.clamp(min=0)}
        found["flash-attn"] = (lambda: flash_attn_with_kvcache(q[:, :1], k, v, **keywords), bytes_)
    return found


def seconds(work: Callable, cuda: bool, repeats: int, graph: bool = True) -> float:
    """Median of `repeats` runs after two that warm up; on a GPU of replays, each after overwriting the cache.

    Overwriting takes longer than the host needs to queue what follows it, so no gap is timed.
    """
    times, other = [], torch.empty(64 << 20, device="cuda") if cuda else None
    replay = captured(work) if cuda and graph else work
    for i in range(repeats + 2):
        if cuda:
            other.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            took = start.elapsed_time(stop) / 1000
        else:
            took = harness.seconds(replay, False)
        if i >= 2:
            times.append(took)
    return statistics.median(times)


def captured(work: Callable) -> Callable:
    """The kernels of `work` as a graph's replay. Two runs on a side stream compile what has to be compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def ceiling(device: str, repeats: int) -> float:
    """Bytes per second of a copy, reading and writing counted."""
    size = 1 << (30 if device == "cuda" else 27)
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(lambda: b.copy_(a), device == "cuda", repeats)


def training_row(name: str, tokens: int, cuda: bool, repeats: int) -> list[dict]:
    """Forward and backward over one sample of so many tokens, and first over one of a few less."""
    heads, keys, dim = SHAPES[name].heads, SHAPES[name].keys, SHAPES[name].head_dim
    kind = {"dtype": torch.bfloat16 if cuda else torch.float32, "device": "cuda" if cuda else "cpu"}

    def inputs(count: int) -> list[Tensor]:
        return [torch.randn(count, n, dim, **kind) for n in (heads, keys, keys, heads)]

    def ours(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        row = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device), len(q), dim**-0.5, 0
        attend_backward(dout, q, k, v, *attend_saving_lse(q, k, v, *row), *row)

    def cudnn(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
        q, k, v = (x.transpose(0, 1)[None].requires_grad_() for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), dout.transpose(0, 1)[None])

    found = []
    for method, call in {"flash.py": ours, **({"cuDNN": cudnn} if cuda else {})}.items():
        row = {"shape": name, "method": method, "tokens": tokens}
        try:
            for count in (tokens - 72, tokens - 8):
                work = partial(call, *inputs(count))
                row["new_ms"] = 1000 * harness.seconds(work, cuda)  # the second: whatever is made once is there
            row["ms"] = 1000 * seconds(partial(call, *inputs(tokens)), cuda, repeats, graph=False)
        except RuntimeError as error:  # cuDNN refuses what its version cannot do
            print(f"{method}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        row["tflops"] = 3.5 * 2 * tokens**2 * heads * dim / (row["ms"] * 1e9)
        found.append(row)
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=["Qwen2.5-7B"], help="of the models")
    p.add_argument("--texts", nargs="+", type=int, default=[1, 64, 256], help="rows of the batch")
    p.add_argument("--lengths", nargs="+", type=int, default=[2048], help="keys of a text, in tokens")
    p.add_argument("--rows", nargs="+", type=int, default=[16_384], help="tokens of a training row")
    p.add_argument("--repeats", type=int, default=30, help="timed runs of each method")
    harness.add_save(p)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cuda = args.device == "cuda"
    most, rows = ceiling(args.device, args.repeats), []
    print(f"a copy reaches {most / 1e9:.0f} GB/s", file=sys.stderr)
    for name in args.shapes:
        for texts, length, ragged in [(t, n, r) for t in args.texts for n in args.lengths for r in (False, True)]:
            if ragged and texts == 1:
                continue
            low, high = length // 8, 2 * length - length // 8
            lengths = [low + (high - low) * i // (texts - 1) for i in range(texts)] if ragged else [length] * texts
            case = make_case(SHAPES[name], lengths, torch.bfloat16 if cuda else torch.float32, args.device)
            for method, (work, bytes_) in methods(SHAPES[name], case).items():
                row = {"shape": name, "method": method, "texts": texts, "length": length, "ragged": ragged}
                row["us"] = 1e6 * seconds(work, cuda, args.repeats)
                row["of_copy"] = bytes_ / (row["us"] * 1e-6) / most
                rows.append(row)
                print(*cells(row), file=sys.stderr, flush=True)
    trained = [row for name in args.shapes for n in args.rows for row in training_row(name, n, cuda, args.repeats)]
    lines = [[*map(str, list(row.values())[:3]), *(f"{row[key]:.1f}" for key in TIMES)] for row in trained]
    columns = ["", "method", "texts", "keys", "lengths", "us", "of a copy"]
    tables = [harness.table("decode attention", columns, list(map(cells, rows)))]
    tables += [harness.table("training attention", ["", "method", "tokens", "ms", "new length ms", "TFLOP/s"], lines)]
    harness.finish("attention", argv, args.save, tables, {"copy_gb_s": most / 1e9, "rows": rows, "training": trained})


def cells(row: dict) -> list[str]:
    which = row["shape"], row["method"], str(row["texts"]), str(row["length"]), "ragged" if row["ragged"] else "even"
    return [*which, f"{row['us']:.1f}", f"{row['of_copy']:.0%}"]


if __name__ == "__main__":
    main()
