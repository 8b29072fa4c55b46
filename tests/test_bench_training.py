"""bench/training.py and bench/pairs.py at their smallest.  python -m pytest tests/test_bench_training.py"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from tiny import save_tiny

BENCH = Path(__file__).parent.parent / "bench"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_cpu_table_has_both_and_the_ratio_of_their_turns(monkeypatch, capsys):
    """A machine that grows slower from turn to turn: only steps of one turn are compared."""
    bench = load("training")
    script = iter((9, 9, 3, 1, 10, 20, 50, 10))  # a warm-up; theirs, ours; ours, theirs; theirs, ours

    class Engine:
        def __init__(self, command):
            pass

        def __call__(self, tokens):
            return {"seconds": next(script)}

        def close(self):
            pass

    monkeypatch.setattr(bench.harness, "Engine", Engine)
    bench.main(["--device", "cpu", "--shapes", "tiny", "--tokens", "48", "--repeats", "3"])
    result = json.loads(capsys.readouterr().out)
    ours, theirs = result["tables"][0]["rows"]
    assert theirs[-1] == "3.00 (2.00 to 5.00)"  # the ratio of the medians is 2
    assert (ours[3].split()[0], theirs[3].split()[0]) == ("4.8", "2.4") and theirs[0] == "transformers + PEFT"


def test_both_are_processes_that_train(capsys):
    """The real thing on a tiny model."""
    bench = load("training")
    bench.main(["--device", "cpu", "--shapes", "tiny", "--tokens", "48", "--repeats", "1"])
    (run,) = json.loads(capsys.readouterr().out)["figures"]["runs"]
    assert [len(some) for some in run["seconds"].values()] == [1, 1]


def test_random_nf4_weights_train_as_any_model_does():
    bench = load("training")
    model = bench.random_model("tiny", torch.device("cpu"), nf4=True)
    assert sum(type(m).__name__ == "Linear4bit" for m in model.modules()) == 14
    assert not [n for n, p in model.named_parameters() if p.is_meta]
    step = bench.ours(model, 8, 0.0, 64)
    before = [p.clone() for p in bench.lora.lora_parameters(model)]
    assert step([bench.sample(40, 512)]) == "--checkpoint none"
    assert any(not torch.equal(a, b) for a, b in zip(before, bench.lora.lora_parameters(model), strict=True))


def test_the_longest_row_is_found_to_two_percent():
    bench, asked = load("training"), []

    def trains_up_to(limit: int):
        return lambda tokens: asked.append(tokens) or tokens <= limit

    for limit in (1500, 78_475, 342_733):
        assert 0.97 * limit - 256 <= bench.longest_row(trains_up_to(limit), 1024) <= limit
    assert bench.longest_row(trains_up_to(1000), 1024) == 0 and len(asked) < 60


def test_the_pairs_bench_measures_both(tmp_path, capsys):
    bench, folder = load("pairs"), save_tiny(tmp_path / "model", num_hidden_layers=1)
    bench.write_records(
        tmp_path / "x.jsonl", bench.parse_args(["--pairs", "3", "--tokens", "300", "--model", str(folder)])
    )
    found = {}
    for who in ("ours", "bare"):
        bench.main(["--model", str(folder), "--worker", who, str(tmp_path / "x.jsonl")])
        found[who] = json.loads(capsys.readouterr().out.splitlines()[-1])
    extra = found["ours"]["tokens"] - found["bare"]["tokens"]  # the template's own tokens, and an EOS each
    assert found["bare"]["tokens"] > 600 and 0 < extra < 3 * 40 and found["ours"]["seconds"] > 0


def test_missing_methods_say_what_they_need():
    bench = load("training")
    args = bench.parse_args(["--device", "cpu"])
    assert "unsloth" in bench.missing("Unsloth", args) and bench.missing("ours", args) == ""
    assert sys.modules.get("unsloth") is None
