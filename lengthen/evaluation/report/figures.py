"""The figures of an evaluation. matplotlib is imported only when one is drawn: it takes a second."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lengthen.text import languages
from lengthen.text.demands import full_marks
from lengthen.text.languages import TYPES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GREY, GRID, MARKS = "#30343b", "#5b636e", "#e4e6ea", "#d9efdd"  # text, small text, lines, full marks


def length_following(outputs: Sequence[dict], scores: dict, title: str) -> "Figure":
    """Written against demanded words, a panel per type of demand, full marks shaded; both axes logarithmic.

    outputs: "output" records, at least one with a demand; scores: what evaluate.score says of them.
    """
    # Without pyplot: no window is opened, and there is no backend to choose.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    asked = [r for r in outputs if r["length_score"] >= 0]
    lengths = [x for r in asked for x in full_marks(r["type"], r["min_words"], r["max_words"])]
    low, high = min(lengths) / 2.5, max(lengths) * 1.6  # of the words written
    left, right = min(map(_demanded, asked)) / 1.4, max(map(_demanded, asked)) * 1.4
    present = sorted({r["language"] for r in asked})
    # All four panels always, an empty one too: the figures of several runs then lie side by side.
    figure = Figure(figsize=(13.2, 4.8), dpi=150, facecolor="white", layout="constrained")
    panels = figure.subplots(1, 4, sharex=True, sharey=True)
    for panel, type_ in zip(panels, TYPES, strict=True):
        rows = [r for r in asked if r["type"] == type_]
        _shade(panel, type_, rows, left, right)
        for code in present:
            colour = languages.language(code).colour
            for ended in (True, False):
                part = [r for r in rows if r["language"] == code and _ended(r) == ended]
                panel.scatter(
                    [_demanded(r) for r in part],
                    [min(max(r["longen_words"], low * 1.04), high / 1.04) for r in part],  # beyond: on the frame
                    s=26,
                    facecolors=colour if ended else "none",
                    edgecolors=colour,
                    linewidths=1.1,
                    alpha=0.75,
                    zorder=3,
                )
        _caption(panel, type_, scores["by_type"].get(type_))
        _axes(panel, (left, right), (low, high))
    figure.supxlabel("words demanded", fontsize=10, color=INK)
    panels[0].set_ylabel("words written (LonGen's measure)", fontsize=10, color=INK)
    constant = scores["constant_writer"]
    always = f"always {constant['best_words']:,} words: {constant['best']:.1f}"
    heading = f"{title}: length score {scores['length_score']:.1f} of 100   ({always})"
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12, color=INK)

    named = map(languages.language, present)
    dots = [(language.name, language.colour, language.colour) for language in named]
    dots += [] if all(map(_ended, asked)) else [("cut off before its end", "none", GREY)]
    handles: list[Any] = [
        Line2D([], [], marker="o", linestyle="", markerfacecolor=face, markeredgecolor=edge, label=name)
        for name, face, edge in dots
    ]
    handles.append(Rectangle((0, 0), 1, 1, color=MARKS, label="full marks"))
    handles.append(Line2D([], [], color="#9aa3ad", linestyle="--", linewidth=0.8, label="as demanded"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=8.5)
    return figure


def _ended(row: dict) -> bool:
    return row["finish"] in ("eos", "")  # "": ready-made, not known


def _demanded(row: dict) -> float:
    """The number in the demand itself; of a range its middle."""
    numbers = [n for n in (row["min_words"], row["max_words"]) if n >= 0]
    return sum(numbers) / len(numbers)


def _shade(panel: Any, type_: str, rows: Sequence[dict], left: float, right: float) -> None:
    panel.plot([left, right], [left, right], color="#9aa3ad", linewidth=0.8, linestyle=(0, (4, 3)), zorder=2)
    if type_ == "range":  # each range has a width of its own: a bar for each
        for a, b in {(r["min_words"], r["max_words"]) for r in rows}:
            panel.plot([(a + b) / 2] * 2, [a, b], color=MARKS, linewidth=9, solid_capstyle="butt", zorder=1)
    else:  # the same share of the demanded number everywhere: a band
        a, b = (x / 1000 for x in full_marks(type_, 1000, 1000))
        panel.fill_between(
            [left, right], [left * a, right * a], [left * b, right * b], color=MARKS, linewidth=0, zorder=1
        )


def _caption(panel: Any, type_: str, part: dict | None) -> None:
    panel.set_title(f"{type_}\n", fontsize=11, fontweight="bold", color=INK, loc="left")
    text = "no query of this type"
    if part:
        follows = part["rank_correlation"]
        text = f"score {part['length_score']:.1f}   rank correlation {'-' if follows is None else f'{follows:+.2f}'}"
    panel.text(0, 1.02, text, transform=panel.transAxes, fontsize=8.5, color=GREY)


def _axes(panel: Any, demanded: tuple[float, float], written: tuple[float, float]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    panel.set(xscale="log", yscale="log", xlim=demanded, ylim=written)
    for axis, (low, high) in ((panel.xaxis, demanded), (panel.yaxis, written)):
        axis.set_ticks([m * 10**e for e in range(7) for m in (1, 2, 5) if low < m * 10**e < high])
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_minor_locator(NullLocator())
    panel.tick_params(labelsize=8.5, colors=GREY, length=0)
    panel.grid(color=GRID, linewidth=0.7)
    panel.set_axisbelow(True)
    for side in panel.spines.values():
        side.set_color(GRID)
