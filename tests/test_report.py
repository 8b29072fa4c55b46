"""report.html: what it says, what it survives, and how it behaves in a browser.   python -m pytest tests/test_report.py

The tests of the page itself need Chromium (apt-get install chromium) and are skipped without it.
"""

import base64
import itertools
import json
import random
import re
import shutil
import sys
import unicodedata
import zlib
from pathlib import Path

import cold
import numpy
import pytest
from browser import CHROMIUM, Browser, Page

import evaluate
from lengthen import cli
from lengthen.evaluation.report import charts
from lengthen.evaluation.report import page as report
from lengthen.evaluation.report import texts as texts_of
from lengthen.evaluation.report.models import CHARTED
from lengthen.evaluation.report.verdict import verdict
from lengthen.jobs import Job
from lengthen.records import UserError, new_record, record_id

ROOT = Path(__file__).parent.parent
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
NAMES = "heron barley lantern granite velvet thimble orchard kettle marble saddle".split()
VOCABULARY = [a + b for a in NAMES for b in NAMES]


def prose(num_words: int, seed: object) -> str:
    """Random words, a paragraph break after every 60."""
    words = random.Random(str(seed)).choices(VOCABULARY, k=num_words)
    return "\n\n".join(" ".join(words[i : i + 60]) for i in range(0, num_words, 60)) + "."


# ---------------------------------------------------------------------------------------------------------
# A run, with the files that the stages write


def make_run(run: Path, iterations: int = 2, drafts: int = 24, queries: int = 12, controls: tuple = ("drafts",)):
    """A whole run: every file of docs/files.md, but for the weights."""
    made = random.Random(1)
    for k in range(1, iterations + 1):
        make_iteration(run / f"iter_{k}", made, drafts, 300 * 1.6 ** (k - 1))
    write_stage("constrain", run / "final/constrained.jsonl", [demand_record(i) for i in range(8)], {})
    make_training(run / "final/generator", 60, 1.6)
    models = {"base": 300, **{f"iter_{k}": 300 * 1.5**k for k in range(1, iterations + 1)}}
    models |= {"final": 300 * 1.4**iterations, **{f"control_{name}": 330 for name in controls}}
    for name, words in models.items():
        make_evaluation(run / "eval" / name, queries, words, 0.9 if name == "final" else 0.2)
    for name in controls:
        make_training(run / "controls" / name / "generator", 40, 1.8)
    settings = {"model": "smollm2", "iterations": iterations, "seed": 0, "seeds": ["prompts/en/seeds.jsonl"]}
    (run / "summary.json").write_text(json.dumps({"settings": settings, "controls_without_pairs": ["one-stage"]}))
    return run


def write_stage(stage: str, path: Path, accepted: list, rejected: dict, finish: bool = True, **stats: object) -> None:
    """Through Job, as the stages do: sidecar, rejected file and all."""
    settings, info = {"samples": 2, "min_gain": 1.2, "seed": 0}, {"model": "smollm2", "device": "cpu"}
    with Job(stage, path, settings=settings, info=info, min_yield=0) as job:
        for record in accepted:
            job.accept(record)
        for reason, records in rejected.items():
            job.count(reason, len(records))
            for record in records:
                job.reject(record, reason)
        job.seconds_before = 60.0 * (1 + len(path.stem) % 5)
        if finish:
            job.finish(tokens=120 * (len(accepted) + 1), **stats)


def extended_record(key: object, draft_words: int, rounds: list[int], **fields: object) -> dict:
    initial = prose(draft_words, ("draft", key))
    words = rounds[-1] if rounds else draft_words
    known = {"id": record_id("extended", str(key), 0), "language": "en", "prompt": f"Write of {prose(8, key)}"}
    known |= {"initial": initial, "initial_words": draft_words, "rounds": len(rounds), "round_words": rounds}
    known |= {"response": prose(words, ("long", key)) if rounds else initial, "response_words": words}
    return new_record("extended", **(known | {"gain": words / draft_words, "finish": "eos" if rounds else ""} | fields))


def draft_record(key: object, words: int, **fields: object) -> dict:
    known = {"id": record_id("responses", str(key), 0), "language": "en", "prompt": f"Write of {prose(8, key)}"}
    known |= {"response": prose(words, ("draft", key)), "response_words": words, "finish": "eos"}
    return new_record("response", **(known | fields))


