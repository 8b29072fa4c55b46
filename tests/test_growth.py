"""bench/growth.py: which commands it runs, what it decides by, and what it makes of the answers.

python -m pytest tests/test_growth.py
"""

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path

import in_process
import pytest

import evaluate
from lengthen import steps
from lengthen.evaluation import intervals
from lengthen.jobs import Job
from lengthen.reading import read_jsonl
from lengthen.records import UserError, new_record, record_id
from lengthen.steps import Step
from lengthen.text.demands import parse_demand

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("growth", ROOT / "bench" / "growth.py")
growth = importlib.util.module_from_spec(spec)
spec.loader.exec_module(growth)

TRIES = ["rank=8,epochs=1", "rank=16,learning_rate=3e-4", "rank=64"]
VOCABULARY = (ROOT / "README.md").read_text().split()[:400]


def texts(step: Step, kind: str, rows: list[dict], dropped: int) -> None:
    """A stage's file with its sidecar; the first `dropped` records go by the length bias."""
    with Job(kind, step.output, min_yield=0) as job:
        if not job.complete:
            for row in rows:
                job.accept(row)
            job.drop({row["id"]: "length-bias" for row in rows[:dropped]})
        job.finish(tokens=100)


LOOPING = (180, "length")  # the longest, but it does not end


def words_of(settings: dict) -> tuple[int, str]:
    """(words an answer has, how it ends), by what the model is, in the made-up study below."""
    adapter = settings["adapter"]
    if "rank-64" in adapter:
        return LOOPING
    if settings.get("at_least"):
        return 66, "eos"
    lengths = {"half/restart": 128, "half/continue": 124, "iter_2/": 120, "final/": 112, "rank-16": 90, "iter_1/": 90}
    lengths |= {"drafts": 44, "one-stage": 60, "no-bias": 70}
    return next((words for part, words in lengths.items() if part in adapter), 40), "eos"


def answers(step: Step) -> None:
    words, finish = words_of(step.settings)
    rng, rows = random.Random(step.part), []
    for i, row in enumerate(map(json.loads, Path(step.settings["benchmark"]).read_text().splitlines())):
        for _ in range(step.settings["samples"]):
            length = int(words * (0.8 + 0.01 * (i % 40)) * rng.uniform(0.95, 1.05))
            if row["constraint"] and "final" in step.settings["adapter"]:  # it has learnt to follow them
                length = int(max(parse_demand(row["constraint"], "en")[1:]) * rng.uniform(0.8, 1.0))
            rows.append({**row, "response": " ".join(rng.choices(VOCABULARY, k=length)), "finish": finish})
    Path(step.output).parent.mkdir(parents=True, exist_ok=True)
    ready = Path(step.output).with_name(f"{Path(step.output).name}.ready.jsonl")
    ready.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main(["score", str(ready), "--output", step.output])


def stage(step: Step, log: object = None) -> dict:
    """A stage that leaves what the study reads: files, sidecars, scores."""
    settings = step.settings
    prompts = [f"Tell {step.part} {i}." for i in range(settings.get("count", 0))]
    if step.name == "instructions":
        made = [new_record("instruction", id=p, language="en", prompt=p) for p in prompts]
        texts(step, "instructions", made, 0)
    elif step.name in ("responses", "extend", "constrain"):
        rows = [row for file in settings["input"] for row in read_jsonl(file)]
        copies = range(settings.get("samples", 1))
        made = [
            {**row, "id": record_id(step.name, row["id"], i), "response": "A b.", "response_words": 2}
            for row in rows
            for i in (copies if step.name == "responses" else [0])
        ]
        texts(step, step.name, made, 0 if settings.get("no_length_bias") else 2)
    elif step.name == "evaluate":
        if not (Path(step.output) / "scores.json").exists():
            answers(step)
    elif not (Path(step.output) / "meta.json").exists():  # done is done, as with train.py
        for file in settings["input"]:
            assert read_jsonl(file)
        Path(step.output).mkdir(parents=True)
        trained = {"pairs": 7, "target_tokens": 10}
        meta = {"status": "done", "seconds": 5, "summary": trained, "settings": settings}
        (Path(step.output) / "meta.json").write_text(json.dumps(meta))
    return {}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """The intervals' own tests are in test_intervals.py; here 100 draws do."""
    monkeypatch.setattr(intervals, "RESAMPLES", 100)


