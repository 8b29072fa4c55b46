"""bench/growth.py: what it makes of answers, and which commands it runs.   python -m pytest tests/test_growth.py"""

import importlib.util
import json
import random
from contextlib import nullcontext
from pathlib import Path

import pytest

from lengthen import steps
from lengthen.records import LowYield, UserError, new_record
from lengthen.steps import Step

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("growth", ROOT / "bench" / "growth.py")
growth = importlib.util.module_from_spec(spec)
spec.loader.exec_module(growth)


def answer(query: int, words: int, finish: str = "eos") -> dict:
    """What an answer gives to each measure that the study shows."""
    ended = finish == "eos"
    known = {"words_median": words if ended else None, "words_median_all": words, "eos_share": ended}
    return {"query": query, **known, "loop_rate": False}


def answers(factor: float, seed: int = 0, cut: int = 0) -> list[dict]:
    """30 instructions x 3 answers whose lengths have the instruction in common; the first `cut` are not ended."""
    rng = random.Random(seed)
    made = []
    for i in range(30):
        usual = 200 + 10 * i
        finish = "length" if i < cut else "eos"
        made += [answer(i, int(factor * usual * rng.uniform(0.9, 1.1)), finish) for _ in "abc"]
    return made


def test_growth_is_the_ratio_of_medians_of_ended_answers():
    base = [answer(0, 100), answer(0, 9, "length"), answer(1, 300)]
    other = [answer(0, 400), answer(1, 500), answer(1, 600)]
    row = growth.row_of(base, other)
    assert row["answers"] == 3 and row["words_median"]["value"] == 500 and row["eos_share"]["value"] == 1
    assert row["growth"]["value"] == 500 / 200 and row["growth_all"]["value"] == 500 / 100
    assert growth.row_of(base, base)["eos_share"]["value"] == pytest.approx(2 / 3)


def test_pairing_narrows_the_interval_and_it_holds_the_truth():
    base, other = answers(1), answers(2, seed=1)
    row = growth.row_of(base, other)
    low, high = row["growth"]["interval"]
    assert low < 2 < high and high - low < 0.35  # unpaired, these lengths would give more than twice that
    assert row["loop_rate"]["value"] == 0 and row["loop_rate"]["interval"][1] < 0.15


@pytest.mark.parametrize(
    ("factor", "cut", "said"),
    [
        (2.0, 0, "goal reached: lower end of growth 1.9"),
        (1.2, 0, "goal not reached: lower end of growth 1."),
        (2.0, 6, "worse than the base model by more than 5%: eos_share"),
    ],
)
def test_the_goal_needs_growth_and_no_worse_endings(factor, cut, said):
    base = answers(1)
    rows = [growth.row_of(base, other) for other in (base, answers(factor, seed=1, cut=cut))]
    assert said in growth.verdict(*rows)


def words_of(adapter: str) -> tuple[int, str]:
    """(words an answer has, how it ends) under an adapter, in the made-up study below."""
    if "rank-64" in adapter:  # the longest, but it does not end
        return 900, "length"
    return (600 if "rank-16" in adapter else 500 if "iter_2" in adapter else 300 if adapter else 200), "eos"


