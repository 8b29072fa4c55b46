"""The whole loop of Self-Lengthen: prints each stage command, then runs it. A script to copy.

One macro-iteration k (arXiv 2410.23933, section 3):

    generate.py instructions   the base model invents instructions            iter_k/instructions.jsonl
    generate.py responses      the Generator of k-1 drafts answers            iter_k/responses.jsonl
    extend.py                  the Extender of k-1 rewrites them longer       iter_k/extended.jsonl
    train.py x 2               both roles are fine-tuned on the result        iter_k/generator/ iter_k/extender/

After the last one: fresh instructions and answers of the last Generator, length demands woven into all that was
collected (generate.py constrain), one last fine-tune (final/generator/), and the evaluation of the base model, each
iteration and the final model (eval/*/scores.json). What it prints at the end is also in summary.json; what the stages
said is in run.log.

The plan is data: a list of steps, each with the settings of one stage. A flag of a stage is given here under the
stage's name, with a dot: --extend.rounds 1, --train.rank 16. `answers` is the drafting of the last stage. Killed at
any point and started again with the same flags, the run continues where it was: every stage resumes, and a finished
one loads no model. More may be asked of it: --instructions, --extend.max-attempts, --evaluate.samples and their like
only add work, but what was learned from it is learned again, and what the new models write replaces what the old ones
wrote: of several iterations all after the first. It is listed before anything starts. Any other change needs --redo.
Relative paths are below the repository, wherever run.py is started.

Examples
    python run.py                                   the demo: SmolLM2-135M on a CPU with 2 cores
    python run.py --dry-run                         only print the commands, as a shell script (recipes/demo.sh)
    python run.py --scale small --plan "RTX 4090"   what a night on a card of 24 GB takes, before it is started
    python run.py --model Qwen/Qwen2.5-7B-Instruct --run runs/qwen --instructions 5000 --iterations 3
    python run.py --instructions 24 --extend.samples 4 --evaluate.limit 16
    python run.py --extend.rounds 2 --redo extend   that stage afresh, and all that stands on it
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from evaluate import BenchmarkFlags
from extend import ExtendFlags
from generate import ConstrainFlags, InstructionsFlags, ResponsesFlags
from lengthen import cli
from lengthen.cli import InputFlags, ModelFlags, OutputFlags, SamplingFlags, at_least, flag
from lengthen.costs.forecast import TimeLeft, show_plan
from lengthen.costs.machine import HERE, ask
from lengthen.costs.yields import TOKENS_PER_WORD
from lengthen.evaluation.judge import JudgeFlags
from lengthen.evaluation.report.page import write_report
from lengthen.evaluation.report.summary import show
from lengthen.models.hub import write_cards
from lengthen.records import UserError, replace_file
from lengthen.steps import ROOT, Step, announce, as_shell, chosen_by, execute, launched, moved, outlook, standing_on
from lengthen.text import languages
from lengthen.training.settings import LoraFlags, MemoryFlags, OptimizerFlags, PairFlags, RuntimeFlags

# What else could make answers longer, or explain that they are: each beside the method, on the method's own files up to
# where it differs, and trained on as many target tokens. (The constant writer is in every scores.json.)
CONTROLS = {
    "told": "the base model, asked for --control-words or more",
    "eos-ban": "the base model, EOS banned for as long",
    "drafts": "fine-tuned on its own drafts, not extended, after the same length bias; in every iteration",
    "one-stage": "iteration 1 with extensions in one call",
    "no-bias": "iteration 1 with the short drafts and extensions kept",
    "no-removal": "the last iteration, its Extender trained on whole drafts (needs 2 iterations)",
    "other-mode": "the last Generator trained in the other --adapter-mode (needs 2 iterations)",
}
MODEL = "Qwen/Qwen2.5-7B-Instruct"  # of the presets that need a GPU


@dataclass(frozen=True)
class LoopFlags:
    """The flags of the loop itself."""

    run: str = flag("runs/paper", "folder of the run; its name is part of every record's id")
    scale: str = flag(
        "",
        "demo: SmolLM2 on a CPU, minutes; small: a night on a card of 24 GB; paper: its constants"
        " (default: demo, or paper where --model is given)",
        choices=("demo", "small", "paper"),
    )
    dry_run: bool = flag(False, "only print the commands, as a shell script")
    plan: str = flag(
        "",
        "only print calls, tokens, hours and GB of each stage, and what they assume; on this machine, or on a card by"
        ' its name: --plan "RTX 4090"',
        nargs="?",
        const=HERE,
        metavar="CARD",
    )
    redo: str = flag("", "start afresh, with what stands on it: extend, iter_2/extend, final, ...; several with commas")
    iterations: int = flag(3, "macro-iterations", at_least(1))
    instructions: int = flag(5000, "new instructions per macro-iteration", at_least(1))
    final_instructions: int = flag(0, "new instructions for the last stage; 0 = as --instructions", at_least(0))
    adapter_mode: str = flag(
        "continue",
        "continue = the adapter of the iteration before learns the new pairs; restart = a new one learns all pairs",
        choices=("continue", "restart"),
    )
    train_launcher: str = flag(
        "python", 'what starts train.py; for several GPUs "torchrun --nproc-per-node 8", with --train.accumulate 8'
    )
    evaluate: str = flag("all", "which models; ends = only the base and the final one", choices=("all", "ends"))
    controls: list[str] = flag(
        [],
        "run beside the method; no NAME = all of them. " + "; ".join(f"{k}: {v}" for k, v in CONTROLS.items()),
        nargs="*",
        metavar="NAME",
    )
    control_words: int = flag(4000, "length that told and eos-ban aim at, words", at_least(1))


@dataclass(frozen=True)
class StageSpec:
    """One stage as the loop calls it. Its flags are declared in its own script; here they are only passed on."""

    command: tuple[str, ...]  # script and subcommand
    file: str  # what it writes, in the folder of its part; training: the role instead, evaluation: the folder itself
    flags: tuple[type, ...]  # what a user sets under the stage's name, ...
    decided: tuple[str, ...] = ()  # ... but for those that the loop decides


STAGES = {
    "instructions": StageSpec(
        ("generate.py", "instructions"), "/instructions.jsonl", (InstructionsFlags, SamplingFlags), ("count",)
    ),
    "responses": StageSpec(("generate.py", "responses"), "/responses.jsonl", (ResponsesFlags, SamplingFlags)),
    "extend": StageSpec(("extend.py",), "/extended.jsonl", (ExtendFlags, SamplingFlags)),
    "train": StageSpec(
        ("train.py",),
        "",
        (PairFlags, LoraFlags, OptimizerFlags, MemoryFlags, RuntimeFlags),
        ("role", "budget_of", "plan", "merge_to", "gguf", "gguf_type"),
    ),
    # The answers of the last Generator: drafts that nobody extends, so all of them are kept.
    "answers": StageSpec(
        ("generate.py", "responses"), "/responses.jsonl", (ResponsesFlags, SamplingFlags), ("samples", "no_length_bias")
    ),
    "constrain": StageSpec(("generate.py", "constrain"), "/constrained.jsonl", (ConstrainFlags, SamplingFlags)),
    "evaluate": StageSpec(("evaluate.py",), "", (BenchmarkFlags, JudgeFlags, SamplingFlags)),
}
# Flags that mean the same in every stage, given once and without a dot.
SHARED: tuple[tuple[type, tuple[str, ...]], ...] = (
    (ModelFlags, ("model", "device", "dtype", "quantize", "trust_remote_code")),
    (OutputFlags, ("language", "seed")),
    (SamplingFlags, DECODING := ("max_rows", "kv_cache", "endpoint", "endpoint_path")),  # training has no use
)
# Where servers sample, training alone has a device.
SERVERS_DECIDE = ("device", "dtype", "quantize", "kv_cache")

Preset = dict[str, dict[str, Any]]  # values in place of the stages' defaults: by stage ("run" = the loop), by flag
# The demo: every value that differs from the paper's, because the model has 135M parameters, a context of 8,192 tokens
# and writes 400 words rather than 1,000, and because it must end within 15 minutes on two cores.
DEMO: Preset = {
    "run": {"model": "smollm2", "run": "runs/demo", "language": "demo", "iterations": 1, "evaluate": "ends"}
    | {"instructions": 12, "final_instructions": 6, "control_words": 350},
    # tokens: one draw that writes an essay instead of an instruction holds up those after it
    "instructions": {"long_words": 300, "max_new_tokens": 192},
    # More drafts instead of more attempts: all rows at once, no tail of retries. And short ones: of drafts of 370 words
    # and more 2 of 32 extensions passed, of one of 275 words 4 of 8.
    "responses": {"max_attempts": 1, "max_new_tokens": 360},
    # tokens: a row that goes on alone takes as long as thirty together
    "extend": {"samples": 6, "max_attempts": 1, "rounds": 1, "max_new_tokens": 560},
    "train": {"epochs": 2, "learning_rate": 2e-4},
    "answers": {"max_attempts": 1, "max_new_tokens": 560},
    # one attempt: 45 draws of this model wove in none, nearly all demands are appended
    "constrain": {"demand_min": 150, "demand_max": 1500, "demand_steps": (50, 100), "max_attempts": 1},
    # without the probes, which take half a minute per model
    "evaluate": {"limit": 8, "no_probes": True, "max_new_tokens": 560},
}

# A model of 7B on a card of 24 GB, over a night: the paper's constants but for the counts, and for how often a stage
# tries again. `--scale small --plan "RTX 4090"` says what each stage takes.
SMALL: Preset = {
    "run": {"model": MODEL, "run": "runs/small", "language": "demo", "iterations": 2, "evaluate": "ends"}
    | {"instructions": 240, "final_instructions": 100},
    "responses": {"max_attempts": 3},
    "extend": {"samples": 1, "max_attempts": 6, "rounds": 2},
    "train": {"epochs": 2},
    "constrain": {"demand_min": 1000, "max_attempts": 3},
}
PRESETS: dict[str, Preset] = {"demo": DEMO, "small": SMALL, "paper": {"run": {"model": MODEL}}}


@dataclass(frozen=True)
class Settings:
    """What the user asks for. Only what was given, or stands in the preset: the rest are the stages' defaults."""

    loop: LoopFlags
    shared: dict[str, Any]
    stages: dict[str, dict[str, Any]]  # by stage, by flag


