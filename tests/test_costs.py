"""pytest tests/test_costs.py: run.py --plan against runs that were made, and by hand.

The oracle is tests/demo_costs.json: what stages of real runs drew and took, copied from their sidecars (per stage:
label, calls, tokens, records, seconds), and this machine's figures as `machine.find_out` measured them.
"""

import json
import math
import multiprocessing
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

import generate
import run
from lengthen.costs import forecast as costs
from lengthen.costs import machine as machines
from lengthen.costs import yields
from lengthen.costs.forecast import TimeLeft, forecast, left_line, show_plan, total
from lengthen.costs.machine import Machine
from lengthen.costs.yields import Flow, assumptions, measured, scenarios, tries, work_of, written
from lengthen.records import UserError
from lengthen.steps import Step

RECORDED = json.loads((Path(__file__).parent / "demo_costs.json").read_text())
RUNS = list(RECORDED["runs"])
XEON = Machine(**{**RECORDED["machine"], "training": tuple(map(tuple, RECORDED["machine"]["training"]))})
# Qwen2.5-7B-Instruct in NF4 on an RTX 4090, by its configuration and the data sheet.
CARD = replace(
    XEON,
    **{"name": "RTX 4090", "cuda": True, "flops": 165e12, "bandwidth": 1.008e12, "memory": 24e9, "context": 32768},
    **{"parameters": 7.6e9, "linear": 6.53e9, "head": 5.45e8, "weights": 5.55e9, "step": 3.06e10, "kv": 57344.0},
    **{"adapter": 8e7, "training": ((128, 3.6e10, 8e9), (4096, 3.7e10, 1.4e10), (32768, 5.2e10, 2.3e10))},
)


def steps_of(*argv: str) -> list[Step]:
    return run.plan(run.parse_args(list(argv)))


def plan(machine: Machine, *argv: str, sidecars: list[dict] | None = None) -> list[costs.Cost]:
    steps = steps_of(*argv)
    return forecast(steps, run.all_settings, machine, sidecars or [{}] * len(steps))


def sidecar(stage: list, name: str) -> dict:
    """The sidecar of a recorded stage, as far as a forecast reads it."""
    _, calls, tokens, records, seconds = stage
    if name.startswith("train"):
        return {"status": "done", "seconds": seconds, "summary": {"pairs": records, "steps": calls, "tokens": tokens}}
    stats = {} if name == "evaluate" else {"attempts": calls, "tokens": tokens}
    return {"status": "done", "seconds": seconds, "accepted": records, "stats": stats}


# ---- against runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("commit", RUNS)
def test_the_plan_of_the_demo_is_within_one_and_a_half_times_its_tokens(commit):
    stages, expected = RECORDED["runs"][commit]["stages"], plan(XEON)
    assert [c.step.label for c in expected] == [label for label, *_ in stages]
    real, likely = sum(tokens for _, _, tokens, _, _ in stages), sum(c.tokens[1] for c in expected)
    assert 1 / 1.5 <= likely / real <= 1.5
    for kind in (True, False):  # and training and sampling each alone
        real = sum(s[2] for c, s in zip(expected, stages, strict=True) if c.training == kind)
        likely = sum(c.tokens[1] for c in expected if c.training == kind)
        assert 1 / 1.8 <= likely / real <= 1.8
    for cost, (label, _, tokens, _, _) in zip(expected, stages, strict=True):
        assert 0.9 * cost.tokens[0] <= tokens <= 1.1 * cost.tokens[2], label  # within what it says is possible


def test_the_plan_of_the_demo_is_within_twice_its_seconds():
    """On the machine that ran it; the other run's had no figures taken."""
    recorded, expected = RECORDED["runs"][RUNS[0]], plan(XEON)
    low, likely, high = total(expected)
    seconds = sum(s for *_, s in recorded["stages"])
    assert 0.5 <= likely / seconds <= 2 and low <= seconds <= high
    for cost, (label, *_, seconds) in zip(expected, recorded["stages"], strict=True):
        assert cost.seconds and 0.9 * cost.seconds[0] <= seconds <= 1.1 * cost.seconds[2], label


