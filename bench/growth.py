"""Does it grow? The study: what two iterations and the last stage make of a model, with every control beside them.

Four phases, each of which ends in a table that can be reported by itself. --until PHASE stops after one.

    iter_1  Instructions, drafts, extensions. Every setting of --try trains a Generator on them; the one that writes
            most on the first --search held-out instructions, at no worse EOS share and loop rate than the base model,
            is taken (where all are worse, the result says so), and these instructions are not reported on. Then the
            answers of base and iteration 1 to the other held-out instructions and to some of its own, and the controls
            told, eos-ban and drafts (run.py --controls).
    iter_2  Its texts. Restarting on all pairs and continuing on the new ones are tried with half of the new
            instructions, the better one (chosen as above) is trained whole; its own drafts control.
    final   Answers, length demands, the Generator that learns them; 64 demands to it, to base, and to base told to
            write more.
    parts   What one stage instead of two, and no length bias, would have made of iteration 1.

Every fine-tune but those that are tried sees as many target tokens as the Generator of its iteration. Intervals are of
95 %, over queries, paired. What the study reads from its folder it writes to growth.json there, with what every stage
took. Killed and started again with the same flags, it continues; --show prints what there is and starts nothing. Flags
not listed below go to run.py; --redo STAGE is as there.

    python bench/growth.py --until iter_1                            # SmolLM2: hours on 2 cores (docs/study.md)
    python bench/growth.py --show
    python bench/growth.py --model Qwen/Qwen2.5-7B-Instruct --run runs/growth-qwen --instructions 5000
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.table import Table

import run as loop
from lengthen import cli
from lengthen.evaluation.benchmark import find_benchmark
from lengthen.evaluation.compare import change_of, read_run, signed
from lengthen.evaluation.measures import median
from lengthen.evaluation.scores import cell
from lengthen.reading import read_jsonl
from lengthen.records import UserError, replace_file, to_line
from lengthen.steps import ROOT, Step, announce, chosen_by, execute, moved, sidecar_of, standing_on

# Where run.py's demo is for minutes: breadth, by the table in docs/study.md. A flag overrides each.
SMOLLM2: loop.Preset = {
    "run": {"run": "runs/growth", "instructions": 400, "final_instructions": 100, "control_words": 450},
    "responses": {"max_attempts": 2, "max_new_tokens": 560},
    "extend": {"samples": 2, "max_attempts": 4, "rounds": 2, "one_pair": True, "max_new_tokens": 1024},
    "answers": {"max_new_tokens": 1024},
    "evaluate": {"limit": 0, "no_probes": False, "max_new_tokens": 1024},
}
# 4e-4 for 3 epochs looped; 3e-4 for 4 wrote more than 2e-4 for 2, of the same 62 pairs (docs/study.md).
TRIES = ["rank=8,learning_rate=3e-4,epochs=2", "rank=8,learning_rate=3e-4,epochs=4"]
PHASES = ("iter_1", "iter_2", "final", "parts")
NOT_HERE = ("--plan", "--dry-run", "--iterations", "--controls")  # flags of run.py: the study's phases decide these
OWN = 20  # of the instructions that iteration 1 was trained on, answered as well
TOLERATED = 0.05  # EOS share and loop rate may be so much worse than the base model's
GROWTH = {"iter_1": 1.2, "iter_2": 1.5}  # bars: the lower end of the interval is above
OVER_DRAFTS = 1.15  # the same against a fine-tune on own drafts


# ---------------------------------------------------------------------------------------------------------
# Files that are made of others


def as_queries(rows: Sequence[dict]) -> list[dict]:
    """Instructions as a benchmark without demands; each prompt once."""
    prompts = {r["prompt"]: r["language"] for r in rows}
    return [{"language": language, "constraint": "", "query": prompt} for prompt, language in prompts.items()]


def by_chance(rows: Sequence[dict]) -> list[dict]:
    """In an order that depends on the instructions alone: all rows of one stay together."""
    return sorted(rows, key=lambda r: (hashlib.sha256(r["prompt"].encode()).hexdigest(), r["id"]))


def half_of(rows: Sequence[dict]) -> list[dict]:
    """The rows of half of the instructions."""
    prompts = list(dict.fromkeys(r["prompt"] for r in by_chance(rows)))
    taken = set(prompts[: -(-len(prompts) // 2)])
    return [r for r in by_chance(rows) if r["prompt"] in taken]


def with_dropped(file: str | Path) -> tuple[list[dict], list[dict]]:
    """(the records of a stage, those that only its length bias dropped)"""
    path = Path(file).with_suffix(".rejected.jsonl")
    rejected = read_jsonl(path, needs=()) if path.exists() and path.stat().st_size else []
    dropped = [{k: v for k, v in r.items() if k != "reason"} for r in rejected if r["reason"] == "length-bias"]
    return read_jsonl(file), dropped


# ---------------------------------------------------------------------------------------------------------
# The study as data: phases of steps. What is decided on the way is read from the folder.


class Study:
    """The steps of each phase, for settings that grow by what the study finds: `setting`, then `mode`."""

    def __init__(self, args: argparse.Namespace, own: loop.Settings, writes: bool = True):
        self.run, self.own, self.tries, self.writes = Path(own.loop.run), own, args.tries, writes
        self.setting = self.mode = ""
        self.worse: dict[str, list[str]] = {}  # contest -> at what its winner is worse than the base model
        held_out = read_jsonl(args.held_out)
        if len(held_out) < args.search + 2:
            raise UserError(f"{args.held_out} has {len(held_out)} instructions", f"more than {args.search + 1}")
        self.searched = self.write("queries/search.jsonl", as_queries(held_out[: args.search]), once=True)
        reported = self.write("queries/report.jsonl", as_queries(held_out[args.search :]), once=True)
        files = [*find_benchmark("mini"), args.demands]
        demands = [row for file in files for row in read_jsonl(file, needs=("query",))]
        demands = [row for row in demands if row["language"] == "en"]
        self.demands = self.write("queries/demands.jsonl", demands, once=True)
        own.stages["evaluate"]["benchmark"] = reported
        asked = own.stages["instructions"]
        asked["dedup_against"] = [*asked.get("dedup_against", []), args.held_out]  # nobody trains on what is reported

    def write(self, name: str, rows: Sequence[dict], once: bool = False) -> str:
        """The rows as a file that a stage reads; of the same rows the same bytes, so a finished stage stays finished.

        once: not again with other rows; else instructions that chose the setting might be reported on later.
        """
        path, data = self.run / name, b"".join(map(to_line, rows))
        before = path.read_bytes() if path.exists() else b""
        if self.writes and before != data:
            if once and before:
                searched = (self.run / "queries/search.jsonl").read_bytes().count(b"\n")
                hint = f"--search {searched}, --held-out and --demands as they were then; or another --run"
                raise UserError(f"the study was begun with other queries than this command's: {path}", hint)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)
        return str(path)

    def steps(self, *names: str, control: str = "") -> list[Step]:
        """The steps of run.py's plan whose part, or part and name, is one of the names, in the order of the names."""
        plan = loop.plan(self.own)
        return [s for name in names for s in plan if s.control == control and name in (s.part, f"{s.part} {s.name}")]

    def asked(self, part: str, benchmark: str, like: str = "eval/base", **changes: Any) -> Step:
        """An evaluation of the plan, with other queries."""
        [step] = [s for s in loop.plan(self.own) if s.part == like]
        return moved(step, part, benchmark=benchmark, **changes)

    def contest(self, part: str, entrants: dict[str, Step]) -> list[Step]:
        """Trainings, and the answers of each to the search instructions; those of base once, in the first contest."""
        steps = [self.asked("search/base", self.searched)] if part == "search" else []
        for name, train in entrants.items():
            steps += [train, self.asked(f"{part}/{name}/eval", self.searched, adapter=train.output)]
        return steps

    def winner(self, part: str, names: Sequence[str]) -> str:
        """The one that wrote most, where its EOS share and loop rate are not worse than the base model's."""
        base = read_run(str(self.run / "search/base"))

        def worth(name: str) -> float:
            scores = read_run(str(self.run / part / name / "eval"))
            return -1 if worse(base, scores) or scores["words_median"] is None else scores["words_median"]

        found = max(names, key=worth)
        self.worse[part] = bad = worse(base, read_run(str(self.run / part / found / "eval")))
        if bad:
            cli.say(f"{part}: none is as good as the base model; {found} is taken, worse at {', '.join(bad)}")
        return found

    def begun(self, until: str) -> list[Step]:
        """The steps of the phases up to the first list that is not finished: by what comes of it others are decided."""
        there: list[Step] = []
        for _, steps in self.phases(until):
            there += steps
            if not all(step.control or finished(step) for step in steps):
                break
        return there

    def phases(self, until: str) -> Iterator[tuple[str, list[Step]]]:
        """(phase, steps) in order; a phase has several lists where a decision comes in between."""
        return takewhile(lambda one: PHASES.index(one[0]) <= PHASES.index(until), self._phases())

    def _phases(self) -> Iterator[tuple[str, list[Step]]]:
        texts = ("instructions", "responses", "extend")
        yield "iter_1", self.steps(*(f"iter_1 {name}" for name in texts))
        pairs = str(self.run / "iter_1/extended.jsonl")
        [train] = self.steps("iter_1 train generator")
        folders = {folder_of(text): text for text in self.tries}
        entrants = {n: moved(train, f"search/{n}", **setting_of(text)) for n, text in folders.items()}
        yield "iter_1", self.contest("search", entrants)
        found = self.winner("search", list(folders))
        self.setting = folders[found]
        self.own.stages["train"].update(setting_of(self.setting))
        if self.writes:
            adopt(entrants[found].output, train.output)
        own = self.write("queries/own.jsonl", as_queries(by_chance(read_jsonl(pairs)))[:OWN])
        yield (
            "iter_1",
            [
                *self.steps("iter_1 train generator", "eval/base", "eval/iter_1"),
                *self.steps("controls/drafts_1", "eval/control_drafts_1", control="drafts"),
                *self.steps("eval/control_told", control="told"),
                *self.steps("eval/control_eos-ban", control="eos-ban"),
                *(self.asked(f"own/{name}", own, f"eval/{name}") for name in ("base", "iter_1")),
            ],
        )

        yield "iter_2", self.steps("iter_1 train extender", *(f"iter_2 {name}" for name in texts))
        new = str(self.run / "iter_2/extended.jsonl")
        half = self.write("half/extended.jsonl", half_of(read_jsonl(new)))
        [before], [train] = self.steps("iter_1 train generator"), self.steps("iter_2 train generator")
        modes = {
            mode: moved(train, f"half/{mode}", **loop.train_settings(mode, [pairs, half], before.output))
            for mode in ("restart", "continue")
        }
        yield "iter_2", self.contest("half", modes)
        self.mode = self.winner("half", list(modes))
        self.own = replace(self.own, loop=replace(self.own.loop, adapter_mode=self.mode))
        drafts = self.steps("controls/drafts_2", "eval/control_drafts_2", control="drafts")
        yield "iter_2", [*self.steps("iter_2 train generator", "eval/iter_2"), *drafts]

        [generator] = self.steps("iter_2 train generator")
        yield (
            "final",
            [
                replace(s, settings={**s.settings, "budget_of": generator.output}) if s.name == "train generator" else s
                for s in self.steps("final")
            ]
            + [
                *self.steps("eval/final"),
                *(
                    self.asked(f"demands/{name}", self.demands, f"eval/{name}")
                    for name in ("base", "final", "control_told")
                ),
                self.asked("own/iter_2", own, "eval/iter_2"),
            ],
        )
        yield (
            "parts",
            [*self.steps("controls/one-stage", "eval/control_one-stage", control="one-stage"), *self.no_bias()],
        )

    def no_bias(self) -> list[Step]:
        """run.py's control no-bias, without drawing again what iteration 1 drew and its length bias dropped."""
        drafts, extend, train = self.steps("iter_1 responses", "iter_1 extend", "iter_1 train generator")
        kept, dropped = with_dropped(extend.output)
        reached = {r["prompt"] for r in kept + dropped} if extend.settings.get("one_pair") else set()
        missed = [r for r in with_dropped(drafts.output)[1] if r["prompt"] not in reached]
        inputs, steps = [extend.output], []
        if dropped:
            inputs.append(self.write("controls/no-bias/dropped.jsonl", dropped))
        if missed:
            file = self.write("controls/no-bias/drafts.jsonl", missed)
            steps = [moved(extend, "controls/no-bias", "no-bias", input=[file], no_length_bias=True)]
            inputs.append(steps[0].output)
        learn = moved(train, "controls/no-bias", "no-bias", input=inputs, budget_of=train.output)
        answers = self.steps("eval/base")[0]
        return [*steps, learn, moved(answers, "eval/control_no-bias", "no-bias", adapter=learn.output)]