def stage(step: Step, log: object = None) -> dict:
    """A stage that writes what the study reads."""
    settings, output = step.settings, Path(step.output)
    if step.name == "instructions":
        output.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            new_record("instruction", id=f"{output.parent.name}{i:03}", language="en", sample=i, prompt=f"Tell {i}.")
            for i in range(settings["count"])
        ]
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if step.name == "extend":  # seven pairs of three instructions
        output.write_text("".join(json.dumps({"id": str(i), "prompt": f"Tell {i % 3}."}) + "\n" for i in range(7)))
    if step.name == "evaluate":
        output.mkdir(parents=True, exist_ok=True)
        asked = map(json.loads, Path(settings["benchmark"]).read_text().splitlines())
        words, finish = words_of(settings["adapter"])
        rows = []
        for row in asked:
            for sample in range(3):
                known = {"id": f"{row['id']}{sample}", "parent_id": row["id"], "sample": sample, "query": row["query"]}
                count = words + int(row["id"][-2:]) + sample
                rows.append(new_record("output", **known, language="en", response_words=count, finish=finish))
        (output / "outputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        median = words if finish == "eos" else None
        figures = {"words_median": median, "words_median_all": words, "eos_share": float(finish == "eos")}
        return {"seconds": 1, **figures, "loop_rate": 0.0}
    if step.name.startswith("train"):
        output.mkdir(parents=True, exist_ok=True)
        if not (output / "meta.json").exists():  # done is done, as with train.py
            (output / "meta.json").write_text(json.dumps(settings))
    return {"seconds": 1, "tokens": 10, **({"pairs": 7} if step.name.startswith("train") else {})}


def test_the_study_holds_out_searches_and_reports(tmp_path, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(steps, "run_step", lambda step, log: done.append(step) or stage(step))
    tries = ["rank=8,epochs=1", "rank=16,learning_rate=3e-4", "rank=64"]
    sizes = ["--held-out", "10", "--search", "4", "--extend.rounds", "2"]
    growth.main(["--run", str(tmp_path / "g"), *sizes, "--try", *tries])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["setting"] == tries[1]  # the longest that ends: rank 64 writes more and never stops
    assert {one["setting"] for one in result["search"]} == {"base", *tries}
    assert result["models"]["iter_2"]["answers"] == 30 and result["verdict"].startswith("goal reached")
    assert {"base", "iter_1", "iter_2", "control_told", "control_drafts_2"} <= set(result["models"])
    assert result["over_own_drafts"]["iter_2"]["value"] == pytest.approx(500 / 300, rel=0.02)  # and not over the base
    assert result["pairs"]["iter_1 generator"] == 7 and not any("final" in step.part for step in done)
    assert result["instructions"] == {"iter_1": 3, "iter_2": 3}  # of seven pairs each
    assert [step.part for step in done if step.name == "train extender"] == ["iter_1"]  # the last has nothing to do
    trained = tmp_path / "g" / "search" / "rank-16_learning_rate-3e-4" / "generator" / "meta.json"
    assert (tmp_path / "g" / "iter_1" / "generator" / "meta.json").read_text() == trained.read_text()  # not done twice
    assert (tmp_path / "g" / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "g" / "growth.json").read_text()) == result

    # what is searched by is not reported on, and neither is trained on
    searched, reported = (
        {json.loads(x)["query"] for x in (tmp_path / "g" / "heldout" / name).read_text().splitlines()}
        for name in ("search.jsonl", "report.jsonl")
    )
    assert len(searched) == 4 and len(reported) == 10 and not searched & reported
    for step in done:
        if step.name == "instructions" and step.part != "heldout":
            assert str(tmp_path / "g" / "heldout" / "instructions.jsonl") in step.settings["dedup_against"]
        if step.name == "evaluate":
            want = "search.jsonl" if step.part.startswith("search/") else "report.jsonl"
            assert step.settings["benchmark"].endswith(want)
        if step.name == "train generator" and not step.part.startswith("search/"):  # the setting that was found
            assert (step.settings["rank"], step.settings["learning_rate"]) == (16, 3e-4)
        if step.name == "extend":
            assert step.settings["rounds"] == 2


def test_the_later_iterations_have_limits_of_their_own(tmp_path, monkeypatch):
    for argv, limits, jobs in (
        ([], [360, 560], [6, 2]),
        (["--responses.max-new-tokens", "700"], [700, 700], [6, 2]),
        (["--model", "m"], [None, None], [None, None]),  # they are SmolLM2's
    ):
        done = []
        monkeypatch.setattr(steps, "run_step", lambda step, log, done=done: done.append(step) or stage(step))
        folder = str(tmp_path / str(len(argv)))
        growth.main(
            ["--run", folder, "--held-out", "4", "--search", "2", "--try", "rank=8", "--controls", "drafts", *argv]
        )
        drafts = {s.part: s.settings.get("max_new_tokens") for s in done if s.name == "responses"}
        assert [drafts["iter_1"], drafts["iter_2"]] == limits and drafts["controls/drafts_2"] == limits[1]
        assert [s.settings.get("samples") for s in done if s.name == "extend"] == jobs


def test_as_many_instructions_are_held_out_as_asked_for(tmp_path, monkeypatch):
    """The judge gives some up: a first study reported on 27 instructions where 30 were asked for."""
    lost = [3]

    def judged(step: Step, log: object) -> dict:
        summary = stage(step)
        path = Path(step.output)
        path.write_text("".join(path.read_text().splitlines(keepends=True)[lost[0] :]))
        return summary

    monkeypatch.setattr(steps, "run_step", judged)
    for gone, fits in ((3, True), (4, False)):
        lost[0] = gone
        args, settings, _ = growth.parse_args(["--run", str(tmp_path / str(gone)), "--held-out", "10", "--search", "2"])
        with nullcontext() if fits else pytest.raises(LowYield, match="11 held-out instructions, 12 are wanted"):
            _, searched, reported = growth.hold_out(args, settings)
            assert [len(p.read_text().splitlines()) for p in (searched, reported)] == [2, 10]


def test_an_unknown_setting_is_refused():
    for text in ("depth=3", "rank=0", "rank"):
        with pytest.raises(UserError, match=f"--try {text}: "):
            growth.parse_args(["--try", text])
