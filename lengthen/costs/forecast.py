"""run.py --plan, and the time that is left while a run goes on: the work of every step, on a machine.

What a finished stage has measured takes the place of what was assumed: its own work and seconds, and, for the stages
like it that follow, how far the assumptions were off.
"""

import math
import re
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from lengthen import cli
from lengthen.costs import machine as machines
from lengthen.costs import yields
from lengthen.costs.machine import HERE, SHARES, Machine, ask
from lengthen.costs.yields import Flow, Work, assumptions, measured, scenarios, work_of
from lengthen.steps import Flags, Step, sidecar_of

WORTH_SAYING = 20.0  # seconds after which a run says how long it still takes
NEXT_STAGE = (0.75, 1.35)  # how much slower or faster than the measured ones a stage may be
SLOW = 1e9  # parameters above which a CPU is not what one wants
Three = tuple[float, float, float]  # low, likely, high


@dataclass(frozen=True)
class Cost:
    """Of one step. Where there are three values: low, likely and high."""

    step: Step
    work: Work  # likely
    tokens: Three
    seconds: Three | None  # None: servers draw its texts, and have not been measured
    memory: float  # bytes, of the card or of this computer
    disk: float  # bytes
    done: bool

    @property
    def training(self) -> bool:
        return self.step.command[0] == "train.py"


def finished(step: Step, again: Container[str]) -> dict[str, Any]:
    """The sidecar of a finished step, {} of any other. again: outputs that are made again, or go on with more."""
    meta = {} if step.output in again else sidecar_of(step)
    return meta if meta.get("status") == "done" else {}


def forecast(
    steps: Sequence[Step], flags: Flags, machine: Machine, sidecars: Sequence[Mapping[str, Any]]
) -> list[Cost]:
    """What each step takes. sidecars: of each step, {} = it has not finished."""
    known = assumptions(machine.parameters)
    all_work = [_follow(steps, flags, Flow(values, machine.context), sidecars) for values in scenarios(known)]
    likely = all_work[0]
    settings = [flags(step) for step in steps]
    speed = _speeds(steps, likely, settings, machine, sidecars)
    costs = []
    for i, (step, own, meta) in enumerate(zip(steps, settings, sidecars, strict=True)):
        works = [work[i] for work in all_work]
        tokens = (min(w.tokens for w in works), likely[i].tokens, max(w.tokens for w in works))
        kind = "training" if "rank" in own else "sampling"
        seconds: Three | None
        if meta:
            seconds = (float(meta["seconds"]),) * 3
        elif own.get("endpoint") and not speed.get(kind):
            seconds = None
        else:
            # Once measured, the speed is no assumption any more; but the next stage is not quite like the last.
            levels, times = ((1, 1, 1), speed[kind]) if speed.get(kind) else ((0, 1, 2), 1.0)
            below, above = NEXT_STAGE if speed.get(kind) else (1.0, 1.0)
            low = below * times * min(machine.seconds(w, own, levels[0]) for w in works)
            high = above * times * max(machine.seconds(w, own, levels[2]) for w in works)
            seconds = low, times * machine.seconds(likely[i], own, levels[1]), high
        memory = 0.0 if own.get("endpoint") else machine.bytes(likely[i], own)
        costs.append(Cost(step, likely[i], tokens, seconds, memory, machine.disk(likely[i], own), bool(meta)))
    return costs


def _follow(steps: Sequence[Step], flags: Flags, flow: Flow, sidecars: Sequence[Mapping[str, Any]]) -> list[Work]:
    """The work of every step under one choice of values, corrected by what finished steps of the same name did."""
    done: list[Work] = []
    off: dict[str, tuple[float, float]] = {}  # name -> (tokens, records) as measured, in multiples of the assumed ones
    for step, meta in zip(steps, sidecars, strict=True):
        work = work_of(step, flags(step), flow)
        if meta:
            real = measured(work, meta, step)
            off[step.name] = real.tokens / max(1.0, work.tokens), real.records / max(1e-9, work.records)
            work = real
        elif step.name in off and step.command[0] != "train.py":
            tokens, records = off[step.name]
            work = replace(work, tokens=tokens * work.tokens, calls=tokens * work.calls, records=records * work.records)
        flow.made[step.output] = work
        done.append(work)
    return done


def _speeds(
    steps: Sequence[Step],
    work: Sequence[Work],
    settings: Sequence[Mapping[str, Any]],
    machine: Machine,
    sidecars: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """Seconds as measured, in multiples of what the same work was assumed to take: of sampling, of training."""
    sums: dict[str, tuple[float, float]] = {}
    for own, done, meta in zip(settings, work, sidecars, strict=True):
        if meta:
            kind = "training" if "rank" in own else "sampling"
            real, assumed = sums.get(kind, (0.0, 0.0))
            sums[kind] = real + meta["seconds"], assumed + machine.seconds(done, own)
    return {kind: real / assumed for kind, (real, assumed) in sums.items()}


# ---------------------------------------------------------------------------------------------------------
# As people read it


def duration(seconds: float) -> str:
    """40 s, 12 min, 3.5 h, 2.1 days"""
    for size, unit, form in ((86400, "days", ".1f"), (3600, "h", ".1f"), (60, "min", ".0f")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:{form}} {unit}"
    return f"{seconds:.0f} s"


def count(number: float) -> str:
    """950, 12k, 3.4M"""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.{1 if number < 10 * size else 0}f}{unit}"
    return f"{number:.0f}"