def test_the_plan_of_the_pilot_is_within_one_and_a_half_times_its_tokens():
    """docs/study.md, Allocation: 40 instructions, two drafts of two tries, two jobs of three tries, no length bias."""
    flags = ["--instructions", "40", "--responses.max-attempts", "2", "--responses.no-length-bias"]
    flags += ["--extend.samples", "2", "--extend.max-attempts", "3", "--extend.max-new-tokens", "720"]
    expected = plan(XEON, *flags, "--extend.no-length-bias")[:3]
    real = [(137, 6_250), (133, 41_644), (219, 51_186)]
    assert 1 / 1.5 <= sum(c.tokens[1] for c in expected) / sum(tokens for _, tokens in real) <= 1.5
    for cost, (calls, _) in zip(expected, real, strict=True):
        assert 1 / 1.5 <= cost.work.calls / calls <= 1.5, cost.step.label


def test_the_plan_of_the_study_is_within_one_and_a_half_times_its_tokens():
    """Its first two stages: 400 instructions in bf16 (bench/growth.py), 389 and 400 records."""
    flags = ["--dtype", "bfloat16", "--instructions", "400", "--responses.max-attempts", "2"]
    expected = plan(XEON, *flags, "--responses.max-new-tokens", "560")[:2]
    for cost, (calls, tokens) in zip(expected, [(1171, 53_300), (1082, 461_706)], strict=True):
        assert 1 / 1.2 <= cost.work.calls / calls <= 1.2, cost.step.label
        assert 1 / 1.2 <= cost.tokens[1] / tokens <= 1.2, cost.step.label


def test_what_stays_in_fp32_makes_drawing_and_training_slower_and_not_reading():
    """The plan took bf16's rate of products from fp32: 17 minutes for 400 instructions that took 208 s."""
    half = replace(XEON, flops=4 * XEON.flops)
    for base, slow in zip(plan(half), plan(replace(half, slower=2.5)), strict=True):
        assert base.seconds and slow.seconds and slow.seconds[1] > base.seconds[1]
    work, flags = plan(half)[0].work, run.all_settings(steps_of()[0])
    read = replace(work, tokens=0.0)  # of prompts alone
    assert half.seconds(read, flags) == replace(half, slower=2.5).seconds(read, flags) < XEON.seconds(read, flags)


@pytest.mark.parametrize("over", [3, 5, 9])
def test_what_was_measured_makes_the_rest_of_the_run_known_better(over):
    """After some stages of the demo: the seconds that are left are within 1.7 times what they then took."""
    stages, steps = RECORDED["runs"][RUNS[0]]["stages"], steps_of()
    sidecars = [
        sidecar(s, step.name) if n < over else {} for n, (s, step) in enumerate(zip(stages, steps, strict=True))
    ]
    known, before = plan(XEON, sidecars=sidecars), plan(XEON)
    real = sum(seconds for *_, seconds in stages[over:])
    low, likely, high = total(known, left=True)
    assert 1 / 1.7 <= likely / real <= 1.7 and low <= real <= high
    assert high / low < total(before[over:])[2] / total(before[over:])[0]  # and the range is narrower
    assert total(known)[1] == pytest.approx(sum(s for *_, s in stages[:over]) + likely)
    line = left_line(known)
    assert re.search(r"measured in .*: \d+ tokens/s drawn.*; about .* are left \(.* to .*\), until \d\d:\d\d", line)
    assert ("trained on" in line) == (over >= 4)


def test_a_machine_that_turns_out_slower_is_believed():
    steps, stages = steps_of(), RECORDED["runs"][RUNS[0]]["stages"]
    sidecars = [sidecar(s, step.name) if n < 3 else {} for n, (s, step) in enumerate(zip(stages, steps, strict=True))]
    slow = [{**meta, "seconds": 3 * meta["seconds"]} if meta else {} for meta in sidecars]
    for once, thrice in zip(plan(XEON, sidecars=sidecars), plan(XEON, sidecars=slow), strict=True):
        assert once.seconds and thrice.seconds
        times = 1 if once.training else 3  # training has not been measured: its assumption stands
        assert thrice.seconds[1] == pytest.approx(times * once.seconds[1])


