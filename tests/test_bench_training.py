"""The benches of training, pairs, the loss, attention and the GPU's sampler, at their smallest.

python -m pytest tests/test_bench_training.py
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
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


def test_random_nf4_weights_train_as_any_model_does(same_nf4_on_every_cpu):
    bench = load("training")
    model = bench.random_model("tiny", torch.device("cpu"), nf4=True)
    assert sum(type(m).__name__ == "Linear4bit" for m in model.modules()) == 14
    assert not [n for n, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    run = bench.ours(model, 8, 0.0, 64)
    before = [p.clone() for p in bench.lora.lora_parameters(model)]
    times, facts = run(40, 2)
    assert len(times) == 2 and facts["settings"] == "--checkpoint none" and facts["lean"] and facts["plan_gb"] >= 0
    assert any(not torch.equal(a, b) for a, b in zip(before, bench.lora.lora_parameters(model), strict=True))


def test_random_models_have_key_biases_as_large_as_real_ones():
    """Qwen2.5-0.5B's reach 211; with small ones nothing that they break would show."""
    model = load("models").random_model("tiny", torch.device("cpu"), nf4=False)
    largest = {name: p.abs().max().item() for name, p in model.named_parameters() if name.endswith("proj.bias")}
    assert len(largest) == 6 and all((value > 100) == ("k_proj" in name) for name, value in largest.items())


def test_a_tied_head_stays_the_embedding(monkeypatch):
    """Qwen3-0.6B's: every parameter is made anew."""
    bench = load("models")
    monkeypatch.setitem(bench.SHAPES, "tiny", bench.SHAPES["tiny"]._replace(tied=True))
    model = bench.random_model("tiny", torch.device("cpu"), nf4=False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_peft_trains_under_autocast_as_trainer_does():
    """It did not: its fp32 adapters then turn every product of a bf16 model into one of fp32."""
    bench, seen = load("training"), []
    model = bench.with_adapter(bench.random_model("tiny", torch.device("cpu"), nf4=False).bfloat16(), 8)
    adapter = next(m for name, m in model.named_modules() if name.endswith("lora_A.default"))
    adapter.register_forward_hook(lambda module, given, result: seen.append((module.weight.dtype, result.dtype)))
    bench.by_steps(model, 512, "")(40, 1)
    assert seen == [(torch.float32, torch.bfloat16)]


def test_a_gpu_runs_every_method_in_its_own_process_and_says_which_fail(monkeypatch, capsys):
    """The GPU's way on a toy shape; a method that fails has a row with the reason."""
    bench = load("training")
    monkeypatch.setattr(bench, "missing", lambda method, args: "" if method in ("ours", "Unsloth") else "left out")
    bench.main(["--tiny", "--methods", "ours", "TRL", "Unsloth"])
    out, err = capsys.readouterr()
    said = [json.loads(line)["figures"]["rows"] for line in out.splitlines()]
    own, failed = said[-1]
    assert said[:2] == [[own], [own, failed]]  # each at once: the bench may be ended before the next
    assert own["method"] == "ours" and own["tokens_per_second"] > 0 and own["lean"] is True
    assert failed["method"] == "Unsloth" and "failed: ModuleNotFoundError" in failed["settings"]
    assert "TRL                   not measured: left out" in err


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


def test_the_loss_bench_has_the_floor_beside_every_method_and_survives_a_peer(monkeypatch, capsys):
    bench = load("loss")

    def breaks(h, w, t, cap):
        raise RuntimeError("no kernel image\nis available")

    given = bench.methods
    monkeypatch.setattr(bench, "methods", lambda *args: ({**given(*args)[0], "peer": breaks}, given(*args)[1]))
    bench.main(["--device", "cpu", "--shapes", "tiny", "--dtype", "float32", "--tokens", "40", "--repeats", "2"])
    out, err = capsys.readouterr()
    rows = json.loads(out)["tables"][0]["rows"]
    assert [row[1] for row in rows][:3] == ["two products", "ours, torch", "torch eager"]
    assert "no peer: RuntimeError: no kernel image" in err and "is available" not in err
    assert all(float(row[7]) < 1e-4 and float(row[8]) < 1e-4 for row in rows[1:]), rows


def test_small_kernels_are_timed_as_replays_not_as_calls_from_python(monkeypatch):
    """Starting one takes the host longer than a GPU needs for it."""
    bench, log, clock = load("attention"), [], iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = next(clock)
            log.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, stop):
            return 1000.0 * (stop.at - self.at)

    empty = torch.empty
    monkeypatch.setattr(bench.torch, "empty", lambda *size, device: empty(1))
    monkeypatch.setattr(bench.torch.cuda, "Event", Event)
    monkeypatch.setattr(bench, "captured", lambda work: work() or (lambda: log.append("replay")))
    assert bench.seconds(lambda: log.append("work"), True, 2) == 1.0
    assert log == ["work", *["event", "replay", "event"] * 4]