# ---------------------------------------------------------------------------------------------------------
# The plan: which steps, in which order


def plan(own: Settings) -> list[Step]:
    """Every step of the run, in order. Pure: the same settings give the same steps."""
    steps = method(own)
    return steps + controls(own, steps)


def method(own: Settings) -> list[Step]:
    """The paper's loop, its last stage, and the evaluations."""
    loop, given, steps = own.loop, own.stages["instructions"], []
    asked: list[str] = []  # instructions.jsonl, by iteration
    extended: list[str] = []  # extended.jsonl, by iteration
    generators, extenders = [""], [""]  # adapters, by iteration; number 0 is the base model

    def add(part: str, stage: str, **decided: Any) -> str:
        """One more step; `decided`: the flags that the loop sets, above all what is read. Returns what it writes."""
        steps.append(make_step(own, part, stage, decided))
        return steps[-1].output

    def add_instructions(part: str, count: int) -> str:
        known = [*given.get("dedup_against", []), *asked]  # no iteration asks what an earlier one did
        codes = languages.chosen(own.shared.get("language", languages.DEFAULT))
        seeds = given.get("seeds", [f"prompts/{code}/seeds.jsonl" for code in codes])
        return add(part, "instructions", seeds=seeds, dedup_against=known, count=count)

    # The loop: both roles answer with what they learnt in the iteration before, and learn from what comes out.
    for k in range(1, loop.iterations + 1):
        part = f"iter_{k}"
        asked.append(add_instructions(part, loop.instructions))
        drafted = add(part, "responses", adapter=generators[-1], input=[asked[-1]])
        extended.append(add(part, "extend", adapter=extenders[-1], input=[drafted]))
        for role, adapters in (("generator", generators), ("extender", extenders)):
            adapters.append(add(part, "train", role=role, **train_settings(loop.adapter_mode, extended, adapters[-1])))

    # The last stage: answers without extension join what all iterations wrote. Each gets a length demand
    # that is true of it, and a Generator learns to follow such demands.
    fresh = add_instructions("final", loop.final_instructions or loop.instructions)
    answers = add("final", "answers", adapter=generators[-1], input=[fresh], samples=1, no_length_bias=True)
    constrained = add("final", "constrain", input=[*extended, answers])
    final = add("final", "train", role="generator", input=[constrained])  # from the base model

    # The base model comes first: the others are compared with it.
    measured = {"base": "", **{f"iter_{k}": generators[k] for k in range(1, loop.iterations + 1)}, "final": final}
    for name, adapter in measured.items():
        # Controls are compared with the iterations, which are evaluated for them.
        if loop.evaluate == "all" or loop.controls or name in ("base", "final"):
            add(f"eval/{name}", "evaluate", adapter=adapter)
    return steps