def folder_of(text: str) -> str:
    return text.replace(",", "_").replace("=", "-")


def setting_of(text: str) -> dict[str, Any]:
    """ "rank=8,epochs=2" -> {"rank": 8, "epochs": 2}, checked as train.py's flags are."""
    flags = [f"--train.{part.replace('_', '-')}" for part in text.split(",")]
    try:
        return loop.parse_args(flags, preset={}).stages["train"]
    except UserError as error:
        raise UserError(f"--try {text}: {error.message}", "--try rank=8,learning_rate=2e-4,epochs=2") from None


def adopt(trained: str, output: str) -> None:
    """A finished training as that of the iteration: its command would be the same, so it is not done twice."""
    if not Path(output).exists():
        half = Path(output).with_name(".generator")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(trained, half)
        half.rename(output)


def worse(base: dict, scores: dict) -> list[str]:
    """What is worse than the base model's by more than is tolerated."""
    return [
        name for name, sign in (("eos_share", -1), ("loop_rate", 1)) if sign * (scores[name] - base[name]) > TOLERATED
    ]


# ---------------------------------------------------------------------------------------------------------
# The result: everything is read from the folder, so that --show and a finished run say the same


def finished(step: Step) -> bool:
    """Whether a step has nothing left to do; with a damaged sidecar it has."""
    done = False
    with suppress(UserError):
        done = sidecar_of(step).get("status") == "done"
    return done and (step.name != "evaluate" or (Path(step.output) / "scores.json").exists())