# ---- by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alike", [math.inf, 2.0])
def test_tries_are_those_of_a_simulation(alike):
    rng = random.Random(1)
    for passing, wanted, most in ((0.36, 1, 1), (0.36, 1, 3), (0.5, 3, 20), (0.2, 3, 6), (0.0, 1, 4), (1.0, 2, 9)):
        used = some = passed = 0
        for _ in range(20_000):
            share = passing
            if alike < math.inf and 0 < passing < 1:  # each task has a share of its own
                share = rng.betavariate(alike * passing, alike * (1 - passing))
            n = k = 0
            while n < most and k < wanted:
                n, k = n + 1, k + (rng.random() < share)
            used, some, passed = used + n, some + (k > 0), passed + k
        # 0.2 and 0.02: more than four standard errors of the widest of these means
        got = tries(passing, wanted, most, alike)
        assert got == pytest.approx([x / 20_000 for x in (used, some, passed)], abs=0.2 if most > 4 else 0.02)


def test_the_mean_of_texts_that_are_cut_is_that_of_a_simulation():
    rng = random.Random(2)
    lengths = [400 * math.exp(rng.gauss(0, yields.SPREAD)) for _ in range(50_000)]
    for limit in (200, 400, 1000):
        assert written(400, limit) == pytest.approx(sum(min(n, limit) for n in lengths) / len(lengths), rel=0.01)
        ended = [n for n in lengths if n < limit]
        assert yields.of_the_ended(400, limit) == pytest.approx(sum(ended) / len(ended), rel=0.02)


def test_instructions_are_cut_where_the_stage_cuts_them():
    assert yields.INSTRUCTION_LIMIT == generate.INSTRUCTION_TOKENS


def test_more_is_asked_more_is_done():
    """Each of these flags makes its own stage dearer, and none makes another stage cheaper that does not follow."""
    base = {c.step.label: c for c in plan(XEON)}
    for flags, label in (
        (["--instructions", "24"], "iter_1/instructions"),
        (["--responses.samples", "4"], "iter_1/responses"),
        (["--extend.max-attempts", "3"], "iter_1/extend"),
        (["--extend.rounds", "3", "--extend.max-attempts", "3"], "iter_1/extend"),
        (["--train.epochs", "4"], "iter_1/train-generator"),
        (["--constrain.max-attempts", "4"], "final/constrain"),
        (["--evaluate.samples", "2"], "eval/base/evaluate"),
    ):
        more = {c.step.label: c for c in plan(XEON, *flags)}
        assert more[label].tokens[1] > 1.2 * base[label].tokens[1], flags
        for name in list(base)[: list(base).index(label)]:
            assert more[name].tokens == base[name].tokens, (flags, name)


def test_a_benchmark_is_counted_once_for_all_scenarios(monkeypatch):
    reads, read = [], yields.read_rows
    monkeypatch.setattr(yields, "read_rows", lambda path: reads.append(path) or read(path))
    yields._in_benchmark.cache_clear()
    steps = steps_of("--language", "de")
    assert sum(step.name == "evaluate" for step in steps) > 1
    forecast(steps, run.all_settings, XEON, [{}] * len(steps))
    assert len(reads) == 1


def test_every_step_of_every_control_has_a_plan():
    expected = plan(XEON, "--model", "m", "--iterations", "2", "--controls")
    by = {c.step.label: c for c in expected}
    assert all(c.tokens[0] <= c.tokens[1] <= c.tokens[2] and c.tokens[1] > 0 for c in expected)
    # as many tokens to learn as what it is compared with
    one, like = by["controls/one-stage/train-generator"], by["iter_1/train-generator"]
    assert one.work.tokens * one.work.targets == pytest.approx(like.work.tokens * like.work.targets, rel=0.01)
    assert by["eval/control_told/evaluate"].tokens[1] > by["eval/base/evaluate"].tokens[1]


