"""The report of a run: one HTML file with its own charts, made of whatever lies in the run's folder.

    1. read every file that docs/files.md lists, as far as it can be read. A run in progress has files that are
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
import re
from pathlib import Path

from lengthen.evaluation.report.charts import bins
from lengthen.evaluation.report.models import length_rows, measure_table, model_data, quality_tables, read_models
from lengthen.evaluation.report.rundir import Files, listing, text
from lengthen.evaluation.report.samples import extender_data, gain_rows, pair_rows, read_samples
from lengthen.evaluation.report.stages import cost_data, facts, progress_of, read_losses, read_stages, settings_data
from lengthen.evaluation.report.texts import Texts, as_shown, pack_answers, pack_samples, visible
from lengthen.evaluation.report.verdict import verdict
from lengthen.records import UserError, replace_file

PAGE = Path(__file__).with_name("page.html")


def collect(run: Path) -> tuple[dict, Texts]:
    """All that the page shows."""
    files, texts = Files(run), Texts()
    summary = files.object("summary.json")
    models = read_models(files)
    stages = read_stages(files, models)
    if not summary and not models and not stages:
        hint = "python evaluate.py report runs/demo   (a folder that run.py made: iter_1/, final/, eval/)"
        raise UserError(f"{run} holds no run: no iter_K/, no final/, no eval/, no summary.json", hint)
    rows, numbers = read_samples(files)
    extender = extender_data(numbers, stages)
    gains = bins(gain_rows(extender), lowest=0.01)
    sentences = verdict(models)
    if ended := [name for name in map(text, listing(summary.get("controls_without_pairs"))) if name]:
        sentences["not"].append(f"Controls that ended without a pair to train on: {', '.join(ended)}.")
    data = {
        "name": run.resolve().name,
        "facts": facts(summary, stages),
        "written": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "verdict": sentences,
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
        raise UserError(f"{run} is not a folder", "python evaluate.py report runs/demo")
    data, texts = collect(run)
    # In a script element only "<" could end the data, and JSON may always write it as an escape.
    values = json.dumps(as_shown(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    page = PAGE.read_text("utf-8")
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = visible(data["name"]).replace("&", "&amp;").replace("<", "&lt;")
    filled = {"script-hash": digest, "title": title, "texts": "\n".join(texts.blocks)}
    filled["data"] = values.replace("<", "\\u003c")
    path = run / "report.html"
    replace_file(path, re.sub(r"\{\{([\w-]+)\}\}", lambda match: filled[match[1]], page))
    return path