def cost_of(step: Step) -> dict:
    """What a finished step took and gave: seconds, tokens (drawn, or trained on), records or pairs."""
    meta = sidecar_of(step)
    stats, trained = meta.get("stats", {}), meta.get("summary", {})
    tokens = stats.get("tokens", trained.get("target_tokens"))
    if step.name == "evaluate":
        tokens = read_run(step.output)["tokens"]
    records, seconds = trained.get("pairs", meta.get("accepted")), round(meta["seconds"], 1)
    hourly = round(3600 * records / seconds) if step.name == "extend" and seconds else None
    known = {"seconds": seconds, "tokens": tokens, "records": records, "pairs_per_hour": hourly}
    return {"part": step.part, "stage": step.name, **known}


def texts_of(step: Step) -> dict:
    """[texts, their instructions, median words] of drafts or extensions, before the length bias and after it."""

    def counted(rows: list[dict]) -> list:
        return [len(rows), len({r["prompt"] for r in rows}), median([r["response_words"] for r in rows])]

    kept, dropped = with_dropped(step.output)
    return {"before": counted(kept + dropped), "after": counted(kept)}


def changed(key: str, before: dict, after: dict) -> dict:
    """How a measure differs between two runs (words as a multiple), with the paired interval."""
    found = change_of(key, before, after)
    return {"value": found.value, "interval": found.interval}