def train_settings(mode: str, pairs: Sequence[str], before: str) -> dict[str, Any]:
    """What a fine-tune starts from and learns. `pairs`: files by iteration; `before`: the adapter of the one before.

    continue: the release's way, the adapter goes on with the new pairs only; restart: from the base model, on all.
    """
    return {"adapter": before, "input": [pairs[-1]]} if mode == "continue" else {"adapter": "", "input": [*pairs]}


def make_step(own: Settings, part: str, stage: str, decided: dict[str, Any]) -> Step:
    """A stage with the flags of all stages, those that the loop decides, and the user's own."""
    spec, role = STAGES[stage], decided.get("role", "")
    file = spec.file or (role and f"/{role}")
    samples = SamplingFlags in spec.flags
    left_out = SERVERS_DECIDE if samples and own.shared.get("endpoint") else () if samples else DECODING
    shared = {k: v for k, v in own.shared.items() if k not in left_out}
    # `decided` twice: it stands before the user's flags on the command line, and wins where both name one.
    settings = {**shared, **decided, **own.stages[stage], **decided, "output": f"{own.loop.run}/{part}{file}"}
    name = f"{spec.command[-1].removesuffix('.py')} {role}".strip()
    launcher = own.loop.train_launcher if stage == "train" else "python"
    return Step(part, name, spec.command, settings, launcher=launcher, spelt=spellings(part, stage, name))


