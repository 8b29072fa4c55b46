"""Scores of answers, and the command that makes and scores them.   python -m pytest tests/test_evaluate.py"""

import json
import math
import random
import shlex
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import cold
import numpy
import pytest
import torch

import evaluate
from lengthen.evaluation import probes
from lengthen.evaluation.benchmark import select
from lengthen.evaluation.measures import spearman
from lengthen.evaluation.report.models import read_models
from lengthen.evaluation.report.rundir import Files
from lengthen.evaluation.report.verdict import verdict
from lengthen.evaluation.scores import HEADLINES, MEASURES, cell, constant_writer, score
from lengthen.jobs import read_sidecar
from lengthen.records import LowYield, UserError, new_record
from lengthen.text.demands import length_score, parse_demand
from lengthen.text.languages import files

ROOT = Path(__file__).parent.parent
LONGEN = ROOT.parent / "shared" / "data" / "LonGen.jsonl"  # as published; not part of this project
needs_longen = pytest.mark.skipif(not LONGEN.exists(), reason="the published LonGen.jsonl is not here")

NAMES = "heron barley lantern granite velvet thimble orchard kettle marble saddle".split()


def prose(num_words: int, seed: int = 0) -> str:
    """Random words in sentences; by either measure of words exactly `num_words` long."""
    words = random.Random(seed).choices([a + b for a in NAMES for b in NAMES], k=num_words)
    return " ".join(words) + "."


def answer(words: int, constraint: str = "around 1000 words", language: str = "en", **fields: object) -> dict:
    """An "output" record as sampling makes it."""
    type_, low, high = parse_demand(constraint, language)
    fields = {"query": f"Write {constraint}.", "parent_id": constraint, "finish": "eos", "response_tokens": 10} | fields
    text = fields.pop("response", prose(words))
    row = new_record(
        "output", **fields, language=language, constraint=constraint, type=type_, min_words=low, max_words=high
    )
    return {**row, **evaluate.measured(row, text, row["finish"], row["response_tokens"])}


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows))
    return path


ROWS = [
    {
        "language": "en",
        "range": "0-1k",
        "type": "about",
        "constraint": "around 100 words",
        "query": "A poem of 100 words.",
    },
    {"language": "en", "range": "0-1k", "constraint": "50-80 words", "query": "Tell a joke in 50 to 80 words."},
    {"language": "zh", "range": "0-1k", "type": "below", "constraint": "小于一百字", "query": "写一首诗，少于一百字。"},
    {"range": "0-1k", "type": "above", "constraint": "more than 60 words", "query": "Say more than 60 words on tea."},
]


# ---------------------------------------------------------------------------------------------------------
# Measures against known answers


@needs_longen
def test_constant_writers_of_the_published_benchmark():
    """The formula's figures on the published 240 rows, and the four English ones that do not say their demand."""
    rows = evaluate.read_rows(LONGEN)
    assert len(rows) == 240
    constant = constant_writer(rows)
    published = {"1000": 4.1, "2000": 31.5, "4000": 67.8, "8000": 40.1}
    assert {k: round(constant["fixed"][k], 1) for k in published} == published
    assert constant["best"] >= 67.78 and constant["best_words"] == 4000
    odd = evaluate.contradictions(rows)
    assert Counter(r["language"] for r in odd) == {"en": 4}
    assert "the query does not say 4000" in [r["why"] for r in odd if "in about 150 words" in r["query"]]
    # 史记 in 四千字: the numeral is read.
    assert [r["min_words"] for r in rows if "四千字" in r["query"] and "史记" in r["query"]] == [4000]


def test_best_constant_is_the_best_of_all():
    demands = ["around 333 words", "around 1500 words", "200-250 words", "more than 700 words", "less than 410 words"]
    rows = [answer(1, d) for d in demands for _ in range(len(d) % 3 + 1)]
    constant = constant_writer(rows)

    def total(words: int) -> float:
        scores = [length_score(words, r["type"], r["min_words"], r["max_words"]) for r in rows]
        return 100 * sum(scores) / len(scores)

    assert constant["best"] == pytest.approx(max(total(n) for n in range(1, 4000)))
    assert total(constant["best_words"]) == pytest.approx(constant["best"])
    assert constant["fixed"]["500"] == pytest.approx(total(500))


def test_scores_of_a_handmade_run():
    """Five answers whose every figure is known: three ended, one cut by the limit, one loop."""
    loop = "the cat sat on the mat and looked at the moon " * 30
    outputs = [
        answer(1000, "around 1000 words", range="a"),  # 1
        answer(600, "around 1000 words", range="a"),  # 2 * 600 / 800 - 1 = 0.5
        answer(300, "around 1000 words", range="a", response_tokens=500),  # below 400: 0
        answer(900, "around 500 words", range="b", finish="length"),  # 3 - 2 * 900 / 600 = 0
        answer(0, "less than 400 words", range="b", finish="repetition", response=loop),  # 330 of 200..400: 1
    ]
    assert [r["length_score"] for r in outputs] == [1, 0.5, 0, 0, 1]
    scores = score(outputs)
    assert scores["rows"] == 3 and scores["answers"] == 5
    assert scores["length_score"] == pytest.approx(50) and scores["length_score_eos"] == pytest.approx(50)
    assert scores["words_median"] == 600 and scores["words_p90"] == pytest.approx(920)  # of 300, 600, 1000
    assert scores["words_median_all"] == 600 and scores["words_p90_all"] == pytest.approx(960)
    assert scores["eos_share"] == 0.6 and scores["finishes"] == {"eos": 3, "length": 1, "repetition": 1}
    assert scores["loop_rate"] == 0.2 and scores["tokens"] == 540
    # wanted 1000 1000 1000 500 300 (the middle of 200..400) against 1000 600 300 900 330
    assert scores["rank_correlation"] == pytest.approx(spearman([(4, 5), (4, 3), (4, 1), (2, 4), (1, 2)]))
    assert scores["by_type"]["about"]["answers"] == 4 and scores["by_type"]["below"]["length_score"] == 100
    assert scores["by_range"]["a"]["length_score"] == pytest.approx(50) and scores["by_range"]["a"]["eos_share"] == 1
    assert list(scores["by_language"]) == ["en"]
    assert set(scores["intervals"]) == {*MEASURES, "short_loss"} <= {key for key, _, _ in HEADLINES}
    # Loops: 330 of 330 words in one answer of five, none elsewhere. Score by LongBench-Write of 1000/1000, 600/1000,
    # 300/1000, 900/500 and 330/300 (the middle of full marks) words.
    assert scores["loop_by_tenth"] == [0.2] * 10
    assert scores["longbench_score"] == pytest.approx(
        (100 + 200 / 3 + 0 + 100 * (1 - 0.8 / 3) + 100 * (1 - 0.1 / 3)) / 5
    )


