"""What came of a run, as two tables for the terminal: what each model writes, and what each stage took."""

from rich.table import Table

from lengthen import cli
from lengthen.evaluation.scores import cell

MODELS = {  # column: (figure of scores.json, how it is printed)
    "median words": ("words_median", "{:.0f}"),
    "p90": ("words_p90", "{:.0f}"),
    "EOS share": ("eos_share", "{:.0%}"),
    "loop rate": ("loop_rate", "{:.0%}"),
    "length score": ("length_score", "{:.1f}"),
    "wanted/written": ("rank_correlation", "{:+.2f}"),
}
COSTS = {  # column: (figures of a stage's summary, the first one there is; how it is printed)
    "records": (("accepted", "pairs", "rows"), "{:.0f}"),
    "rejected": (("rejected",), "{:.0f}"),
    "gain": (("gain_median",), "{:.2f}x"),
    "tokens": (("tokens",), "{:,.0f}"),
    "seconds": (("seconds",), "{:.0f}"),
}


def show(summary: dict) -> None:
    """The result as two tables: what each model writes, and what each stage cost."""
    table = Table(
        "model", title="What the models write (words of answers that ended by EOS, 95 % intervals over queries)"
    )
    for column in MODELS:
        table.add_column(column, justify="right")
    for name, scores in summary["models"].items():
        trust = {"words_median": scores["intervals"]["words_median"]}  # one interval is enough for a look
        table.add_row(name, *(cell(scores[key], form, trust.get(key)) for key, form in MODELS.values()))
    cli.console.print(table)

    table = Table("part", "stage", title="What it took")
    for column in COSTS:
        table.add_column(column, justify="right")
    for stage in summary["stages"]:
        rejected = stage.get("rejected")  # by reason
        stage = {**stage, "rejected": sum(rejected.values()) if isinstance(rejected, dict) else None}
        values = [next((stage[key] for key in keys if key in stage), None) for keys, _ in COSTS.values()]
        forms = [form for _, form in COSTS.values()]
        shown = [cell(None if v == -1 else v, form) for v, form in zip(values, forms, strict=True)]
        table.add_row(stage["part"], stage["stage"], *shown)
    cli.console.print(table)