def test_a_card_holds_only_so_many_texts_at_a_time():
    expected = {c.step.label: c for c in plan(CARD, "--scale", "small")}
    work, flags = expected["iter_2/extend"].work, run.all_settings(expected["iter_2/extend"].step)
    rows = CARD.rows(work, flags)
    assert rows * work.length * CARD.kv <= 24e9 - CARD.weights and 1 < rows < 256
    assert CARD.rows(work, {**flags, "max_rows": 3}) == 3
    assert CARD.rows(work, {**flags, "kv_cache": "fp8"}) == pytest.approx(min(256, 2 * rows))
    assert all(c.memory <= 24e9 for c in expected.values())


def test_the_small_preset_is_a_night_on_a_card_of_24_gb():
    low, likely, high = total(plan(CARD, "--scale", "small"))
    assert 6 * 3600 <= likely <= 12 * 3600 and low < likely < high


def test_servers_time_is_not_known_before_it_is_measured():
    flags = ["--model", "m", "--endpoint", "http://127.0.0.1:8000/v1"]
    expected = plan(CARD, *flags)
    assert [c.seconds is None for c in expected] == [not c.training for c in expected]
    stages = RECORDED["runs"][RUNS[0]]["stages"]
    steps = steps_of(*flags)
    known = plan(CARD, *flags, sidecars=[sidecar(stages[0], "instructions"), *[{}] * (len(steps) - 1)])
    assert all(c.seconds for c in known)


def test_an_assumption_is_read_from_what_the_step_did():
    step = steps_of()[1]
    flow = Flow(scenarios(assumptions(1e9))[0], 8192)
    work = measured(
        work_of(steps_of()[0], run.all_settings(steps_of()[0]), flow), sidecar(["", 9, 99, 3, 1.0], "x"), step
    )
    assert (work.calls, work.tokens, work.records) == (9, 99, 3)
    for name, (low, likely, high, text, source) in assumptions(7e9).items():
        assert min(low, high) <= likely <= max(low, high) and text and source, name


# ---- as it is printed -----------------------------------------------------------------------------------


def test_the_plan_is_printed_with_every_assumption_and_as_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lengthen.cli.console.width", 160)
    steps = steps_of("--run", str(tmp_path))
    show_plan(steps, run.all_settings, XEON)
    out, err = capsys.readouterr()
    record = json.loads(out.strip().splitlines()[-1])
    assert [s["stage"] for s in record["stages"]] == [s.name for s in steps]
    assert record["tokens"][1] == pytest.approx(sum(s["tokens"][1] for s in record["stages"]), abs=20)
    for value in [*assumptions(XEON.parameters).values(), *machines.SHARES.values()]:
        assert value.text in err and value.source in err
    for label in ("iter_1/extend", "final/train-generator", "eval/base/evaluate", "in all"):
        assert label in err