def test_scores_of_probed_answers():
    """Two answers of 100 and 40 tokens: buckets end at 64 and 128, so the second has the last 36 of the long one."""
    fields = ("base_tokens", "base_losses", "own_loss", "shuffled_loss")
    known = [(100, [2.0, 1.0], 1.64, 2.0), (40, [3.0], 3.0, 2.5), (-1, [], -1.0, -1.0)]
    outputs = [answer(50, query=f"Query {i}", **dict(zip(fields, k, strict=True))) for i, k in enumerate(known)]
    scores = score(outputs, [1.0, 2.0, 6.0])
    assert scores["own_prompt_gain"] == pytest.approx((0.36 - 0.5) / 2) and scores["own_prompt_share"] == 0.5
    pooled = math.exp((64 * 2 + 40 * 3) / 104)
    assert scores["base_perplexity_by_position"] == [[0, 64, pytest.approx(pooled)], [64, 128, pytest.approx(math.e)]]
    assert scores["short_loss"] == 3 and scores["intervals"]["short_loss"][0] < 3 < scores["intervals"]["short_loss"][1]
    nothing = score([answer(50)])
    assert nothing["own_prompt_gain"] is nothing["base_perplexity_by_position"] is nothing["short_loss"] is None


def test_intervals_are_over_queries_not_answers():
    """The same answer nine times to a query tells no more than once."""
    once = [answer(600 + 90 * i, query=f"Query {i}") for i in range(8)]
    few, many = score(once)["intervals"], score([r for r in once for _ in range(9)])["intervals"]
    for key in ("words_median_all", "length_score", "eos_share"):
        assert few[key] == pytest.approx(many[key], rel=0.02)


@pytest.mark.parametrize(
    "value, form, interval, text",
    [
        (362.4, "{:,.0f}", (300.6, 1420.2), "362 [301, 1,420]"),
        (0.5, "{:.1%}", (0.25, 0.75), "50.0% [25.0, 75.0]"),
        (0.5, "{:.1%}", None, "50.0%"),
        (1.5, "x{:.2f}", (1, 2), "x1.50 [1.00, 2.00]"),  # "[x1.00" would be a tag of rich's and vanish
        (None, "{:.1f}", None, "-"),
    ],
)
def test_cells(value, form, interval, text):
    assert cell(value, form, interval) == text