def spread(values: Three, form: Callable[[float], str]) -> str:
    """The likely value, and where it may lie: 12 min (5-28 min)"""
    low, likely, high = map(form, values)
    if values[0] == values[2]:
        return likely
    unit = re.search("[^0-9.]*$", low)[0]  # type: ignore[index]
    return f"{likely} ({low.removesuffix(unit) if high.endswith(unit) else low}-{high})"


def total(costs: Sequence[Cost], left: bool = False) -> Three:
    """Seconds of all steps, or of those that have not finished."""
    known = [c.seconds for c in costs if c.seconds and not (left and c.done)]
    return tuple(sum(three[i] for three in known) for i in range(3))  # type: ignore[return-value]


def show_plan(steps: Sequence[Step], flags: Flags, machine: Machine, again: Container[str] = ()) -> None:
    """run.py --plan: a table and the assumptions for people, one JSON record on stdout.

    again: the outputs that count as not there, whatever is there.
    """
    costs = forecast(steps, flags, machine, [finished(step, again) for step in steps])
    table = Table(
        title=f"What it takes on {machine.name}: likely (low-high)", box=None, padding=(0, 2, 0, 0), pad_edge=False
    )
    table.add_column("stage", no_wrap=True)
    for name in ("calls", "tokens", "time", "GB", "disk"):
        table.add_column(name, justify="right", no_wrap=True)

    for cost in costs:
        tokens = spread((cost.work.tokens,) * 3 if cost.done else cost.tokens, count)
        times = spread(cost.seconds, duration) if cost.seconds else "servers'"
        memory = f"{cost.memory / 1e9:.1f}" if cost.memory else "-"
        label = cost.step.label + ", measured" * cost.done
        table.add_row(label, count(cost.work.calls), tokens, times, memory, f"{cost.disk / 1e9:.2f}")
    record = record_of(costs, machine)
    table.add_section()
    table.add_row("in all", count(record["calls"]), spread(record["tokens"], count), spread(total(costs), duration),
                  f"{record['memory_gb']:.1f}", f"{record['disk_gb']:.2f}")  # fmt: skip
    cli.console.print(table)
    where = "the card" if machine.cuda else "main memory"
    cli.say(f"calls: texts drawn, or optimizer steps; GB: of the {machine.memory / 1e9:.0f} GB of {where}; disk: GB")
    if not machine.cuda and machine.parameters > SLOW:
        cli.say('no GPU here: this is for a CPU; --plan CARD is for a card, such as --plan "RTX 4090"')
    cli.say("assumed, and not known before a run: likely (cheap to dear)")
    for value in [*assumptions(machine.parameters).values(), *SHARES.values()]:
        cli.say(f"  {value}")
    cli.say(f"  and fixed: {yields.FIXED}; {machines.FIXED}")
    if any(cost.done for cost in costs):
        cli.say(left_line(costs))
    cli.emit(record)


def record_of(costs: Sequence[Cost], machine: Machine) -> dict[str, Any]:
    """What --plan prints, as JSON: sums, and a list of the stages."""
    return {
        "stage": "plan",
        "machine": machine.name,
        "calls": round(sum(c.work.calls for c in costs if not c.training)),
        "tokens": [round(sum(c.tokens[i] for c in costs)) for i in range(3)],
        "seconds": [round(s) for s in total(costs)],
        "memory_gb": round(max(c.memory for c in costs) / 1e9, 2),
        "disk_gb": round(sum(c.disk for c in costs) / 1e9, 3),
        "stages": [
            {
                "part": c.step.part,
                "stage": c.step.name,
                "calls": round(c.work.calls),
                "tokens": [round(n) for n in c.tokens],
                "seconds": [round(s) for s in c.seconds] if c.seconds else None,
                "measured": c.done,
            }
            for c in costs
        ],
    }


def left_line(costs: Sequence[Cost]) -> str:
    """What was measured so far, and how long the whole still takes."""
    rates = []
    for what, training in (("drawn", False), ("trained on", True)):
        mine = [c for c in costs if c.done and c.training == training]
        if seconds := sum(c.seconds[1] for c in mine if c.seconds):
            rates.append(f"{sum(c.work.tokens for c in mine) / seconds:,.0f} tokens/s {what}")
    spent = sum(c.seconds[1] for c in costs if c.done and c.seconds)
    low, likely, high = total(costs, left=True)
    at = time.strftime("%H:%M", time.localtime(time.time() + likely))
    return (
        f"measured in {duration(spent)}: {', '.join(rates)}; about {duration(likely)} are left "
        f"({duration(low)} to {duration(high)}), until {at}"
    )


class TimeLeft:
    """What steps.execute calls after each step: says how long the rest takes, by what was measured so far."""

    def __init__(self, steps: Sequence[Step], flags: Flags, given: Mapping[str, Any], again: Container[str] = ()):
        self.steps, self.flags, self.given, self.again = steps, flags, given, again
        self.started, self.machine = time.monotonic(), None  # type: tuple[float, Machine | None]

    def __call__(self, over: int) -> None:
        # A run of seconds, or one that finds all its stages finished, has nobody who waits.
        if time.monotonic() - self.started < WORTH_SAYING or over == len(self.steps):
            return
        sidecars = [finished(s, self.again if n > over else ()) for n, s in enumerate(self.steps, start=1)]
        try:
            self.machine = self.machine or ask(HERE, self.given)
            line = left_line(forecast(self.steps, self.flags, self.machine, sidecars))
        except Exception as error:  # whatever it is, a forecast is not worth a run
            line = f"how long the rest takes is not known: {getattr(error, 'message', repr(error))}"
            self.started = math.inf  # and is not asked again
        cli.say(line)