def rows_of(runs: dict[str, dict], tables: Sequence[str]) -> dict[str, dict]:
    """{model: {measure: {"value", "interval", "change": {"value", "interval"}}}}; changes from the first, the base."""
    keys = [key for key, (*_, where) in COLUMNS.items() if set(tables) & set(where.split())]
    return {
        name: {"answers": run["answers"]}
        | {
            key: {"value": run[key], "interval": run["intervals"].get(key), "change": changed(key, runs["base"], run)}
            for key in keys
        }
        for name, run in runs.items()
        if "base" in runs
    }


COLUMNS = {  # measure of scores.json: (title, format, its tables)
    "words_median": ("words (EOS)", "{:.0f}", "eval own demands"),
    "words_median_all": ("words (all)", "{:.0f}", "eval own"),
    "eos_share": ("EOS share", "{:.0%}", "eval own demands"),
    "loop_rate": ("loops", "{:.0%}", "eval own demands"),
    "rank_correlation": ("wanted/written", "{:+.2f}", "demands"),
    "length_score": ("length score", "{:.1f}", "demands"),
    "perplexity": ("perplexity", "{:.2f}", "probes"),
    "own_prompt_gain": ("gain by own query", "{:.3f}", "probes"),
    "short_loss": ("short tasks", "{:.2f}", "probes"),
    "distinct_3": ("distinct-3", "{:.3f}", "probes"),
}
TABLES = {
    "eval": "Held-out instructions; x = median words as a multiple of the base model's",
    "probes": "The same answers, probed",
    "own": "Instructions that iteration 1 was trained on",
    "demands": "Length demands; in the second line the difference from the base model",
}


