"""Paged decode attention: time and share of memory bandwidth, of kernels/attention.py and of what else one could use.

    python bench/attention.py                       # on a GPU: the 7B's shape at 1, 64 and 256 texts, a minute or two
    python bench/attention.py --device cpu --texts 2 --lengths 40 --shapes SmolLM2-135M --repeats 2    # the references

One layer, keys and values in bf16 (fp32 on a CPU), page 256. Per number of texts and length: microseconds (median of
--repeats), and the bytes of all keys and values divided by that time, as a share of what copying 1 GB reaches on the
same card: 100 % is a kernel that waits for memory only. "ragged": the lengths run from an eighth of the given one to
twice it, evenly, so that their sum is about the same. On a GPU each method is captured as a graph, as the sampler runs
it: starting kernels from Python takes longer than small ones run. The cache is overwritten before each replay.
Methods: ours; ours on fp8 pages (half the bytes: its share counts those); ours verifying 4 drafted tokens; flash-attn's
flash_attn_with_kvcache if installed; gathering the pages and torch's SDPA. The table goes to stderr, one JSON line to
stdout; --save keeps it (harness.py). No GPU has run this yet.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import harness

from kernels.attention import Pages, paged_attention, quantise

# name: (query heads, key heads, head size)
SHAPES = {"Qwen2.5-7B": (28, 4, 128), "Llama-3.1-8B": (32, 8, 128), "SmolLM2-135M": (9, 3, 64)}
S = 256  # tokens in a page


def make_case(shape: tuple, lengths: list[int], dtype: torch.dtype, device: str) -> tuple[Pages, Tensor, Tensor]:
    """-> (pages, table, lengths); the pages of a text lie scattered over the pool."""
    _, heads, dim = shape
    counts = [-(-n // S) for n in lengths]
    order = torch.randperm(sum(counts)).int().split(counts)
    table = torch.nn.utils.rnn.pad_sequence(order, batch_first=True, padding_value=-1)
    pools = [torch.randn(sum(counts), heads, S, dim, dtype=dtype, device=device) for _ in range(2)]
    return Pages(*pools), table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


def methods(shape: tuple, case: tuple[Pages, Tensor, Tensor]) -> dict[str, tuple[Callable, int]]:
    """name -> (a call, bytes of keys and values that it must read)."""
    (pages, table, lengths), (hq, heads, dim) = case, shape
    dtype, device, B = pages.keys.dtype, pages.keys.device, len(lengths)
    q = torch.randn(B, 4, hq, dim, dtype=dtype, device=device)
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


def seconds(work: Callable, cuda: bool, repeats: int) -> float:
    """Median of `repeats` runs after two that warm up; on a GPU of replays, each after overwriting the cache.

    Overwriting takes longer than the host needs to queue what follows it, so no gap is timed.
    """
    times, other = [], torch.empty(64 << 20, device="cuda") if cuda else None
    replay = captured(work) if cuda else work
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
            began = time.perf_counter()
            replay()
            took = time.perf_counter() - began
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=["Qwen2.5-7B"], help="of the models")
    p.add_argument("--texts", nargs="+", type=int, default=[1, 64, 256], help="rows of the batch")
    p.add_argument("--lengths", nargs="+", type=int, default=[2048], help="keys of a text, in tokens")
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
    columns = ["", "method", "texts", "keys", "lengths", "us", "of a copy"]
    tables = [harness.table("decode attention", columns, list(map(cells, rows)))]
    harness.finish("attention", argv, args.save, tables, {"copy_gb_s": most / 1e9, "rows": rows})


def cells(row: dict) -> list[str]:
    which = row["shape"], row["method"], str(row["texts"]), str(row["length"]), "ragged" if row["ragged"] else "even"
    return [*which, f"{row['us']:.1f}", f"{row['of_copy']:.0%}"]


if __name__ == "__main__":
    main()
