"""Paged attention compiled without a GPU: tensor cores used, no spills, shared memory in the limit of each card.

    pytest tests/test_attention_aot.py

As tests/test_linear_cross_entropy_aot.py, whose limits and tools these are; about a minute on one core the first time.
"""

import json
import sys

import pytest
from test_linear_cross_entropy_aot import SHARED_LIMIT, compile_kernel, needs_triton, run_compiler

# fp8, softcap, sinks and padded head sizes cost registers; a full tile of 64 rows is G * Q = 8 * 8
DECODES = {
    "decode qwen2.5": {},
    "decode verify, softcap, sinks": {"G": 8, "Q": 8, "HAS_CAP": True, "HAS_SINKS": True},
    # Triton makes constants of integers that are 1
    "decode one text, one split": {"SINGLE": True, "HAS_SINKS": True, "B": 1, "window": 1, "workers": 1, "splits": 1},
    "decode fp8": {"G": 8, "Q": 8, "FP8": True},
    "decode gemma": {"G": 2, "Q": 4, "D": 256, "HAS_CAP": True},
    "decode head 96": {"G": 4, "Q": 8, "D": 96, "DTYPE": "fp16"},
    "decode fp32": {"G": 4, "Q": 4, "DTYPE": "fp32"},
}


def decode_meta(fast, arch: int, G=7, Q=1, D=128, FP8=False, DTYPE="bf16", **flags) -> tuple[dict, dict, tuple]:
    """-> (constants, pointer types, (warps, stages)) as `decode` would choose them."""
    padded = 1 << (D - 1).bit_length()
    tile = fast.tile_for(arch, padded, 4 if DTYPE == "fp32" else 2)
    kind = 0 if not FP8 else 1 if arch >= 89 else 2
    meta = {"HKV": 4, "G": G, "Q": Q, "D": D, "DV": D, "S": 256, "FP8": kind, "EMULATE": False}
    meta |= {"HAS_CAP": False, "HAS_SINKS": False, "SINGLE": False, **flags}
    meta |= {"BM": max(16, min(tile.m, 1 << (G * Q - 1).bit_length())), "BN": tile.n, "BD": padded, "BDV": padded}
    pool = {0: DTYPE, 1: "fp8e4nv", 2: "u8"}[kind]
    types = {"q_ptr": DTYPE, "out_ptr": DTYPE, "k_ptr": pool, "v_ptr": pool}
    return meta, types, (tile.warps, tile.stages)


def compile_all(arch: int) -> dict:
    from kernels import attention_triton as fast

    types = {"table_ptr": "i32", "lengths_ptr": "i32", "slots_ptr": "i32"}
    types |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr", "scales_ptr", "sinks_ptr", "acc_ptr", "stat_ptr"), "fp32")
    report = {}
    for name, flags in DECODES.items():
        meta, more, (warps, stages) = decode_meta(fast, arch, **flags)
        report[name] = compile_kernel(fast._decode_kernel, meta, {**types, **more}, arch, warps, stages)
    flags = {"HAS_SINKS": True, "EMULATE": False}
    meta = {"HQ": 28, "Q": 1, "DV": 128, **flags, "BN": 64, "BDV": 128, "BS": 128, "STEP": 8}
    report["join"] = compile_kernel(fast._join_kernel, meta, {**types, "out_ptr": "bf16"}, arch, 2, 3)
    meta = {"HKV": 4, "D": 128, "S": 256, "FP8": True, "BD": 128}
    report["store"] = compile_kernel(
        fast._store_kernel, meta, {**types, "new_ptr": "bf16", "pool_ptr": "u8"}, arch, 1, 3
    )
    return report


@needs_triton
@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_kernels_fit_the_card(arch):
    report = run_compiler(__file__, arch)
    assert set(report) == {*DECODES, "join", "store"}
    for name, used in report.items():
        assert used["stack"] == 0 and used["spills"] == 0, (name, used)
        assert used["shared"] <= SHARED_LIMIT[arch], (name, used)
        assert used["registers"] * 32 * used["warps"] <= 65_536, (name, used)
        products = name.startswith("decode") and name != "decode fp32"  # fp32 is exact, hence not on tensor cores
        assert (used["tensor_core"] > 0) == products, (name, used)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