def demand_record(key: int) -> dict:
    known = {"id": record_id("constrain", str(key), 0), "language": "en", "prompt": f"Write about {prose(5, key)}"}
    known |= {"query": f"Write around 500 words about {prose(5, key)}", "constraint": "around 500 words"}
    return new_record("constrained", **known, response=prose(500, key), response_words=500, origin="extended")


def make_iteration(folder: Path, made: random.Random, drafts: int, words: float) -> None:
    keys = [f"{folder.name}/{i}" for i in range(drafts)]
    lengths = {key: max(20, int(made.lognormvariate(0, 0.3) * words)) for key in keys}
    asked = {k: {"id": record_id("instructions", k, 0), "prompt": f"Write of {prose(8, k)}"} for k in keys}
    ask = [new_record("instruction", **asked[k], prompt_words=10) for k in keys]
    write_stage("instructions", folder / "instructions.jsonl", ask, {"judge": ask[:3]})
    good, cut, biased = keys[: drafts // 2], keys[drafts // 2 : -4], keys[-4:]
    refused = {"unfinished": [draft_record(k, 400, finish="length") for k in cut]}
    refused["length-bias"] = [draft_record(k, 90) for k in biased]
    write_stage("responses", folder / "responses.jsonl", [draft_record(k, lengths[k]) for k in good], refused)
    kept, failed = [], {"not-longer": [], "gain": [], "length-bias": []}
    for number, key in enumerate(k + s for k in good for s in ("a", "b")):
        draft = lengths[key[:-1]]
        rounds = [int(draft * made.uniform(1.1, 1.5)), int(draft * made.uniform(1.5, 2.4))]
        if number % 3 == 0:
            kept.append(extended_record(key, draft, rounds))
        elif number % 3 == 1:
            failed["not-longer" if number % 2 else "gain"].append(extended_record(key, draft, []))
        elif number % 6 == 2:
            failed["length-bias"].append(extended_record(key, draft, rounds[:1]))
    write_stage("extend", folder / "extended.jsonl", kept, failed, jobs=2 * len(good))
    for role, start in (("generator", 1.9), ("extender", 1.5)):
        make_training(folder / role, 4 * len(kept), start)


def make_training(folder: Path, steps: int, start: float) -> None:
    folder.mkdir(parents=True)
    noise = random.Random(folder.name)
    losses = [start * 0.8 ** (3 * i / steps) + noise.gauss(0, 0.06) for i in range(steps)]
    rows = [{"step": i + 1, "epoch": 4 * i // steps, "loss": x, "skipped": False} for i, x in enumerate(losses)]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = {"stage": "train", "status": "done", "seconds": 7.5 * steps, "settings": {"rank": 8}}
    meta |= {"summary": {"tokens": 600 * steps}, "versions": {"torch": "2.13.0"}}
    (folder / "meta.json").write_text(json.dumps(meta))


def make_evaluation(folder: Path, queries: int, words: float, follows: float) -> None:
    """Answers and their scores by evaluate.py itself; what only a judge or a model can measure is set by hand."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(queries):
        wanted = 50 * round((250, 400, 600, 900, 1200)[i % 5] / 50)
        for sample in range(2):
            noise = random.Random(f"{folder.name}{i}{sample}")
            length = max(5, int((wanted**follows * words ** (1 - follows)) * noise.lognormvariate(0, 0.25)))
            query, ended = f"Write around {wanted} words about {prose(4, i)}", noise.random() < 0.85
            row = {"id": f"{folder.name}-{i}-{sample}", "sample": sample, "language": "en", "query": query}
            row |= {"constraint": f"around {wanted} words", "finish": "eos" if ended else "length"}
            rows.append(row | {"response": prose(length, (folder.name, i, sample))})
    source = folder.parent / f"{folder.name}.answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "save_figure", lambda *_: None)  # the PNG takes a second, and is no matter here
        evaluate.main(["score", str(source), "--output", str(folder)])
    source.unlink()
    path = folder / "scores.json"
    scores = json.loads(path.read_text())
    spread = {k: [scores[k] * 0.93, scores[k] * 1.08] for k in CHARTED if scores[k] is not None}
    scores["intervals"] = {**spread, **(scores.get("intervals") or {})}
    scores |= {"loop_by_tenth": [0.01 * i * follows for i in range(10)], "longbench_score": 61.0, "compression": 2.2}
    scores |= {"base_perplexity_by_position": [[0, 128, 9.1], [128, 256, 7.7 + follows], [256, 512, 6.9]]}
    marks = {"relevance": 6.5, "clarity": 7.1, "mean": 6.8, "interval": [6.2, 7.3], "judged": 24, "failed": 0}
    scores |= {"quality": {"judge/one": marks}}
    path.write_text(json.dumps(scores))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "study")


def embedded(path: Path) -> tuple[dict, list[str]]:
    """What a page holds: (data, all texts), unpacked by other means than the page's."""
    page = path.read_text("utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    blocks = re.search(r'<script type="text/plain" id="texts">(.*?)</script>', page, re.DOTALL)[1].split()
    return data, [text for block in blocks for text in json.loads(zlib.decompress(base64.b64decode(block)))]


# ---------------------------------------------------------------------------------------------------------
# Text that acts is spelled out


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a \x1b[31mred\x1b[0m", "a ␛[31mred␛[0m"),
        ("left \u202e tfel", "left ⟨U+202E⟩ tfel"),
        ("a\r\nb\tc\rd\x7f\x9b", "a\nb\tc␍d␡⟨U+009B⟩"),
        ("\ud83d half", "⟨U+D83D⟩ half"),
        (
            "👩\u200d🚀 مرحبا 中文 naïve",
            "👩\u200d🚀 مرحبا 中文 naïve",
        ),  # joiners and scripts that run to the left are text
    ],
)
def test_characters_that_act_are_spelled_out(text, shown):
    assert texts_of.visible(text) == shown


def test_no_character_that_acts_is_left():
    """Against Unicode's own tables: no control, no half character, no line separator, nothing that turns direction."""
    turning = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    left = set(texts_of.visible("".join(map(chr, range(sys.maxunicode + 1))))) - set("\n\t")
    assert not {c for c in left if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"}}
    assert not {c for c in left if unicodedata.bidirectional(c) in turning} | left & set("\u061c\u200e\u200f")


HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> {{texts}} "
HOSTILE += "\x1b[31m \u202e <!--"


def spoil(value: object) -> object:
    """The same JSON with HOSTILE in front of every string that is shown (what is looked up stays)."""
    if isinstance(value, dict):
        fixed = ("id", "parent_id", "status", "type", "stage")
        return {k: v if k in fixed or v in ("eos", "length-bias") else spoil(v) for k, v in value.items()}
    if isinstance(value, list):
        return [spoil(v) for v in value]
    return HOSTILE + value if isinstance(value, str) else value


@pytest.fixture(scope="module")
def hostile(run, tmp_path_factory) -> Path:
    copy = Path(shutil.copytree(run, tmp_path_factory.mktemp("hostile") / "<b>bold & \x1b"))
    (copy / "eval/control_drafts").rename(copy / "eval/<script>hacked=1<")
    for path in copy.rglob("*.json*"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        path.write_text("".join(json.dumps(spoil(json.loads(line))) + "\n" for line in lines))
    return report.write_report(copy)


def test_no_text_can_leave_its_place(hostile):
    page = hostile.read_text("utf-8")
    assert page.lower().count("<script") == 3 and page.count("</script>") == 3
    assert "onerror" in page and "<img" not in page
    assert "\x1b" not in page and "\u202e" not in page and "⟨U+202E⟩" in page and "␛" in page
    assert "<title>&lt;b>bold &amp; ␛: a run" in page
    data, texts = embedded(hostile)
    assert any(text.startswith(HOSTILE.split(" \x1b")[0]) for text in texts)


# ---------------------------------------------------------------------------------------------------------
# What it says


def scored(kind: str, words: float | None, queries: int = 0, shift: int = 0, **more: object) -> dict:
    """A model as read_models gives it: `queries` queries with an answer each, their median `words`, and one cut short.

    Lengths differ from query to query by up to 80 %, and in the same way for every model.
    """
    known = {"words_median": words, "rows": 60, "eos_share": 0.8, "loop_rate": 0.0}
    names = {"iteration": "iteration 1", "control": "control drafts"}
    lengths = [words * (0.2 + 1.6 * i / max(1, queries - 1)) + i % 3 for i in range(queries)]
    answers = [{"query": f"q{i + shift}", "words": n, "ended": True} for i, n in enumerate(lengths)]
    answers += [{"query": f"q{shift}", "words": 9000, "ended": False}] if queries else []
    return {"kind": kind, "name": names.get(kind, kind), "scores": {**known, **more}, "answers": answers}


BASE, FINAL = scored("base", 300), scored("final", 450)
SURE, LONGER = scored("base", 300, 41), scored("final", 450, 41)


@pytest.mark.parametrize(
    "models, shows, limits",
    [
        ([], "No model of this run has been evaluated so far.", "Growth"),
        ([BASE], "The base model alone has been evaluated", "Growth"),
        ([BASE, FINAL], "1.50 times the base model's 300", "nobody judged it"),
        ([BASE, FINAL], "no evidence of growth", "no control was evaluated"),
        ([SURE, LONGER], "(paired by query), leaves out 1: on these queries its answers are longer", ""),
        ([SURE, scored("final", 200, 41)], "leaves out 1: on these queries its answers are shorter", ""),
        ([SURE, scored("final", 330, 41, shift=90)], "(not paired: other queries), holds 1: this does not show", ""),
        ([BASE, scored("final", 450, rows=8)], "", "8 queries are too few"),
        ([scored("base", None), FINAL], "The base model has no median length", ""),
        (
            [BASE, scored("final", 450, eos_share=0.7)],
            "But it ends by itself in 70\u00a0% of the answers (base: 80\u00a0%)",
            "",
        ),
        (
            [BASE, scored("final", 450, loop_rate=0.04)],
            " It ends by itself in 80\u00a0% of the answers (base: 80\u00a0%)",
            "",
        ),
        ([BASE, scored("iteration", 330), FINAL], "before the fine-tune on length demands, it was 1.10", ""),
        ([BASE, scored("iteration", 450)], "Iteration 1 writes 450 words", ""),
        ([SURE, LONGER, scored("control", 450, 41)], "", "450 words in the median: the method is not set"),
        ([SURE, LONGER, scored("control", 340, 41)], "340 words in the median; the method's is 1.3", ""),
        ([SURE, LONGER, scored("control", 340)], "", "340 words in the median: the method is not set apart"),
        ([scored("base", 300, queries_hash="a"), scored("final", 450, queries_hash="b")], "", "different queries"),
    ],
)
def test_the_verdict_says_no_more_than_the_numbers(models, shows, limits):
    told = verdict(models)
    assert shows in " " + " ".join(told["shows"]) and limits in " ".join(told["not"])


def test_the_page_holds_what_the_files_say(run):
    data, texts = embedded(report.write_report(run))
    records = [json.loads(line) for line in (run / "iter_2/extended.jsonl").open()]
    rejected = [json.loads(line) for line in (run / "iter_2/extended.rejected.jsonl").open()]
    funnel = next(f for f in data["extender"][1]["funnels"] if f["name"] == "Extensions")
    biased = sum(r["reason"] == "length-bias" for r in rejected)
    assert (funnel["kept"], funnel["biased"], funnel["total"]) == (len(records), biased, len(records) + len(rejected))
    assert sum(funnel["reasons"].values()) == len(rejected) - biased
    gains = sorted(r["gain"] for r in records + [r for r in rejected if r["reason"] == "length-bias"])
    assert data["extender"][1]["gain_median"] == pytest.approx((gains[len(gains) // 2] + gains[~(len(gains) // 2)]) / 2)

    assert [m["name"] for m in data["models"]] == ["base", "iteration 1", "iteration 2", "final", "control drafts"]
    scores = json.loads((run / "eval/final/scores.json").read_text())
    assert data["models"][3]["scores"] == {key: scores[key] for key in CHARTED}
    answers = [json.loads(line) for line in (run / "eval/final/outputs.jsonl").open()]
    row = data["lengths"]["rows"][3]
    assert sum(row["solid"]) == sum(a["finish"] == "eos" for a in answers) == row["num_solid"]
    assert sum(row["hollow"]) == sum(a["finish"] == "length" for a in answers)
    assert row["median"] == scores["words_median"]
    assert sorted(p[1] for p in data["models"][3]["points"]) == sorted(a["longen_words"] for a in answers)

    everything = set(texts)
    assert {row[field] for row in records for field in ("prompt", "initial", "response")} <= everything
    assert {row[field] for row in answers for field in ("query", "response")} <= everything
    assert len(texts) == len(everything)  # each once
    kept = data["samples"]["outcomes"].index("kept")
    place = [data["samples"]["parts"].index("iteration 2"), data["samples"]["kinds"].index("extension"), kept]
    numbers = [row[7] for row in data["samples"]["rows"] if row[:3] == place]
    assert sorted([texts[n] for n in row] for row in numbers) == sorted(
        [r["prompt"], r["initial"], r["response"]] for r in records
    )
    iteration = data["cost"]["pairs"][0]
    parts = [json.loads((run / f"iter_1/{s}.meta.json").read_text()) for s in ("instructions", "responses", "extended")]
    assert iteration["per_hour"] == pytest.approx(3600 * parts[2]["accepted"] / sum(p["seconds"] for p in parts))
    assert data["losses"][-1]["part"] == "control drafts" and "one-stage" in data["verdict"]["not"][-1]
    assert not data["progress"] and not data["notes"]
    pairs = [len((run / f"iter_{k}/extended.jsonl").read_text().splitlines()) for k in (1, 1, 2, 2)]
    assert [loss["steps"] for loss in data["losses"]] == [*(4 * n for n in pairs), 60, 40]


def test_bins_count_every_value_once():
    values = [random.Random(3).lognormvariate(6, 1) for _ in range(500)] + [0, 1]
    found = charts.bins([{"solid": values, "hollow": [7.0]}, {"solid": [], "hollow": values}])
    assert [[sum(r["solid"]), sum(r["hollow"])] for r in found["rows"]] == [[502, 1], [0, 502]]
    assert found["pinned"] == sum(v < found["low"] for v in values * 2 + [7.0]) > 0
    assert charts.bins([{"solid": [5.0], "hollow": []}])["rows"][0]["num_solid"] == 1
    assert charts.bins([{"solid": [], "hollow": []}]) is None


def test_long_loss_curves_are_thinned_to_means():
    entries = [{"step": i, "epoch": i // 1000, "loss": float(i)} for i in range(4000)]
    curve = charts.loss_curve([*entries, {"step": 4000, "loss": float("nan")}])
    assert len(curve["points"]) == 200 and curve["points"][0] == [9.5, 9.5] and curve["steps"] == 4000
    assert curve["epochs"] == [[k * 1000, k * 1000 + 999, k * 1000 + 499.5] for k in range(4)]


# ---------------------------------------------------------------------------------------------------------
# What it survives


def damage(run: Path, seed: int) -> None:
    """A few files of a run cut short, deleted, or with values of another type."""
    chance = random.Random(seed)
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        kind = chance.choice(["keep", "keep", "cut", "delete", "values", "binary"])
        if kind == "delete":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size + 1)])
        elif kind == "binary":
            path.write_bytes(path.read_bytes()[:200] + chance.randbytes(50) + b"\n{}\n[]\n" + b"[" * 100_000)
        elif kind == "values" and path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            path.write_text("".join(json.dumps(scramble(json.loads(line), chance)) + "\n" for line in lines))


def scramble(value: object, chance: random.Random) -> object:
    """Some values of a JSON document replaced by what should not be there."""
    if chance.random() < 0.12:
        odd = [None, True, -1, 0, 1e308, 10**400, float("nan"), "", "x", [], [None], {}, {"a": []}, "\ud800"]
        return chance.choice(odd)
    if isinstance(value, dict):
        return {k: scramble(v, chance) for k, v in value.items()}
    return [scramble(v, chance) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> list[Path]:
    """Reports of runs in every state of disrepair."""
    folder, pages = tmp_path_factory.mktemp("damaged"), []
    small = make_run(folder / "whole", iterations=1, drafts=8, queries=5)
    for seed in range(24):
        copy = Path(shutil.copytree(small, folder / f"run_{seed}"))
        damage(copy, seed)
        pages.append(report.write_report(copy))
    return pages


def test_damaged_runs_are_reported_as_far_as_they_can_be_read(damaged):
    for page in damaged:
        data, texts = embedded(page)
        assert data["notes"] and len(texts) == len(set(texts))
        assert all(-1 <= n < len(texts) for row in data["samples"]["rows"] for n in row[7])


def test_a_run_in_progress_says_so(tmp_path):
    run = tmp_path / "young"
    write_stage(
        "responses", run / "iter_1/responses.jsonl", [draft_record(0, 90), draft_record(1, 80)], {}, finish=False
    )
    with (run / "iter_1/responses.jsonl").open("a") as handle:
        handle.write('{"id": "torn')
    data, texts = embedded(report.write_report(run))
    assert data["progress"] == ["iter_1, responses: not finished, 2 kept so far"]
    assert data["notes"] == ["iter_1/responses.jsonl: 1 line damaged or half-written and left out"]
    assert data["models"] == [] and len(data["samples"]["rows"]) == 2 and len(texts) == 4


def test_what_is_no_run_is_refused(tmp_path):
    for folder, words in ((tmp_path / "none", "is not a folder"), (tmp_path, "holds no run")):
        with pytest.raises(UserError, match=words) as error:
            report.write_report(folder)
        assert "evaluate.py report" in error.value.hint
    assert not list(tmp_path.iterdir())


def test_texts_beyond_the_limit_become_a_seeded_subset(run, monkeypatch, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "study"))
    whole, every_text = embedded(report.write_report(copy))
    monkeypatch.setattr(texts_of, "MAX_BYTES", 60_000)
    monkeypatch.setattr(texts_of, "BLOCK_CHARS", 10_000)
    data, texts = embedded(report.write_report(copy))
    packed = re.search(r'id="texts">(.*?)</script>', (copy / "report.html").read_text(), re.DOTALL)[1]
    assert 40_000 < len(packed) < 70_000 and 0 < len(texts) < len(every_text)
    for key, rows in (("samples", "rows"), ("answers", "queries")):
        assert 0 < len(data[key][rows]) < len(whole[key][rows]) == whole[key]["total"] == data[key]["total"]
        assert data[key][rows] != whole[key][rows][: len(data[key][rows])]  # not simply the first ones
    again, _ = embedded(report.write_report(copy))
    assert again["samples"] == data["samples"] and again["answers"] == data["answers"]
    assert data["extender"] == whole["extender"] and data["lengths"] == whole["lengths"]  # the numbers are of all


def test_the_command(run):
    done = cold.run("evaluate.py", "report", run)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and str(run / "report.html") in done.stderr
    assert told == {"stage": "report", "report": str(run / "report.html"), "bytes": told["bytes"]}
    assert told["bytes"] == (run / "report.html").stat().st_size
    failed = cold.run("evaluate.py", "report", run / "nothing")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and "hint:" in failed.stderr


# ---------------------------------------------------------------------------------------------------------
# Colours

SEEN = {  # linear RGB as colour-blind people see it: Machado, Oliveira and Fernandes 2009, table 1, severity 1.0
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = numpy.array([[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07218], [0.01933, 0.11919, 0.9503]])


def linear(colour: str) -> numpy.ndarray:
    parts = numpy.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return numpy.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb: numpy.ndarray) -> numpy.ndarray:
    """CIELAB of linear RGB: a distance of 2.3 is just noticeable."""
    xyz = TO_XYZ @ numpy.clip(rgb, 0, 1) / TO_XYZ.sum(axis=1)
    f = numpy.where(xyz > 0.008856, numpy.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return numpy.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    low, high = sorted(float(TO_XYZ[1] @ linear(c)) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_are_told_apart_by_everybody(scheme):
    rules = re.findall(r":root \{(.*?)\}", report.PAGE.read_text("utf-8"), re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", rules))
    models = [name for name in colours if name in ("base", "final") or name.startswith(("iter-", "control-"))]
    assert len(models) == 11
    for sight, matrix in SEEN.items():
        seen = {name: lab(numpy.array(matrix) @ linear(colours[name])) for name in models}
        closest = min(numpy.linalg.norm(seen[a] - seen[b]) for a, b in itertools.combinations(models, 2))
        assert closest > 12, sight
    assert all(contrast(colours[name], colours["paper"]) >= 3 for name in models)
    assert all(contrast(colours[name], colours["paper"]) >= 4.5 for name in ("ink", "soft", "link"))
    assert contrast(colours["mark"], colours["mark-ink"]) >= 4.5


# ---------------------------------------------------------------------------------------------------------
# In a browser


DRAWINGS = "[...document.querySelectorAll('svg')].map((s) => s.outerHTML).join()"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def found(page: Page) -> str:
    page.wait("!document.getElementById('found').textContent.startsWith('Searching')")
    return page.run("document.getElementById('found').textContent")


def search(page: Page, needle: str) -> str:
    """Type into the search box and wait for the page that comes of it."""
    page.run("document.querySelectorAll('#samples article').forEach((a) => { a.dataset.old = 1; })")
    page.run(f"document.getElementById('search').value = {json.dumps(needle)}")
    page.run("document.getElementById('search').dispatchEvent(new Event('input'))")
    page.wait("!document.querySelector('#samples article[data-old]')")
    return found(page)


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_opens_whole(browser, run, width, dark):
    page = browser.open(report.write_report(run), width=width, dark=dark)
    assert page.complaints() == []
    assert all(url.startswith(("file:", "data:")) for url in page.requests()) and page.requests()
    sections = page.run("[...document.querySelectorAll('main > section')].map((s) => s.id)")
    names = "models lengths following endings quality extender training cost answers samples settings"
    assert sections == names.split()
    assert page.run("document.documentElement.scrollWidth") <= width
    drawn = "[...document.querySelectorAll('main figure svg')]"
    assert page.run(f"{drawn}.every((s) => s.childElementCount > 3 && s.getAttribute('aria-label'))")
    assert "NaN" not in page.run(DRAWINGS)
    assert not re.search(r"\bundefined\b|\bnull\b|\[object", page.run("document.body.innerText"))
    paper = page.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == dark
    page.close()


@needs_browser
def test_search_filters_and_pages(browser, run):
    page = browser.open(report.write_report(run))
    data, texts = embedded(run / "report.html")
    rows = data["samples"]["rows"]
    needle = texts[rows[0][7][1]].split()[3]

    def hits(word: str) -> int:
        return sum(any(n >= 0 and word.lower() in texts[n].lower() for n in row[7]) for row in rows)

    assert found(page) == f"1 to 10 of {len(rows)} texts"
    first = page.run("document.querySelector('#samples article').innerText")
    page.run("[...document.querySelectorAll('#samples button')].find((b) => b.textContent.startsWith('Next')).click()")
    page.wait("document.getElementById('found').textContent.startsWith('11')")
    assert page.run("document.querySelector('#samples article').innerText") != first
    assert search(page, needle.upper()) == f"1 to {min(10, hits(needle))} of {hits(needle)} texts"
    marked = page.run("[...document.querySelectorAll('#samples mark')].map((m) => m.textContent)")
    assert marked and set(marked) == {needle}
    assert search(page, "nobody wrote this .*") == "No text matches."
    assert page.run("document.querySelectorAll('#samples article').length") == 0
    page.run("document.getElementById('search').value = ''")
    page.run("var s = document.querySelector('select[aria-label=Outcome]')")
    page.run("s.value = [...s.options].find((o) => o.text === 'gained too little').value")
    page.run("s.dispatchEvent(new Event('change'))")
    gain = data["samples"]["outcomes"].index("gain")
    page.wait("document.querySelector('#samples article')")
    assert found(page).endswith(f"of {sum(row[2] == gain for row in rows)} texts")
    assert page.complaints() == []
    page.close()


@needs_browser
def test_the_keyboard_reaches_the_search_and_the_answers(browser, run):
    page = browser.open(report.write_report(run))
    page.press("/")
    assert page.run("document.activeElement.id") == "search"
    page.run("document.querySelectorAll('#samples article').forEach((a) => { a.dataset.old = 1; })")
    for key in "marble":
        page.press(key)
    page.wait("document.querySelector('#samples mark')?.textContent === 'marble'")
    columns = "[...document.querySelectorAll('#answers .columns .label')].map((l) => l.textContent.split(' · ')[0])"
    assert page.run(columns) == ["Base", "Base", "Final", "Final"]  # two samples each, of the same query
    asked = "document.querySelector('#answers .text').textContent"
    first = page.run(asked)
    page.run("[...document.querySelectorAll('#answers button')].find((b) => b.textContent.startsWith('Next')).focus()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    page.wait(f"{asked} !== {json.dumps(first)}")
    assert page.complaints() == []
    page.close()


@needs_browser
def test_hostile_text_is_shown_and_not_obeyed(browser, hostile):
    page = browser.open(hostile)
    assert page.run("window.hacked") is None and page.run("document.images.length") == 0
    assert page.complaints() == []  # nothing was even tried: the content security policy had nothing to stop
    shown = page.run("document.querySelector('#samples article .text').textContent")
    assert shown.startswith("</script><script>window.hacked = 1</script><img src=x") and "␛[31m ⟨U+202E⟩ <!--" in shown
    assert page.run("document.querySelector('h1').textContent") == "<b>bold & ␛"
    assert page.run("[...document.querySelectorAll('.text')].every((t) => t.dir === 'auto')")
    assert page.run("document.documentElement.scrollWidth") <= 1280
    page.close()


@needs_browser
def test_a_run_without_loops_draws_no_place_of_them(browser, run, tmp_path):
    """A line along the bottom, its axis marked 0 %, 0 % and 0 %, stood there."""
    headings = "[...document.querySelectorAll('#endings h3')].map((h) => h.textContent)"
    whole = Path(shutil.copytree(run, tmp_path / "run"))
    for path in whole.glob("eval/*/scores.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "loop_by_tenth": [0.0] * 10}))
    for folder, drawn in ((run, True), (whole, False)):
        page = browser.open(report.write_report(folder))
        assert ("Where the repetitions are" in page.run(headings)) == drawn
        assert "Answers that repeat themselves" in page.run(headings) and page.complaints() == []
        page.close()


@needs_browser
def test_damaged_runs_open_without_a_complaint(browser, damaged):
    for path in damaged[::3]:
        page = browser.open(path)
        assert page.complaints() == [], path
        assert "NaN" not in page.run(DRAWINGS), path
        page.close()


@needs_browser
def test_old_browsers_and_paper(browser, run):
    path = report.write_report(run)
    page = browser.open(path, before="delete window.DecompressionStream")
    assert "lacks DecompressionStream" in page.run("document.getElementById('samples').textContent")
    assert page.run("document.querySelectorAll('main figure svg').length") > 10 and page.complaints() == []
    page.close()
    page = browser.open(path)
    page.media("print")
    assert page.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.run("[...document.querySelectorAll('.text')].every((t) => t.scrollHeight <= t.clientHeight + 1)")
    page.close()


@needs_browser
def test_ten_thousand_samples_stay_small_and_open_at_once(browser, tmp_path):
    """15 MB is the bar, and of the texts only the blocks are unpacked that hold what is on the screen; a search needs
    them all. Texts as long as the demo's, 900 words a sample, of which not all fit."""
    folder = tmp_path / "large" / "iter_1"
    folder.mkdir(parents=True)
    chance = random.Random(5)
    lexicon = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(5000)]
    pool = " ".join(chance.choices(lexicon, k=90_000))  # compresses to a half; English to two fifths

    def cut(length: int) -> str:
        start = chance.randrange(len(pool) - length)
        return pool[start : start + length]

    with (folder / "extended.jsonl").open("w") as handle:
        for i in range(10_000):
            record = {"id": f"{i:016x}", "prompt": cut(200), "initial": cut(2000), "response": cut(4000)}
            record |= {"initial_words": 300, "response_words": 600, "rounds": 1, "round_words": [600], "gain": 2.0}
            handle.write(json.dumps(record) + "\n")
    path = report.write_report(folder.parent)
    assert path.stat().st_size <= 15_000_000
    data, _ = embedded(path)
    assert data["samples"]["total"] == 10_000 and len(data["samples"]["rows"]) > 2_000
    page = browser.open(path)
    assert page.complaints() == []
    lead = page.run("document.querySelector('#samples .lead').textContent")
    assert f"a random {len(data['samples']['rows']):,} of 10,000 texts (seed 0)" in lead
    unpacked, blocks = page.run("[opened.size, blocks.length]")
    assert 0 < unpacked < blocks / 4, (unpacked, blocks)
    assert re.fullmatch(r"1 to 10 of [\d,]+ texts", search(page, lexicon[0]))
    assert page.run("opened.size") == blocks
    page.close()
