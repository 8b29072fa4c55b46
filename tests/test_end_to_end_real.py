"""The real commands on the real SmolLM2-135M-Instruct, at the smallest setting.

python -m pytest tests/test_end_to_end_real.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lengthen.records import read_jsonl

ROOT = Path(__file__).parents[1]
# Many short drafts in one batch: some end by themselves within 200 tokens, and leave room to be made longer.
SMALLEST = """--instructions 4 --final-instructions 2 --instruction-tokens 128 --samples 4 --draft-tokens 200
--max-attempts 1 --extend-samples 4 --extend-attempts 1 --rounds 1 --max-new-tokens 400 --demand-attempts 1 --epochs 1
--limit 1 --max-length 1024 --no-length-bias --min-gain 1""".split()


@pytest.mark.real_model
def test_the_real_smollm2_at_the_smallest_setting(tmp_path):
    """A real instruct model: pairs and both adapters come out. Of two fresh answers at the end none may pass the
    filters at this size; then the run says why, and ends with exit code 3.
    """
    run = tmp_path / "smol"
    command = [sys.executable, "run.py", "--run", str(run), *SMALLEST]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, env=env)
    told = process.stderr[-4000:]
    assert process.returncode in (0, 3) and "Traceback" not in process.stderr, told
    extended = read_jsonl(run / "iter_1" / "extended.jsonl")
    assert all(r["finish"] == "eos" and r["response_words"] > r["initial_words"] for r in extended)
    for role in ("generator", "extender"):
        assert (run / "iter_1" / role / "adapter_model.safetensors").exists(), told
    if process.returncode == 3:
        assert "--min-yield asks for 1" in process.stderr.replace("\n", " ") and "hint:" in told
    else:
        assert json.loads((run / "eval" / "final" / "scores.json").read_text())["rows"] == 1
