"""Run: pytest tests/test_prompts.py

What the files in prompts/ must hold so that the stages work, and that they are of the quality a reader expects.
"""

import json
import re
from collections import Counter
from string import Formatter

import pytest

from lengthen.models import chat
from lengthen.text import selection
from lengthen.text.demands import TYPES, length_score, parse_demand, stated_demands, states_demand
from lengthen.text.filters import has_chatter
from lengthen.text.languages import PROMPTS, codes
from lengthen.text.languages import language as read_language
from lengthen.text.selection import NearDuplicates
from lengthen.text.words import count_words, detect_language

FIELDS = {
    "instruct": set(),
    "instruct_prefill": {"example_1", "example_2"},
    "judge": {"instruction", "words"},
    "extend": {"instruction", "draft"},
    "constrain": {"instruction", "constraint"},
    "quality": {"query", "answer", "mark"},
    "compare": {"query", "first", "second", "mark"},
}
LANGUAGES = codes()


def raw(name: str, language: str) -> str:
    return (PROMPTS / language / f"{name}.md").read_text("utf-8")


def rows(name: str, *languages: str) -> list[dict]:
    """The lines of a file of those languages, of all without."""
    files = [PROMPTS / language / name for language in languages or LANGUAGES]
    return [json.loads(line) for file in files if file.exists() for line in file.read_text("utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Templates


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", FIELDS)
def test_templates_have_their_fields_language_and_one_final_newline(name, language):
    text = raw(name, language)
    assert {field for _, field, _, _ in Formatter().parse(text) if field is not None} == FIELDS[name]
    assert chat.FIELDS[name] == FIELDS[name]
    assert re.search(r"\S\n\Z", text) and "\r" not in text and "\t" not in text
    if name != "instruct_prefill":
        assert detect_language(re.sub(r"\{\w+\}", "", text)) == language
    assert count_words(text) < (
        250 if read_language(language).blanks else 400
    )  # a model of 135M parameters has to follow it


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_prefill_stops_right_behind_the_third_number(language):
    filled = chat.fill("instruct_prefill", language, example_1="AAA", example_2="BBB")
    mark = filled.splitlines()[-1]
    assert re.fullmatch(r"\w+ ?3 ?[:：]", mark) and filled.index("AAA") < filled.index("BBB") < filled.index(mark)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_extender_is_told_what_the_method_asks(language):
    """Method section 3: an outline, enriched and detailed, new sub-sections, no going past its end, no repetition."""
    text = raw("extend", language).lower()
    needed = {
        "en": [
            "outline",
            "enrich",
            "detail",
            "sub-section",
            "do not go on past",
            "never repeat",
            "without any comment",
        ],
        "zh": ["提纲", "充实", "详细", "小节", "不要续写", "不要重复", "不要任何评论"],
        "de": [
            "gliederung",
            "reichere",
            "ausführlicher",
            "unterabschnitt",
            "nicht über ihr ende",
            "wiederhole dich nicht",
        ]
        + ["ohne jeden kommentar"],
        "es": [
            "esquema",
            "enriquece",
            "detallado",
            "apartados",
            "no vayas más allá",
            "no te repitas",
            "sin ningún comentario",
        ],
        "fr": ["plan", "enrichis", "détaillé", "sous-parties", "ne va pas au-delà", "ne te répète pas"]
        + ["sans aucun commentaire"],
        "ja": ["構成案", "充実", "詳しい", "小見出し", "その先には進まない", "繰り返さず", "コメントは一切付けず"],
    }[language]
    assert [phrase for phrase in needed if phrase not in text] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_judge_asks_for_yes_or_no_last(language):
    last = raw("judge", language).rstrip("\n").split("\n")[-1]
    assert "{words}" in last
    own = read_language(language)
    assert re.search(rf"{own.yes}\W+\w*\W*{own.no}\W", last)


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_with_braces_go_in_as_they_are(language):
    instruction = "Print {draft} and {{0}} and {} with str.format"
    filled = chat.fill("extend", language, instruction=instruction, draft="{instruction}")
    assert instruction in filled and "{instruction}" in filled


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


@pytest.mark.parametrize("language", LANGUAGES)
def test_seeds_are_enough_of_each_of_seven_kinds_and_in_their_language(language):
    seeds = rows("seeds.jsonl", language)
    assert len(seeds) >= 14 and all(set(seed) == {"language", "kind", "prompt"} for seed in seeds)
    kinds = Counter(seed["kind"] for seed in seeds)
    assert len(kinds) == 7 and min(kinds.values()) >= 2
    assert len({seed["kind"] for seed in seeds[:7]}) == 7  # the first seven show them all
    for seed in seeds:
        assert seed["language"] == language == detect_language(seed["prompt"])
        assert 3 < count_words(seed["prompt"]) < 500  # the window that self-instruct applies to new ones
        assert seed["prompt"] == seed["prompt"].strip() and "\n" not in seed["prompt"]
        assert seed["prompt"].endswith(tuple(".?。？")) and not has_chatter(seed["prompt"], language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_seeds_state_no_length(language):
    for seed in rows("seeds.jsonl", language):
        assert stated_demands(seed["prompt"], language) == []
        assert not re.search(
            r"\d|\bwords?\b|\bpages?\b|\bchapters?\b|字数|篇幅|字以|页|\b(?:Wörter|Seiten|palabras|páginas|mots|pages)\b",
            seed["prompt"],
        ), seed["prompt"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_seeds_and_queries_differ_from_each_other(language, monkeypatch):
    """The benchmark must not be what the models are trained on."""
    monkeypatch.setattr(selection, "SIMILAR", 0.25)
    distinct = NearDuplicates()
    for seed in rows("seeds.jsonl", language):
        assert distinct.add(seed["prompt"], language), seed["prompt"]
    for name, field in (("bench_mini", "query"), ("heldout", "prompt"), ("bench_more", "query")):
        for row in rows(f"{name}.jsonl"):
            if row["language"] == language:
                assert distinct.add(row[field], language), row[field]


def test_held_out_instructions_are_of_the_kinds_of_the_seeds_and_of_others_in_turn():
    held_out, kinds = rows("heldout.jsonl", "en"), {seed["kind"] for seed in rows("seeds.jsonl", "en")}
    assert [row["kind"] in kinds for row in held_out] == [True, False] * 36
    for row in held_out:
        assert set(row) == {"language", "kind", "prompt"} and detect_language(row["prompt"]) == row["language"] == "en"
        assert stated_demands(row["prompt"], "en") == [] and not has_chatter(row["prompt"], "en")


# ---------------------------------------------------------------------------------------------------------------------
# Mini benchmark

FIRST = rows("bench_mini.jsonl", "en")[:8]  # the demo's evaluation


def demand(row: dict) -> tuple[str, int, int]:
    return parse_demand(row["constraint"], row["language"])


def test_every_query_is_readable_and_states_exactly_its_demand():
    for row in rows("bench_mini.jsonl") + rows("bench_more.jsonl", "en"):
        assert list(row) == ["language", "range", "type", "constraint", "query"]
        assert demand(row)[0] == row["type"]
        assert states_demand(row["query"], *demand(row), row["language"]), row["query"]
        assert detect_language(row["query"]) == row["language"]
        assert all(200 <= number <= 1500 for number in demand(row)[1:] if number != -1)


def test_the_mini_benchmark_is_balanced():
    bench = rows("bench_mini.jsonl")
    languages = Counter(row["language"] for row in bench)
    assert languages["en"] >= 14 and min(languages.values()) >= 12
    for language in LANGUAGES:
        types = Counter(row["type"] for row in bench if row["language"] == language)
        assert set(types) == set(TYPES) and len(set(types.values())) == 1
        assert len({row["range"] for row in bench if row["language"] == language}) == 3
    cells = Counter((row["type"], row["range"]) for row in rows("bench_more.jsonl", "en"))
    assert len(cells) == 12 and set(cells.values()) == {4}
    numerals = [row for row in bench if row["language"] == "zh" and not re.search(r"\d", row["constraint"])]
    assert len(numerals) >= 4


def test_the_first_eight_english_queries_cover_types_and_lengths():
    assert Counter(row["type"] for row in FIRST) == dict.fromkeys(TYPES, 2)
    asked = sorted(max(demand(row)[1:]) for row in FIRST)
    assert asked[0] <= 300 and asked[-1] >= 1200 and len(set(asked)) >= 7


def test_no_constant_length_does_well_on_the_mini_benchmark():
    """A writer that ignores the prompt must stay clearly below one that follows it, or the score says nothing."""
    demands = [demand(row) for row in FIRST]
    best = max(sum(length_score(words, *x) for x in demands) / 8 for words in range(100, 2000, 10))
    assert best < 0.65, best


def test_the_readme_names_every_file_and_kind():
    readme = (PROMPTS / "README.md").read_text("utf-8")
    for path in PROMPTS.glob("*/*"):
        assert f"`{path.name}`" in readme, path
    for kind in {seed["kind"] for language in LANGUAGES for seed in rows("seeds.jsonl", language)}:
        assert f"`{kind}`" in readme
    for fields in FIELDS.values():
        assert all(f"`{field}`" in readme for field in fields)


# ---------------------------------------------------------------------------------------------------------------------
# Short tasks


def test_short_tasks_are_short_and_of_every_language():
    tasks = rows("short_tasks.jsonl")
    assert {task["language"] for task in tasks} == set(LANGUAGES) and min(
        Counter(task["language"] for task in tasks).values()
    ) >= 12
    assert all(set(task) == {"language", "prompt", "answer"} for task in tasks)
    assert all(1 <= count_words(task["answer"]) <= 40 for task in tasks)
    assert len({task["prompt"] for task in tasks}) == len(tasks)


def test_short_tasks_are_held_out():
    """None is a seed or a query of the benchmark, nor like one."""
    known = NearDuplicates()
    for name, field in (("seeds.jsonl", "prompt"), ("bench_mini.jsonl", "query")):
        for row in rows(name):
            known.add(row[field], row["language"])
    assert all(known.add(task["prompt"], task["language"]) for task in rows("short_tasks.jsonl"))
