"""Every shipped kernel configuration, compiled without a GPU: tensor cores used, no spills, shared memory in the limit.

    pytest tests/test_linear_cross_entropy_aot.py

One process per architecture, because Triton decides at import whether its kernels are compiled or interpreted. About a
minute on one core the first time; Triton caches what it compiles.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# bytes of shared memory that one block may use (CUDA programming guide, table of compute capabilities)
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compile_kernel(kernel, meta: dict, types: dict, arch: int, warps: int, stages: int) -> dict:
    """Compile with the types and alignments of a real launch; read registers and instructions off the cubin.

    types: of the pointers, and of what else is no int32. Aligned pointers and sizes are what torch and the models'
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
            signature[name] = "fp32" if name in ("scale", "softcap", "eps") else "i32"
    aligned = [
        i
        for i, n in enumerate(signature)
        if signature[n][0] == "*" or n in ("V", "H", "N", "half", "n") or n.startswith("stride")
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
    types |= dict.fromkeys(("zt_ptr", "part_ptr", "coef_ptr", "sums_ptr", "u_ptr", "z_ptr"), "fp32")
    types |= dict.fromkeys(("t_ptr", "rows_ptr"), "i64")
    return compile_kernel(kernel, meta, types, arch, warps, stages)


def run_compiler(script: str, arch: int) -> dict:
    """A test file as a script, in a process where Triton compiles -> the JSON of its last line."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    run = subprocess.run([sys.executable, script, str(arch)], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def compile_all(arch: int) -> dict:
    """Of each configuration the variant with the most to hold, and of the product also the one that training runs."""
    from kernels import linear_cross_entropy_triton as fast

    store = {"STORE": True, "STATS": False, "EMULATE": False}
    plain = {"HAS_BIAS": False, "HAS_CAP": False, **store}
    full = {"HAS_BIAS": True, "HAS_CAP": True, **store, "STATS": True}
    report = {}
    for name, flags, small, even in (
        ("train", plain, False, True),
        ("softcap, statistics", full, True, True),
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
    meta = {"HAS_CAP": True, "HAS_ROWS": True, "GRAD": True, "STATS": True, "EMULATE": False}
    report["finish"] = compile_one(fast._finish_kernel, {**meta, "BLOCK_P": 2048, "BLOCK_H": 1024}, arch, 4, 3)
    return report


@needs_triton
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_fit_the_card(arch):
    report = run_compiler(__file__, arch)
    assert len(report) >= 5, report.keys()
    for name, used in report.items():
        assert used["stack"] == 0 and used["spills"] == 0, (name, used)
        assert used["shared"] <= SHARED_LIMIT[arch], (name, used)
        assert used["registers"] * 32 * used["warps"] <= 65_536, (name, used)
        assert (used["tensor_core"] > 0) == name.startswith("gemm_exp"), (name, used)


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
