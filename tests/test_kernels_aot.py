"""Every shipped kernel configuration, compiled ahead of time, without a GPU: tensor cores used, no spills, registers
and shared memory within the limits of each card.

    pytest -m aot

One process per architecture compiles them all, because Triton decides at import whether kernels are compiled or
interpreted. About half a minute each on one core the first time; Triton caches what it compiles.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import cold
import pytest

from kernels import HAS_TRITON

ROOT = Path(__file__).resolve().parent.parent
# bytes of shared memory that one block may use (CUDA programming guide, table of compute capabilities)
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}


def compile_kernel(kernel, meta: dict, types: dict, arch: int, warps: int, stages: int) -> dict:
    """Compile with the types and alignments of a real launch; read registers and instructions off the cubin.

    types: of the pointers, and of what else is not int32. Aligned pointers and sizes are what torch and the models'
    shapes give.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    for name in kernel.arg_names:
        if name in meta:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + types[name]
        else:
            signature[name] = "fp32" if name in ("scale", "softcap", "eps", "coldest") else "i32"
    aligned = [
        i
        for i, n in enumerate(signature)
        if signature[n][0] == "*" or n in ("V", "H", "N", "half", "n") or n.startswith("stride")
        if not kernel.params[i].do_not_specialize
    ]
    source = ASTSource(
        kernel, signature=signature, constexprs=meta, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.check_output([tools / "cuobjdump", "--dump-resource-usage", cubin], text=True)
        sass = subprocess.check_output([tools / "nvdisasm", "-c", cubin], text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA|QGMMA|UTCHMMA)\b", sass)),
        "shared": compiled.metadata.shared,
        "warps": warps,
    }


def compile_one(kernel, meta: dict, arch: int, warps: int, stages: int) -> dict:
    types = dict.fromkeys(kernel.arg_names, "bf16")
    types |= dict.fromkeys(("zt_ptr", "part_ptr", "sums_ptr", "u_ptr", "z_ptr"), "fp32")
    return compile_kernel(kernel, meta, {**types, "t_ptr": "i64"}, arch, warps, stages)


# ---- what is compiled ------------------------------------------------------------------------------------------------


def compile_loss(arch: int) -> dict:
    """kernels/linear_cross_entropy_triton.py: of each configuration the variant with the most to hold, and of the
    product also the one that training runs."""
    from kernels import linear_cross_entropy_triton as fast

    store = {"STORE": True, "EMULATE": False}
    plain = {"HAS_BIAS": False, "HAS_CAP": False, **store}
    full = {"HAS_BIAS": True, "HAS_CAP": True, **store}
    report = {}
    for name, flags, small, even in (
        ("train", plain, False, True),
        ("softcap", full, True, True),
        ("bias, ragged H", {**plain, "HAS_BIAS": True}, False, False),
    ):
        if not even and arch not in (89, 90):
            continue  # one card with mma.sync and one with wgmma are enough for the rare shape
        tile = fast.tile_for(arch, small=small)
        meta = {**flags, "EVEN_H": even, "BM": tile.m, "BN": tile.n, "BK": tile.k}
        report["gemm_exp " + name] = compile_one(fast._gemm_exp_kernel, meta, arch, tile.warps, tile.stages)
    report["exp"] = compile_one(fast._exp_kernel, {**full, "BLOCK": fast.EXP_BLOCK}, arch, fast.WARPS, 1)
    meta = {"HAS_BIAS": True, "HAS_CAP": True, "BLOCK": 1024}
    report["target"] = compile_one(fast._target_kernel, meta, arch, 4, 3)
    # 2048 partial sums: V = 262,144 in tiles of 128
    meta = {"HAS_CAP": True, "GRAD": True, "EMULATE": False}
    report["finish"] = compile_one(fast._finish_kernel, {**meta, "BLOCK_P": 2048, "BLOCK_H": 1024}, arch, 4, 3)
    return report


