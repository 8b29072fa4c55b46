"""The numbers of a scores.json: their names, their formats, and how they are shown on a terminal."""

from collections.abc import Sequence

from rich.table import Table

from lengthen import cli
from lengthen.measures import OPENING_TOKENS, PREFIX_WORDS

GROUPS = ("type", "range", "language")  # scores.json has a table by_… of each

HEADLINES = (  # key of scores.json, name, format
    ("rows", "queries", "{:,.0f}"),
    ("answers", "answers", "{:,.0f}"),
    ("words_median", "words, median (ended by EOS)", "{:,.0f}"),
    ("words_p90", "words, p90 (ended by EOS)", "{:,.0f}"),
    ("words_median_all", "words, median (all)", "{:,.0f}"),
    ("words_p90_all", "words, p90 (all)", "{:,.0f}"),
    ("eos_share", "ended by EOS", "{:.1%}"),
    ("loop_rate", "loops", "{:.1%}"),
    ("length_score", "length score, of 100", "{:.1f}"),
    ("length_score_eos", "length score (ended by EOS)", "{:.1f}"),
    ("constant_best", "  best constant writer", "{:.1f}"),
    ("longbench_score", "LongBench-Write's length score", "{:.1f}"),
    ("rank_correlation", "rank correlation wanted/written", "{:+.2f}"),
    ("distinct_3", f"distinct-3, first {PREFIX_WORDS} words", "{:.3f}"),
    ("compression", f"zlib compression, first {PREFIX_WORDS} words", "{:.2f}"),
    ("content_words", "query's content words used", "{:.1%}"),
    ("perplexity", "perplexity, median (own answers)", "{:.2f}"),
    ("own_prompt_gain", f"gain by the own query, first {OPENING_TOKENS} tokens", "{:.3f}"),
    ("own_prompt_share", "  answers for which it is above 0", "{:.1%}"),
    ("short_loss", "short tasks, nats per token", "{:.3f}"),
    ("tokens", "tokens", "{:,.0f}"),
    ("seconds", "seconds", "{:,.0f}"),
)


def cell(value: float | None, form: str = "{:,.0f}", interval: Sequence[float] | None = None) -> str:
    """362 [301, 420]; the sign of the unit, where there is one, only with the value."""
    text = "-" if value is None else form.format(value)
    return text + (f" [{', '.join(form.format(end).strip('x%') for end in interval)}]" if interval else "")


def headlines(scores: dict) -> dict:
    return {**scores, "constant_best": (scores["constant_writer"] or {}).get("best")}


def show(scores: dict, title: str) -> None:
    """Two tables on stderr: the run as a whole with 95 % intervals over queries, and its groups."""
    table = Table(title=cli.shown(title), show_header=False)
    table.add_column("measure")
    table.add_column("value", justify="right")
    for key, name, form in HEADLINES:
        table.add_row(name, cell(headlines(scores)[key], form, scores["intervals"].get(key)))
    cli.console.print(table)
    if any(scores["loop_by_tenth"] or ()):
        cli.say(f"words in loops, by tenth of the answer: {' '.join(f'{x:.0%}' for x in scores['loop_by_tenth'])}")
    if positions := scores["base_perplexity_by_position"]:
        cli.say("base model's perplexity from token " + ", ".join(f"{a}: {x:.1f}" for a, _, x in positions))

    table = Table(title="By group (words of the answers that ended by EOS)")
    columns = (
        ("answers", "answers", "{:,.0f}"),
        ("words_median", "median words", "{:,.0f}"),
        ("eos_share", "EOS", "{:.0%}"),
        ("length_score", "length score", "{:.1f}"),
        ("rank_correlation", "wanted/written", "{:+.2f}"),
    )
    table.add_column("group")
    for _, name, _ in columns:
        table.add_column(name, justify="right")
    for field in GROUPS:
        for value, part in scores[f"by_{field}"].items():
            table.add_row(cli.shown(value), *(cell(part[key], form) for key, _, form in columns))
        table.add_section()
    cli.console.print(table)
    if constant := scores["constant_writer"]:
        fixed = ", ".join(f"{int(words):,} words {value:.1f}" for words, value in constant["fixed"].items())
        cli.say(f"always writing {constant['best_words']:,} words would score {constant['best']:.1f}; {fixed}")
