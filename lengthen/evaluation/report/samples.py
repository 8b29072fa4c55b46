"""The records of a run's stages: what was drafted, extended and rejected; their numbers, without their texts."""

from collections import Counter
from typing import Any

from lengthen.evaluation.measures import median
from lengthen.evaluation.report.rundir import Files, amount, counts, display, listing, number, table, text


def read_samples(files: Files) -> tuple[list[dict], dict]:
    """The records of the stages without their texts, and where those are; (rows, {part: {kind: numbers}})."""
    rows: list[dict] = []
    numbers: dict[str, dict[str, list[dict]]] = {}
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
    entries = []
    for part, kinds in numbers.items():
        entry: dict[str, Any] = {"part": display(part), "funnels": []}
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
            entries.append(entry)
    return entries


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