# fp8, softcap, sinks and padded head sizes cost registers; a full tile of 64 rows is G * Q = 8 * 8
DECODES = {
    "decode qwen2.5": {},
    "decode verify, softcap, sinks": {"G": 8, "Q": 8, "HAS_CAP": True, "HAS_SINKS": True},
    "decode one split": {"SINGLE": True, "HAS_SINKS": True},
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


def compile_attention(arch: int) -> dict:
    """kernels/attention_triton.py."""
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
    types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr"), "bf16")
    types |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr"), "fp32")
    cases = ("place", 128, True, True), ("place 256", 256, True, False), ("store", 128, False, True)
    for name, D, turn, fp8 in cases:
        types |= dict.fromkeys(("k_pool_ptr", "v_pool_ptr"), "u8" if fp8 else "bf16")
        meta = {"HQ": 28 * turn, "HKV": 4, "D": D, "DV": D, "S": 256, "TURN": turn, "NORM": turn, "FP8": fp8}
        meta |= {"EMULATE": False, "BH": fast.PLACED, "BD": D // 2, "BDV": D // 2}
        report[name] = compile_kernel(fast._place_kernel, meta, types, arch, 2, 3)
    return report


def compile_tail(arch: int) -> dict:
    """kernels/sampling_tail_triton.py: of the logits, with drafts and without; above a floor; the threshold."""
    from kernels import sampling_tail_triton as fast

    types = dict.fromkeys(("kinds_ptr", "early_ptr", "seen_ptr", "free_ptr", "wide_ptr"), "u8")
    types |= dict.fromkeys(("line_ptr", "drafts_ptr", "seeds_ptr", "positions_ptr", "token_ptr", "top_k_ptr"), "i64")
    types |= dict.fromkeys(("penalty_ptr", "temperature_ptr", "floors_ptr", "y_ptr", "maxima_ptr", "top_p_ptr"), "fp32")
    types |= {"best_ptr": "fp64", "out_ptr": "fp64", "tokens_ptr": "i64"}
    report = {"noise": compile_kernel(fast._gumbel_kernel, {"BLOCK": fast.COLUMN}, types, arch, 1, 3)}
    for name, x, Q, prepare, store in (
        ("all", "bf16", 1, True, False),
        ("ranked, drafts", "bf16", 8, True, True),
        ("above", "fp32", 1, False, False),
    ):
        meta = {"Q": Q, "PREPARE": prepare, "STORE": store, "ROWS": 64, "BLOCK": fast.BLOCK}
        report[name] = compile_kernel(fast._tail_kernel, meta, {**types, "x_ptr": x}, arch, 4, 3)
    meta = {"BLOCK": fast.SCAN}
    report["lowest"] = compile_kernel(fast._lowest_kernel, meta, {**types, "x_ptr": "fp32"}, arch, 16, 3)
    return report


def compile_layer_passes(arch: int) -> dict:
    """kernels/layer_passes_triton.py: RMSNorm at the largest hidden size of the families and at a head's; the others
    have one shape of program."""
    from kernels import layer_passes_triton as fast

    flat, emulate = {"BLOCK": fast.FLAT}, {"EMULATE": False}
    report = {
        "swiglu": compile_one(fast._swiglu_kernel, {**flat, **emulate}, arch, 4, 1),
        "swiglu backward": compile_one(fast._swiglu_backward_kernel, {**flat, **emulate}, arch, 4, 1),
    }
    meta = {"BACK": True, "BLOCK_H": fast.HEADS, "BLOCK_D": 64, **emulate}
    report["rotate"] = compile_one(fast._rotate_kernel, meta, arch, 4, 1)
    for N in (8192, 128):
        rows, columns, warps = fast.row_blocks(N)
        meta = {"BLOCK_M": rows, "BLOCK_N": columns, **emulate}
        report[f"norm {N}"] = compile_one(fast._rms_norm_kernel, meta, arch, warps, 1)
        meta |= {"ADD": True}
        report[f"norm backward {N}"] = compile_one(fast._rms_norm_backward_kernel, meta, arch, warps, 1)
    return report


FILES = {
    "loss": compile_loss,
    "attention": compile_attention,
    "layer passes": compile_layer_passes,
    "tail": compile_tail,
}


@pytest.mark.aot
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_fit_the_card(arch):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = cold.interpreter(__file__, arch, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == set(FILES)
    for file, kernels in report.items():
        for name, used in kernels.items():
            assert used["stack"] == 0 and used["spills"] == 0, (file, name, used)
            assert used["shared"] <= SHARED_LIMIT[arch], (file, name, used)
            assert used["registers"] * 32 * used["warps"] <= 65_536, (file, name, used)
    assert len(report["loss"]) >= 5
    for name, used in report["loss"].items():
        assert (used["tensor_core"] > 0) == name.startswith("gemm_exp"), (name, used)
    assert set(report["attention"]) == {*DECODES, "join", "place", "place 256", "store"}
    assert len(report["tail"]) == 5
    for name, used in report["attention"].items():
        products = name.startswith("decode") and name != "decode fp32"  # fp32 is exact, hence not on tensor cores
        assert (used["tensor_core"] > 0) == products, (name, used)
    assert len(report["layer passes"]) == 7
    for name, used in report["layer passes"].items():
        assert used["registers"] <= 128, (name, used)  # two programs of four warps and more on a multiprocessor


def variants_of_the_loss() -> dict[str, int]:
    """How many variants of each kernel the chunks of many steps would compile, by Triton's own rule.

    The real launcher, with kernels that note what they are given; no code is made.
    """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from kernels import linear_cross_entropy_triton as fast
    from kernels.linear_cross_entropy import Head

    backend, keys = make_backend(GPUTarget("cuda", 90, 32)), {}

    def noting(name, kernel):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        def launch(*args, num_warps, num_stages=3, **meta):
            keys.setdefault(name, set()).add(str(bind(*args, **meta)[1]))

        return type("Noting", (), {"__getitem__": lambda self, grid: launch})()

    for name in ("_target_kernel", "_gemm_exp_kernel", "_exp_kernel", "_finish_kernel"):
        setattr(fast, name, noting(name, getattr(fast, name)))
    fast.architecture = lambda device: 90
    weight, total = torch.zeros(512, 64, dtype=torch.bfloat16), 1000
    for rows in (1, 7, 16, 100, 128, 129, 300):
        for path in ("fused", "split"):
            for start in (0, 128, 640):  # chunks begin at multiples of 128
                here = slice(start, start + rows)
                h, t = torch.zeros(rows, 64, dtype=torch.bfloat16), torch.zeros(total, dtype=torch.long)[here]
                sums = torch.zeros(2, total + rows)[:, here]
                fast.run_chunk(path, h, Head(weight), t, sums, torch.empty_like(h))
    return {name: len(found) for name, found in keys.items()}


@pytest.mark.aot
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_the_number_of_rows_compiles_no_variant():
    """It did: one more for a single row, one more for multiples of 16, of each kernel that knows it."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = cold.interpreter(__file__, "variants", env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    one_each = ("_target_kernel", "_gemm_exp_kernel", "_exp_kernel")
    assert found == dict.fromkeys(one_each, 1) | {"_finish_kernel": 2}  # the split path has one partial sum a row


if __name__ == "__main__" and sys.argv[1] == "variants":
    print(json.dumps(variants_of_the_loss()))
elif __name__ == "__main__":
    arch = int(sys.argv[1])
    print(json.dumps({file: compile_file(arch) for file, compile_file in FILES.items()}))