def all_settings(step: Step) -> dict[str, Any]:
    """A step's settings, with the stage's defaults for what is not given."""
    spec = next(spec for spec in STAGES.values() if spec.command == step.command)
    kinds = (ModelFlags, OutputFlags, SamplingFlags, InputFlags, *spec.flags)
    return {name: value for kind in kinds for name, value in cli.defaults_of(kind).items()} | step.settings


def spellings(part: str, stage: str, name: str) -> dict[str, str]:
    """{a flag of a stage: what it is called here}, for the hints of a stage that was started by run.py."""
    shared = {flag for _, names in SHARED for flag in names}
    own = [field.name for kind in STAGES[stage].flags for field in fields(kind)]
    flags = {name: f"--{stage}.{name}" for name in own if name not in (*shared, *STAGES[stage].decided)}
    flags |= {"overwrite": f"--redo {part}/{name.replace(' ', '-')}", "output": "--run"}
    flags |= {"count": "--final-instructions" if part == "final" else "--instructions"}
    spelt = {f"--{name.replace('_', '-')}": ours.replace("_", "-") for name, ours in flags.items()}
    spelt["--overwrite"] = flags["overwrite"]  # a part's name keeps its _
    if stage in ("instructions", "responses", "extend"):  # a flag of these holds in every iteration and control
        spelt["(with --overwrite)"] = f"(with --redo {stage}: afresh in every iteration, as the flag holds in all)"
        more = "it goes on from what is there, in every iteration: what has learned from that is made afresh"
        spelt["(it goes on from what is there)"] = f"({more})"
    return spelt


