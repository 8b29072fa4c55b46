"""The report of a run: one HTML file with its own charts, made of whatever lies in the run's folder.

    1. read every file that design and README list, as far as it can be read. A run in progress has files that are
       missing or end in half a line: what cannot be read is left out, and the page says so.
    2. say in words what the numbers show and what they do not (`verdict`)
    3. bin the lengths, thin out the points of the scatter plots and of the loss curves: the page stays small
    4. pack the texts: each different one once, in blocks of deflate and base64 that the page opens as it needs them.
       Where all of them would exceed MAX_BYTES, a seeded random subset is taken, and the page says of how many.
    5. put all that into page.html, which holds the style and the script

What a model wrote may hold markup, terminal escapes and marks that turn the direction of writing. Nothing reaches the
page except through `visible`, which spells such characters out; the script only ever sets text, never markup; and a
content security policy allows that one script, by its hash, and no network.

Reads   RUN/iter_K/, RUN/final/, RUN/controls/NAME/: *.jsonl, *.rejected.jsonl, *.meta.json,
        {generator,extender}/{meta.json,train_log.jsonl}
        RUN/eval/NAME/{outputs.jsonl,outputs.meta.json,scores.json}, RUN/summary.json
Writes  RUN/report.html
"""

import base64
import datetime
import hashlib
import json
import math
import random
import re
import statistics
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lengthen.cli import ACTING
from lengthen.evaluation.report.rundir import Files, amount, counts, display, iteration, listing, number, table, text
from lengthen.evaluation.report.verdict import interval, verdict
from lengthen.evaluation.scores import HEADLINES
from lengthen.records import UserError, replace_file
from lengthen.text.demands import TYPES, full_marks

PAGE = Path(__file__).with_name("page.html")
MAX_BYTES = 14_000_000  # of texts and their rows in the page; the whole file stays below 15 MB
ANSWER_SHARE = 0.5  # answers to the benchmark may take so much of it, the samples of the stages the rest
BLOCK_CHARS = 200_000  # a block is opened at once: large enough to compress, small enough not to wait for
NUM_BINS = 56  # of a distribution
MAX_POINTS = 1500  # of a scatter plot
MAX_STEPS = 200  # points of a loss curve

STAGES = (  # file, stage, what it counts
    ("instructions.jsonl", "instructions"),
    ("responses.jsonl", "responses"),
    ("extended.jsonl", "extend"),
    ("constrained.jsonl", "constrain"),
)
CHARTED = ("words_median", "eos_share", "loop_rate", "length_score", "rank_correlation")
# ---------------------------------------------------------------------------------------------------------
# What is shown is text


def visible(text: str) -> str:
    """The text with every character spelled out that would act instead of being seen: ESC is ␛, U+202E is ⟨U+202E⟩."""

    def spell(match: re.Match) -> str:
        code = ord(match[0])
        return "␡" if code == 0x7F else chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"

    return ACTING.sub(spell, text.replace("\r\n", "\n"))


def as_shown(value: Any) -> Any:
    """Any JSON value with its strings made visible, and null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {visible(str(k)): as_shown(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_shown(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return visible(value) if isinstance(value, str) else value


# ---------------------------------------------------------------------------------------------------------
# Texts: each once, compressed, up to a size


class Texts:
    """A pool of texts. `add` gives a text its number; `blocks` are JSON lists, deflated, in base64."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.blocks: list[str] = []
        self.starts: list[int] = []  # number of the first text of each block
        self.pending: list[str] = []
        self.pending_chars = self.rows = 0

    def add(self, value: Any) -> int:
        """The number of a text; -1 of an empty one."""
        shown = visible(text(value))
        if not shown:
            return -1
        if shown not in self.numbers:
            self.numbers[shown] = len(self.numbers)
            self.pending.append(shown)
            self.pending_chars += len(shown)
            if self.pending_chars >= BLOCK_CHARS:
                self.close()
        return self.numbers[shown]

    def close(self) -> None:
        """End the block that is being filled."""
        if self.pending:
            packed = zlib.compress(json.dumps(self.pending, ensure_ascii=False).encode(), 6)
            self.blocks.append(base64.b64encode(packed).decode())
            self.starts.append(len(self.numbers) - len(self.pending))
            self.pending, self.pending_chars = [], 0

    @property
    def bytes(self) -> int:
        """What the page holds so far; an open block is guessed at half its characters, 100 for a row of numbers."""
        return sum(map(len, self.blocks)) + self.pending_chars // 2 + 100 * self.rows


