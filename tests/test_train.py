"""train.py: packing, masks, accumulation, resume; oracles: transformers, PEFT.  python -m pytest tests/test_train.py"""

import itertools
import json
import os
import re
import signal
from pathlib import Path

import cold
import peft
import pytest
import torch
from tiny import save_tiny, tiny_model, tiny_tokenizer
from trainees import EOS, alone, assert_same, learner_for, record, some_pairs, with_lora, words, write
from transformers import AutoModelForCausalLM

import train
from lengthen.models import lora
from lengthen.models.chat import Chat
from lengthen.models.loading import load_model
from lengthen.reading import read_jsonl
from lengthen.records import LowYield, UserError, new_record
from lengthen.training import checkpoint, folder, lean_layer, learner, policy, shapes
from lengthen.training.packed import examine
from lengthen.training.pairs import left_out_notes
from lengthen.training.settings import PairFlags

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    # widths that NF4's blocks of 64 divide: bitsandbytes needs that on a CPU
    return save_tiny(tmp_path_factory.mktemp("model"), intermediate_size=128)


@pytest.fixture
def run(tmp_path, model_folder, capsys):
    """Call train.main on seven records -> (summary, log entries, stderr)."""
    write(tmp_path / "extended.jsonl", [record(i) for i in range(7)])

    def call(*flags: str, output: str = "out", role: str = "generator", inputs=("extended.jsonl",)):
        files = [str(tmp_path / name) for name in inputs]
        basics = ["--role", role, "--model", str(model_folder), "--input", *files, "--output", str(tmp_path / output)]
        small = ["--epochs", "2", "--learning-rate", "5e-3", "--rank", "4", "--alpha", "8", "--save-every", "2"]
        capsys.readouterr()
        train.main([*basics, *small, *flags])
        out, err = capsys.readouterr()
        return json.loads(out.splitlines()[-1]), read_jsonl(tmp_path / output / "train_log.jsonl", needs=()), err

    return call


# ---- exactness ------------------------------------------------------------------------------------------


def test_one_step_is_pefts(tmp_path):
    """The same AdamW step of the same adapter: ours packed and fused, PEFT's one sample at a time."""
    pairs, ours = some_pairs(30, 12, 21), with_lora()
    lora.save_adapter(ours, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).train()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0) for p in (lora.lora_parameters(ours), trained)]
    loss, norm, *_ = train.train_step(learner_for(ours, optimizers[0]), pairs, per_row=8)

    expected = alone(theirs, pairs) / sum(len(p.ids) - p.num_prompt for p in pairs)
    expected.backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(trained, train.CLIP)
    optimizers[1].step()
    assert loss == pytest.approx(expected.item(), rel=1e-5) and norm == pytest.approx(expected_norm.item(), rel=1e-4)
    names = {n: p for n, p in theirs.named_parameters()}
    for name, layer in lora.lora_layers(ours).items():
        for part, value in (("A", layer.A), ("B", layer.B)):
            torch.testing.assert_close(
                value, names[f"base_model.model.{name}.lora_{part}.default.weight"], rtol=0, atol=1e-4
            )


