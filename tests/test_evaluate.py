"""Scores of answers, and the command that makes and scores them.   python -m pytest tests/test_evaluate.py"""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest

import evaluate
from lengthen.demands import length_score, parse_demand
from lengthen.records import LowYield, UserError, new_record

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
    return evaluate.answered(row, text, row["finish"], row["response_tokens"])


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


@pytest.mark.parametrize(
    "x, y, expected",
    [
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.82078268166812329),  # the example of scipy.stats.spearmanr, with a tie
        ([1, 2, 3, 4, 5], [2, 4, 8, 16, 32], 1.0),  # monotone, not linear
        ([1, 2, 3, 4, 5], [9, 7, 5, 3, 1], -1.0),
        ([1, 2, 2, 3, 5], [1, 3, 2, 4, 5], 9.5 / math.sqrt(9.5 * 10)),  # ranks 1 2.5 2.5 4 5 and 1 3 2 4 5, by hand
        ([1, 2, 3, 4], [1, 2, 3, 4], None),  # too few
        ([7, 7, 7, 7, 7], [1, 2, 3, 4, 5], None),  # constant: undefined, not 0
        ([1, 2, 3, 4, 5], [7, 7, 7, 7, 7], None),
        ([], [], None),
    ],
)
def test_spearman(x, y, expected):
    assert evaluate.spearman(x, y) == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_spearman_without_ties_is_the_textbook_formula():
    rng = random.Random(1)
    x, y = rng.sample(range(1000), 50), rng.sample(range(1000), 50)
    rank = [{v: i for i, v in enumerate(sorted(z))} for z in (x, y)]
    gaps = sum((rank[0][a] - rank[1][b]) ** 2 for a, b in zip(x, y, strict=True))
    assert evaluate.spearman(x, y) == pytest.approx(1 - 6 * gaps / (50 * (50**2 - 1)), abs=1e-12)


def test_ranks_share_ties():
    assert evaluate.ranks([30, 10, 20, 10, 10]) == [5, 2, 4, 2, 2]


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_quantile_is_numpys(size):
    values = [random.Random(size).randrange(1000) for _ in range(size)]
    for q in (0, 0.25, 0.5, 0.9, 1):
        assert evaluate.quantile(values, q) == pytest.approx(float(numpy.quantile(values, q)))