def study(run: Path, capsys, *flags: str) -> dict:
    """bench/growth.py with 4 + 10 held-out instructions and 16 + 4 demands; its result."""
    run.mkdir(parents=True, exist_ok=True)
    small = {"held-out": (run / "heldout.jsonl", 14), "demands": (run / "more.jsonl", 4)}
    for (path, count), source in zip(small.values(), ("heldout.jsonl", "bench_more.jsonl"), strict=True):
        path.write_text("".join((ROOT / "prompts" / "en" / source).read_text().splitlines(keepends=True)[:count]))
    given = [word for name, (path, _) in small.items() for word in (f"--{name}", str(path))]
    sizes = ["--search", "4", "--instructions", "6", "--final-instructions", "3", "--responses.samples", "2"]
    sizes += ["--evaluate.samples", "1"]
    growth.main(["--run", str(run), *given, *sizes, "--try", *TRIES, *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_phase_ends_in_a_result_and_the_last_has_all(tmp_path, monkeypatch, capsys):
    done: list[Step] = []
    monkeypatch.setattr(steps, "run_step", lambda step, log: done.append(step) or stage(step))
    run = tmp_path / "g"
    first = {"base", "iter_1", *(f"control_{name}" for name in ("drafts_1", "told", "eos-ban"))}
    assert set(study(run, capsys, "--until", "iter_1")["rows"]["eval"]) == first
    done.clear()  # the call for all phases runs these steps again, as no-ops
    result = study(run, capsys)
    more = {"control_one-stage", "control_no-bias", "iter_2", "control_drafts_2", "final"}
    assert set(result["rows"]["eval"]) == first | more
    assert json.loads((run / "growth.json").read_text()) == result == study(run, capsys, "--show")
    assert (run / "growth.png").read_bytes().startswith(b"\x89PNG")

    # what was decided: the longest that ends; rank 64 writes more and never stops
    assert result["setting"] == TRIES[1] and result["mode"] == "restart"
    assert result["rows"]["eval"]["iter_2"]["words_median"]["change"]["value"] == pytest.approx(3, rel=0.1)
    assert result["over"]["iter_1 / control_drafts_1"]["value"] == pytest.approx(90 / 44, rel=0.1)
    assert set(result["rows"]["own"]) == {"base", "iter_1", "iter_2"}
    assert result["rows"]["demands"]["final"]["answers"] == 20
    assert [one["met"] for one in result["bars"]] == [True] * 7, result["bars"]
    assert result["texts"]["iter_1 extend"] == {"before": [10, 5, 2], "after": [8, 4, 2]}  # of 12 drafts 2 are dropped
    quoted = {group: growth.as_table(group, rows) for group, rows in result["rows"].items()}
    assert {group: len(lines) for group, (_, _, lines) in quoted.items()} == {"eval": 10, "own": 3, "demands": 3}
    _, columns, lines = quoted["demands"]
    by = {line[0]: dict(zip(columns, line, strict=True)) for line in lines}
    assert by["base"]["score - base"] == "+0.0" and by["final"]["wanted/written - base"].startswith("+")
    one = next(c for c in result["cost"] if (c["part"], c["stage"]) == ("iter_2", "extend"))
    assert one["tokens"] == 100 and one["records"] == 8

    # what was run, each once
    trained = {s.part: s.settings for s in done if s.name.startswith("train")}
    assert Counter((s.part, s.name) for s in done).most_common(1)[0][1] == 1
    restart = [str(run / f"iter_{k}" / "extended.jsonl") for k in (1, 2)]
    assert trained["iter_2"]["input"] == restart and trained["iter_2"]["adapter"] == ""
    assert trained["half/continue"]["adapter"] == str(run / "iter_1/generator")
    halves = read_jsonl(trained["half/restart"]["input"][1]), read_jsonl(restart[1])
    assert len({r["prompt"] for r in halves[0]}) == -(-len({r["prompt"] for r in halves[1]}) // 2)
    assert all(trained[part]["rank"] == 16 for part in trained if not part.startswith("search/"))
    for part, like in (("controls/drafts_1", 1), ("controls/no-bias", 1), ("controls/drafts_2", 2), ("final", 2)):
        assert trained[part]["budget_of"] == str(run / f"iter_{like}/generator")
    unbiased = [row for file in trained["controls/no-bias"]["input"] for row in read_jsonl(file)]
    assert len({r["id"] for r in unbiased}) == len(unbiased) == 12 and len({r["prompt"] for r in unbiased}) == 6
    adopted = run / "search" / "rank-16_learning_rate-3e-4" / "generator" / "meta.json"
    assert (run / "iter_1" / "generator" / "meta.json").read_text() == adopted.read_text()  # not trained twice

    # what chooses is not reported, and nobody trains on either
    searched, reported = (
        {row["query"] for row in read_jsonl(run / "queries" / f"{name}.jsonl", needs=("query",))}
        for name in ("search", "report")
    )
    assert len(searched) == 4 and len(reported) == 10 and not searched & reported
    for step in done:
        if step.name == "instructions":
            assert str(run / "heldout.jsonl") in step.settings["dedup_against"]
        if step.name == "evaluate":
            part = step.part.partition("/")[0]
            file = {"search": "search", "half": "search", "eval": "report"}.get(part, part)
            assert step.settings["benchmark"] == str(run / "queries" / f"{file}.jsonl")


def test_show_starts_nothing_and_a_killed_study_can_be_read(tmp_path, monkeypatch, capsys):
    class Killed(BaseException):
        pass

    def dying(step: Step, log: object) -> dict:
        if step.part == "eval/iter_1":
            raise Killed
        return stage(step)

    monkeypatch.setattr(steps, "run_step", dying)
    with pytest.raises(UserError, match="holds no finished stage"):
        study(tmp_path / "g", capsys, "--show")
    with pytest.raises(Killed):
        study(tmp_path / "g", capsys)
    monkeypatch.setattr(steps, "run_step", lambda step, log: pytest.fail(f"{step.part} {step.name} was started"))
    result = study(tmp_path / "g", capsys, "--show")
    assert result["setting"] == TRIES[1] and set(result["rows"]["eval"]) == {"base"} and result["bars"] == []


def test_a_redo_reaches_what_stands_on_the_step_in_all_phases(tmp_path, monkeypatch, capsys):
    """It was taken, and ignored: the hint of a stage that refused led back to the same error."""
    monkeypatch.setattr(steps, "run_step", lambda step, log: stage(step))
    study(tmp_path / "g", capsys, "--until", "iter_1")
    again: list[Step] = []
    monkeypatch.setattr(steps, "run_step", lambda step, log: again.append(step) or stage(step))
    with pytest.raises(UserError, match="no stage 'iter_3/extend'"):
        study(tmp_path / "g", capsys, "--until", "iter_1", "--redo", "iter_3/extend")
    assert not again
    study(tmp_path / "g", capsys, "--until", "iter_1", "--redo", "iter_1/extend")
    redone = {step.label for step in again if step.settings.get("overwrite")}
    tried = [f"search/{growth.folder_of(text)}" for text in TRIES]
    expected = {"iter_1/extend", "iter_1/train-generator", "eval/iter_1/evaluate", "own/iter_1/evaluate"}
    expected |= {f"{part}/{name}" for part in tried for name in ("train-generator", "eval/evaluate")}
    # As many tokens as iteration 1.
    assert redone == expected | {"controls/drafts_1/train-generator", "eval/control_drafts_1/evaluate"}


def test_a_setting_that_is_worse_because_all_are_is_reported_as_that(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "run_step", lambda step, log: stage(step))
    real = words_of
    monkeypatch.setitem(globals(), "words_of", lambda own: LOOPING if "search/" in own["adapter"] else real(own))
    result = study(tmp_path / "g", capsys, "--until", "iter_1")
    assert result["setting"] == TRIES[0] and "eos_share" in result["setting_worse"] and result["mode_worse"] == []


def test_what_is_chosen_on_and_reported_on_stays_as_it_was(tmp_path, monkeypatch, capsys):
    """--show without the --search of then rewrote both: instructions that chose the setting were reported later."""
    monkeypatch.setattr(steps, "run_step", lambda step, log: stage(step))
    result = study(tmp_path / "g", capsys, "--until", "iter_1")
    files = {path: path.read_bytes() for path in sorted((tmp_path / "g" / "queries").iterdir())}
    assert study(tmp_path / "g", capsys, "--until", "iter_1", "--show", "--search", "6") == result
    with pytest.raises(UserError, match="begun with other queries .*search.jsonl") as caught:
        study(tmp_path / "g", capsys, "--until", "iter_1", "--search", "3")
    assert caught.value.hint.startswith("--search 4, ")
    assert {path: path.read_bytes() for path in sorted((tmp_path / "g" / "queries").iterdir())} == files


@pytest.mark.parametrize("flags", [["--dry-run"], ["--plan"], ["--iterations", "1"], ["--controls=told"]])
def test_flags_that_would_start_another_study_are_refused(flags):
    with pytest.raises(UserError, match=f"{flags[0][:6]}.* is run.py's"):
        growth.parse_args(flags)


@pytest.mark.parametrize(
    ("eos", "loops", "bad"), [(0.9, 0.1, []), (0.84, 0.1, ["eos_share"]), (1, 0.16, ["loop_rate"])]
)
def test_a_bar_is_missed_by_worse_endings(eos, loops, bad):
    base, other = {"eos_share": 0.9, "loop_rate": 0.1}, {"eos_share": eos, "loop_rate": loops}
    assert growth.worse(base, other) == bad


def test_an_unknown_setting_is_refused():
    for text in ("depth=3", "rank=0", "rank"):
        with pytest.raises(UserError, match=f"--try {text}: "):
            growth.parse_args(["--try", text])


@pytest.mark.soak
def test_the_study_with_a_model(writer, tmp_path, monkeypatch, capsys):
    """The real stages, in this process, on the tiny writer, with a kill and a resume; minutes."""
    monkeypatch.setattr(steps, "run_command", in_process.run_command)
    small = """--instructions 8 --final-instructions 3 --instructions.long-words 50 --responses.samples 2
    --responses.max-attempts 3 --responses.max-new-tokens 200 --extend.samples 2 --extend.max-attempts 3
    --extend.rounds 1 --extend.one-pair --extend.max-new-tokens 200 --answers.max-attempts 5
    --answers.max-new-tokens 200 --constrain.demand-min 20 --constrain.demand-max 2000 --constrain.demand-steps 10,20
    --constrain.max-attempts 1 --language en --evaluate.samples 1 --evaluate.max-new-tokens 40 --evaluate.no-probes
    --control-words 30 --search 6 --try epochs=1 epochs=2""".split()
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text("".join((ROOT / "prompts/en/heldout.jsonl").read_text().splitlines(keepends=True)[:12]))
    flags = ["--run", str(tmp_path / "g"), "--model", str(writer), "--held-out", str(held_out), *small]
    growth.main([*flags, "--until", "iter_1"])
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    growth.main(flags)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["cost"][: len(first["cost"])] == first["cost"]  # nothing is done twice
    assert {"base", "iter_1", "iter_2", "final", "control_drafts_1"} <= set(result["rows"]["eval"])
    assert all(c["tokens"] > 0 for c in result["cost"]) and result["rows"]["demands"]["final"]["answers"] == 64