def controls(own: Settings, steps: Sequence[Step]) -> list[Step]:
    """The steps of the controls: changed copies of the method's. A control that would change nothing has none."""
    by = {(step.part, step.name): step for step in steps}
    last, mode, words = own.loop.iterations, own.loop.adapter_mode, own.loop.control_words
    added: list[Step] = []

    def add(like: Step, part: str, **changes: Any) -> str:
        added.append(moved(like, part, control, **changes))
        return added[-1].output

    def evaluate(name: str, **changes: Any) -> None:
        add(by["eval/base", "evaluate"], f"eval/control_{name}", **changes)

    def learn(name: str, k: int, **changes: Any) -> str:
        """Train and evaluate the Generator that iteration k would have had under a control, on as many tokens."""
        like = by[f"iter_{k}", "train generator"]
        adapter = add(like, f"controls/{name}", budget_of=like.output, **changes)
        evaluate(name, adapter=adapter)
        return adapter

    drafts, extend, teach = by["iter_1", "responses"], by["iter_1", "extend"], by["iter_1", "train extender"]
    for control in own.loop.controls:
        match control:
            # Two that train nothing: is a longer answer to be had by asking, or by force?
            case "told":
                evaluate("told", at_least=words)
            case "eos-ban":
                evaluate("eos-ban", min_new_tokens=round(TOKENS_PER_WORD * words))
            # Trained on long drafts, not on extensions: what is left of the growth is the selection's.
            case "drafts":
                drafted, adapter = [drafts.output], ""
                for k in range(1, last + 1):
                    if k > 1:  # from here on it drafts by itself
                        like = by[f"iter_{k}", "responses"]
                        drafted.append(add(like, f"controls/drafts_{k}", adapter=adapter))
                    adapter = learn(f"drafts_{k}", k, **train_settings(mode, drafted, adapter))
            # Parts of the method left out, one at a time.
            case "one-stage" if extend.settings.get("stages", ExtendFlags.stages) > 1:
                learn("one-stage", 1, input=[add(extend, "controls/one-stage", stages=1)])
            case "no-bias" if not drafts.settings.get("no_length_bias"):
                kept = add(drafts, "controls/no-bias", no_length_bias=True)
                learn("no-bias", 1, input=[add(extend, "controls/no-bias", input=[kept], no_length_bias=True)])
            # The Extender of the iteration before the last, trained otherwise, writes the last one's pairs.
            case "no-removal" if last > 1 and not teach.settings.get("no_line_removal"):
                like, learner = by[f"iter_{last - 1}", "train extender"], by[f"iter_{last}", "train generator"]
                extender = add(like, "controls/no-removal", no_line_removal=True, budget_of=like.output)
                longer = add(by[f"iter_{last}", "extend"], "controls/no-removal", adapter=extender)
                learn("no-removal", last, input=[*learner.settings["input"][:-1], longer])
            case "other-mode" if last > 1:
                pairs = [by[f"iter_{k}", "extend"].output for k in range(1, last + 1)]
                before = by[f"iter_{last - 1}", "train generator"].output
                other = "restart" if mode == "continue" else "continue"
                learn("other-mode", last, **train_settings(other, pairs, before))
    return added


def heading(step: Step) -> str:
    """What the shell script says above the commands of one part of the run."""
    if step.control:
        return f"Control {step.control}: {CONTROLS[step.control]}"
    what, _, k = step.part.replace("/", "_").partition("_")
    return {
        "iter": f"Iteration {k}: instructions, drafts, extensions; both roles learn from them",
        "final": "Answers without extension; length demands for all; the Generator that learns to follow them",
        "eval": "What the models write",
    }[what]


# ---------------------------------------------------------------------------------------------------------
# What comes of it


def summary_of(own: Settings, stages: list[dict], ended: list[str], seconds: float) -> dict:
    """What summary.json holds: one row per model that was measured, one per stage, and the settings."""
    # Flat, as they were given: report.html lists them.
    dotted = {f"{stage}.{name}": value for stage, given in own.stages.items() for name, value in given.items()}
    return {
        "settings": {**asdict(own.loop), **own.shared, **dotted},
        "seconds": round(seconds, 1),
        "models": {s["part"].removeprefix("eval/"): s for s in stages if s["stage"] == "evaluate"},
        "extenders": {s["part"]: s for s in stages if s["stage"] == "extend"},
        "controls_without_pairs": ended,
        "stages": stages,
    }


# ---------------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> argparse.ArgumentParser:
    """Our own flags, and those of the stages under their names. Only what is given comes out of it: see Settings."""
    parser = cli.make_parser(__doc__, "run.py")
    # Spelt out, the usage would be two screens of flags before the first sentence.
    parser.usage = "python run.py [--FLAG VALUE ...] [--STAGE.FLAG VALUE ...]"
    cli.add_flags(parser, "the loop", LoopFlags, given_only=True)
    shared = [name for _, names in SHARED for name in names]  # not once more under each stage's name
    for kind, names in SHARED:
        others = [field.name for field in fields(kind) if field.name not in names]
        cli.add_flags(parser, "every stage (without --model: the demo)", kind, leave_out=others, given_only=True)
    for name, spec in STAGES.items():
        for kind in spec.flags:
            title, left_out = f"{name}: {' '.join(spec.command)}", [*shared, *spec.decided]
            cli.add_flags(parser, title, kind, leave_out=left_out, prefix=f"{name}.", given_only=True)
    opposites = parser.add_argument_group("opposites, of what a preset may have switched on")
    for dest in [action.dest for action in parser._actions if action.const is True and "." in action.dest]:
        stage, name = dest.split(".")
        off = name.removeprefix("no_") if name.startswith("no_") else f"no_{name}"
        flag, told = (f"--{stage}.{word}".replace("_", "-") for word in (off, name))
        opposites.add_argument(flag, dest=dest, action="store_false", default=argparse.SUPPRESS, help=f"not {told}")
    return parser


