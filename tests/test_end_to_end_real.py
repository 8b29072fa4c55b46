"""The real commands by subprocess on the real SmolLM2-135M-Instruct, at the smallest setting.

python -m pytest tests/test_end_to_end_real.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lengthen.reading import read_jsonl

ROOT = Path(__file__).parents[1]
SMALLEST = """--instructions 4 --final-instructions 2 --instructions.max-new-tokens 128 --responses.max-new-tokens 400
--extend.samples 2 --extend.min-gain 1 --train.epochs 1 --train.max-length 1024 --evaluate.limit 1
--responses.no-length-bias --extend.no-length-bias""".split()


@pytest.mark.real_model
def test_the_real_smollm2_at_the_smallest_setting(tmp_path):
    """A real instruct model from instructions to scores. Its texts differ from machine to machine in the last bits of
    the logits, and so does what passes the filters: where nothing does, the run says why and ends with exit code 3.
    """
    run = tmp_path / "smol"
    command = [sys.executable, "run.py", "--run", str(run), *SMALLEST]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600, env=env)
    # what the stages said, shown and kept
    log = (run / "run.log").read_text()
    assert log.count("$ python ") == log.count(": exit code ") and log.splitlines()[2] in process.stderr
    told = process.stderr[-4000:]
    assert process.returncode in (0, 3) and "Traceback" not in process.stderr, told
    for instruction in read_jsonl(run / "iter_1" / "instructions.jsonl"):
        assert instruction["language"] == "en" and 3 < instruction["prompt_words"] < 500
    if process.returncode == 3:
        assert "--min-yield asks for 1" in process.stderr.replace("\n", " ") and "hint:" in told
        return
    for record in read_jsonl(run / "iter_1" / "extended.jsonl"):
        assert record["finish"] == "eos" and record["response_words"] > record["initial_words"]
    for role in ("generator", "extender"):
        assert (run / "iter_1" / role / "adapter_model.safetensors").exists()
    assert json.loads((run / "eval" / "final" / "scores.json").read_text())["rows"] == 1