@pytest.mark.parametrize(("per_row", "budget"), [(1, 1e12), (3, 1e12), (8, 1.0)])
def test_accumulated_is_one_big_batch(per_row, budget):
    """However the pairs of a step are split into rows, by number or by memory, and however much is recomputed."""
    pairs, results = some_pairs(40, 5, 17, 28, 3), []
    for rows, room in ((per_row, budget), (8, 1e12)):
        model = with_lora()
        optimizer = torch.optim.SGD(lora.lora_parameters(model), lr=1.0)
        loss, norm, *_ = train.train_step(learner_for(model, optimizer, room), pairs, rows)
        results.append((loss, norm, lora.lora_parameters(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    assert_same(results[0][2], results[1][2], 1e-6)


# ---- pairs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["generator", "extender"])
def test_targets_are_the_answer_and_its_eos_by_position(role):
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS  # SmolLM2's case: a mask by id would lose the EOS
    records = [record(i) for i in range(3)]
    pairs, left_out = train.make_pairs(records, Chat(tokenizer), PairFlags(role), 0, 2048)
    index, targets = train.targets_of(pairs)
    flat = [i for p in pairs for i in p.ids]
    assert not left_out and [flat[i + 1] for i in index] == targets
    answers = "".join(r["response"] + tokenizer.decode([EOS]) for r in records)
    assert tokenizer.decode(targets) == answers and targets.count(EOS) == 3
    assert all(EOS in p.ids[: p.num_prompt] for p in pairs), "the EOS that ends the user's turn is no target"


def test_the_query_of_a_constrained_record_is_the_prompt():
    asked = new_record("constrained", prompt="the river", query="the river in 50 words", response="a b.", language="en")
    assert train.to_messages(asked, "generator", 0.8, 0)[0]["content"] == "the river in 50 words"
    assert train.to_messages(record(1), "generator", 0.8, 0)[0]["content"] == record(1)["prompt"]


def test_the_extender_sees_a_sparser_draft_that_keeps_its_paragraphs():
    records = [record(i) for i in range(40)]
    kept = total = 0
    for r in records:
        lines = [line for line in r["initial"].split("\n") if line]
        shown = train.to_messages(r, "extender", 0.8, 0)[0]["content"]
        whole = train.to_messages(r, "extender", 1.0, 0)[0]["content"]
        assert r["initial"] in whole and r["prompt"] in shown
        assert shown == train.to_messages(r, "extender", 0.8, 0)[0]["content"], "another epoch, another outline"
        present = [line for line in lines if line in shown.split("\n")]
        kept, total = kept + len(present), total + len(lines)
        draft = shown[shown.index(present[0]) : shown.index(present[-1]) + len(present[-1])]
        assert "\n\n\n" not in draft
        # two lines of different paragraphs are still apart
        for paragraph in draft.split("\n\n"):
            homes = {next(k for k, p in enumerate(r["initial"].split("\n\n")) if x in p) for x in paragraph.split("\n")}
            assert len(homes) == 1
    assert 0.7 < kept / total < 0.9  # 480 lines: 0.8 +- 5 standard deviations


def test_too_long_and_unfinished_pairs_are_left_out_counted_and_listed(run, tmp_path):
    rows = [record(i) for i in range(6)] + [record(6, response=words(700, 6)), record(7, finish="length")]
    write(tmp_path / "extended.jsonl", rows)
    summary, _, err = run("--max-length", "400")
    assert (summary["pairs"], summary["left_out"]) == (6, 2)
    rejected = {r["id"]: r for r in read_jsonl(tmp_path / "out" / "rejected.jsonl")}
    assert {i: r["reason"] for i, r in rejected.items()} == {"r6": "too-long", "r7": "unfinished"}
    assert rejected["r6"]["tokens"] > 700 and rejected["r6"]["response"] == rows[6]["response"]
    total = 700 + sum(len(r["response"].split()) for r in (*rows[:6], rows[7]))
    assert f"warning: left out 2 of 8 pairs (rejected.jsonl), {700 + 86:,} of {total:,} words" in err
    assert "--max-length is 400" in err


def test_the_context_caps_the_length(run, tmp_path):
    write(tmp_path / "extended.jsonl", [record(0), record(1, response=words(2500, 1))])
    summary, _, err = run()
    assert summary["left_out"] == 1 and "--max-length is 2048" in err


def test_a_long_pair_among_many_is_a_warning_and_an_ordinary_one_is_not():
    records = [{"response": "w " * n} for n in range(1, 101)]
    ordinary = left_out_notes(records, [{**records[50], "reason": "unfinished"}], 10)
    longest = left_out_notes(records, [{**records[99], "reason": "too-long", "tokens": 99}], 10)
    assert not ordinary[0].startswith("warning") and longest[0].startswith("warning")
    assert "100 of 5,050 words" in longest[0] and left_out_notes(records, [], 10) == []


def test_no_pair_left_is_too_little_yield(run, tmp_path):
    with pytest.raises(LowYield, match="0 of 7 records") as raised:
        run("--max-length", "20")
    assert "rejected.jsonl" in raised.value.hint
    assert not (tmp_path / "out" / lora.WEIGHTS).exists()
    with pytest.raises(LowYield, match="--min-yield asks for 8"):
        run("--min-yield", "8", output="other")


def test_languages_are_filtered_and_detected(run, tmp_path):
    rows = [record(0), {"prompt": "写一篇关于长江的文章", "response": "长江是一条河。"}]
    write(tmp_path / "extended.jsonl", rows)
    assert run("--language", "zh")[0]["pairs"] == 1
    assert run("--language", "both", output="both")[0]["pairs"] == 2


# ---- order and rate -------------------------------------------------------------------------------------


def test_every_epoch_visits_each_pair_once_in_another_order():
    epochs = [[i for step in range(4 * e, 4 * e + 4) for i in train.step_pairs(step, 11, 3, 0)] for e in range(3)]
    assert all(sorted(order) == list(range(11)) for order in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [i for step in range(4) for i in train.step_pairs(step, 11, 3, seed=1)]


def test_rows_respect_number_and_memory():
    lengths = [[len(p.ids) for p in row] for row in train.split_rows(some_pairs(5, 6, 7, 50, 2, 3), 3, 16)]
    assert lengths == [[5, 6], [7], [50], [2, 3]]
    assert [len(r) for r in train.split_rows(some_pairs(2, 2, 2, 2, 2), 2, 100)] == [2, 2, 1]


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [train.learning_rate(step, 20, 1.0) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert rates[11] == pytest.approx(0.5) and 0 < rates[-1] < 0.01  # cosine: half the rate at half the way
    assert train.learning_rate(0, 1, 1.0) == 1.0


def test_training_in_float16_is_refused_with_the_reason(tmp_path):
    flags = ["--role", "generator", "--model", "smollm2", "--input", "x.jsonl", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="loss scaling") as error:
        train.main([*flags, "--dtype", "float16"])
    assert error.value.hint == "--dtype bfloat16, or float32" and not (tmp_path / "out").exists()


# ---- a whole run ----------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_everything(run, tmp_path, model_folder):
    summary, log, err = run("--epochs", "6", "--batch-size", "2", "--merge-to", str(tmp_path / "merged"))
    assert summary["last_loss"] < 0.9 * summary["first_loss"] and summary["steps"] == len(log) == 24
    assert [e["step"] for e in log] == list(range(1, 25)) and log[0]["epoch"] == 0 and log[-1]["epoch"] == 5
    assert sum(e["tokens"] for e in log) == summary["tokens"] and "tok/s" in err and "| lr " in err
    out = {p.name for p in (tmp_path / "out").iterdir()}
    assert out == {lora.WEIGHTS, lora.CONFIG, "meta.json", "train_log.jsonl", "loss.png", "rejected.jsonl", "README.md"}
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["status"] == "done" and meta["quantize"] == "none" and meta["settings"]["rank"] == 4
    assert list(meta["settings"]["inputs"]) == [f"{tmp_path.name}/extended.jsonl"]

    ids = torch.arange(5, 45)[None]
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    applied = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.no_grad():
        expected = applied(input_ids=ids).logits
        with applied.disable_adapter():
            assert (applied(input_ids=ids).logits - expected).abs().max() > 0.1
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("own", ["", "256"])
def test_few_compiled_products_are_kept_unless_the_user_says_how_many(run, monkeypatch, own):
    """oneDNN's 1,024 were 0.6 GB after 40 steps in bf16 on a CPU, for rows of 40 lengths."""
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, own)
    if not own:
        monkeypatch.delenv(name)
    run("--epochs", "1")
    assert os.environ[name] == (own or "64")


def test_a_control_trains_on_as_many_target_tokens(run, tmp_path):
    """--budget-of: fewer pairs go round more often, and the last step is the one that reaches the budget."""
    method, log, _ = run("--epochs", "3", output="method")
    assert method["target_tokens"] == sum(e["target_tokens"] for e in log)
    write(tmp_path / "few.jsonl", [record(i) for i in range(20, 23)])
    few = {"output": "few", "inputs": ("few.jsonl",)}
    control, steps, _ = run("--budget-of", str(tmp_path / "method"), "--epochs", "1", **few)
    assert control["pairs"] == 3 and control["steps"] == len(steps) > 3  # not one epoch
    assert control["target_tokens"] - steps[-1]["target_tokens"] < method["target_tokens"] <= control["target_tokens"]
    assert steps[-1]["lr"] < 0.1 * max(e["lr"] for e in steps)  # the cosine ends where the training does
    assert "nothing to train" in run("--budget-of", str(tmp_path / "method"), "--epochs", "1", **few)[2]
    with pytest.raises(UserError, match="target_tokens"):
        run("--epochs", "1", **few)
    with pytest.raises(UserError, match="--budget-of .*nowhere is not a finished training"):
        run("--budget-of", str(tmp_path / "nowhere"), output="third")


def test_a_finished_run_loads_no_model(run, monkeypatch):
    first = run()
    monkeypatch.setattr(learner, "load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    again = run()
    assert again[:2] == first[:2] and "nothing to train" in again[2]


def test_help_and_a_finished_run_import_no_torch(run, tmp_path, model_folder):
    """In a cold interpreter: what is not trained does not wait seconds for torch and transformers."""
    summary, _, _ = run()
    small = "--epochs 2 --learning-rate 5e-3 --rank 4 --alpha 8 --save-every 2".split()
    command = ["--role", "generator", "--model", str(model_folder), "--input", str(tmp_path / "extended.jsonl")]
    command += ["--output", str(tmp_path / "out"), *small]
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
try:
    train.main({{argv!r}})
except SystemExit:
    pass
loaded = {{{{name.partition(".")[0] for name in sys.modules}}}}
print(sorted(loaded & {{{{"torch", "transformers", "safetensors", "kernels", "bitsandbytes"}}}}), file=sys.stderr)
"""
    for argv in (["--help"], command):
        done = cold.interpreter("-c", code.format(argv=argv))
        assert done.returncode == 0 and done.stderr.splitlines()[-1] == "[]", done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == summary and "nothing to train" in done.stderr


def test_other_settings_are_refused_by_name(run, tmp_path):
    run()
    with pytest.raises(UserError, match="rank = 4, this command says 8") as raised:
        run("--rank", "8")
    assert "--overwrite" in raised.value.hint
    write(tmp_path / "extended.jsonl", [record(i) for i in range(5)])
    with pytest.raises(UserError, match="inputs"):
        run()
    assert run("--rank", "8", "--overwrite")[0]["pairs"] == 5


def test_a_checkpoint_is_not_continued_in_another_precision(run, monkeypatch):
    """--dtype is no setting: it would go on with weights that the first half has not seen."""
    step, calls = train.train_step, itertools.count()

    def dies_at_the_fourth(*given, **options):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", dies_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            run()
    with pytest.raises(UserError, match="begun with dtype float32, this command or machine takes bfloat16") as caught:
        run("--dtype", "bfloat16")
    assert "--dtype float32" in caught.value.hint
    run()


def test_nf4_trains_on_the_cpu(run, tmp_path):
    summary, log, _ = run("--quantize", "nf4", "--epochs", "4")
    assert summary["last_loss"] < summary["first_loss"]
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["quantize"] == "nf4"


# ---- going on with an adapter ---------------------------------------------------------------------------


def test_an_adapter_is_continued_where_it_was(run, tmp_path):
    first = run("--epochs", "6")
    again = run("--adapter", str(tmp_path / "out"), "--learning-rate", "0", "--epochs", "1", output="next")
    fresh = run("--learning-rate", "0", "--epochs", "1", output="fresh")
    losses = [sum(e["loss"] * e["target_tokens"] for e in log) for log in (again[1], fresh[1])]
    assert losses[0] < 0.9 * losses[1] and first[0]["steps"] == 42
    a, b = (lora.read_adapter(tmp_path / name)[1] for name in ("out", "next"))
    assert all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n], strict=True))  # rate 0: the same adapter


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "8"], "has rank 4, not 8"),
        (["--alpha", "4"], "has alpha 8, not 4"),
        (["--targets", "q_proj"], "adapts other layers"),
    ],
)
def test_an_adapter_of_other_shape_is_not_continued(run, tmp_path, flags, message):
    run("--epochs", "1")
    with pytest.raises(UserError, match=message):
        run("--adapter", str(tmp_path / "out"), *flags, output="next")


def test_an_rslora_adapter_of_peft_is_continued_at_its_own_scale(run, tmp_path):
    """PEFT scales by alpha / sqrt(rank) where its config says use_rslora; what we write says so, too."""
    run("--epochs", "1")
    path = tmp_path / "out" / lora.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True}))
    plain, scaled = ({"output": name} for name in ("fresh", "next"))
    fresh = run("--learning-rate", "0", "--epochs", "1", **plain)
    again = run("--adapter", str(tmp_path / "out"), "--learning-rate", "0", "--epochs", "1", **scaled)
    assert json.loads((tmp_path / "next" / lora.CONFIG).read_text())["use_rslora"]
    assert losses_of(again[1]) != losses_of(fresh[1])


def test_an_adapter_for_another_base_is_refused(run, tmp_path):
    run("--epochs", "1")
    other = save_tiny(tmp_path / "other", seed=9, intermediate_size=128)
    with pytest.raises(UserError, match="another model of the same shape"):
        run("--adapter", str(tmp_path / "out"), "--model", str(other), output="next")


# ---- interruptions --------------------------------------------------------------------------------------

KILLER = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import train
from lengthen.models import lora
from lengthen.training import folder
count = 0
def kill(module, name, nth):
    original = getattr(module, name)
    def wrapped(*args, **kwargs):
        global count
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, name, wrapped)
kill({module}, {name!r}, {nth})
train.main({argv!r})
"""


@pytest.mark.parametrize(
    ("module", "name", "nth"),
    [
        ("train", "train_step", 6),  # inside a step, one behind a checkpoint
        ("folder", "rename", 5),  # the newest was renamed to the previous, the new one not yet to the newest
        ("lora", "replace_file", 2),  # weights of the adapter written, its config not
    ],
)
def test_killed_and_run_again_is_the_unbroken_run(run, tmp_path, module, name, nth):
    flags = ["--epochs", "2", "--dropout", "0.1"]
    _, expected, _ = run(*flags, output="unbroken")
    argv = ["--role", "generator", "--model", None, "--input", str(tmp_path / "extended.jsonl")]
    meta = json.loads((tmp_path / "unbroken" / "meta.json").read_text())
    argv[3] = meta["base"]
    argv += ["--output", str(tmp_path / "out"), "--learning-rate", "5e-3", "--rank", "4", "--alpha", "8"]
    argv += ["--save-every", "2", *flags]
    code = KILLER.format(root=str(ROOT), tests=str(ROOT / "tests"), module=module, name=name, nth=nth, argv=argv)
    killed = cold.run("-c", code)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    _, log, err = run(*flags)
    assert "resuming after step" in err
    assert [e["step"] for e in log] == [e["step"] for e in expected]
    for ours, theirs in zip(log, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6) and ours["lr"] == theirs["lr"]
    a, b = (lora.read_adapter(tmp_path / folder)[1] for folder in ("out", "unbroken"))
    assert_same([x for n in a for x in a[n]], [x for n in b for x in b[n]], 1e-6)


def test_what_a_kill_leaves_behind_goes_with_the_next_start(run, tmp_path, monkeypatch):
    """Seen in bench/soak.py: killed between "done" and the removal of the checkpoints, these stayed for good."""
    with monkeypatch.context() as patch:
        patch.setattr(folder.TrainingFolder, "drop_checkpoints", lambda self: None)
        run()
    (tmp_path / "out" / ".meta.json.1234.tmp").write_text("half a side")
    assert (tmp_path / "out" / "checkpoint").is_dir()
    run()
    left = [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".") or "checkpoint" in p.name]
    assert left == [] and (tmp_path / "out" / "adapter_model.safetensors").exists()


def stop_at(monkeypatch, step: int):
    """The run ends as by Ctrl-C in that step (from 1)."""
    original, calls = train.train_step, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", interrupted)
    return lambda: monkeypatch.setattr(train, "train_step", original)


@pytest.mark.parametrize("damaged", [["checkpoint"], ["checkpoint", "checkpoint.previous"]])
def test_a_damaged_checkpoint_falls_back_and_says_so(run, tmp_path, monkeypatch, damaged):
    _, expected, _ = run(output="unbroken")
    restore = stop_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        run()
    restore()
    for name in damaged:  # one flipped bit, a length that is right
        path = tmp_path / "out" / name / "state.safetensors"
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
    _, log, err = run()
    assert err.count("is damaged (its checksum is another)") == len(damaged)
    assert ("resuming after step 4" in err) == (len(damaged) == 1)
    assert [e["loss"] for e in log] == pytest.approx([e["loss"] for e in expected], abs=1e-6)


@pytest.mark.parametrize(("module", "function"), [(folder, "rename"), (folder, "replace_file"), (checkpoint, "save")])
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_a_failing_write_or_rename_costs_nothing(run, tmp_path, monkeypatch, module, function, nth):
    """Disk full at the nth write: an error with a hint, then the same command gives the unbroken run."""
    original, calls = getattr(module, function), []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, fails)
    with pytest.raises((UserError, OSError), match="No space left"):
        run("--save-every", "1")
    monkeypatch.setattr(module, function, original)
    summary, log, _ = run("--save-every", "1")
    assert [e["step"] for e in log] == list(range(1, 15)) and summary["steps"] == 14
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(("checkpoint", "."))]


# ---- steps that are not finite --------------------------------------------------------------------------


def not_finite_at(monkeypatch, steps: set[int]) -> None:
    original, calls = train.row_loss, []

    def poisoned(*args):
        calls.append(1)
        loss, hits = original(*args)
        return loss * float("nan") if len(calls) in steps else loss, hits

    monkeypatch.setattr(train, "row_loss", poisoned)


def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted(run, tmp_path, monkeypatch):
    not_finite_at(monkeypatch, {3, 5, 6})
    summary, log, err = run()
    assert summary["skipped_steps"] == 3 and [e["step"] for e in log if e["skipped"]] == [3, 5, 6]
    assert log[2]["loss"] == -1.0 and err.count("skipped: not finite") == 3
    assert all(bool(torch.isfinite(x).all()) for pair in lora.read_adapter(tmp_path / "out")[1].values() for x in pair)


def test_three_in_a_row_stop_the_run(run, tmp_path, monkeypatch):
    not_finite_at(monkeypatch, {7, 8, 9})
    with pytest.raises(UserError, match="3 steps in a row were skipped: not finite .last: step 9") as raised:
        run()
    assert "--learning-rate" in raised.value.hint and (tmp_path / "out" / "checkpoint" / "state.json").exists()
    assert not (tmp_path / "out" / lora.WEIGHTS).exists()


# ---- folders that are wrong -----------------------------------------------------------------------------


def test_two_writers_of_one_folder(run, tmp_path):
    (tmp_path / "out").mkdir()
    from lengthen.jobs import Lock

    lock = Lock(tmp_path / "out")
    with pytest.raises(UserError, match="being written by another process"):
        run()
    lock.release()
    assert run()[0]["pairs"] == 7


def test_an_output_that_is_not_ours(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        run(output="file")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / lora.WEIGHTS).write_text("x")
    with pytest.raises(UserError, match="not the meta.json"):
        run(output="theirs")
    assert (tmp_path / "theirs" / lora.WEIGHTS).read_text() == "x"


def test_an_input_that_is_not_finished(run, tmp_path):
    (tmp_path / "extended.meta.json").write_text('{"status": "running"}')
    with pytest.raises(UserError, match="not finished"):
        run()
    assert run("--allow-partial")[0]["pairs"] == 7


@pytest.mark.real_model
def test_smollm2_packs_and_fuses():
    from lengthen.models.loading import load_model

    loaded = load_model("smollm2", train=True)
    parameters = lora.attach(loaded.model, 8, 16)
    abilities = examine(loaded.model)
    assert abilities.packs and abilities.head is not None
    assert sum(p.numel() for p in parameters) == 2_442_240  # PEFT's count for rank 8 on all 210 linear layers


# ---- memory that runs out -------------------------------------------------------------------------------


def out_of_memory_at(monkeypatch, calls_that_fail: set[int], error=torch.OutOfMemoryError) -> None:
    original, calls = train.row_loss, []

    def fails(*args):
        calls.append(1)
        if len(calls) in calls_that_fail:
            raise error("can't allocate memory: you tried to allocate 7 bytes")
        return original(*args)

    monkeypatch.setattr(train, "row_loss", fails)


@pytest.fixture
def own_layers(monkeypatch) -> None:
    """No lean layers: transformers' own."""
    monkeypatch.setattr(lean_layer, "stands_against", lambda *args: "a test says so")


@pytest.mark.parametrize("layers", ["lean", "own"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_step_out_of_memory_is_done_again_and_loses_nothing(run, tmp_path, monkeypatch, error, layers, request):
    """Rows 4 and 5 of the run fail, the second in the middle of a step: the losses and weights of a run without."""
    if layers == "own":
        request.getfixturevalue("own_layers")
    flags = ["--accumulate", "2", "--dropout", "0.2"]
    _, expected, _ = run(*flags, output="without")
    out_of_memory_at(monkeypatch, {4, 7}, error)
    summary, log, err = run(*flags, "--auto-shrink")
    assert (
        err.count("out of memory in a row of") == 2
        and f"again with --checkpoint {'full' if layers == 'own' else ''}" in err
    )
    assert [e["loss"] for e in log] == pytest.approx([e["loss"] for e in expected], abs=1e-6)
    a, b = (lora.read_adapter(tmp_path / name)[1] for name in ("out", "without"))
    assert_same([x for n in a for x in a[n]], [x for n in b for x in b[n]], 1e-5)
    assert summary["skipped_steps"] == 0


def test_out_of_memory_names_the_largest_part_and_what_helps(run, tmp_path, monkeypatch, own_layers):
    out_of_memory_at(monkeypatch, {5})
    with pytest.raises(
        UserError, match=r"out of memory in a row of \d+ tokens with --checkpoint none; the largest"
    ) as e:
        run("--max-length", "400")
    assert "--auto-shrink" in e.value.hint and (tmp_path / "out" / "checkpoint" / "state.json").exists()
    out_of_memory_at(monkeypatch, set(range(1, 99)))
    with pytest.raises(UserError, match="out of memory.*with --checkpoint full") as e:
        run("--auto-shrink", output="always")
    assert "--auto-shrink" not in e.value.hint


def test_other_errors_are_not_taken_for_a_lack_of_memory(run, monkeypatch):
    monkeypatch.setattr(train, "row_loss", lambda *args: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run("--auto-shrink")


@pytest.mark.parametrize(
    ("checkpoint", "more"), [("none", []), ("attention", ["--offload", "--tile-rows", "16"]), ("full", [])]
)
def test_a_forced_level_gives_the_same_losses(run, monkeypatch, checkpoint, more):
    with monkeypatch.context() as patch:
        patch.setattr(policy, "CPU_ACTIVATION_GB", 0.0001)  # some layers are recomputed, of long rows
        _, expected, _ = run(output="auto")
    _, log, err = run("--checkpoint", checkpoint, *more)
    assert "lean ones" in err
    assert [e["loss"] for e in log] == pytest.approx([e["loss"] for e in expected], rel=1e-6)
    assert f"goes with --checkpoint {checkpoint}" in err


def losses_of(log: list[dict]) -> list[float]:
    return [entry["loss"] for entry in log]


def test_an_embedding_in_host_memory_gives_the_same_losses(run):
    assert losses_of(run("--embeddings", "host", output="host")[1]) == losses_of(run(output="plain")[1])


def test_moments_of_8_bits_train_alike_and_resume_exactly(run, tmp_path, monkeypatch):
    """Killed and run again: 8-bit states, scales and step counts come back as they were."""
    pytest.importorskip("bitsandbytes")
    flags = ("--adam-bits", "8", "--rank", "64", "--targets", "gate_proj")  # matrices below 4,096 elements stay fp32
    whole, plain = run(*flags, output="whole")[1], run(*flags[2:], output="plain")[1]
    assert losses_of(whole) == pytest.approx(losses_of(plain), rel=0.02) and losses_of(whole) != losses_of(plain)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        step, calls = train.train_step, iter(range(100))
        context.setattr(train, "train_step", lambda *a, **k: die() if next(calls) == 5 else step(*a, **k))
        with pytest.raises(KeyboardInterrupt):
            run(*flags, output="killed")
    assert losses_of(run(*flags, output="killed")[1]) == losses_of(whole)


def test_levels_that_only_lean_layers_have_are_refused_without_them(run, own_layers):
    with pytest.raises(UserError, match="--offload needs the memory-lean layer"):
        run("--offload")


def test_plan_prints_what_a_run_takes_and_loads_nothing(run, tmp_path, monkeypatch, capsys, model_folder):
    monkeypatch.setattr(learner, "load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    flags = ["--role", "generator", "--model", str(model_folder), "--input", "nowhere", "--output", str(tmp_path / "p")]
    train.main([*flags, "--plan", "--vram", "24", "--max-length", "1000"])
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["stage"] == "plan" and record["fits"] and record["longest"] > 100_000 and record["quantize"] == "nf4"
    assert "linear weights" in err and "chosen: --checkpoint none" in err and "s a step at 165 TFLOP/s: RTX 4090" in err
    assert not (tmp_path / "p").exists()
    monkeypatch.setattr(policy, "CPU_ACTIVATION_GB", 0.001)
    train.main([*flags, "--plan", "--rank", "4"])
    out, err = capsys.readouterr()
    assert not json.loads(out)["fits"] and "DOES NOT FIT" in err and "measured" in err


def quantised(folder: Path, how: dict | None) -> Path:
    """A model's folder whose config.json says so."""
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | ({"quantization_config": how} if how else {})
    path.write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("quantization", "flags", "said"),
    [
        ({"quant_method": "gptq"}, ["--vram", "24"], "is quantised already (gptq)"),
        ({"quant_method": "gptq"}, [], "is quantised already (gptq)"),
        (None, ["--device", "cuda:77"], "--device cuda:77"),
        (None, ["--device", "cpu", "--quantize", "nf4"], "bitsandbytes misreads model.layers.0.mlp.down_proj on a CPU"),
    ],
)
def test_the_plan_refuses_what_loading_refuses(tmp_path, capsys, quantization, flags, said):
    folder = quantised(save_tiny(tmp_path / "model"), quantization)  # rows of 112 weights in it
    basics = ["--role", "generator", "--model", str(folder), "--input", "nowhere", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError) as planned:
        train.main([*basics, "--plan", *flags])
    assert said in planned.value.message
    if "--vram" not in flags:
        names = {"--device": "device", "--quantize": "quantize"}
        options = {names[flag]: value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
        with pytest.raises(UserError, match=re.escape(planned.value.message)):
            load_model(str(folder), **options)


def test_the_plan_of_an_nf4_model_counts_its_four_bits(tmp_path, capsys):
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    folder = quantised(save_tiny(tmp_path / "model", intermediate_size=128), nf4)
    basics = ["--role", "generator", "--model", str(folder), "--input", "nowhere", "--output", str(tmp_path / "out")]
    train.main([*basics, "--plan"])
    assert json.loads(capsys.readouterr()[0])["quantize"] == "nf4"


def test_nf4_layers_with_biases_train_on_a_cpu_with_bf16(tmp_path):
    """An evaluation used to leave their weights in a layout without a gradient, and the next pass broke off."""
    loaded = load_model(
        str(save_tiny(tmp_path, "qwen2", intermediate_size=128)),
        device="cpu",
        dtype="bfloat16",
        quantize="nf4",
        train=True,
    )
    lora.attach(loaded.model, 4, 8)
    assert examine(loaded.model).packs and not lean_layer.install(loaded.model).why


def test_a_model_that_cannot_be_counted_is_measured(run, monkeypatch, own_layers):
    def cannot(*args, **kwargs):
        raise UserError("no plan for a llama model: nonzero")

    monkeypatch.setattr(shapes, "trace", cannot)
    _, log, err = run()
    assert "its activations are measured instead" in err and len(log) == 14


# ---- spikes ---------------------------------------------------------------------------------------------


def test_a_spike_is_far_above_the_median():
    assert train.spike_ceiling([2.0] * 15) == float("inf")
    assert train.spike_ceiling([2.0] * 16) == 6.0
    assert train.spike_ceiling([100.0] * 50 + [2.0] * 32) == 6.0  # the last 32 count
    assert train.spike_ceiling([0.01] * 40) == 1.01  # a model that knows its pairs by heart


def spiking(monkeypatch, calls_that_spike: set[int]) -> None:
    original, calls = train.row_loss, []

    def spikes(*args):
        calls.append(1)
        loss, hits = original(*args)
        return loss * 50 if len(calls) in calls_that_spike else loss, hits

    monkeypatch.setattr(train, "row_loss", spikes)


def test_a_spike_is_skipped_counted_and_changes_nothing(run, tmp_path, monkeypatch):
    spiking(monkeypatch, {19, 20})
    summary, log, err = run("--epochs", "4")
    assert summary["skipped_steps"] == 2 and [e["step"] for e in log if e["skipped"]] == [19, 20]
    assert log[18]["loss"] > 100 and log[18]["reason"].startswith("a spike, above") and "skipped: a spike" in err
    assert summary["last_loss"] < 50


def test_three_spikes_in_a_row_stop_the_run_and_it_goes_on(run, tmp_path, monkeypatch):
    _, expected, _ = run("--epochs", "4", output="without")
    with monkeypatch.context() as patch:
        spiking(patch, {21, 22, 23})
        with pytest.raises(UserError, match="3 steps in a row were skipped: a spike"):
            run("--epochs", "4")
    assert json.loads((tmp_path / "out" / "checkpoint" / "state.json").read_text())["step"] == 22
    # The losses before are read back from the log: the ceiling of a resumed run is that of an unbroken one.
    _, log, _ = run("--epochs", "4")
    assert [e["loss"] for e in log[:20]] == pytest.approx([e["loss"] for e in expected[:20]], abs=1e-6)
    assert [e["skipped"] for e in log] == [False] * 20 + [True] * 2 + [False] * 6


# ---- the log --------------------------------------------------------------------------------------------


def test_a_line_and_a_record_a_step(run):
    _, log, err = run()
    assert err.count("% of peak") == len(log) == 14 and "TFLOP/s (one float32 matrix product on" in err
    for entry in log:
        assert 0 < entry["peak_percent"] < 400 and 0 < entry["peak_gb"] < 64
        assert entry["reason"] == "" and entry["grad_norm"] > 0


def test_an_adapter_of_another_width_is_refused(run, tmp_path):
    run("--epochs", "1")
    wider = save_tiny(tmp_path / "wider", intermediate_size=192)
    with pytest.raises(UserError, match="is for another model: .* is .* there, .* here"):
        run("--adapter", str(tmp_path / "out"), "--model", str(wider), output="next")
