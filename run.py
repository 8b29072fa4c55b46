"""The whole loop of Self-Lengthen: prints each stage command, then runs it. A script to copy.

One macro-iteration k (arXiv 2410.23933, section 3):

    generate.py instructions   the base model invents instructions            iter_k/instructions.jsonl
    generate.py responses      the Generator of k-1 drafts answers            iter_k/responses.jsonl
    extend.py                  the Extender of k-1 rewrites them longer       iter_k/extended.jsonl
    train.py x 2               both roles are fine-tuned on the result        iter_k/generator/ iter_k/extender/

Behind the last one: fresh instructions and answers of the last Generator, length demands woven into all that was
collected (generate.py constrain), one last fine-tune (final/generator/), and the evaluation of the base model, each
iteration and the final model (eval/*/scores.json). What it prints at the end is also in summary.json.

Killed at any point and started again with the same flags it goes on where it was: every stage resumes, and a
finished one is a no-op that loads no model.

Examples
    python run.py                                   the demo: SmolLM2-135M on a CPU with 2 cores
    python run.py --dry-run                         only print the commands, as a shell script
    python run.py --model Qwen/Qwen2.5-7B-Instruct --run runs/qwen --instructions 5000 --iterations 3
"""

import argparse
import ctypes
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from lengthen import cli
from lengthen.evaluation.report.page import write_report
from lengthen.records import UserError, replace_file

ROOT = Path(__file__).resolve().parent

# The demo: every value that differs from the paper's, because the model has 135M parameters, a context of 8,192 tokens
# and writes 400 words rather than 1,000, and because it must end within 15 minutes on two cores.
DEMO = {
    "model": "smollm2",
    "run": "runs/demo",
    "language": "en",
    "iterations": 1,
    "instructions": 12,
    "final_instructions": 6,
    "instruction_tokens": 192,  # one draw that writes an essay instead holds up those behind it
    "samples": 2,
    "draft_tokens": [360],  # of drafts of 370 words and more 2 of 32 extensions passed, of one of 275 words 4 of 8
    "max_attempts": 1,  # more drafts instead of more attempts: all rows at once, no tail of retries
    "extend_samples": [6],  # likewise
    "extend_attempts": 1,
    "rounds": 1,
    "max_new_tokens": 560,  # a row that goes on alone takes as long as thirty together
    "long_words": 300,
    "demand_min": 150,
    "demand_max": 1500,
    "demand_steps": "50,100",
    "demand_attempts": 1,  # 45 draws of this model wove in none: nearly all demands are appended
    "epochs": 2,
    "learning_rate": 2e-4,
    "benchmark": "mini",
    "limit": 8,
    "evaluate": "ends",
    "no_probes": True,  # they take half a minute per model
    "control_words": 350,
}

# What else could make answers longer, or explain that they are: each beside the method, on the method's own files up to
# where it differs, and trained on as many target tokens. (The constant writer is in every scores.json.)
CONTROLS = {
    "told": "the base model, asked for --control-words or more",
    "eos-ban": "the base model, EOS banned for as long",
    "drafts": "fine-tuned on its own drafts, not extended, behind the same length bias; in every iteration",
    "one-stage": "iteration 1 with extensions in one call",
    "no-bias": "iteration 1 with the short drafts and extensions kept",
    "no-removal": "the last iteration, its Extender trained on whole drafts (needs 2 iterations)",
    "other-mode": "the last Generator trained in the other --adapter-mode (needs 2 iterations)",
}
TOKENS_PER_WORD = 1.35  # of English prose, for most tokenizers: how long "for as long" is in tokens


@dataclass
class Step:
    """One stage command. `part` is the folder of the run it belongs to: iter_K, final, eval/..."""

    part: str
    name: str
    command: list[str]  # without the interpreter: ["generate.py", "responses", "--model", ...]
    control: str = ""  # the control it belongs to; the method itself has none


# ---------------------------------------------------------------------------------------------------------
# The plan: which commands, in which order