def result_of(study: Study, steps: Sequence[Step]) -> dict:
    """All that the finished steps say."""
    answered = {s.part: s.output for s in steps if s.name == "evaluate"}
    groups: dict[str, dict[str, dict]] = {"eval": {}, "own": {}, "demands": {}}
    for part, output in answered.items():
        if part.partition("/")[0] in groups:
            groups[part.partition("/")[0]][part.partition("/")[2]] = read_run(output)
    runs = groups["eval"]
    over = {
        f"{model} / {other}": changed("words_median", runs[other], runs[model])
        for model, others in OVER.items()
        for other in others
        if model in runs and other in runs
    }
    tables = {"eval": ("eval", "probes"), "own": ("own",), "demands": ("demands",)}
    rows = {group: rows_of(read, tables[group]) for group, read in groups.items()}
    return {
        "bench": "growth",
        "model": study.own.shared["model"],
        "setting": study.setting,
        "setting_worse": study.worse.get("search", []),
        "mode": study.mode,
        "mode_worse": study.worse.get("half", []),
        "bars": bars(rows, over, runs),
        "rows": rows,
        "over": over,
        "searched": {
            part: read_run(out)["words_median"]
            for part, out in answered.items()
            if part.partition("/")[0] in ("search", "half")
        },
        "texts": {f"{s.part} {s.name}": texts_of(s) for s in steps if s.name in ("responses", "extend")},
        "cost": (cost := [cost_of(s) for s in steps]),
        "seconds": round(sum(c["seconds"] for c in cost)),
    }


# What each ratio separates is in the study's text: selection, extension, the second stage, the bias.
OVER = {
    "iter_1": ("control_drafts_1", "control_one-stage", "control_no-bias", "control_told"),
    "iter_2": ("control_drafts_2", "iter_1"),
}


def bars(rows: dict, over: dict, runs: dict) -> list[dict]:
    """Each bar whose figures are there: what is measured, its lower end (or what is worse), and whether it is met."""
    found = []
    for model, bar in GROWTH.items():
        if model in rows["eval"]:
            low = (rows["eval"][model]["words_median"]["change"]["interval"] or [0])[0]
            found.append({"bar": f"{model}: growth above {bar}", "low": low, "met": low > bar})
            bad = worse(runs["base"], runs[model])
            found.append({"bar": f"{model}: EOS share and loop rate", "worse": bad, "met": not bad})
        own = over.get(f"{model} / control_drafts_{model[-1]}")
        if own:
            low = (own["interval"] or [0])[0]
            found.append({"bar": f"{model}: over own drafts above {OVER_DRAFTS}", "low": low, "met": low > OVER_DRAFTS})
    if "final" in rows["demands"]:
        low = (rows["demands"]["final"]["rank_correlation"]["change"]["interval"] or [0])[0]
        found.append({"bar": "final: rank correlation above base", "low": low, "met": low > 0})
    return found