# ---------------------------------------------------------------------------------------------------------
# Numbers for the charts


def bins(rows: Sequence[dict], lowest: float = 1.0) -> dict | None:
    """Counts of each row's `solid` and `hollow` values in NUM_BINS bins of equal ratio, the same for all rows.

    Values below a sixteenth of the median are counted in the first bin: a few answers of one word would otherwise
    leave half of the axis empty. None where there is no value.
    """
    every = sorted(v for row in rows for v in (*row["solid"], *row["hollow"]))
    if not every:
        return None
    low = max(every[0], every[len(every) // 2] / 16, lowest)
    high = max(every[-1], low * 1.5)
    low, high = low / 1.06, high * 1.06
    step = math.log(high / low) / NUM_BINS

    def count(values: Sequence[float]) -> list[int]:
        found = Counter(min(NUM_BINS - 1, max(0, int(math.log(max(v, low) / low) / step))) for v in values)
        return [found[i] for i in range(NUM_BINS)]

    shown = [
        {**row, "solid": count(row["solid"]), "hollow": count(row["hollow"])}
        | {"num_solid": len(row["solid"]), "num_hollow": len(row["hollow"])}
        for row in rows
    ]
    return {"low": low, "high": high, "rows": shown, "pinned": sum(v < low for v in every)}


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def thinned(values: list, most: int) -> list:
    """A seeded random part of the values, in their order."""
    kept = sorted(random.Random(0).sample(range(len(values)), min(most, len(values))))
    return [values[i] for i in kept]


def loss_curve(entries: list[dict]) -> dict | None:
    """At most MAX_STEPS points [step, loss] (means of neighbours) and the mean of each epoch [first, last, mean]."""
    points, epochs = [], {}
    for entry in entries:
        step, loss = amount(entry.get("step")), number(entry.get("loss"))
        if step is not None and loss is not None and entry.get("skipped") is not True:
            points.append((step, loss))
            epochs.setdefault(amount(entry.get("epoch")) or 0, []).append((step, loss))
    if not points:
        return None
    size = math.ceil(len(points) / MAX_STEPS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    curve = [[statistics.fmean(s for s, _ in g), statistics.fmean(x for _, x in g)] for g in groups]
    means = [[p[0][0], p[-1][0], statistics.fmean(x for _, x in p)] for p in epochs.values()]
    return {"points": curve, "epochs": means, "steps": len(points), "per_point": size}


# ---------------------------------------------------------------------------------------------------------
# The models: what was evaluated


def read_models(files: Files) -> list[dict]:
    """One entry per folder of eval/: base, iterations, final, then the controls by name. With all answers' numbers."""
    rank = {"eval/base": -1, "eval/final": 10**7}
    order = sorted(files.folders("eval/*"), key=lambda p: (rank.get(p, iteration(p) or 10**8), p))
    models = []
    for part in order:
        name = part.removeprefix("eval/")
        answers = [
            {
                "file": f"{part}/outputs.jsonl",
                "offset": offset,
                "words": amount(row.get("response_words")),
                "longen_words": amount(row.get("longen_words")),
                "ended": text(row.get("finish")) in ("eos", ""),  # "": ready-made, not known
                "marks": marks_of(row),
                "query": text(row.get("parent_id")) or text(row.get("query")),
            }
            for offset, row in files.lines(f"{part}/outputs.jsonl")
        ]
        scores = files.object(f"{part}/scores.json")
        meta = files.object(f"{part}/outputs.meta.json")
        if answers or scores or meta:
            kind = "iteration" if iteration(name) else name if name in ("base", "final") else "control"
            models.append({"part": part, "name": display(name), "kind": kind, "scores": scores, "answers": answers})
    return models


def marks_of(row: dict) -> list[float] | None:
    """The lengths that get full marks, [from, to]; None without a demand."""
    low, high = number(row.get("min_words")), number(row.get("max_words"))
    if row.get("type") not in TYPES or low is None or high is None:
        return None
    a, b = full_marks(row["type"], low, high)
    return [a, b] if 0 < a <= b else None


def value_of(scores: dict, key: str) -> float | None:
    if key == "constant_best":
        return number(table(scores.get("constant_writer")).get("best"))
    return number(scores.get(key))


def written(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def measure_table(models: list[dict]) -> dict | None:
    """All scores, a row per measure, a column per model; measures that no model has are left out."""
    scored = [m for m in models if m["scores"]]
    rows = []
    for key, name, form in HEADLINES:
        values = [value_of(m["scores"], key) for m in scored]
        if any(v is not None for v in values):
            ranges = [interval(m["scores"], key) for m in scored]
            spans = [f"{written(r[0], form)} to {written(r[1], form)}" if r else "" for r in ranges]
            rows.append([name.strip(), *([written(v, form), s] for v, s in zip(values, spans, strict=True))])
    return {"columns": ["measure", *(m["name"] for m in scored)], "rows": rows} if rows else None


def quality_tables(models: list[dict]) -> list[dict]:
    """One table per judge: a row per criterion, a column per model."""
    judged = {m["name"]: table(m["scores"].get("quality")) for m in models if table(m["scores"].get("quality"))}
    tables = []
    for judge in dict.fromkeys(j for by_judge in judged.values() for j in by_judge):
        found = {name: table(by_judge.get(judge)) for name, by_judge in judged.items()}
        rows = []
        for criterion in dict.fromkeys(k for marks in found.values() for k in marks):
            values = [number(marks.get(criterion)) for marks in found.values()]
            if any(v is not None for v in values):
                form = "{:,.0f}" if criterion in ("judged", "failed", "missing", "cut") else "{:.2f}"
                known = [{"intervals": {"mean": marks.get("interval")}} for marks in found.values()]
                ranges = [interval(scores, criterion) for scores in known]
                spans = [f"{written(r[0], form)} to {written(r[1], form)}" if r else "" for r in ranges]
                rows.append([criterion, *([written(v, form), s] for v, s in zip(values, spans, strict=True))])
        if rows:
            tables.append({"title": f"Judge: {judge}", "columns": ["criterion", *found], "rows": rows})
    return tables


def model_data(model: dict) -> dict:
    """What the charts need of one model."""
    scores, answers = model["scores"], model["answers"]
    points = [
        [sum(a["marks"]) / 2, a["longen_words"], a["ended"], *a["marks"]]
        for a in answers
        if a["marks"] and a["longen_words"] is not None
    ]
    curve = [[number(x) for x in listing(row)] for row in listing(scores.get("base_perplexity_by_position"))]
    return {
        "name": model["name"],
        "kind": model["kind"],
        "scored": bool(scores),
        "answers": amount(scores.get("answers")) if scores else len(answers),
        "queries": amount(scores.get("rows")) if scores else len({a["query"] for a in answers}),
        "scores": {key: number(scores.get(key)) for key in CHARTED},
        "intervals": {key: interval(scores, key) for key in CHARTED},
        "points": thinned(points, MAX_POINTS),
        "num_points": len(points),
        "loop_by_tenth": [number(x) for x in listing(scores.get("loop_by_tenth"))][:10],
        "perplexity_by_position": [r for r in curve if len(r) == 3 and None not in r],
    }


def length_rows(models: list[dict]) -> list[dict]:
    """Rows of the distribution of answer lengths: solid = ended by EOS, hollow = cut."""
    rows = []
    for index, model in enumerate(models):
        known = [a for a in model["answers"] if a["words"] is not None]
        if known:
            solid = [a["words"] for a in known if a["ended"]]
            rows.append(
                {
                    "model": index,
                    "name": model["name"],
                    "solid": solid,
                    "hollow": [a["words"] for a in known if not a["ended"]],
                    "median": median(solid),
                    "interval": interval(model["scores"], "words_median"),
                }
            )
    return rows


# ---------------------------------------------------------------------------------------------------------
# The stages: what was made, what it took


def read_stages(files: Files, models: list[dict]) -> list[dict]:
    """One entry per stage that has begun: part, stage, status, seconds, tokens, accepted, the sidecar."""
    stages = []
    for part in files.parts():
        for name, stage in STAGES:
            meta = files.object(f"{part}/{Path(name).stem}.meta.json")
            if meta or (files.run / part / name).exists():
                tokens, kept = amount(table(meta.get("stats")).get("tokens")), amount(meta.get("accepted"))
                if meta.get("status") != "done":  # the sidecar of a running stage is some seconds old
                    kept = sum(1 for _ in files.lines(f"{part}/{name}"))
                stages.append(stage_entry(part, stage, meta, tokens, kept))
        for role in ("generator", "extender"):
            meta = files.object(f"{part}/{role}/meta.json")
            if meta or (files.run / part / role).is_dir():
                told = table(meta.get("summary"))
                stages.append(stage_entry(part, f"train {role}", meta, amount(told.get("tokens")), None))
    for index, model in enumerate(models):
        meta = files.object(f"{model['part']}/outputs.meta.json")
        if meta:
            entry = stage_entry("evaluation", model["name"], meta, amount(model["scores"].get("tokens")), None)
            stages.append({**entry, "model": index, "scored": bool(model["scores"])})
    return stages


def stage_entry(part: str, stage: str, meta: dict, tokens: float | None, accepted: float | None) -> dict:
    return {
        "part": part,
        "stage": stage,
        "status": text(meta.get("status")) or "unknown",
        "seconds": amount(meta.get("seconds")),
        "tokens": tokens,
        "accepted": accepted,
        "model": None,  # of an evaluation: which one
        "meta": meta,
    }


def cost_data(stages: list[dict]) -> dict | None:
    """Seconds and tokens by stage, and pairs per hour by iteration: what an extension costs, drafts included."""
    rows = [
        {k: s[k] for k in ("stage", "status", "seconds", "tokens", "accepted", "model")} | {"part": display(s["part"])}
        for s in stages
        if s["seconds"] is not None
    ]
    if not rows:
        return None
    pairs = []
    for part in dict.fromkeys(s["part"] for s in stages if iteration(s["part"])):
        mine = [s for s in stages if s["part"] == part and s["stage"] in ("instructions", "responses", "extend")]
        seconds = sum(s["seconds"] or 0 for s in mine)
        made = next((s["accepted"] for s in mine if s["stage"] == "extend"), None)
        if made is not None and seconds:
            pairs.append({"part": display(part), "pairs": made, "seconds": seconds, "per_hour": 3600 * made / seconds})
    known = [r for r in rows if r["tokens"] is not None]
    return {"rows": rows, "pairs": pairs, "seconds": sum(r["seconds"] for r in rows)} | {
        "tokens": sum(r["tokens"] for r in known) if known else None
    }


def progress_of(stages: list[dict]) -> list[str]:
    """What is under way, as sentences."""
    told = []
    for s in stages:
        if s["status"] == "done" and s.get("scored", True):
            continue
        where = f"{s['part']}, {s['stage']}"
        if s["status"] == "done":
            told.append(f"{where}: answered, not scored")
        else:
            kept = f", {s['accepted']:,.0f} kept so far" if s["accepted"] is not None else ""
            told.append(f"{where}: {'not finished' if s['status'] == 'running' else 'no sidecar'}{kept}")
    return told


def read_samples(files: Files) -> tuple[list[dict], dict]:
    """The records of the stages without their texts, and where those are; (rows, {part: {kind: numbers}})."""
    rows, numbers = [], {}
    kinds = (("extension", "extended"), ("draft", "responses"), ("demand", "constrained"))
    for part in files.parts():
        for kind, stem in kinds:
            mine = []
            for name in (f"{stem}.jsonl", f"{stem}.rejected.jsonl"):
                for offset, record in files.lines(f"{part}/{name}"):
                    outcome = text(record.get("reason")) if "rejected" in name else "kept"
                    mine.append(sample_row(part, kind, f"{part}/{name}", offset, record, outcome or "unknown"))
            if mine:
                numbers.setdefault(part, {})[kind] = mine
                rows += mine
    return rows, numbers


def sample_row(part: str, kind: str, file: str, offset: int, record: dict, outcome: str) -> dict:
    rounds = [int(w) for x in listing(record.get("round_words")) if (w := amount(x)) is not None]
    words, initial = amount(record.get("response_words")), amount(record.get("initial_words"))
    return {
        "part": part,
        "kind": kind,
        "file": file,
        "offset": offset,
        "outcome": outcome,
        "words": words,
        "initial": initial,
        "rounds": rounds,
        # A rejected extension has its draft as its text: it gained nothing, and no text of its own was kept.
        "gain": number(record.get("gain")) if rounds else None,
        "finish": text(record.get("finish")),
    }


def passed(row: dict) -> bool:
    """It passed the filters, whether or not the length bias dropped it afterwards."""
    return row["outcome"] in ("kept", "length-bias")


def extender_data(numbers: dict, stages: list[dict]) -> list[dict]:
    """Per iteration: what became of drafts and extensions, by reason; lengths before and after; the gains."""
    found = []
    for part, kinds in numbers.items():
        entry = {"part": display(part), "funnels": []}
        metas = {s["stage"]: s["meta"] for s in stages if s["part"] == part}
        for kind, stage, name in (("draft", "responses", "Drafts"), ("extension", "extend", "Extensions")):
            if kind in kinds:
                outcomes = Counter(row["outcome"] for row in kinds[kind])
                entry["funnels"].append(
                    {
                        "name": name,
                        "total": len(kinds[kind]),
                        "passed": sum(map(passed, kinds[kind])),
                        "kept": outcomes.pop("kept", 0),
                        "biased": outcomes.pop("length-bias", 0),
                        "reasons": counts(outcomes),
                        "attempts": counts(metas.get(stage, {}).get("attempt_reasons")),
                    }
                )
        extensions = [r for r in kinds.get("extension", []) if passed(r)]
        entry["gains"] = [(r["gain"], r["outcome"] == "kept") for r in extensions if r["gain"] is not None]
        entry["gain_median"] = median([g for g, _ in entry["gains"]])
        entry["min_gain"] = number(table(metas.get("extend", {}).get("settings")).get("min_gain"))
        if entry["funnels"]:
            found.append(entry)
    return found


def pair_rows(numbers: dict) -> list[dict]:
    """Rows of the distribution of training texts: drafts and extensions; hollow = dropped by the length bias."""
    rows = []
    for part, kinds in numbers.items():
        for kind, name in (("draft", "drafts"), ("extension", "extensions")):
            good = [r for r in kinds.get(kind, []) if passed(r) and r["words"] is not None]
            if good:
                kept = [r["words"] for r in good if r["outcome"] == "kept"]
                dropped = [r["words"] for r in good if r["outcome"] != "kept"]
                rows.append(
                    {"name": f"{display(part)}, {name}", "kind": kind, "part": display(part)}
                    | {"solid": kept, "hollow": dropped, "median": median(kept), "interval": None}
                )
    return rows


def gain_rows(extender: list[dict]) -> list[dict]:
    """Rows of the distribution of gains, and out of `extender` what was only needed for them."""
    rows = []
    for entry in extender:
        gains = entry.pop("gains")
        if gains:
            kept, dropped = ([g for g, k in gains if k == want and g > 0] for want in (True, False))
            rows.append(
                {"name": entry["part"], "solid": kept, "hollow": dropped}
                | {"median": entry["gain_median"], "interval": None}
            )
    return rows


def read_losses(files: Files) -> list[dict]:
    losses = []
    for part in files.parts():
        for role in ("generator", "extender"):
            curve = loss_curve([entry for _, entry in files.lines(f"{part}/{role}/train_log.jsonl")])
            if curve:
                losses.append({"part": display(part), "role": role, **curve})
    return losses


# ---------------------------------------------------------------------------------------------------------
# Texts of answers and samples, as many as fit


def pack_answers(files: Files, models: list[dict], texts: Texts) -> dict:
    """Queries with the answers of all models, in a seeded order where not all of them fit."""
    by_query: dict[str, list[tuple[int, dict]]] = {}
    for index, model in enumerate(models):
        for answer in model["answers"]:
            by_query.setdefault(answer["query"], []).append((index, answer))
    queries, order = {}, list(by_query)
    random.Random(0).shuffle(order)
    for query in order:
        if texts.bytes > ANSWER_SHARE * MAX_BYTES:
            break
        answers, first = [], {}
        for index, answer in by_query[query]:
            record = files.line_at(answer["file"], answer["offset"])
            first = first or record
            sample, words = amount(record.get("sample")) or 0, answer["words"]
            score = amount(record.get("length_score"))
            finish = text(record.get("finish"))
            answers.append([index, sample, words, finish, score, texts.add(record.get("response"))])
        texts.rows += 1 + len(answers)
        constraint, language = text(first.get("constraint")), text(first.get("language"))
        queries[query] = [texts.add(first.get("query")), constraint, language, sorted(answers, key=lambda a: a[:2])]
    return {"queries": [queries[q] for q in by_query if q in queries], "total": len(by_query)}


SLOTS = {  # kind: (title, field) of the texts that are shown beside each other
    "extension": (("Instruction", "prompt"), ("Draft", "initial"), ("Extension", "response")),
    "draft": (("Instruction", "prompt"), ("Draft", "response")),
    "demand": (("Instruction", "prompt"), ("With its demand", "query"), ("Answer", "response")),
}


def pack_samples(files: Files, rows: list[dict], texts: Texts) -> dict:
    """Rows [part, kind, outcome, finish, words, initial, rounds, texts]; a seeded choice of them where not all fit."""
    found = {"outcomes": [row["outcome"] for row in rows], "finishes": [row["finish"] for row in rows]}
    found |= {"parts": [display(row["part"]) for row in rows], "kinds": list(SLOTS)}
    lists = {name: list(dict.fromkeys(values)) for name, values in found.items()}
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    packed = {}
    for place in order:
        if texts.bytes > MAX_BYTES:
            break
        row = rows[place]
        record = files.line_at(row["file"], row["offset"])
        if row["kind"] == "extension" and not row["rounds"]:
            record["response"] = ""  # it is the draft once more
        numbers = [texts.add(record.get(field)) for _, field in SLOTS[row["kind"]]]
        texts.rows += 1
        packed[place] = [
            lists["parts"].index(display(row["part"])),
            lists["kinds"].index(row["kind"]),
            lists["outcomes"].index(row["outcome"]),
            lists["finishes"].index(row["finish"]),
            row["words"],
            row["initial"],
            row["rounds"],
            numbers,
        ]
    titles = {kind: [title for title, _ in slots] for kind, slots in SLOTS.items()}
    return {**lists, "titles": titles, "rows": [packed[p] for p in sorted(packed)], "total": len(rows)}


# ---------------------------------------------------------------------------------------------------------
# Settings


def flat(value: Any) -> str:
    """A setting as one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {flat(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(flat, value))
    return "–" if value in ("", None) else json.dumps(value) if isinstance(value, bool) else str(value)


def settings_data(summary: dict, stages: list[dict]) -> dict:
    """The run's flags, the versions that were used, and the settings of each stage."""
    versions: dict[str, list[str]] = {}
    for stage in stages:
        for name, version in table(stage["meta"].get("versions")).items():
            known = versions.setdefault(name, [])
            if (shown := flat(version)) not in known:
                known.append(shown)
    run = [[k, flat(v)] for k, v in table(summary.get("settings")).items()]
    per_stage = []
    for stage in stages:
        meta = stage["meta"]
        told = {**table(meta.get("info")), **table(meta.get("settings"))}
        if told:
            title = f"{stage['part']}, {stage['stage']}"
            per_stage.append({"title": title, "rows": [[k, flat(v)] for k, v in told.items()]})
    return {"run": run, "versions": [[k, " and ".join(v)] for k, v in versions.items()], "stages": per_stage}


def facts(summary: dict, stages: list[dict]) -> list[str]:
    """The line under the title: model, size, device, time."""
    infos = [table(s["meta"].get("info")) for s in stages]
    model = text(table(summary.get("settings")).get("model")) or next((text(i.get("model")) for i in infos), "")
    devices = dict.fromkeys(text(i.get("device")) for i in infos)
    started = min((text(s["meta"].get("created")) for s in stages if text(s["meta"].get("created"))), default="")
    num = len({s["part"] for s in stages if iteration(s["part"])})
    seconds = sum(s["seconds"] or 0 for s in stages)
    return [
        *([model] if model else []),
        *([f"{num} iteration{'s' if num > 1 else ''}"] if num else []),
        *(["on " + " and ".join(d for d in devices if d)] if any(devices) else []),
        *([f"{duration(seconds)} of work"] if seconds else []),
        *([f"started {started[:10]}"] if started else []),
    ]


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------------------


def collect(run: Path) -> tuple[dict, Texts]:
    """All that the page shows."""
    files, texts = Files(run), Texts()
    summary = files.object("summary.json")
    models = read_models(files)
    stages = read_stages(files, models)
    if not summary and not models and not stages:
        hint = "python evaluate.py --report runs/demo   (a folder that run.py made: iter_1/, final/, eval/)"
        raise UserError(f"{run} holds no run: no iter_K/, no final/, no eval/, no summary.json", hint)
    rows, numbers = read_samples(files)
    extender = extender_data(numbers, stages)
    gains = bins(gain_rows(extender), lowest=0.01)
    told = verdict(models)
    if ended := [name for name in map(text, listing(summary.get("controls_without_pairs"))) if name]:
        told["not"].append(f"Controls that ended without a pair to train on: {', '.join(ended)}.")
    data = {
        "name": run.resolve().name,
        "facts": facts(summary, stages),
        "written": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "verdict": told,
        "progress": progress_of(stages),
        "models": [model_data(m) for m in models],
        "lengths": bins(length_rows(models)),
        "measures": measure_table(models),
        "quality": quality_tables(models),
        "extender": extender,
        "pairs": bins(pair_rows(numbers)),
        "gains": gains,
        "losses": read_losses(files),
        "cost": cost_data(stages),
        "settings": settings_data(summary, stages),
        "answers": pack_answers(files, models, texts),
        "samples": pack_samples(files, rows, texts),
    }
    texts.close()
    return {**data, "starts": texts.starts, "notes": list(dict.fromkeys(files.notes))}, texts


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what lies in the run's folder and return its path; UserError where there is no run."""
    if not run.is_dir():
        raise UserError(f"{run} is no folder", "python evaluate.py --report runs/demo")
    data, texts = collect(run)
    # In a script element only "<" could end the data, and JSON may always write it as an escape.
    values = json.dumps(as_shown(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    page = PAGE.read_text("utf-8")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = visible(data["name"]).replace("&", "&amp;").replace("<", "&lt;")
    filled = {"script-hash": digest, "title": title, "texts": "\n".join(texts.blocks)}
    filled["data"] = values.replace("<", "\\u003c")
    path = run / "report.html"
    replace_file(path, re.sub(r"\{\{([\w-]+)\}\}", lambda match: filled[match[1]], page))
    return path