def plan(args: argparse.Namespace) -> list[Step]:
    """Every command of the run, in order. Pure: the same flags give the same commands."""
    run, steps = Path(args.run), []
    controlled = ""  # the control that the steps being added belong to
    model = flags(model=args.model, device=args.device, dtype=args.dtype, quantize=args.quantize)
    model += ["--trust-remote-code"] if args.trust_remote_code else []
    common = model + flags(language=args.language, seed=args.seed)
    machine = flags(max_rows=args.max_rows or "", kv_cache=args.kv_cache)
    sampling = flags(max_new_tokens=args.max_new_tokens or "") + machine
    bias = ["--no-length-bias"] if args.no_length_bias else []

    def add(part: str, name: str, command: list[str]) -> None:
        steps.append(Step(part, name, command, controlled))

    def instructions(part: str, count: int, earlier: list[str]) -> str:
        output = f"{run / part}/instructions.jsonl"
        known = [*args.dedup_against, *earlier]
        against = ["--dedup-against", *known] if known else []
        command = ["generate.py", "instructions", *common, "--seeds", *args.seeds, *against]
        command += flags(count=count, long_words=args.long_words, max_new_tokens=args.instruction_tokens or "")
        command += [*machine, *flags(output=output)]
        add(part, "instructions", command)
        return output

    def drafts(part: str, k: int, adapter: str, bias: list[str]) -> str:
        tokens = of_iteration(k, args.draft_tokens)
        return responses(part, asked[k - 1], adapter, tokens, [*flags(samples=args.samples), *bias])

    def responses(part: str, source: str, adapter: str, tokens: int, more: list[str]) -> str:
        output = f"{run / part}/responses.jsonl"
        command = ["generate.py", "responses", *common, *flags(adapter=adapter), "--input", source]
        command += flags(max_new_tokens=tokens or args.max_new_tokens or "") + machine
        add(part, "responses", [*command, *flags(max_attempts=args.max_attempts, output=output), *more])
        return output

    def extend(part: str, k: int, source: str, adapter: str, bias: list[str], stages: int = args.stages) -> str:
        output = f"{run / part}/extended.jsonl"
        command = ["extend.py", *common, *flags(adapter=adapter), *sampling, "--input", source]
        command += flags(samples=of_iteration(k, args.extend_samples), rounds=args.rounds, stages=stages)
        command += flags(max_attempts=args.extend_attempts)
        command += flags(min_gain=args.min_gain, penalty_scope=args.penalty_scope, output=output)
        add(part, "extend", [*command, *bias])
        return output

    def train(part: str, role: str, inputs: list[str], adapter: str, more: list[str]) -> str:
        output = f"{run / part}/{role}"
        command = ["train.py", "--role", role, *common, *flags(adapter=adapter), "--input", *inputs]
        command += flags(rank=args.rank, alpha=args.alpha, learning_rate=args.learning_rate, epochs=args.epochs)
        add(part, f"train {role}", [*command, *flags(max_length=args.max_length or "", output=output), *more])
        return output

    def evaluate(name: str, adapter: str, more: Sequence[str] = ()) -> None:
        command = ["evaluate.py", *common, *flags(adapter=adapter), *sampling, "--benchmark", args.benchmark, *more]
        command += flags(samples=args.answers if args.answers > 1 else "", limit=args.limit or "")
        command += ["--no-probes"] if args.no_probes else []
        add(f"eval/{name}", "evaluate", [*command, *flags(output=f"{run}/eval/{name}")])

    # continue: the release's way, the adapter of k-1 goes on with the new pairs only;
    # restart: from the base model, on the pairs of all iterations so far.
    def fine_tune(part: str, role: str, pairs: list[str], before: str, go_on: bool, more: list[str]) -> str:
        return train(part, role, pairs[-1:] if go_on else list(pairs), before if go_on else "", more)

    lines = ["--no-line-removal"] if args.no_line_removal else []
    go_on = args.adapter_mode == "continue"
    asked, drafted, extended, generators, extenders = (
        [],
        [],
        [],
        [""],
        [""],
    )  # by iteration; adapter 0 is the base model
    for k in range(1, args.iterations + 1):
        part = f"iter_{k}"
        asked.append(instructions(part, args.instructions, asked))
        drafted.append(drafts(part, k, generators[-1], bias))
        extended.append(extend(part, k, drafted[-1], extenders[-1], bias))
        generators.append(fine_tune(part, "generator", extended, generators[-1], go_on, []))
        extenders.append(fine_tune(part, "extender", extended, extenders[-1], go_on, lines))

    fresh = instructions("final", args.final_instructions or args.instructions, asked)
    answers = responses("final", fresh, generators[-1], 0, ["--samples", "1", "--no-length-bias"])
    constrained = f"{run}/final/constrained.jsonl"
    command = ["generate.py", "constrain", *common, *machine, "--input", *extended, answers]
    command += flags(demand_min=args.demand_min, demand_max=args.demand_max, demand_steps=args.demand_steps)
    add("final", "constrain", [*command, *flags(max_attempts=args.demand_attempts, output=constrained)])
    final = train("final", "generator", [constrained], "", [])

    evaluate("base", "")
    if args.evaluate == "all" or args.controls:  # controls are compared with the iterations
        for k in range(1, args.iterations + 1):
            evaluate(f"iter_{k}", generators[k])
    evaluate("final", final)

    def generator_of(name: str, k: int, pairs: list[str], before: str, go_on: bool = go_on) -> str:
        """Train and evaluate the Generator that iteration k would have had under a control."""
        budget = flags(budget_of=generators[k])  # trained on as many tokens as the method's
        adapter = fine_tune(f"controls/{name}", "generator", pairs, before, go_on, budget)
        evaluate(f"control_{name}", adapter)
        return adapter

    last = args.iterations
    for controlled in args.controls:
        match controlled:
            case "told":
                evaluate("control_told", "", flags(at_least=args.control_words))
            case "eos-ban":
                banned = round(TOKENS_PER_WORD * args.control_words)
                evaluate("control_eos-ban", "", flags(min_new_tokens=banned))
            case "drafts":
                own, adapter = drafted[:1], ""
                for k in range(1, last + 1):
                    if k > 1:  # from here on it drafts by itself
                        own.append(drafts(f"controls/drafts_{k}", k, adapter, bias))
                    adapter = generator_of(f"drafts_{k}", k, own, adapter)
            case "one-stage" if args.stages > 1:
                generator_of("one-stage", 1, [extend("controls/one-stage", 1, drafted[0], "", bias, stages=1)], "")
            case "no-bias" if not args.no_length_bias:
                kept = drafts("controls/no-bias", 1, "", ["--no-length-bias"])
                longer = extend("controls/no-bias", 1, kept, "", ["--no-length-bias"])
                generator_of("no-bias", 1, [longer], "")
            case "no-removal" if last > 1 and not args.no_line_removal:
                whole = ["--no-line-removal", *flags(budget_of=extenders[-2])]
                trained = fine_tune("controls/no-removal", "extender", extended[:-1], extenders[-3], go_on, whole)
                longer = extend("controls/no-removal", last, drafted[-1], trained, bias)
                generator_of("no-removal", last, [*extended[:-1], longer], generators[-2])
            case "other-mode" if last > 1:
                generator_of("other-mode", last, extended, generators[-2], not go_on)
    return steps