def test_distinct_3_of_equal_prefixes():
    n = evaluate.PREFIX_WORDS
    fresh = " ".join(f"w{i}" for i in range(n))
    assert evaluate.distinct_3([fresh]) == (1.0, 1)
    assert evaluate.distinct_3(["la " * n]) == (1 / (n - 2), 1)
    # What follows the prefix does not count: neither a loop nor fresh words behind it.
    assert evaluate.distinct_3([fresh + " la" * 5000]) == (1.0, 1)
    assert evaluate.distinct_3(["la " * n + fresh]) == (1 / (n - 2), 1)
    # Shorter texts are left out, and said to be.
    assert evaluate.distinct_3([fresh, "la " * (n - 1)]) == (1.0, 1)
    assert evaluate.distinct_3(["la " * (n - 1)]) == (None, 0)
    # Chinese is measured by characters; case and punctuation make no difference.
    assert evaluate.distinct_3(["啦，" * n]) == (1 / (n - 2), 1)
    assert evaluate.distinct_3(["La, la! " * (n // 2)]) == (1 / (n - 2), 1)


@needs_longen
def test_constant_writers_of_the_published_benchmark():
    """The formula's figures on the published 240 rows, and the four English ones that do not say their demand."""
    rows = evaluate.read_rows(LONGEN)
    assert len(rows) == 240
    constant = evaluate.constant_writer(rows)
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
    constant = evaluate.constant_writer(rows)

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
    scores = evaluate.score(outputs)
    assert scores["rows"] == 3 and scores["answers"] == 5
    assert scores["length_score"] == pytest.approx(50) and scores["length_score_eos"] == pytest.approx(50)
    assert scores["words_median"] == 600 and scores["words_p90"] == pytest.approx(920)  # of 300, 600, 1000
    assert scores["words_median_all"] == 600 and scores["words_p90_all"] == pytest.approx(960)
    assert scores["eos_share"] == 0.6 and scores["finishes"] == {"eos": 3, "length": 1, "repetition": 1}
    assert scores["loop_rate"] == 0.2 and scores["tokens"] == 540
    # wanted 1000 1000 1000 500 300 (the middle of 200..400) against 1000 600 300 900 330
    assert scores["rank_correlation"] == pytest.approx(evaluate.spearman([4, 4, 4, 2, 1], [5, 3, 1, 4, 2]))
    assert scores["by_type"]["about"]["answers"] == 4 and scores["by_type"]["below"]["length_score"] == 100
    assert scores["by_range"]["a"]["length_score"] == pytest.approx(50) and scores["by_range"]["a"]["eos_share"] == 1
    assert list(scores["by_language"]) == ["en"]


def test_a_writer_of_one_length_scores_well_but_follows_nothing():
    """What the controls are for: the constant writer's own score is its control, its correlation undefined."""
    demands = [f"around {n} words" for n in (850, 900, 1000, 1100, 1200)]
    constant = evaluate.score([answer(1000, d) for d in demands])
    assert (
        constant["length_score"] == constant["constant_writer"]["best"] == 100 and constant["rank_correlation"] is None
    )
    follower = evaluate.score([answer(int(d.split()[1]) // 2, d) for d in demands])
    assert follower["rank_correlation"] == pytest.approx(1) and follower["length_score"] < 30


def test_a_loop_counts_though_it_ended():
    assert (
        evaluate.score([answer(0, response="over and over the same small line of words again. " * 40)])["loop_rate"]
        == 1
    )


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
    command = [sys.executable, "-c", code, "--outputs", str(ready_made(tmp_path)), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
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
    evaluate.main(["--outputs", str(ready_made(tmp_path)), "--output", str(tmp_path / "a")])
    evaluate.main(["--outputs", str(tmp_path / "a" / "outputs.jsonl"), "--output", str(tmp_path / "b")])
    a, b = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    for known_difference in ("output", "seconds"):
        a.pop(known_difference), b.pop(known_difference)
    assert a == b
    with pytest.raises(UserError, match="is what this command would write"):
        evaluate.main(["--outputs", str(tmp_path / "a" / "outputs.jsonl"), "--output", str(tmp_path / "a")])


def test_answers_without_demand_or_finish_are_measured_as_far_as_it_goes(tmp_path, capsys):
    path = write_lines(tmp_path / "x.jsonl", [{"query": "Tell me of the sea.", "response": prose(n)} for n in (10, 30)])
    evaluate.main(["--outputs", str(path), "--output", str(tmp_path / "out")])
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
    evaluate.main(["--outputs", str(path), "--output", str(tmp_path / "known")])
    assert json.loads(capsys.readouterr().out)["perplexity"] == 3


GOOD = {"query": "Write 100 words about tea.", "response": "Tea."}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([GOOD, {"query": "Write a page."}], "line 2: no field 'response'"),
        ([GOOD, {"response": "Tea."}], "line 2: no field 'query'"),
        ([{**GOOD, "response": None}], "line 1: a NoneType in the field 'response'"),
        ([{**GOOD, "response": ["Tea."]}], "line 1: a list in the field 'response'"),
        ([{**GOOD, "query": 7}], "line 1: a int in the field 'query'"),
        ([{**GOOD, "finish": 1}], "line 1: a int in the field 'finish'"),
        ([{**GOOD, "query": "Écrivez une page sur le thé et la mer dans une ville."}], "line 1: no language given"),
        ([{**GOOD, "language": "fr"}], "line 1: language 'fr'"),
        ([GOOD, {**GOOD, "constraint": "quite long"}], "line 2: cannot read the constraint 'quite long'"),
        ([{**GOOD, "constraint": "less than 9 words", "type": "above"}], "line 1: type 'above', but the constraint"),
        ([GOOD, '{"query": "torn'], "line 2: line contains invalid json"),
        ([], "holds no record"),
    ],
)
def test_bad_files_of_answers(tmp_path, rows, message):
    path = write_lines(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match="bad.jsonl") as caught:
        evaluate.main(["--outputs", str(path), "--output", str(tmp_path / "out")])
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
        ([ROWS[2]], "has no row in --language en"),
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
        evaluate.read_rows(evaluate.find_benchmark(name))


def test_a_hub_data_set_offline_is_one_line_and_a_hint():
    """conftest.py sets HF_HUB_OFFLINE: nothing is asked of the network."""
    with pytest.raises(UserError) as caught:
        evaluate.find_benchmark("nobody/no-such-data-set")
    assert caught.value.message.startswith("nobody/no-such-data-set is no file") and "\n" not in caught.value.message
    assert "--benchmark mini" in caught.value.hint


def test_a_hub_data_set_is_its_one_jsonl_file(tmp_path, monkeypatch):
    import huggingface_hub

    write_lines(tmp_path / "LonGen.jsonl", ROWS)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert evaluate.find_benchmark("some/benchmark") == tmp_path / "LonGen.jsonl"
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
    rows = evaluate.read_rows(evaluate.find_benchmark("mini"))
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
    from transformers import AutoModelForCausalLM

    from lengthen.sampler import Sampler

    pairs, own = [], Sampler.logprobs
    monkeypatch.setattr(Sampler, "logprobs", lambda self, asked: pairs.extend(asked) or own(self, asked))
    evaluate.main(flags(writer, bench, tmp_path / "out"))
    records = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").read_text().splitlines()]
    assert len(records) == len(pairs)
    model = AutoModelForCausalLM.from_pretrained(writer).eval()
    for record, (prompt, answer_ids) in zip(records, pairs, strict=True):
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
    from lengthen.sampler import Sampler

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


def test_a_finished_run_loads_no_model(run, writer, bench, monkeypatch, capsys):
    import lengthen.model

    def refuse(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(lengthen.model, "load_model", refuse)
    before, scores = (run / "outputs.jsonl").read_text(), json.loads((run / "scores.json").read_text())
    (run / "scores.json").unlink()
    evaluate.main(flags(writer, bench, run, "--samples", "2"))
    assert (run / "outputs.jsonl").read_text() == before and json.loads((run / "scores.json").read_text()) == scores
    output = capsys.readouterr()
    assert json.loads(output.out)["answers"] == 6
    assert "3 rows in en, 1 in the other language skipped" in output.err
    with pytest.raises(UserError, match="samples = 2, this command says 3"):
        evaluate.main(flags(writer, bench, run, "--samples", "3"))


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
        (["--outputs", "x.jsonl", "--benchmark", "mini", "--output", "x"], "not allowed with"),
        (["--model", "m", "--output", "x", "--samples", "0"], "0 is below 1"),
        (["--model", "m", "--output", "x", "--bench", "mini"], "unrecognized arguments"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(argv)


# ---------------------------------------------------------------------------------------------------------
# For people


def test_compare_puts_runs_side_by_side(tmp_path, capsys):
    for name, words in (("base", 100), ("final", 150)):
        rows = [{**ROWS[0], "finish": "eos", "response": prose(words, i)} for i in range(3)]
        path = write_lines(tmp_path / f"{name}.jsonl", rows)
        evaluate.main(["--outputs", str(path), "--output", str(tmp_path / name)])
    capsys.readouterr()
    evaluate.main(["--compare", str(tmp_path / "base"), str(tmp_path / "final")])
    output = capsys.readouterr()
    assert "150  x1.50" in output.err and "not like for like" not in output.err
    runs = json.loads(output.out)["runs"]
    assert [r["words_median"] for r in runs.values()] == [100, 150]
    assert [r["length_score"] for r in runs.values()] == [100, pytest.approx(50)]
    # Other queries are said to be others.
    evaluate.main(["--outputs", str(ready_made(tmp_path)), "--output", str(tmp_path / "other")])
    evaluate.main(["--compare", str(tmp_path / "base"), str(tmp_path / "other")])
    assert "not like for like" in capsys.readouterr().err
    with pytest.raises(UserError, match="scores.json does not exist"):
        evaluate.main(["--compare", str(tmp_path)])


def test_the_figure_shows_every_answer_and_clips_none_away(monkeypatch):
    """Every answer is a point inside the axes of its type's panel, an empty one and an endless one too."""
    from matplotlib import pyplot

    from lengthen.figures import length_following

    outputs = [answer(w, d) for d in ("around 500 words", "200-300 words") for w in (0, 200, 450, 90000)]
    outputs += [answer(90, "小于三千字", language="zh", finish="length")]
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)  # the figure stays to be looked at
    image = length_following(outputs, evaluate.score(outputs), "test")
    assert image.startswith(b"\x89PNG")
    panels = {panel.get_title(loc="left").strip(): panel for panel in drawn[0].axes}
    assert list(panels) == ["about", "range", "above", "below"]
    for type_, count in (("about", 4), ("range", 4), ("above", 0), ("below", 1)):
        points = [xy for dots in panels[type_].collections for xy in dots.get_offsets() if len(dots.get_offsets())]
        inside = [xy for xy in points if numpy.isfinite(xy).all() and panels[type_].viewLim.contains(*xy)]
        assert len(inside) == count
    monkeypatch.undo()
    pyplot.close(drawn[0])