def test_the_models_of_case_d_write_the_script_so_lookup_has_something_to_find():
    """Case d replaced the tokens in a function that captured steps never call: it measured nothing."""
    bench = load("sampler_gpu")
    args, device = bench.parse_args(["--tiny"]), torch.device("cpu")
    work = bench.make_work("d", args)
    used = [token for prompt in work.prompts for token in prompt]
    assert len(set(used)) == len(used)
    copied = [len({*script} & {*prompt}) for prompt, script in zip(work.prompts, work.script, strict=True)]
    assert 0.3 < sum(copied) / (40 * len(copied)) < 0.7 and min(copied) < 20 < max(copied)
    assert all(len(script) == len({*script}) == 40 for script in work.script)
    rates = []
    for lookup in (True, False):
        notes = bench.run_ours(work, device, lookup=lookup)["notes"]
        assert notes.endswith("100.0% of the tokens as scripted"), notes
        rates.append(float(notes.split()[0]))
    assert rates[0] > 1.1 and rates[1] == 1.0


def test_decoding_is_clocked_without_prompts(monkeypatch):
    bench = load("sampler_gpu")
    work = bench.make_work("decode-7B-64", bench.parse_args(["--tiny"]))
    assert len(work.prompts) == 4 and work.lengths == [32 + 8 + bench.WARM] * 4
    result = bench.run_ours(work, torch.device("cpu"))
    # From the step after each text's 16th token on: 32 tokens a text.
    assert 4 * 32 <= result["tokens"] <= 4 * 40 and result["seconds"] > 0


def test_texts_that_decode_beside_prompts_do_not_end_before_the_last_is_admitted():
    """Each of the 64 steps with prompts runs a burst of 8 tokens beside it: texts of 256 tokens gave no figure."""
    bench = load("sampler_gpu")
    work = bench.make_work("decode-7B-256", bench.parse_args([]))
    steps = -(-sum(map(len, work.prompts)) // 8192)
    assert steps == 64 and min(work.lengths) >= 8 * steps + bench.WARM + 256 and work.clocked == 256


def test_what_a_process_measured_is_there_before_it_ends():
    code = "import time; print('{\"n\": 1}', flush=True); time.sleep(600)"
    found = load("harness").measured([sys.executable, "-c", code], "notes")
    assert next(found) == {"n": 1}
    found.close()  # and the process ends


def test_what_was_measured_is_said_after_each_cell(monkeypatch, capsys):
    bench = load("sampler_gpu")

    monkeypatch.setattr(bench.harness, "machine", dict)

    def measured(command, failed):
        if command[command.index("--one") + 2] != "ours":
            raise KeyboardInterrupt  # the step's limit
        yield {"tokens": 10, "seconds": 2.0}

    monkeypatch.setattr(bench.harness, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--tiny", "--cases", "decode-7B-64", "--engines", "ours", "ours, no graphs"])
    result = load("on_gpu").last_document(capsys.readouterr().out)
    assert [cell["tokens_per_second"] for cell in result["figures"]["cells"]] == [5.0]
    assert result["tables"][0]["rows"][0][:2] == ["decode-7B-64", "ours"]
