"""The models of a run: what was evaluated, its scores as tables, its answers as numbers."""

from lengthen.evaluation.measures import median
from lengthen.evaluation.report.charts import thinned
from lengthen.evaluation.report.rundir import (
    Files,
    amount,
    display,
    interval_of,
    iteration,
    listing,
    number,
    table,
    text,
)
from lengthen.evaluation.scores import HEADLINES
from lengthen.text.demands import TYPES, full_marks

CHARTED = ("words_median", "eos_share", "loop_rate", "length_score", "rank_correlation")
MAX_POINTS = 1500  # of a scatter plot


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
                "query": (text(row.get("language")), text(row.get("constraint")), text(row.get("query"))),
                "parent": text(row.get("parent_id")) or text(row.get("query")),
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
    a, b = full_marks(row["type"], int(low), int(high))
    return [a, b] if 0 < a <= b else None


def value_of(scores: dict, key: str) -> float | None:
    if key == "constant_best":
        return number(table(scores.get("constant_writer")).get("best"))
    return number(scores.get(key))


def written(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def table_row(name: str, values: list[float | None], ranges: list[list[float] | None], form: str) -> list:
    """A name, then [value, "low to high"] of each model."""
    spans = [f"{written(r[0], form)} to {written(r[1], form)}" if r else "" for r in ranges]
    return [name, *([written(v, form), s] for v, s in zip(values, spans, strict=True))]


def measure_table(models: list[dict]) -> dict | None:
    """All scores, a row per measure, a column per model; measures that no model has are left out."""
    scored = [m for m in models if m["scores"]]
    rows = []
    for key, name, form in HEADLINES:
        values = [value_of(m["scores"], key) for m in scored]
        if any(v is not None for v in values):
            rows.append(table_row(name.strip(), values, [interval_of(m["scores"], key) for m in scored], form))
    return {"columns": ["measure", *(m["name"] for m in scored)], "rows": rows} if rows else None


def quality_tables(models: list[dict]) -> list[dict]:
    """One table per judge: a row per criterion, a column per model."""
    judged = {m["name"]: table(m["scores"].get("quality")) for m in models if table(m["scores"].get("quality"))}
    tables = []
    for judge in dict.fromkeys(j for by_judge in judged.values() for j in by_judge):
        by_model = {name: table(by_judge.get(judge)) for name, by_judge in judged.items()}
        rows = []
        for criterion in dict.fromkeys(k for marks in by_model.values() for k in marks):
            values = [number(marks.get(criterion)) for marks in by_model.values()]
            if any(v is not None for v in values):
                form = "{:,.0f}" if criterion in ("judged", "failed", "missing", "cut") else "{:.2f}"
                # A judge's one interval is that of the mean of the seven criteria.
                known = [{"intervals": {"mean": marks.get("interval")}} for marks in by_model.values()]
                rows.append(table_row(criterion, values, [interval_of(scores, criterion) for scores in known], form))
        if rows:
            tables.append({"title": f"Judge: {judge}", "columns": ["criterion", *by_model], "rows": rows})
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
        "queries": amount(scores.get("rows")) if scores else len({a["parent"] for a in answers}),
        "scores": {key: number(scores.get(key)) for key in CHARTED},
        "intervals": {key: interval_of(scores, key) for key in CHARTED},
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
                    "interval": interval_of(model["scores"], "words_median"),
                }
            )
    return rows
