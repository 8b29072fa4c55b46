"""What the scores of a run show and what they do not, in sentences.

Growth is the median length of the last trained model over that of the base model, counting answers that the model
itself ended. It is called shown only where the 95 % interval of that ratio, drawn over queries and paired where both
models answered the same, leaves out 1; everything that weakens it is named: few queries, other queries or settings,
worse endings, a control that does as well, quality that nobody judged.
"""

from lengthen.evaluation.growth import growth
from lengthen.evaluation.intervals import Interval, by_query
from lengthen.evaluation.report.rundir import amount, number, table

FEW_QUERIES = 30  # below that, luck and growth look alike


def verdict(models: list[dict]) -> dict:
    """{"shows": [sentences], "not": [sentences]}: growth from the base to the last trained model, and its limits."""
    trained = [m for m in models if m["kind"] in ("iteration", "final") and m["scores"]]
    base = next((m for m in models if m["kind"] == "base" and m["scores"]), None)
    if not base or not trained:
        alone = trained[-1] if trained else base
        state = (
            f"{sentence_name(alone)} alone has been evaluated" if alone else "No model of this run has been evaluated"
        )
        return {"shows": [f"{state} so far."], "not": ["Growth, or that there is none."]}
    last = trained[-1]
    old, new = (number(m["scores"].get("words_median")) for m in (base, last))
    shows: list[str] = []
    limits: list[str] = []
    if old and new is not None:
        ratio = f"{new / old:.2f} times the base model's {old:,.0f}"
        shows.append(f"{sentence_name(last)} writes {new:,.0f} words in the median, {ratio}.")
        shows.append(told_apart(base, last))
    else:
        empty = sentence_name(base if not old else last)
        shows.append(f"{empty} has no median length to compare: growth is not defined.")
    shows += worse_endings(base, last)
    iterations = [m for m in trained if m["kind"] == "iteration" and m is not last]
    if old and iterations and (before := number(iterations[-1]["scores"].get("words_median"))) is not None:
        name = iterations[-1]["name"]
        shows.append(f"After {name}, before the fine-tune on length demands, it was {before / old:.2f} times.")
    apart, sentence = controls_say(models, last)
    (shows if apart else limits).append(sentence)
    queries = amount(last["scores"].get("rows"))
    if queries is not None and queries < FEW_QUERIES:
        limits.append(f"{queries:,.0f} queries are too few to tell growth from luck.")
    if base["scores"].get("queries_hash") != last["scores"].get("queries_hash"):
        limits.append("The two models answered different queries: their numbers are not like for like.")
    if base["scores"].get("sampling") != last["scores"].get("sampling"):
        limits.append("The two models were sampled with different settings.")
    if not any(table(m["scores"].get("quality")) for m in models):
        limits.append("Quality: nobody judged it, and longer is not better.")
    limits.append("One run with one seed; the median counts only answers that the model itself ended.")
    return {"shows": shows, "not": limits}


def sentence_name(model: dict) -> str:
    names = {"base": "The base model", "final": "The final model"}
    return names.get(model["kind"], model["name"][:1].upper() + model["name"][1:])


def grown(before: dict, after: dict) -> tuple[Interval | None, str]:
    """The 95 % interval of (median words of `after` / `before`), answers ended by EOS; how its queries were drawn."""

    def words(model: dict) -> dict:
        return by_query((a["query"], a["words"] if a["ended"] else None) for a in model["answers"])

    change = growth(words(before), words(after))
    return change.interval, "paired by query" if change.paired else "not paired: other queries"


def told_apart(base: dict, last: dict) -> str:
    ends, how = grown(base, last)
    if not ends:
        return "There is no interval of that ratio (too few answers), so this is no evidence of growth."
    span = f"The 95\u00a0% interval of that ratio, {ends[0]:.2f} to {ends[1]:.2f} ({how}),"
    if ends[0] > 1 or ends[1] < 1:
        return f"{span} leaves out 1: on these queries its answers are {'longer' if ends[0] > 1 else 'shorter'}."
    return f"{span} holds 1: this does not show that the lengths differ."


def worse_endings(base: dict, last: dict) -> list[str]:
    """One sentence on EOS and loops; more than 5 points worse than the base model is the limit that was set."""
    clauses = []
    for key, name, sign in (("eos_share", "ends by itself in", -1), ("loop_rate", "loops in", 1)):
        old, new = (number(m["scores"].get(key)) for m in (base, last))
        if old is not None and new is not None:
            worse = sign * (new - old) > 0.05
            clauses.append((worse, f"{name} {100 * new:.0f}\u00a0% of the answers (base: {100 * old:.0f}\u00a0%)"))
    if not clauses:
        return []
    start = "But it" if any(worse for worse, _ in clauses) else "It"
    return [f"{start} {' and '.join(sentence for _, sentence in clauses)}."]


def controls_say(models: list[dict], last: dict) -> tuple[bool, str]:
    """(the method stands out, a sentence): was it the method, or would the longest control have done as well?"""
    controls = [(number(m["scores"].get("words_median")), m) for m in models if m["kind"] == "control"]
    known = [(words, m) for words, m in controls if words is not None]
    mine = number(last["scores"].get("words_median"))
    if not known or mine is None:
        return False, "Whether the extensions, and nothing cheaper, made the difference: no control was evaluated."
    words, control = max(known, key=lambda pair: pair[0])
    sentence = (
        f"The longest control, {control['name'].removeprefix('control ')}, writes {words:,.0f} words in the median"
    )
    ends, how = grown(control, last)
    if ends and ends[0] > 1:
        return True, f"{sentence}; the method's is {ends[0]:.2f} to {ends[1]:.2f} times that (95\u00a0%, {how})."
    return False, f"{sentence}: the method is not set apart from it."