def show(result: dict) -> None:
    """Everything as tables."""
    for name, title in TABLES.items():
        rows, columns = result["rows"][name.replace("probes", "eval")], [k for k in COLUMNS if name in COLUMNS[k][2]]
        table = Table("model", title=title)
        for key in columns:
            table.add_column(COLUMNS[key][0], justify="right")
        for model, row in rows.items():
            cells = []
            for key in columns:
                form, one = COLUMNS[key][1], row.get(key, {"value": None, "interval": None, "change": {}})
                change, sign = one["change"] if model != "base" else {}, signed(key, form)
                more = "" if change.get("value") is None else "\n" + cell(change["value"], sign, change["interval"])
                cells.append(cell(one["value"], form, one["interval"]) + more)
            table.add_row(model, *map(cli.shown, cells))
        if rows:
            cli.console.print(table)
    for what, one in result["over"].items():
        cli.say(f"{what}: {cell(one['value'], 'x{:.2f}', one['interval'])}")
    table = Table("part", "stage", title="What it took")
    for column in ("seconds", "tokens", "records", "pairs_per_hour"):
        table.add_column(column.replace("_", " "), justify="right")
    for one in result["cost"]:
        values = (one[key] for key in ("seconds", "tokens", "records", "pairs_per_hour"))
        table.add_row(one["part"], one["stage"], *map(cell, values))
    cli.console.print(table)
    table = Table("texts", title="Texts, their instructions, median words")
    for column in ("before the length bias", "after it"):
        table.add_column(column, justify="right")
    for what, one in result["texts"].items():
        table.add_row(what, *(", ".join(map(cell, one[when])) for when in ("before", "after")))
    cli.console.print(table)
    for one in result["bars"]:
        low = f"lower end {one['low']:.2f}" if "low" in one else ", ".join(one["worse"]) or "no worse"
        cli.say(f"{'met' if one['met'] else 'MISSED'}  {one['bar']}: {low}")


LONGER = {"words_median": "growth (EOS)", "words_median_all": "growth (all)"}
QUOTED = {  # group: (its table's name, {measure: column of its change from the base model})
    "eval": ("held out", LONGER),
    "own": ("trained on", LONGER),
    "demands": ("length demands", {"rank_correlation": "wanted/written - base", "length_score": "score - base"}),
}


def as_table(group: str, rows: dict[str, dict]) -> tuple[str, list[str], list[list[str]]]:
    """A group's table as a document has it: name, columns, rows; every measure, and how much some of them changed."""
    name, changes = QUOTED[group]
    columns = {key: (title, form) for key, (title, form, where) in COLUMNS.items() if group in where.split()}
    lines = []
    for model, row in rows.items():
        values = [cell(row[key]["value"], form, row[key]["interval"]) for key, (_, form) in columns.items()]
        for key in changes:
            form, change = signed(key, columns[key][1]).removeprefix("x"), row[key]["change"]
            values.append(cell(change["value"], form, change["interval"]))
        lines.append([model, *values])
    return name, ["model", *(title for title, _ in columns.values()), *changes.values()], lines


