"""Preferences: which of two runs' answers judges find better, and how far to trust that.

Every pair is judged in both orders. The summary says the share that B wins over both orders, how often a judge agrees
with itself when the order is turned round, and how often two judges agree.
"""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from lengthen import cli
from lengthen.evaluation.intervals import bootstrap, by_query
from lengthen.evaluation.judge import JudgeFlags, ask_judges, no_verdict, recorded
from lengthen.evaluation.measures import mean
from lengthen.evaluation.questions import Question
from lengthen.evaluation.scores import cell, read_outputs, rounded
from lengthen.records import UserError, hash_of, replace_file
from lengthen.stage import Stage


def pairs_of(a: Sequence[dict], b: Sequence[dict]) -> list[tuple[dict, dict]]:
    """Answers of both runs to the same query and sample; each answer is in one pair at most."""
    partners = defaultdict(list)
    for row in sorted(b, key=lambda r: r["parent_id"], reverse=True):
        partners[row["language"], row["query"], row["sample"]].append(row)
    pairs = []
    for row in sorted(a, key=lambda r: (r["parent_id"], r["sample"])):
        if others := partners[row["language"], row["query"], row["sample"]]:
            pairs.append((row, others.pop()))
    return pairs


def compare_runs(runs: Sequence[str], judges: JudgeFlags, stage: Stage) -> tuple[dict, list[UserError]]:
    """Let the judges prefer one of two answers, in both orders; (what comparison.json holds, what went wrong)."""
    folder, files = Path(stage.out.output), [Path(run) / "outputs.jsonl" for run in runs]
    if (folder / "outputs.jsonl").exists():
        raise UserError(f"{folder} is the folder of a run", "--output ANOTHER_FOLDER")
    a, b = map(read_outputs, files)
    pairs = pairs_of(a, b)
    if not pairs:
        raise UserError(f"{files[0]} and {files[1]} hold no answers to the same query", "two runs on one --benchmark")
    items = [item for answer_a, answer_b in pairs for item in items_of(answer_a, answer_b)]
    problems = ask_judges(folder, judges, stage, items, inputs=files)
    result = {
        "run_a": runs[0],
        "run_b": runs[1],
        "pairs": len(pairs),
        "unpaired": [len(a) - len(pairs), len(b) - len(pairs)],
        **preferences(recorded(folder), pairs, judges.judge),
    }
    for name, summary in result["judges"].items():
        if name in judges.judge and not summary["verdicts"] and not summary["missing"]:
            problems.append(no_verdict(name, folder, summary["failed"]))
    if folder.exists():  # it does not if an input was refused
        replace_file(folder / "comparison.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    show_preferences(result)
    return result, problems


def items_of(answer_a: dict, answer_b: dict) -> list[tuple[dict, Question]]:
    """The two questions about a pair, one in each order, with the known fields of their "preference" records."""
    texts = {"a": answer_a["response"], "b": answer_b["response"]}
    fields = {
        "parent_id": answer_a["id"],
        "other_id": answer_b["id"],
        "language": answer_a["language"],
        "sample": answer_a["sample"],
    }
    fields["answer_hash"] = hash_of(answer_a["query"], *texts.values())
    items = []
    for order in ("ab", "ba"):
        key = f"{answer_a['id']} {fields['answer_hash']} {order}"
        answers = tuple(texts[run] for run in order)
        items.append(
            ({**fields, "order": order}, Question(key, "compare", answer_a["language"], answer_a["query"], answers))
        )
    return items


POINTS = {"a": 0.0, "tie": 0.5, "b": 1.0}  # of a verdict, for B


def preferences(records: Sequence[dict], pairs: Sequence[tuple[dict, dict]], asked: Sequence[str] = ()) -> dict:
    """{"judges": {judge: what it prefers and how steadily}, "between_judges": [how far two of them agree]}.

    Only pairs judged in both orders count: a judge that always takes the first answer then gives each run one half.
    """
    by_judge: dict[str, dict] = {name: {} for name in asked}
    hashes = {a["id"]: hash_of(a["query"], a["response"], b["response"]) for a, b in pairs}
    for r in records:
        if hashes.get(r["parent_id"]) == r["answer_hash"]:  # else it is about earlier texts
            by_judge.setdefault(r["judge"], {})[r["parent_id"], r["order"]] = r
    judges: dict[str, dict] = {}
    outcomes: dict[str, dict[str, str]] = {}  # judge -> {pair: "a", "b" or "tie"}
    for name, given in by_judge.items():
        good = {key: r for key, r in given.items() if "reason" not in r}
        both = [
            (answer, good[answer["id"], "ab"]["winner"], good[answer["id"], "ba"]["winner"])
            for answer, _ in pairs
            if {(answer["id"], "ab"), (answer["id"], "ba")} <= good.keys()
        ]
        points = {answer["id"]: (POINTS[ab] + POINTS[ba]) / 2 for answer, ab, ba in both}
        outcomes[name] = {id_: "b" if p > 0.5 else "a" if p < 0.5 else "tie" for id_, p in points.items()}
        decided = [r["order"][0] == r["winner"] for r in good.values() if r["winner"] != "tie"]
        turned = [ab for _, ab, _ in both], [ba for _, _, ba in both]
        counts = Counter(outcomes[name].values())
        groups = by_query(((answer["language"], answer["query"]), points[answer["id"]]) for answer, _, _ in both)
        judges[name] = {
            "judged": len(both),  # pairs, in both orders
            "win_rate": rounded(mean(list(points.values()))),  # of B; a tie is one half
            "interval": rounded(bootstrap(groups, mean)),
            "wins_a": counts["a"],
            "wins_b": counts["b"],
            "ties": counts["tie"],  # also where the two orders contradict each other
            "order_agreement": agreement(*turned),
            "order_kappa": kappa(*turned),
            "first_share": rounded(mean(decided)),  # verdicts for the answer shown first; 0.5 = no bias
            "verdicts": len(good),
            "failed": len(given) - len(good),
            "missing": 2 * len(pairs) - len(given),
            "cut": sum(r["cut"] > 0 for r in good.values()),
        }
    between = []
    for x, y in itertools.combinations(outcomes, 2):
        common = [id_ for id_ in outcomes[x] if id_ in outcomes[y]]
        said = [outcomes[x][id_] for id_ in common], [outcomes[y][id_] for id_ in common]
        between.append({"judges": [x, y], "pairs": len(common), "agreement": agreement(*said), "kappa": kappa(*said)})
    return {"judges": judges, "between_judges": between}


def agreement(x: Sequence[str], y: Sequence[str]) -> float | None:
    """The share of cases in which both say the same."""
    return rounded(mean([a == b for a, b in zip(x, y, strict=True)]))


def kappa(x: Sequence[str], y: Sequence[str]) -> float | None:
    """Cohen's kappa: agreement beyond that of two who say each thing as often, but independently of each other.

    None where both always say the same one thing: nothing is left beyond chance.
    """
    if not x:
        return None
    counts_x, counts_y, n = Counter(x), Counter(y), len(x)
    by_chance = sum(counts_x[c] * counts_y[c] for c in counts_x) / n**2
    observed = sum(a == b for a, b in zip(x, y, strict=True)) / n
    return None if by_chance == 1 else round((observed - by_chance) / (1 - by_chance), 4)


def show_preferences(result: dict) -> None:
    """One column per judge, on stderr."""
    table = Table(title=cli.shown(f"B = {result['run_b']} against A = {result['run_a']}"))
    table.add_column("measure")
    for name in result["judges"]:
        table.add_column(cli.shown(name), justify="right", overflow="fold")
    rows = (
        ("win_rate", "B preferred (tie = one half)", "{:.1%}"),
        ("wins_a", "pairs for A", "{:,}"),
        ("wins_b", "pairs for B", "{:,}"),
        ("ties", "ties", "{:,}"),
        ("order_agreement", "same verdict in both orders", "{:.1%}"),
        ("order_kappa", "  Cohen's kappa", "{:+.2f}"),
        ("first_share", "verdicts for the first answer", "{:.1%}"),
        ("judged", "pairs judged in both orders", "{:,}"),
        ("failed", "verdicts given up", "{:,}"),
        ("missing", "verdicts missing", "{:,}"),
        ("cut", "verdicts on cut texts", "{:,}"),
    )
    for key, name, form in rows:
        cells = [
            cell(judge[key], form, judge["interval"] if key == "win_rate" else None)
            for judge in result["judges"].values()
        ]
        table.add_row(name, *map(cli.shown, cells))
    cli.console.print(table)
    cli.say(f"{result['pairs']} pairs of answers to the same query and sample; without a partner: {result['unpaired']}")
    for pair in result["between_judges"]:
        if pair["agreement"] is not None:
            beyond = "-" if pair["kappa"] is None else f"{pair['kappa']:+.2f}"
            who = " and ".join(pair["judges"])
            cli.say(f"{who} agree on {pair['agreement']:.1%} of {pair['pairs']} pairs, Cohen's kappa {beyond}")
