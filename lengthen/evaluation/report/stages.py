"""The stages of a run: what was made, what it took, with which settings."""

import json
from pathlib import Path
from typing import Any

from lengthen.evaluation.report.charts import loss_curve
from lengthen.evaluation.report.rundir import Files, amount, display, iteration, table, text

STAGES = (  # file, stage
    ("instructions.jsonl", "instructions"),
    ("responses.jsonl", "responses"),
    ("extended.jsonl", "extend"),
    ("constrained.jsonl", "constrain"),
)


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
                summary = table(meta.get("summary"))
                stages.append(stage_entry(part, f"train {role}", meta, amount(summary.get("tokens")), None))
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
    sentences = []
    for s in stages:
        if s["status"] == "done" and s.get("scored", True):
            continue
        where = f"{s['part']}, {s['stage']}"
        if s["status"] == "done":
            sentences.append(f"{where}: answered, not scored")
        else:
            kept = f", {s['accepted']:,.0f} kept so far" if s["accepted"] is not None else ""
            sentences.append(f"{where}: {'not finished' if s['status'] == 'running' else 'no sidecar'}{kept}")
    return sentences


def read_losses(files: Files) -> list[dict]:
    losses = []
    for part in files.parts():
        for role in ("generator", "extender"):
            curve = loss_curve([entry for _, entry in files.lines(f"{part}/{role}/train_log.jsonl")])
            if curve:
                losses.append({"part": display(part), "role": role, **curve})
    return losses


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
        settings = {**table(meta.get("info")), **table(meta.get("settings"))}
        if settings:
            title = f"{stage['part']}, {stage['stage']}"
            per_stage.append({"title": title, "rows": [[k, flat(v)] for k, v in settings.items()]})
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