def draw(folders: dict[str, str], title: str) -> Any:
    """Every answer's words as a dot (hollow = not ended by EOS), the median of the ended ones with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.55 * len(folders) + 1.4), dpi=110)
    axis = figure.subplots()
    for y, run in enumerate(read_run(folder) for folder in folders.values()):
        for ended in (True, False):
            some = [a["words_median_all"] for a in run["measured"] if (a["words_median"] is not None) == ended]
            spread = [y + 0.28 * ((i * 0.618034) % 1 - 0.5) for i in range(len(some))]
            color = "#9ecae1" if ended else "none"
            axis.scatter(some, spread, s=12, c=color, edgecolors="#6baed6", linewidths=0.6, zorder=1)
        if (value := run["words_median"]) is not None:
            axis.plot(run["intervals"]["words_median"] or [value] * 2, [y, y], color="#08306b", linewidth=2.2, zorder=2)
            axis.plot(value, y, "o", color="#08306b", markersize=6, zorder=3)
    axis.set_yticks(range(len(folders)), folders)
    axis.invert_yaxis()
    axis.set(xlabel="words of an answer (hollow: cut or a loop); bar: median of the ended ones, 95 %", title=title)
    axis.set_xlim(left=0)
    axis.grid(axis="x", alpha=0.3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, loop.Settings]:
    """Our flags and run.py's."""
    parser = cli.make_parser(__doc__, "bench/growth.py")
    add = parser.add_argument
    add("--held-out", default="prompts/en/heldout.jsonl", metavar="FILE", help="instructions that nobody trains on")
    add("--demands", default="prompts/en/bench_more.jsonl", metavar="FILE", help="queries beside the mini benchmark's")
    add("--search", type=cli.at_least(2), default=12, help="first held-out instructions, to choose the setting by")
    add("--try", dest="tries", nargs="+", default=TRIES, help="settings of train.py")
    add("--until", choices=PHASES, default=PHASES[-1], help="the last phase to run")
    add("--show", action="store_true", help="print what is there, start nothing")
    add("--save", default="", metavar="NAME", help="also write bench/results/NAME.json")
    args, more = parser.parse_known_args(argv)
    for text in args.tries:
        setting_of(text)
    if wrong := [word for word in more if word.partition("=")[0] in NOT_HERE]:
        raise UserError(f"{wrong[0]} is run.py's, the study decides that itself", f"leave {wrong[0]} out")
    preset = {stage: {**loop.DEMO[stage], **SMOLLM2.get(stage, {})} for stage in loop.DEMO}
    # Before the user's flags, which win: what the phases need.
    fixed = ["--iterations=2", "--evaluate=all", "--evaluate.samples=3"]
    return args, loop.parse_args([*fixed, *more, "--controls", "told", "eos-ban", "drafts", "one-stage"], preset)


def main(argv: list[str] | None = None) -> None:
    args, own = parse_args(argv)
    os.chdir(ROOT)  # where the stages run: relative paths are below the repository
    study, done = Study(args, own, writes=not args.show), list[Step]()
    if args.show:
        done = [step for step in study.begun(args.until) if finished(step)]
    else:
        # What stands on a step is looked for in all phases that are there, by a copy: decisions change a study.
        there = Study(*parse_args(argv), writes=False).begun(args.until) if own.loop.redo else []
        named = chosen_by(own.loop.redo, there)
        afresh = standing_on(there, named)
        announce(there, {}, own.loop.redo, afresh)
        for phase, steps in study.phases(args.until):
            cli.say(f"phase {phase}: {sum(map(finished, steps))} of {len(steps)} stages are there")
            # By their labels: what is decided may be another setting now.
            redone = ([s for s in steps if s.label in {one.label for one in some}] for some in (named, afresh))
            execute(steps, str(study.run), *redone)
            done += [step for step in steps if finished(step)]
    if not done:
        raise UserError(f"{study.run} holds no finished stage", "the same command without --show")
    result = result_of(study, done)
    replace_file(study.run / "growth.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    models = {s.part.removeprefix("eval/"): s.output for s in done if s.part.startswith("eval/")}
    if models:
        title = f"{own.shared['model']}: held-out instructions"
        cli.save_figure(study.run / "growth.png", lambda: draw(models, title))
    show(result)
    cli.say(f"{study.run}/growth.json, growth.png; {result['seconds']} s of stages")
    cli.emit(result)
    if args.save:
        import harness  # beside this file: there when it runs as a script

        tables = [harness.table(*as_table(group, rows)) for group, rows in result["rows"].items() if rows]
        harness.finish("growth", argv, args.save, tables, result)


if __name__ == "__main__":
    cli.run(main)