def parse_args(argv: Sequence[str] | None = None, preset: Preset = DEMO) -> Settings:
    """The settings of a run: those given, over those of --scale; without it, of the preset where no --model is."""
    args, unknown = make_parser().parse_known_args(argv)
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)}", spelling_of(unknown[0]))
    given = vars(args)
    if given.get("scale"):
        preset = PRESETS[given["scale"]]
    elif given.get("model"):
        preset = {}  # the demo's values are those of one model
    stages = {name: dict(preset.get(name, {})) for name in STAGES}
    general = {**preset.get("run", {}), **{name: value for name, value in given.items() if "." not in name}}
    if "language" in general:  # the preset names a group
        general["language"] = languages.spelt(general["language"])
    # "extend.rounds" -> stages["extend"]["rounds"]; the preset's value gives way to it.
    for stage, name, value in ((*dotted.split("."), value) for dotted, value in given.items() if "." in dotted):
        stages[stage][name] = value
    ConstrainFlags(**stages["constrain"])  # the least and the most words must agree
    if general.get("controls") == []:
        general["controls"] = list(CONTROLS)
    if wrong := [name for name in general.get("controls", []) if name not in CONTROLS]:
        raise UserError(f"--controls knows no {', '.join(wrong)}", f"one or more of {', '.join(CONTROLS)}; none = all")
    # What is not the loop's own is for all stages: model, language, seed, ...
    own = {name: general.pop(name) for name in [field.name for field in fields(LoopFlags)] if name in general}
    return Settings(LoopFlags(**own), general, stages)


RENAMED = {  # flags of earlier versions whose names changed by more than the stage's name before them
    "instruction-tokens": "--instructions.max-new-tokens",
    "draft-tokens": "--responses.max-new-tokens",
    "extend-samples": "--extend.samples",
    "extend-attempts": "--extend.max-attempts",
    "demand-attempts": "--constrain.max-attempts",
    "answers": "--evaluate.samples",
}


def spelling_of(text: str) -> str:
    """The hint for a flag that run.py does not have: how it is spelt with a stage's name."""
    name = text.partition("=")[0].removeprefix("--")
    known = [action.option_strings[0] for action in make_parser()._actions]
    spelt = [RENAMED[name]] if name in RENAMED else [flag for flag in known if flag.endswith(f".{name}")]
    return " or ".join(spelt) or "python run.py --help"


def main(argv: list[str] | None = None) -> None:
    own = parse_args(argv)
    run = own.loop.run

    # 1) what will be done
    steps = plan(own)
    launched(own.loop.train_launcher)  # a mistake in it is found now, not after hours of sampling
    if left_out := sorted(set(own.loop.controls) - {step.control for step in steps}):
        cli.say(f"controls left out: {', '.join(left_out)}: the same as this run, or they need a second iteration")
    if own.loop.dry_run:
        words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--dry-run"]
        names = {"RUN": run, "MODEL": own.shared["model"]}
        print(as_shell(steps, shlex.join(["python", "run.py", *words]), heading, names))
        return
    os.chdir(ROOT)  # where the stages run: a relative path is below the repository, whoever reads it
    named = chosen_by(own.loop.redo, steps)
    afresh = standing_on(steps, named)
    fate, given = outlook(steps, all_settings, afresh), own.shared | own.stages["train"]
    if own.loop.plan:
        # What was measured here says nothing of a card.
        again = fate if own.loop.plan == HERE else [step.output for step in steps]
        show_plan(steps, all_settings, ask(own.loop.plan, given), again)
        return
    cli.say(f"{len(steps)} stages in {run}; stop and start again at any time")
    announce(steps, fate, own.loop.redo, afresh)

    # 2) do it, stage by stage
    started = time.monotonic()
    results, ended = execute(steps, run, named, afresh, TimeLeft(steps, all_settings, given, fate))

    # 3) say what came of it
    summary = summary_of(own, results, ended, time.monotonic() - started)
    replace_file(Path(run) / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    report = write_report(Path(run))
    write_cards(run)
    show(summary)
    cli.say(f"{summary['seconds']:.0f} s; everything is in {run}, this table in {run}/summary.json")
    cli.say(f"to look at: {report}")
    cli.emit({"summary": f"{run}/summary.json", "seconds": summary["seconds"], "models": summary["models"]})


if __name__ == "__main__":
    cli.run(main)
