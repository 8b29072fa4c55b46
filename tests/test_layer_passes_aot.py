"""The layer's passes, compiled without a GPU: no spills, registers and shared memory within the card's limits.

    pytest tests/test_layer_passes_aot.py

As test_linear_cross_entropy_aot.py, whose tools it uses: one process per architecture.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_linear_cross_entropy_aot import ROOT, SHARED_LIMIT, compile_one, needs_triton


def compile_all(arch: int) -> dict:
    """RMSNorm at the largest hidden size of the families and at a head's; the others have one shape of program."""
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
        report[f"norm backward {N}"] = compile_one(
            fast._rms_norm_backward_kernel, {**meta, "ADD": True}, arch, warps, 1
        )
    return report


@needs_triton
@pytest.mark.parametrize("arch", [80, 89, 90])
def test_kernels_fit_the_card(arch):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run([sys.executable, __file__, str(arch)], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert len(report) == 7, report.keys()
    for name, used in report.items():
        assert used["stack"] == 0 and used["spills"] == 0, (name, used)
        assert used["shared"] <= SHARED_LIMIT[arch], (name, used)
        assert used["registers"] * 32 * used["warps"] <= 65_536, (name, used)
        assert used["registers"] <= 128, (name, used)  # two programs of four warps and more on a multiprocessor


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    print(json.dumps(compile_all(int(sys.argv[1]))))