def of_iteration(k: int, values: list[int]) -> int:
    """The setting of iteration k, from 1; the last one given holds for all that follow."""
    return values[min(k, len(values)) - 1]


def flags(**values: object) -> list[str]:
    """rank=8 -> ["--rank", "8"]; "auto" and "" leave the flag out, so that the stage's own default holds."""
    parts = []
    for name, value in values.items():
        if value not in ("", "auto"):
            parts += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return parts


def as_shell(steps: list[Step]) -> str:
    """The plan as a shell script that works when pasted."""
    lines = ["#!/bin/sh", "set -e", f"cd {shlex.quote(str(ROOT))}"] if Path.cwd() != ROOT else ["#!/bin/sh", "set -e"]
    for step in steps:
        lines.append(f"python {shlex.join(step.command)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# Running it


def run_step(step: Step) -> dict | None:
    """Run one stage: its stderr is ours, its last line of stdout the summary. Where it fails, so do we.

    None = a control came out with nothing (exit code 3): that is its result, and no reason to stop the others.
    """

    def die_with_parent() -> None:
        # Should run.py be killed outright, its stage stops too (and resumes later), instead of holding the file's lock.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    command = [sys.executable, str(ROOT / step.command[0]), *step.command[1:]]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # a polite kill is passed on
    while True:
        try:
            output, _ = process.communicate()
            break
        except KeyboardInterrupt:  # Ctrl-C went to the stage as well: let it finish what it must
            continue
    if process.returncode == 3 and step.control:
        cli.say(f"the control {step.control} ends here: nothing came out of {step.name}")
        return None
    if process.returncode:
        code = 128 - process.returncode if process.returncode < 0 else process.returncode
        hint = {
            3: "too few records came out: the lines above count why; mend it and run the same command again",
            130: "run the same command again to go on",
        }.get(code, "mend that and run the same command again: what is finished is kept")
        cli.console.print(
            f"[bold]run.py:[/] {step.part} {step.name} ended with exit code {code}; {hint}", highlight=False
        )
        sys.exit(code)
    return json.loads(output.strip().splitlines()[-1])


def execute(steps: Sequence[Step]) -> tuple[list[dict], list[str]]:
    """Run the stages in order; (their summaries with part and stage, the controls that came out with nothing)."""
    results, ended = [], []
    for number, step in enumerate(steps, start=1):
        if step.control in ended:
            continue
        cli.console.rule(f"{number}/{len(steps)}  {step.part}  {step.name}", align="left")
        cli.say(f"$ python {shlex.join(step.command)}")
        if (result := run_step(step)) is None:
            ended.append(step.control)
        else:
            results.append({**result, "part": step.part, "stage": step.name})
    return results, ended


def summary_of(args: argparse.Namespace, stages: list[dict], ended: list[str], seconds: float) -> dict:
    """What summary.json holds: one row per model that was measured, one per stage, and the settings."""
    scores = {s["part"].removeprefix("eval/"): s for s in stages if s["stage"] == "evaluate"}
    extenders = {s["part"]: s for s in stages if s["stage"] == "extend"}
    return {
        "settings": vars(args),
        "seconds": round(seconds, 1),
        "models": scores,
        "extenders": extenders,
        "controls_without_pairs": ended,
        "stages": stages,
    }


def show(summary: dict) -> None:
    """The result as two tables: what each model writes, and what each stage cost."""

    def cell(value: object, form: str = "{:.0f}") -> str:
        return "-" if value is None or value == -1 else form.format(value)

    def between(interval: list[float] | None) -> str:
        return rf" \[{interval[0]:.0f}, {interval[1]:.0f}]" if interval else ""

    table = Table(title="What the models write (words of answers that ended by EOS, 95 % intervals over queries)")
    for name in ("model", "median words", "p90", "EOS share", "loop rate", "length score", "wanted/written"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, s in summary["models"].items():
        table.add_row(
            name,
            cell(s["words_median"]) + between(s["intervals"]["words_median"]),
            cell(s["words_p90"]),
            cell(s["eos_share"], "{:.0%}"),
            cell(s["loop_rate"], "{:.0%}"),
            cell(s["length_score"], "{:.1f}"),
            cell(s["rank_correlation"], "{:+.2f}"),
        )
    cli.console.print(table)

    table = Table(title="What it took")
    for name in ("part", "stage", "records", "rejected", "gain", "tokens", "seconds"):
        table.add_column(name, justify="left" if name in ("part", "stage") else "right")
    for s in summary["stages"]:
        table.add_row(
            s["part"],
            s["stage"],
            cell(s.get("accepted", s.get("pairs", s.get("rows")))),
            cell(sum(s["rejected"].values()) if isinstance(s.get("rejected"), dict) else None),
            cell(s.get("gain_median"), "{:.2f}x"),
            cell(s.get("tokens"), "{:,.0f}"),
            cell(s.get("seconds")),
        )
    cli.console.print(table)


# ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, "run.py")
    add = parser.add_argument
    add("--run", default="runs/paper", help="folder of the run; its name is part of every record's id")
    add("--dry-run", action="store_true", help="only print the commands, as a shell script")
    # model
    add("--model", default="", help="hub id, local folder or .gguf file; empty = the demo on smollm2")
    add("--device", default="auto", help="auto = cuda where there is one, else cpu")
    add("--dtype", default="auto", help="auto = bf16 on CUDA, else fp32")
    add("--quantize", default="auto", help="none, nf4, or auto = nf4 on CUDA below 40 GB")
    add("--trust-remote-code", action="store_true", help="run code that the model's repository brings")
    # the loop
    add("--iterations", type=cli.at_least(1), default=3, help="macro-iterations")
    add("--instructions", type=cli.at_least(1), default=5000, help="new instructions per macro-iteration")
    add("--final-instructions", type=cli.at_least(0), default=0, help="for the last stage; 0 = as --instructions")
    add("--instruction-tokens", type=cli.at_least(0), default=0, help="tokens of an instruction; 0 = 1024")
    add("--seeds", nargs="+", default=["prompts/seeds.en.jsonl", "prompts/seeds.zh.jsonl"], help="JSONL of examples")
    add("--dedup-against", nargs="+", default=[], help="JSONL files of prompts that must not be asked: held out, say")
    add("--language", choices=("en", "zh", "both"), default="both", help="which languages take part")
    add("--seed", type=int, default=0, help="of every random draw")
    add("--long-words", type=cli.at_least(1), default=2000, help="the judge asks for more words than this")
    add("--samples", type=cli.at_least(1), default=2, help="drafts per instruction")
    add("--max-attempts", type=cli.at_least(1), default=20, help="draws per draft before it is given up")
    add("--extend-samples", type=cli.at_least(1), nargs="+", default=[2], help="extensions per draft, by iteration")
    add("--extend-attempts", type=cli.at_least(1), default=20, help="two-stage draws per extension")
    add("--rounds", type=cli.at_least(1), default=3, help="rounds per extension")
    add("--stages", type=cli.at_least(1), default=2, help="calls per round: 2 = the paper's, 1 = control")
    add(
        "--min-gain",
        type=cli.at_least(0, float),
        default=1.2,
        help="an extension must exceed its draft's words so often",
    )
    add("--penalty-scope", choices=("output", "all"), default="output", help="the Extender's repetition penalty covers")
    add("--max-new-tokens", type=cli.at_least(0), default=0, help="tokens a draw; 0 = min(16384, context - prompt)")
    limits = "tokens of a draft, one limit per iteration (the last one holds on); 0 = as --max-new-tokens"
    add("--draft-tokens", type=cli.at_least(0), nargs="+", default=[0], help=limits)
    add("--max-rows", type=cli.at_least(0), default=0, help="texts decoded at a time; 0 = what the device takes")
    add("--kv-cache", choices=("auto", "fp8"), default="auto", help="fp8 = keys, values in half the memory (GPU)")
    # fine-tuning
    add("--adapter-mode", choices=("continue", "restart"), default="continue", help="see the README, departures")
    add("--rank", type=cli.at_least(1), default=8, help="LoRA rank")
    add("--alpha", type=cli.at_least(0, float), default=16, help="LoRA alpha")
    add("--learning-rate", type=cli.at_least(0, float), default=1e-4, help="peak, cosine with 10 %% warm-up")
    add("--epochs", type=cli.at_least(1), default=4, help="passes over the pairs")
    add("--max-length", type=cli.at_least(0), default=0, help="tokens a pair; 0 = 16384 generator, 32768 extender")
    # length demands of the last stage
    add("--demand-min", type=cli.at_least(1), default=2000, help="shortest answer that gets a demand, words")
    add("--demand-max", type=cli.at_least(1), default=8000, help="longest, words")
    add("--demand-steps", default="1000,2000", help="demands are rounded to these, words (80 %% and 20 %%)")
    add("--demand-attempts", type=cli.at_least(1), default=5, help="draws before a demand is appended")
    # evaluation
    add("--benchmark", default="mini", help="mini, a JSONL file in LonGen's format, or a hub id")
    add("--limit", type=cli.at_least(0), default=0, help="queries of the benchmark; 0 = all")
    add("--answers", type=cli.at_least(1), default=1, help="answers per query")
    add("--evaluate", choices=("all", "ends"), default="all", help="ends = only the base and the final model")
    add("--no-probes", action="store_true", help="do not ask the models about their answers (see evaluate.py)")
    # controls
    add("--no-length-bias", action="store_true", help="control: keep the short ones too")
    add("--no-line-removal", action="store_true", help="control: show the Extender whole drafts in training")
    names = "; ".join(f"{name}: {what}" for name, what in CONTROLS.items())
    add("--controls", nargs="*", metavar="NAME", help=f"run beside the method; no NAME = all of them. {names}")
    add("--control-words", type=cli.at_least(1), default=4000, help="length that told and eos-ban aim at, words")

    if not parser.parse_args(argv).model:  # the demo's values become the defaults; flags still override them
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    args.controls = list(CONTROLS) if args.controls == [] else args.controls or []
    if unknown := [name for name in args.controls if name not in CONTROLS]:
        raise UserError(
            f"--controls knows no {', '.join(unknown)}", f"one or more of {', '.join(CONTROLS)}; none = all"
        )
    if args.demand_min >= args.demand_max:
        raise UserError(f"--demand-min {args.demand_min} is not below --demand-max {args.demand_max}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # 1) what will be done
    steps = plan(args)
    if left_out := sorted(set(args.controls) - {step.control for step in steps}):
        cli.say(f"controls left out: {', '.join(left_out)}: the same as this run, or they need a second iteration")
    if args.dry_run:
        print(as_shell(steps))
        return
    cli.say(f"{len(steps)} stages in {args.run}; stop and start again at any time")

    # 2) do it, stage by stage
    started = time.monotonic()
    results, ended = execute(steps)

    # 3) say what came of it
    summary = summary_of(args, results, ended, time.monotonic() - started)
    replace_file(Path(args.run) / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    report = write_report(Path(args.run))
    show(summary)
    cli.say(f"{summary['seconds']:.0f} s; everything is in {args.run}, this table in {args.run}/summary.json")
    cli.say(f"to look at: {report}")
    cli.emit({"summary": f"{args.run}/summary.json", "seconds": summary["seconds"], "models": summary["models"]})


if __name__ == "__main__":
    cli.run(main)
