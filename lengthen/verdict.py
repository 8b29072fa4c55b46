"""What the scores of a run show and what they do not, in sentences.

Growth is the median length of the last trained model over that of the base model, counting answers that the model
itself ended. It is called shown only where the intervals of both do not overlap; everything that weakens it is named:
few queries, other queries or settings, worse endings, a control that does as well, quality that nobody judged.
"""

from lengthen.rundir import amount, listing, number, table

FEW_QUERIES = 30  # below that, luck and growth look alike


def interval(scores: dict, key: str) -> list[float] | None:
    """[low, high] of a score, where scores.json has it."""
    ends = [number(x) for x in listing(table(scores.get("intervals")).get(key))]
    return sorted(ends) if len(ends) == 2 and None not in ends else None


def verdict(models: list[dict]) -> dict:
    """{"shows": [sentences], "not": [sentences]}: growth from the base to the last trained model, and its limits."""
    trained = [m for m in models if m["kind"] in ("iteration", "final") and m["scores"]]
    base = next((m for m in models if m["kind"] == "base" and m["scores"]), None)
    if not base or not trained:
        alone = trained[-1] if trained else base
        told = (
            f"{sentence_name(alone)} alone has been evaluated" if alone else "No model of this run has been evaluated"
        )
        return {"shows": [f"{told} so far."], "not": ["Growth, or that there is none."]}
    last = trained[-1]
    old, new = (number(m["scores"].get("words_median")) for m in (base, last))
    shows, limits = [], []
    if old and new is not None:
        ratio = f"{new / old:.2f} times the base model's {old:,.0f}"
        shows.append(f"{sentence_name(last)} writes {new:,.0f} words in the median, {ratio}.")
        shows.append(told_apart(base, last, new >= old))
    else:
        empty = sentence_name(base if not old else last)
        shows.append(f"{empty} has no median length to compare: growth is not defined.")
    shows += worse_endings(base, last)
    iterations = [m for m in trained if m["kind"] == "iteration" and m is not last]
    if old and iterations and (before := number(iterations[-1]["scores"].get("words_median"))) is not None:
        name = iterations[-1]["name"]
        shows.append(f"After {name}, before the fine-tune on length demands, it was {before / old:.2f} times.")
    apart, told = controls_say(models, last)
    (shows if apart else limits).append(told)
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


def told_apart(base: dict, last: dict, longer: bool) -> str:
    before, after = (interval(m["scores"], "words_median") for m in (base, last))
    if not before or not after:
        return "No intervals were computed, so this is no evidence of growth."
    spans = f"The 95 % intervals, {before[0]:,.0f} to {before[1]:,.0f} and {after[0]:,.0f} to {after[1]:,.0f} words,"
    if before[1] < after[0] or after[1] < before[0]:
        return f"{spans} do not overlap: on these queries its answers are {'longer' if longer else 'shorter'}."
    return f"{spans} overlap: this does not show that its answers are {'longer' if longer else 'shorter'}."


def worse_endings(base: dict, last: dict) -> list[str]:
    """One sentence on EOS and loops; more than 5 points worse than the base model is the limit that was set."""
    told = []
    for key, name, sign in (("eos_share", "ends by itself in", -1), ("loop_rate", "loops in", 1)):
        old, new = (number(m["scores"].get(key)) for m in (base, last))
        if old is not None and new is not None:
            worse = sign * (new - old) > 0.05
            told.append((worse, f"{name} {100 * new:.0f}\u00a0% of the answers (base: {100 * old:.0f}\u00a0%)"))
    if not told:
        return []
    start = "But it" if any(worse for worse, _ in told) else "It"
    return [f"{start} {' and '.join(sentence for _, sentence in told)}."]


def controls_say(models: list[dict], last: dict) -> tuple[bool, str]:
    """(the method stands out, a sentence): was it the method, or would the longest control have done as well?"""
    found = [(number(m["scores"].get("words_median")), m) for m in models if m["kind"] == "control"]
    found = [(words, m) for words, m in found if words is not None]
    mine = number(last["scores"].get("words_median"))
    if not found or mine is None:
        return False, "Whether the extensions, and nothing cheaper, made the difference: no control was evaluated."
    words, control = max(found, key=lambda pair: pair[0])
    ours, theirs = interval(last["scores"], "words_median"), interval(control["scores"], "words_median")
    told = f"The longest control, {control['name'].removeprefix('control ')}, writes {words:,.0f} words in the median"
    if ours and theirs and ours[0] > theirs[1]:
        return True, f"{told}; the intervals do not overlap."
    return False, f"{told}: the method is not set apart from it."
