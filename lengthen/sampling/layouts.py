"""How a weight lies in a CPU's memory, for products with a few rows: what is fastest depends on processor and shape.

    mkl       packed by MKL           fp32 only; on an AVX-512 Xeon ahead at nearly every shape and number of rows
    onednn    blocked by oneDNN       on an AVX2 EPYC from 4 rows on 1.5 to 2.4 times as fast as MKL; what bf16 needs
    columns   column by column        plain torch, which then calls what it has

`layout_of` measures each shape once, a few tenths of a second, and keeps what won in the cache folder, by
processor, threads and torch: layouts round differently, so the same machine must always take the same. Where nothing
can be kept, nothing is measured. Delete the file to measure again.
"""

import functools
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lengthen.jobs import try_lock
from lengthen.models.gguf import cache_folder

BLOCK_ROWS = 32  # the number of rows that oneDNN's layout is made for; it serves 2 to 512 as well
PACK_ROWS = 512  # the same of MKL's: packed for 512 rows it is as fast for 4 as packed for 4
ROWS, TRIES = (1, 4, 16, 48), 20  # numbers of rows that are measured, and how often; the least time counts
SMALL, LARGE = 100_000, 8_000_000  # weights: fewer are not measured; more are measured by a part of their rows
AHEAD = 0.87  # of the first layout's time: what another must stay below, so that chance does not choose

Product = Callable[[Tensor], Tensor]


def lay_out(layout: str, weight: Tensor, bias: Tensor | None) -> Product:
    """x [..., in] -> x W^T + bias, [..., out]. weight [out, in], copied; bias [out]; fp32 or bf16, all of one dtype."""
    if layout == "mkl":
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach().contiguous(), PACK_ROWS)
        shape, times = weight.new_empty(1).expand(weight.shape), torch.ops.mkl._mkl_linear  # only the shape is read
        return lambda x: times(x, packed, shape, bias, x.numel() // x.shape[-1])
    if layout == "onednn":
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), BLOCK_ROWS)
        multiply = torch.ops.mkldnn._linear_pointwise
        return lambda x: multiply(x, blocked, bias, "none", [], "")
    by_column = weight.detach().t().contiguous().t()  # same shape and values; F.linear is then a plain product
    return lambda x: F.linear(x, by_column, bias)


def layouts_for(dtype: torch.dtype) -> tuple[str, ...]:
    """Those that this torch has for weights of a dtype; the first is taken unless another is clearly ahead."""
    there = {
        "mkl": dtype == torch.float32 and torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available() and (dtype == torch.float32 or bf16_is_served()),
        "columns": True,
    }
    order = ("mkl", "columns", "onednn") if dtype == torch.float32 else ("onednn", "columns")
    return tuple(name for name in order if there[name])


def bf16_is_served() -> bool:
    """Whether oneDNN multiplies bf16 here at all; it is fast where the processor has AMX or AVX-512 BF16."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def layout_of(out: int, width: int, dtype: torch.dtype) -> str:
    """The layout of a weight [out, width] on this machine."""
    layouts = layouts_for(dtype)
    if out * width < SMALL or len(layouts) == 1:
        return layouts[0]
    try:
        return kept(machine(), min(out, LARGE // width), width, dtype, layouts)
    except OSError:  # it could turn out otherwise the next time
        return layouts[0]


@functools.cache
def kept(machine: str, out: int, width: int, dtype: torch.dtype, layouts: tuple[str, ...]) -> str:
    """What has been kept of a machine, measured first where nothing has. Raises OSError."""
    path, shape = cache_folder() / "layouts.json", f"{out} x {width}" + " bf16" * (dtype == torch.bfloat16)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        try_lock(lock.fileno(), path, wait=True)  # of two processes one measures
        known = read(path)
        found = known.setdefault(machine, {})
        if found.get(shape) not in layouts:
            found[shape] = measure(out, width, dtype, layouts)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(known, indent=1) + "\n")
            temporary.rename(path)
    return found[shape]


def recorded() -> dict[str, str]:
    """What has been measured on this machine, for the record: layouts by "out x in" of fp32, "out x in bf16"."""
    return read(cache_folder() / "layouts.json").get(machine(), {})


def read(path: Path) -> dict[str, dict[str, str]]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):  # one that is damaged is measured anew
        return {}
    return known if isinstance(known, dict) else {}


def measure(out: int, width: int, dtype: torch.dtype, layouts: tuple[str, ...]) -> str:
    """The layout with the least time, as the geometric mean over ROWS; the first unless another is clearly ahead."""
    weight = torch.ones(out, width, dtype=dtype)  # no random numbers are used up; the time is the same
    products = {name: lay_out(name, weight, None) for name in layouts}
    score = dict.fromkeys(layouts, 0.0)
    for rows in ROWS:
        x, least = torch.ones(rows, width, dtype=dtype), dict.fromkeys(layouts, math.inf)
        for _ in range(TRIES):
            for name, product in products.items():  # in turns: what disturbs one disturbs all
                began = time.perf_counter()
                product(x)
                least[name] = min(least[name], time.perf_counter() - began)
        for name in layouts:
            score[name] += math.log(least[name]) / len(ROWS)
    best = min(layouts, key=score.__getitem__)
    return best if score[best] < score[layouts[0]] + math.log(AHEAD) else layouts[0]


def machine() -> str:
    """Processor, threads, and what computes: the key of what is kept."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor()}, {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@functools.cache
def processor() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return name