def test_run_py_asks_for_the_plan_and_starts_nothing(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(run, "ask", lambda card, given: asked.append((card, given)) or CARD)
    monkeypatch.setattr(run, "execute", lambda *_: pytest.fail("nothing is to be started"))
    run.main(["--scale", "small", "--run", str(tmp_path / "r"), "--plan", "RTX 4090", "--train.rank", "16"])
    assert asked[0][0] == "RTX 4090" and asked[0][1]["rank"] == 16 and asked[0][1]["model"] == run.MODEL
    assert "RTX 4090" in capsys.readouterr().err and not (tmp_path / "r").exists()
    run.main(["--run", str(tmp_path / "r"), "--plan"])
    assert asked[1][0] == machines.HERE


def test_what_was_made_otherwise_or_elsewhere_is_not_measured(tmp_path, monkeypatch, capsys):
    """A finished demo was taken for a plan of 500 instructions, and for an RTX 4090's: 0 s were left."""
    monkeypatch.setattr(run, "ask", lambda card, given: XEON)
    made = tmp_path / "iter_1" / "instructions.meta.json"

    def planned(*flags: str) -> tuple[list[str], list[int]]:
        run.main(["--run", str(tmp_path), *flags])
        record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        return [f"{s['part']}/{s['stage']}" for s in record["stages"] if s["measured"]], record["tokens"]

    changes = [["--plan", "--instructions", "500"], ["--plan", "--instructions.long-words", "200"]]
    changes += [["--plan", "RTX 4090"], ["--plan", "--redo", "instructions"]]
    changes += [["--plan", "--scale", "demo", "--model", "other"]]
    before = [planned(*flags) for flags in changes]
    made.parent.mkdir()
    meta = sidecar(RECORDED["runs"][RUNS[0]]["stages"][0], "instructions")
    settings = {"count": 12, "long_words": 300, "model": "its hash", "inputs": {"en/seeds.jsonl": "its hash"}}
    made.write_text(json.dumps({**meta, "settings": settings, "info": {"model": "smollm2", "adapter": ""}}))
    assert planned("--plan")[0] == ["iter_1/instructions"]
    assert [planned(*flags) for flags in changes] == before and not any(measured for measured, _ in before)


def test_a_card_that_nobody_knows_is_refused():
    with pytest.raises(UserError, match="knows no card 'GTX 480'") as error:
        machines.ask("GTX 480", {"model": "m"})
    assert "RTX 4090" in error.value.hint


def test_the_time_left_is_said_after_a_stage_that_took_a_while(tmp_path, monkeypatch, capsys):
    steps, asked = steps_of("--run", str(tmp_path)), []
    monkeypatch.setattr(costs, "ask", lambda card, given: asked.append(card) or XEON)
    left = TimeLeft(steps, run.all_settings, {})
    left(1)
    assert not asked and not capsys.readouterr().err  # a second has not passed: nobody waits
    left.started -= 60
    left(1)
    left(2)
    assert asked == [machines.HERE] and capsys.readouterr().err.count("are left") == 2
    left(len(steps))
    assert not capsys.readouterr().err  # nothing is left

    def unknown(card: str, given: dict) -> Machine:
        raise UserError("no plan for a strange model")

    monkeypatch.setattr(costs, "ask", unknown)
    left.machine = None
    left(2)
    left(3)
    assert capsys.readouterr().err.count("no plan for a strange model") == 1


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyError("seconds")])
def test_a_forecast_that_fails_ends_no_run(error, tmp_path, monkeypatch, capsys):
    def fails(card: str, given: dict) -> Machine:
        raise error

    monkeypatch.setattr(costs, "ask", fails)
    left = TimeLeft(steps_of("--run", str(tmp_path)), run.all_settings, {})
    left.started -= 60
    left(1)
    left(2)
    assert capsys.readouterr().err == f"how long the rest takes is not known: {error!r}\n"


def test_the_process_that_looks_at_a_model_leaves_nobody_behind(tmp_path):
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        machines.ask("H100", {"model": "./nothing"})
    assert not multiprocessing.active_children()


def test_a_model_and_a_card_are_found_out_without_weights(tmp_path):
    """A tiny model on an H100, by a process of its own; its sizes counted by hand."""
    from tiny import save_tiny

    folder = save_tiny(tmp_path / "m", "llama")
    (folder / "model.safetensors").unlink()
    found = machines.ask("H100", {"model": str(folder), "rank": 4})
    config = json.loads((folder / "config.json").read_text())
    hidden, inner, layers, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    keys = config["num_key_value_heads"] * config["head_dim"]
    linear = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    assert (found.name, found.cuda, found.memory, found.flops) == ("H100", True, 80e9, 989e12)
    assert found.linear == linear and found.head == vocab * hidden and found.kv == 2 * layers * keys * 2
    assert found.adapter == 4 * 4 * layers * (2 * 2 * hidden + 2 * (hidden + keys) + 3 * (hidden + inner))
    assert found.weights == pytest.approx(2 * found.parameters) and found.step == 2 * (linear + found.head)
    lengths = [row[0] for row in found.training]
    assert (
        lengths[0] == 128
        and lengths[-1] >= found.context
        and found.looked_up(192, 1) == pytest.approx((found.training[0][1] + found.training[1][1]) / 2)
    )