def test_a_writer_of_one_length_scores_well_but_follows_nothing():
    """What the controls are for: the constant writer's own score is its control, its correlation undefined."""
    demands = [f"around {n} words" for n in (850, 900, 1000, 1100, 1200)]
    constant = score([answer(1000, d) for d in demands])
    assert (
        constant["length_score"] == constant["constant_writer"]["best"] == 100 and constant["rank_correlation"] is None
    )
    follower = score([answer(int(d.split()[1]) // 2, d) for d in demands])
    assert follower["rank_correlation"] == pytest.approx(1) and follower["length_score"] < 30


def test_a_loop_counts_though_it_ended():
    assert score([answer(0, response="over and over the same small line of words again. " * 40)])["loop_rate"] == 1


# ---------------------------------------------------------------------------------------------------------
# Ready-made answers


def ready_made(folder: Path) -> Path:
    texts = [prose(100), prose(40, 1), "春江花月夜" * 12, ""]
    finishes = ["eos", "length", "eos", "eos"]
    rows = [{**r, "response": t, "finish": f} for r, t, f in zip(ROWS, texts, finishes, strict=True)]
    return write_lines(folder / "answers.jsonl", rows)


def test_ready_made_answers_are_scored_without_torch(tmp_path):
    """As a user runs it; torch must not even be imported, so this takes no longer than it must."""
    code = (
        "import sys, evaluate; evaluate.main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = cold.interpreter("-c", code, "score", ready_made(tmp_path), "--output", tmp_path / "out")
    assert done.stderr.splitlines()[-1] == "[]"
    scores = json.loads(done.stdout.splitlines()[-1])
    assert len(done.stdout.splitlines()) == 1
    # 100 words of about 100: 1; 40 of 50-80: 0.6; 60 of 50-100: 1; 0 of more than 60: 0
    assert scores["length_score"] == pytest.approx(65) and scores["rows"] == 4
    assert scores["eos_share"] == 0.75 and scores["words_median"] == 60 and scores["words_median_all"] == 50
    assert scores["by_language"]["zh"]["length_score"] == 100 and scores["tokens"] is None
    needed = "words_p90 loop_rate rank_correlation distinct_3 seconds by_type by_range constant_writer".split()
    assert set(needed) <= set(scores)
    rows = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
    assert [r["longen_words"] for r in rows] == [100, 40, 60, 0]
    assert all(set(r) == set(new_record("output")) and None not in r.values() for r in rows)
    assert rows[1]["type"] == "range" and rows[3]["language"] == "en"  # not in the file: read from the texts


def test_its_own_outputs_give_the_same_scores(tmp_path, capsys):
    evaluate.main(["score", str(ready_made(tmp_path)), "--output", str(tmp_path / "a")])
    evaluate.main(["score", str(tmp_path / "a" / "outputs.jsonl"), "--output", str(tmp_path / "b")])
    a, b = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for known_difference in ("output", "seconds"):
        a.pop(known_difference), b.pop(known_difference)
    assert a == b
    with pytest.raises(UserError, match="is what this command would write"):
        evaluate.main(["score", str(tmp_path / "a" / "outputs.jsonl"), "--output", str(tmp_path / "a")])


def test_answers_without_demand_or_finish_are_measured_as_far_as_it_goes(tmp_path, capsys):
    path = write_lines(tmp_path / "x.jsonl", [{"query": "Tell me of the sea.", "response": prose(n)} for n in (10, 30)])
    evaluate.main(["score", str(path), "--output", str(tmp_path / "out")])
    scores = json.loads(capsys.readouterr().out)
    undefined = (
        "length_score rank_correlation eos_share words_median words_p90 constant_writer tokens distinct_3".split()
    )
    assert [scores[k] for k in undefined] == [None] * len(undefined)
    assert (
        scores["words_median_all"] == 20 and scores["rows"] == 1 and scores["answers"] == 2
    )  # two answers to one query
    assert scores["finishes"] == {"unknown": 2}
    assert not (tmp_path / "out" / "length_following.png").exists()
    assert scores["perplexity"] is None
    path = write_lines(tmp_path / "y.jsonl", [{**GOOD, "perplexity": p} for p in (2.5, 3, 20)])
    evaluate.main(["score", str(path), "--output", str(tmp_path / "known")])
    assert json.loads(capsys.readouterr().out)["perplexity"] == 3


GOOD = {"query": "Write 100 words about tea.", "response": "Tea."}


def test_answers_with_the_same_query_and_sample_are_numbered_not_dropped(tmp_path):
    rows = [{**GOOD, "sample": 0}, {**GOOD, "sample": 0, "response": "Tea is good."}, {**GOOD, "sample": 1}]
    read = evaluate.read_rows(write_lines(tmp_path / "answers.jsonl", rows), ready_made=True)
    assert [row["sample"] for row in read] == [0, 1, 2] and len({row["id"] for row in read}) == 3
    assert len({row["parent_id"] for row in read}) == 1


def test_a_thought_without_an_answer_counts_no_words(tmp_path):
    rows = [{**GOOD, "response": "<think>Tea is a drink, and I could write"}, GOOD]
    read = evaluate.read_rows(write_lines(tmp_path / "answers.jsonl", rows), ready_made=True)
    assert [(row["response"], row["finish"]) for row in read] == [("", "length"), ("Tea.", "")]


def test_another_engines_stop_is_an_ended_answer(tmp_path):
    rows = [{**GOOD, "finish_reason": "stop"}, {**GOOD, "finish": "max_tokens"}]
    read = evaluate.read_rows(write_lines(tmp_path / "answers.jsonl", rows), ready_made=True)
    assert [row["finish"] for row in read] == ["eos", "length"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([GOOD, {"query": "Write a page."}], "line 2: no field 'response'"),
        ([GOOD, {"response": "Tea."}], "line 2: no field 'query'"),
        ([{**GOOD, "response": None}], "line 1: no field 'response'"),
        ([{**GOOD, "response": ["Tea."]}], "line 1: a list in the field 'response'"),
        ([{**GOOD, "query": 7}], "line 1: a int in the field 'query'"),
        ([{**GOOD, "finish": 1}], "line 1: the field 'finish' says 1"),
        ([{**GOOD, "query": "Напишите страницу о чае и море в городе."}], "line 1: no language is given"),
        ([{**GOOD, "language": "xx"}], "line 1: language 'xx'"),
        ([GOOD, {**GOOD, "constraint": "quite long"}], "line 2: cannot read the constraint 'quite long'"),
        ([{**GOOD, "constraint": "less than 9 words", "type": "above"}], "line 1: type 'above', but the constraint"),
        ([GOOD, '{"query": "torn'], "line 2: line contains invalid json"),
        ([], "holds no record"),
    ],
)
def test_bad_files_of_answers(tmp_path, rows, message):
    path = write_lines(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match="bad.jsonl") as caught:
        evaluate.main(["score", str(path), "--output", str(tmp_path / "out")])
    assert message in caught.value.message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------
# The benchmark


@pytest.mark.parametrize(
    "rows, message",
    [
        ([ROWS[0], {**ROWS[1], "constraint": "a few words"}], "line 2: cannot read the constraint 'a few words'"),
        ([{**ROWS[0], "constraint": None}], "line 1: no field 'constraint'"),
        ([{k: v for k, v in ROWS[0].items() if k != "constraint"}], "line 1: no field 'constraint'"),
        ([ROWS[2]], "none of the 1 records is in --language en"),
    ],
)
def test_bad_benchmarks(tmp_path, rows, message):
    path = write_lines(tmp_path / "bench.jsonl", rows)
    with pytest.raises(UserError, match="bench.jsonl") as caught:
        flags = ["--benchmark", str(path), "--language", "en", "--output", str(tmp_path / "out")]
        evaluate.main(["--model", "unused", *flags])
    assert message in caught.value.message


@pytest.mark.parametrize("name", ["nowhere.jsonl", "some/where.jsonl", "nowhere"])
def test_a_missing_benchmark_file(name):
    with pytest.raises(UserError, match="does not exist"):
        evaluate.read_rows(*evaluate.find_benchmark(name))


def test_a_hub_data_set_offline_is_one_line_and_a_hint():
    """conftest.py sets HF_HUB_OFFLINE: nothing is asked of the network."""
    with pytest.raises(UserError) as caught:
        evaluate.find_benchmark("nobody/no-such-data-set")
    assert caught.value.message.startswith("nobody/no-such-data-set is not a file") and "\n" not in caught.value.message
    assert "--benchmark mini" in caught.value.hint


def test_a_hub_data_set_is_its_one_jsonl_file(tmp_path, monkeypatch):
    import huggingface_hub

    write_lines(tmp_path / "LonGen.jsonl", ROWS)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert evaluate.find_benchmark("some/benchmark") == [tmp_path / "LonGen.jsonl"]
    write_lines(tmp_path / "other.jsonl", ROWS)
    with pytest.raises(UserError, match="LonGen.jsonl, other.jsonl"):
        evaluate.find_benchmark("some/benchmark")


def test_queries_that_do_not_state_their_demand_are_listed(tmp_path):
    rows = [*ROWS, {**ROWS[0], "query": "A poem of 150 words."}, {**ROWS[2], "query": "写一首长诗。"}]
    odd = evaluate.contradictions(evaluate.read_rows(write_lines(tmp_path / "bench.jsonl", rows)))
    assert [(r["query"], r["why"]) for r in odd] == [
        ("A poem of 150 words.", "the query does not say 100"),
        ("写一首长诗。", "the query does not say 100"),
    ]


def test_the_mini_benchmark_states_all_its_demands():
    rows = [row for path in evaluate.find_benchmark("mini") for row in evaluate.read_rows(path)]
    assert evaluate.contradictions(rows) == []
    first = [r for r in rows if r["language"] == "en"][:8]  # the demo's
    assert {r["type"] for r in first} == {"about", "range", "above", "below"}
    assert len({r["constraint"] for r in first}) >= 6


def test_equal_queries_of_a_benchmark_are_different_queries(tmp_path):
    rows = evaluate.read_rows(write_lines(tmp_path / "bench.jsonl", [ROWS[0], ROWS[0], {**ROWS[0], "id": "mine"}]))
    assert len({r["parent_id"] for r in rows}) == 3 and rows[2]["parent_id"] == "mine"


# ---------------------------------------------------------------------------------------------------------
# With a model


def flags(writer: Path, bench: Path, output: Path, *more: str) -> list[str]:
    command = ["--model", str(writer), "--benchmark", str(bench), "--output", str(output), "--device", "cpu"]
    return [*command, "--language", "en", "--max-new-tokens", "60", *more]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("bench") / "bench.jsonl", ROWS)


@pytest.fixture(scope="module")
def run(writer: Path, bench: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished evaluation: three English queries, two samples each."""
    output = tmp_path_factory.mktemp("runs") / "eval" / "base"
    evaluate.main(flags(writer, bench, output, "--samples", "2"))
    return output


def records_of(output: Path) -> dict[str, dict]:
    return {r["id"]: r for r in map(json.loads, (output / "outputs.jsonl").read_text().splitlines())}


def test_sampling_a_benchmark(run):
    records = records_of(run)
    assert len(records) == 6 and Counter(r["query"] for r in records.values()).most_common(1)[0][1] == 2
    assert all(set(r) == set(new_record("output")) and None not in r.values() for r in records.values())
    assert {r["finish"] for r in records.values()} <= {"eos", "length"} and len(
        {r["response"] for r in records.values()}
    ) == 6
    assert all(r["run_id"] == "eval/base" and r["response_tokens"] > 0 for r in records.values())
    scores = json.loads((run / "scores.json").read_text())
    assert scores["rows"] == 3 and scores["answers"] == 6 and scores["model"] and scores["sampling"]["samples"] == 2
    assert scores["tokens"] == sum(r["response_tokens"] for r in records.values())
    assert (run / "length_following.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []


def test_perplexity_is_that_of_a_full_pass_of_the_model(writer, bench, tmp_path, monkeypatch):
    """Oracle: transformers' own logits over prompt and answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lengthen.sampling.engine import Sampler

    tokenizer = AutoTokenizer.from_pretrained(writer)

    def text_of(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    pairs, own = [], Sampler.logprobs
    monkeypatch.setattr(Sampler, "logprobs", lambda self, asked: pairs.extend(asked) or own(self, asked))
    evaluate.main(flags(writer, bench, tmp_path / "out", "--no-probes"))
    records = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
    assert len(records) == len(pairs)
    model = AutoModelForCausalLM.from_pretrained(writer).eval()
    for record in records:
        [(prompt, answer_ids)] = [pair for pair in pairs if text_of(pair[1]) == record["response"].strip()]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer_ids])).logits[0, len(prompt) - 1 : -1]
        want = torch.nn.functional.cross_entropy(logits, torch.tensor(answer_ids)).exp().item()
        assert record["response_tokens"] == len(answer_ids) and record["perplexity"] == pytest.approx(want, rel=1e-4)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["perplexity"] == pytest.approx(numpy.median([r["perplexity"] for r in records]), rel=1e-3)


def test_plain_instructions_are_a_benchmark_too(writer, tmp_path):
    rows = [{**row, "constraint": "", "type": ""} for row in ROWS[:2]]
    path = write_lines(tmp_path / "bench.jsonl", rows)
    evaluate.main(flags(writer, path, tmp_path / "out"))
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["answers"] == 2 and scores["length_score"] is None and scores["rank_correlation"] is None
    assert scores["constant_writer"] is None and scores["words_median_all"] > 0


def test_controls_ask_for_words_or_ban_the_end(writer, bench, tmp_path, monkeypatch):
    from lengthen.sampling.engine import Sampler

    asked, add = [], Sampler.add
    monkeypatch.setattr(Sampler, "add", lambda self, request: asked.append((self, request)) or add(self, request))
    evaluate.main(flags(writer, bench, tmp_path / "plain"))
    evaluate.main(flags(writer, bench, tmp_path / "told", "--at-least", "300", "--language", "both"))
    evaluate.main(flags(writer, bench, tmp_path / "ban", "--min-new-tokens", "40"))
    texts = [sampler.tokenizer.decode(request.prompt_ids) for sampler, request in asked]
    told = texts[len(records_of(tmp_path / "plain")) :][: len(ROWS)]
    assert (
        sum("Write at least 300 words." in text for text in told) == sum("请至少写300字。" in text for text in told) + 2
    )
    assert sum("at least 300" in text or "至少写300" in text for text in texts) == len(ROWS) == len(told)
    assert all(r["response_tokens"] >= 40 for r in records_of(tmp_path / "ban").values())
    for name, setting in (("told", {"at_least": 300}), ("ban", {"min_new_tokens": 40}), ("plain", {"at_least": 0})):
        scores = json.loads((tmp_path / name / "scores.json").read_text())
        assert scores["sampling"].items() >= setting.items()
    # what was asked for beyond the query is in the settings, the record's query is the benchmark's
    assert {r["query"] for r in records_of(tmp_path / "told").values()} == {row["query"] for row in ROWS}


@pytest.fixture(scope="module")
def adapter(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the writer, small enough to leave it a writer."""
    import torch

    from lengthen.models import lora
    from lengthen.models.loading import load_model

    model = load_model(str(writer), device="cpu").model
    lora.attach(model, rank=4, alpha=8)
    generator = torch.Generator().manual_seed(1)
    for layer in lora.lora_layers(model).values():
        layer.B.data.normal_(0, 0.05, generator=generator)
    folder = tmp_path_factory.mktemp("adapter")
    lora.save_adapter(model, folder, str(writer))
    return folder


def losses_of(model, prompt: list[int], text: list[int]) -> list[float]:
    """By transformers alone, token by token."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(text), reduction="none").tolist()


def test_probes_are_full_passes_of_the_base_and_of_the_adapted_model(writer, adapter, bench, tmp_path, monkeypatch):
    """Oracle: transformers' logits, with PEFT's adapter for the short tasks and without it for the answers."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lengthen.models.chat import Chat

    monkeypatch.setattr(probes, "OPENING_TOKENS", 20)  # shorter than most answers
    for module in ("probes", "scores"):
        monkeypatch.setattr(f"lengthen.evaluation.{module}.POSITIONS", (0, 16, 1000))
    evaluate.main(flags(writer, bench, tmp_path / "out", "--adapter", str(adapter), "--samples", "2"))
    chat = Chat(AutoTokenizer.from_pretrained(writer))
    base = AutoModelForCausalLM.from_pretrained(writer).eval()
    english = [row["query"] for row in ROWS if row.get("language") != "zh"]
    following = {english[0]: english[1], english[1]: english[2], english[2]: english[0]}
    for record in records_of(tmp_path / "out").values():
        text = chat.encode_text(record["response"])
        own = losses_of(base, probes.prompt_of(chat, record["query"]), text)
        strange = losses_of(base, probes.prompt_of(chat, following[record["query"]]), text)
        assert record["base_tokens"] == len(text)
        assert record["own_loss"] == pytest.approx(numpy.mean(own[:20]), abs=1e-3)
        assert record["shuffled_loss"] == pytest.approx(numpy.mean(strange[:20]), abs=1e-3)
        parts = [numpy.mean(part) for part in (own[:16], own[16:]) if part]
        assert record["base_losses"] == pytest.approx(parts, abs=1e-3)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    tasks = [json.loads(line) for file in files(probes.SHORT_TASKS) for line in file.read_text().splitlines()]
    adapted, want, without = peft.PeftModel.from_pretrained(base, adapter).eval(), [], []
    for task in tasks:
        if task["language"] == "en":
            pair = probes.prompt_of(chat, task["prompt"]), chat.encode_answer(task["answer"])
            want.append(numpy.mean(losses_of(adapted, *pair)))
            with adapted.disable_adapter():
                without.append(numpy.mean(losses_of(adapted, *pair)))
    assert scores["short_losses"] == pytest.approx(want, abs=1e-3) and scores["short_loss"] == pytest.approx(
        numpy.mean(want), abs=1e-3
    )
    assert numpy.abs(numpy.subtract(want, without)).max() > 0.05  # else this test could not tell the two models apart


def test_the_next_query_is_of_the_same_language_and_never_the_same():
    queries = [("en", "a"), ("zh", "甲"), ("en", "b"), ("en", "c"), ("zh", "乙"), ("en", "d")]
    following = probes.next_queries(queries)
    assert sorted(following) == sorted(following.values()) == sorted(queries)
    assert all(a != b and a[0] == b[0] for a, b in following.items())
    assert probes.next_queries([("en", "a"), ("zh", "甲")]) == {("en", "a"): ("en", "a"), ("zh", "甲"): ("zh", "甲")}


def test_a_lone_query_has_no_other_to_be_compared_with(writer, tmp_path, capsys):
    rows = [ROWS[0], ROWS[0], ROWS[2]]  # the same text twice is one query
    evaluate.main(flags(writer, write_lines(tmp_path / "bench.jsonl", rows), tmp_path / "out", "--language", "both"))
    scores = json.loads(capsys.readouterr().out)
    assert scores["own_prompt_gain"] is scores["own_prompt_share"] is scores["intervals"]["own_prompt_gain"] is None
    assert scores["base_perplexity_by_position"] and scores["rows"] == 3
    assert {r["shuffled_loss"] for r in records_of(tmp_path / "out").values()} == {-1}


def test_without_probes_nothing_is_asked_and_the_rest_is_the_same(run, writer, bench, tmp_path, capsys):
    evaluate.main(flags(writer, bench, tmp_path / "out", "--samples", "2", "--no-probes"))
    plain, probed = json.loads(capsys.readouterr().out), json.loads((run / "scores.json").read_text())
    keys = ("own_prompt_gain", "own_prompt_share", "short_loss", "base_perplexity_by_position")
    assert all(plain[k] is None and probed[k] is not None for k in keys)
    for key in set(MEASURES) - set(keys):
        assert plain[key] == probed[key], key
    evaluate.main(flags(writer, bench, tmp_path / "out", "--samples", "2"))  # finished: no model is loaded for them
    assert "without the probes" in capsys.readouterr().err


def test_own_outputs_of_a_model_give_its_probes_without_it(run, tmp_path, capsys):
    evaluate.main(["score", str(run / "outputs.jsonl"), "--output", str(tmp_path / "again")])
    again, before = json.loads(capsys.readouterr().out), json.loads((run / "scores.json").read_text())
    for key in (*MEASURES, "base_perplexity_by_position", "loop_by_tenth"):
        assert again[key] == before[key], key
    assert again["short_loss"] is None  # no part of the answers


def test_killed_at_any_write_of_the_probes_they_are_the_same(writer, adapter, bench, tmp_path, monkeypatch):
    """What was noted is not measured again, and what was measured is in the records in the end."""
    from scripted import Killed, die_at

    from lengthen.sampling.engine import Sampler

    logprobs, calls = Sampler.logprobs, []
    monkeypatch.setattr(Sampler, "logprobs", lambda self, pairs: calls.append(len(pairs)) or logprobs(self, pairs))
    more = ("--adapter", str(adapter), "--max-new-tokens", "20")

    def attempt(name: str, step: int) -> int:
        with monkeypatch.context() as patch:
            steps = die_at(patch, step)
            try:
                evaluate.main(flags(writer, bench, tmp_path / name, *more))
            except Killed:
                pass
            return steps()

    total = attempt("whole", 10**9)
    whole, scores = records_of(tmp_path / "whole"), json.loads((tmp_path / "whole" / "scores.json").read_text())
    assert len(whole) == 3 and all(r["base_tokens"] > 0 and r["shuffled_loss"] > 0 for r in whole.values())
    # The last steps are a write and a rename each of the figure, the scores, the sidecar and the records, after three
    # notes. Killed in the first note, the last, at the records' write and rename, and at the sidecar's rename:
    for left, noted in ((10, 0), (8, 2), (7, 3), (6, 3), (4, 3)):
        folder = tmp_path / f"dead_{left}"
        attempt(folder.name, total - left)
        journal = (folder / "outputs.work.jsonl").read_bytes()
        assert journal.count(b"\n") == 3 + noted  # the answers are there, too
        calls.clear()
        attempt(folder.name, 10**9)
        assert [n for n in calls if n] == [len(scores["short_losses"]), 2 * (3 - noted)][: 2 if noted < 3 else 1]
        names = {r["run_id"] for r in whole.values()}
        assert {k: {**r, "run_id": [*names][0]} for k, r in records_of(folder).items()} == whole, left
        again = json.loads((folder / "scores.json").read_text())
        assert {k: again[k] for k in MEASURES} == {k: scores[k] for k in MEASURES}
        assert again["short_losses"] == scores["short_losses"] and not (folder / "outputs.work.jsonl").exists()


def test_a_finished_run_loads_no_model(run, writer, bench, monkeypatch, capsys):
    import lengthen.models.loading

    def refuse(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(lengthen.models.loading, "load_model", refuse)
    before, scores = (run / "outputs.jsonl").read_text(), json.loads((run / "scores.json").read_text())
    (run / "scores.json").unlink()
    evaluate.main(flags(writer, bench, run, "--samples", "2"))
    assert (run / "outputs.jsonl").read_text() == before and json.loads((run / "scores.json").read_text()) == scores
    output = capsys.readouterr()
    assert json.loads(output.out)["answers"] == 6
    with pytest.raises(UserError, match="samples = 2, this command says 1, and what is there is not taken back"):
        evaluate.main(flags(writer, bench, run, "--samples", "1"))


def test_more_answers_and_queries_join_those_that_are_there(run, writer, bench, tmp_path, capsys):
    """Probed again, all together: the next query of its language may be another one now."""
    output = tmp_path / "eval" / "base"
    evaluate.main(flags(writer, bench, output, "--samples", "1", "--limit", "2"))
    before = records_of(output)
    evaluate.main(flags(writer, bench, output, "--samples", "2", "--limit", "0"))
    assert records_of(output) == records_of(run) and len(before) == 2
    assert read_sidecar(output / "outputs.jsonl")["history"] == {"limit": [2, 0], "samples": [1, 2]}
    assert "goes on with --limit 2 -> 0, --samples 1 -> 2" in capsys.readouterr().err


def test_resume_from_a_torn_file_gives_the_same_answers(run, writer, bench, tmp_path):
    """Two answers on disk and half of a third: the same six in the end, whatever the batch was."""
    output = tmp_path / "eval" / "base"
    output.mkdir(parents=True)
    lines = (run / "outputs.jsonl").read_text().splitlines(keepends=True)
    (output / "outputs.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    meta = json.loads((run / "outputs.meta.json").read_text())
    (output / "outputs.meta.json").write_text(json.dumps({**meta, "status": "running"}))
    evaluate.main(flags(writer, bench, output, "--samples", "2", "--max-rows", "1"))
    assert records_of(output) == records_of(run)


def test_limit_counts_rows_of_the_language(writer, tmp_path, capsys):
    path = write_lines(tmp_path / "bench.jsonl", [ROWS[2], *ROWS])
    evaluate.main(flags(writer, path, tmp_path / "out", "--limit", "2"))
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    assert {r["query"] for r in records_of(tmp_path / "out").values()} == {ROWS[0]["query"], ROWS[1]["query"]}


def test_an_answer_that_is_only_a_thought_has_no_perplexity():
    """JSON has no NaN: `compare` and `judge` would refuse the file."""
    row = {"query": "q", "language": "en", "type": "", "constraint": "", "min_words": -1, "max_words": -1}
    writer = SimpleNamespace(logprobs=lambda pairs: [torch.empty(len(pairs[0][1]))])
    request = SimpleNamespace(prompt_ids=[1, 2])
    sample = SimpleNamespace(error="", text="", finish="length", num_tokens=60, token_ids=[], request=request)
    fields, reason = evaluate.Answer(row, evaluate.ControlFlags()).read(sample, writer)
    assert not reason and fields["perplexity"] == -1 and fields["response_words"] == 0


def test_a_limit_asks_every_language():
    rows = [new_record("output", language=code, query=f"{code} {i}") for code in ("en", "zh") for i in range(4)]
    asked = [[row["query"] for row in select(rows, "both", limit, "file")] for limit in (2, 3, 8)]
    assert asked[0] == ["en 0", "zh 0"] and asked[1] == [*asked[0], "en 1"] and len(asked[2]) == 8


def test_a_prompt_beyond_the_context_is_left_out_and_the_rest_go_on(writer, tmp_path, capsys):
    long = {**ROWS[0], "query": "Write 100 words about " + "tea " * 4000}
    evaluate.main(flags(writer, write_lines(tmp_path / "bench.jsonl", [long, ROWS[1]]), tmp_path / "out"))
    output = capsys.readouterr()
    scores = json.loads(output.out)
    assert scores["rows"] == 1 and scores["rejected"] == {"context": 1}
    assert "unanswered and in no score" in output.err
    with pytest.raises(LowYield):
        evaluate.main(flags(writer, write_lines(tmp_path / "bench.jsonl", [long]), tmp_path / "none"))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--output", "x"], "required: --model"),
        (["--model", "smollm2"], "required: --output"),
        (["score", "x.jsonl", "--benchmark", "mini", "--output", "x"], "unrecognized arguments: --benchmark"),
        (["score", "--output", "x"], "required: FILE"),
        (["compare"], "required: RUN"),
        (["judge", "x"], "no judge is named"),
        (["jugde", "x", "--judge", "m"], "invalid choice: 'jugde'"),
        (["answers.jsonl", "--output", "x"], "invalid choice: 'answers.jsonl'"),
        (["--model", "m", "--output", "x", "--samples", "0"], "must be at least 1, got 0"),
        (["--model", "m", "--output", "x", "--bench", "mini"], "unrecognized arguments"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(argv)


@pytest.mark.parametrize(
    "argv, now",
    [
        ("--report runs/demo", "report runs/demo"),
        ("--report=runs/demo", "report runs/demo"),
        ("--compare a b", "compare a b"),
        ("--judge m --compare a b --output c", "compare a b --judge m --output c"),
        ("--output x --outputs 'my answers.jsonl' --limit 3", "score 'my answers.jsonl' --output x --limit 3"),
    ],
)
def test_the_spelling_of_before_is_answered_with_that_of_today(argv, now):
    with pytest.raises(UserError, match="is a command now") as caught:
        evaluate.main(shlex.split(argv))
    assert caught.value.hint == f"python evaluate.py {now}"


def test_answer_is_the_command_that_need_not_be_named():
    assert evaluate.with_command(["--model", "m"]) == ["answer", "--model", "m"] and evaluate.with_command([])
    for argv in (["answer", "--model", "m"], ["--help"], ["compare", "a"]):
        assert evaluate.with_command(argv) == argv
    named_like_one = ["--model", "compare", "--output", "report"]
    assert evaluate.with_command(named_like_one) == ["answer", *named_like_one]


def test_a_figure_never_fails_a_run(tmp_path, monkeypatch, capsys):
    def broken(*_: object) -> bytes:
        raise RuntimeError("no font")

    monkeypatch.setattr(evaluate, "length_following", broken)
    evaluate.main(["score", str(ready_made(tmp_path)), "--output", str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert json.loads(shown.out)["rows"] == 4 and "no length_following.png: RuntimeError: no font" in shown.err
    assert (tmp_path / "out" / "scores.json").exists()


# ---------------------------------------------------------------------------------------------------------
# For people


def folder_of(path: Path, lengths: list[int], queries: list[dict] | None = None, **fields) -> str:
    """A scored run with one answer of so many words to each query."""
    queries = queries or [{"query": f"Write around 100 words about {name}s.", **ABOUT_100} for name in NAMES]
    rows = [
        {**q, "finish": "eos", "response": prose(n, i), **fields}
        for i, (q, n) in enumerate(zip(queries, lengths, strict=True))
    ]
    source = write_lines(path.with_suffix(".jsonl"), rows)
    evaluate.main(["score", str(source), "--output", str(path)])
    return str(path)


ABOUT_100 = {"language": "en", "constraint": "around 100 words"}


def test_compare_puts_runs_side_by_side(tmp_path, capsys):
    lengths = [40, 60, 70, 80, 95, 105, 120, 140, 160, 210]
    a = folder_of(tmp_path / "base", lengths)
    b = folder_of(tmp_path / "final", [n * 3 // 2 + n % 7 for n in lengths])  # each about half as long again
    capsys.readouterr()
    evaluate.main(["compare", a, b])
    output = capsys.readouterr()
    summary = json.loads(output.out)
    assert [summary["runs"][f]["words_median"] for f in (a, b)] == [100, pytest.approx(152, abs=2)]
    estimate, (low, high) = summary["changes"][b]["words_median"]
    assert 1.45 < low <= estimate <= high < 1.6 and summary["paired"] == [b]
    assert f"x{estimate:.2f} [{low:.2f}, {high:.2f}]" in output.err and "not like for like" not in output.err
    estimate, (low, high) = summary["changes"][b]["length_score"]
    assert estimate == pytest.approx(summary["runs"][b]["length_score"] - summary["runs"][a]["length_score"], abs=1e-3)
    assert low < estimate < high and f"{estimate:+.1f} [{low:+.1f}, {high:+.1f}]" in output.err
    # Both ended all ten: the shares have an interval each, their difference of 0 shows no spread to make one of.
    assert summary["changes"][b]["eos_share"] == [0, None] and "100.0% [69.2, 100.0]" in output.err


def test_an_interval_does_not_depend_on_who_finished_first(tmp_path, capsys):
    """The demo's report said 0.92 to 1.34 where compare said 0.94 to 1.34, of the same answers."""
    lengths = [40, 60, 70, 80, 95, 105, 120, 140, 160, 210]
    (tmp_path / "eval").mkdir()
    a, b = folder_of(tmp_path / "eval" / "base", lengths), folder_of(tmp_path / "eval" / "final", lengths[::-1])

    def compared() -> dict:
        capsys.readouterr()
        evaluate.main(["compare", a, b])
        return json.loads(capsys.readouterr().out)["changes"]

    before = compared()
    for folder in (a, b):
        path = Path(folder) / "outputs.jsonl"
        rows = path.read_text().splitlines(keepends=True)
        random.Random(folder[-1]).shuffle(rows)
        path.write_text("".join(rows))
    assert compared() == before
    low, high = before[b]["words_median"][1]
    told = " ".join(verdict(read_models(Files(tmp_path)))["shows"])
    assert f"{low:.2f} to {high:.2f} (paired by query)" in told


def test_runs_on_other_queries_are_compared_unpaired_and_said_to_be(tmp_path, capsys):
    lengths = [40, 60, 70, 80, 95, 105, 120, 140, 160, 210]
    a = folder_of(tmp_path / "a", lengths)
    others = [{"query": f"Describe a {name} in around 100 words.", **ABOUT_100} for name in NAMES[:8]]
    b = folder_of(tmp_path / "b", lengths[:8], others)
    capsys.readouterr()
    evaluate.main(["compare", a, b])
    output = capsys.readouterr()
    assert "not like for like" in output.err and "not paired" in output.err
    summary = json.loads(output.out)
    _, (low, high) = summary["changes"][b]["words_median"]
    assert summary["paired"] == [] and low < 0.7 and high > 1.1  # the same lengths, but of other queries
    with pytest.raises(UserError, match="scores.json does not exist"):
        evaluate.main(["compare", str(tmp_path)])


def test_compare_reads_runs_from_before_there_were_intervals(tmp_path, capsys):
    """scores.json without the new keys, records without the new fields, or no records at all."""
    lengths = [40, 60, 70, 80, 95, 105, 120, 140, 160, 210]
    a, b = (folder_of(tmp_path / name, [n * k for n in lengths]) for name, k in (("old", 1), ("new", 2)))
    scores = json.loads((Path(a) / "scores.json").read_text())
    new = ("intervals", "loop_by_tenth", "compression", "content_words", "longbench_score", "own_prompt_gain")
    old = {k: v for k, v in scores.items() if k not in (*new, "short_loss", "short_losses", "short_tasks")}
    (Path(a) / "scores.json").write_text(json.dumps(old))
    records = [json.loads(line) for line in (Path(a) / "outputs.jsonl").read_text().splitlines()]
    probes = ("base_tokens", "base_losses", "own_loss", "shuffled_loss")
    write_lines(Path(a) / "outputs.jsonl", [{k: v for k, v in r.items() if k not in probes} for r in records])
    capsys.readouterr()
    evaluate.main(["compare", a, b])
    assert json.loads(capsys.readouterr().out)["changes"][b]["words_median"] == [2, None]  # twice, query by query
    (Path(a) / "outputs.jsonl").unlink()
    evaluate.main(["compare", a, b])
    summary = json.loads(capsys.readouterr().out)
    assert summary["changes"][b]["words_p90"][1] is None and summary["runs"][a]["compression"] is None


def test_the_figure_shows_every_answer_and_clips_none_away():
    """Every answer is a point inside the axes of its type's panel, an empty one and an endless one too."""
    from lengthen.evaluation.report.figures import length_following

    outputs = [answer(w, d) for d in ("around 500 words", "200-300 words") for w in (0, 200, 450, 90000)]
    outputs += [answer(90, "小于三千字", language="zh", finish="length")]
    figure = length_following(outputs, score(outputs), "test")
    panels = {panel.get_title(loc="left").strip(): panel for panel in figure.axes}
    assert list(panels) == ["about", "range", "above", "below"]
    for type_, count in (("about", 4), ("range", 4), ("above", 0), ("below", 1)):
        points = [xy for dots in panels[type_].collections for xy in dots.get_offsets() if len(dots.get_offsets())]
        inside = [xy for xy in points if numpy.isfinite(xy).all() and panels[type_].viewLim.contains(*xy)]
        assert len(inside) == count
