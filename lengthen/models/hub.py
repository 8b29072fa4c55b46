"""Model cards and data cards: README.md of an adapter, a merged model and a run, for the Hugging Face Hub.

A card says what base, data and settings something was made from, how it scores, and under which licence it may be
passed on, all of it read from the sidecars: `hf upload` needs nothing else. huggingface_hub writes the machine-readable
head. No local path gets into a card, of a folder only its name.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lengthen.jobs import read_sidecar
from lengthen.records import replace_file
from lengthen.text import languages

DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what --model smollm2 is
PAPER = "[Self-Lengthen](https://arxiv.org/abs/2410.23933)"
TAGS = ["self-lengthen", "long-form-generation"]
ROLES = {
    "generator": "writes long answers to instructions",
    "extender": "rewrites a draft into a longer text (its prompt is `prompts/LANGUAGE/extend.md` of the project)",
}
FILES = {  # of a run: configuration of the data set -> (files, what a line is)
    "instructions": ("*/instructions.jsonl", "an instruction that the base model invented, judged and deduplicated"),
    "responses": ("*/responses.jsonl", "a draft: an instruction and the Generator's answer"),
    "extended": ("iter_*/extended.jsonl", "a draft (`initial`) and the longer text the Extender made of it"),
    "constrained": ("final/constrained.jsonl", "an instruction with a length demand (`query`) that its answer meets"),
}
SCORES = {  # of scores.json: as the card says it, and in which form
    "words_median": ("median words of answers that ended by themselves", "{:.0f}"),
    "eos_share": ("share of answers that ended by themselves", "{:.0%}"),
    "loop_rate": ("share that repeats itself", "{:.0%}"),
    "length_score": ("length score, 0 to 100 (LonGen's formula)", "{:.1f}"),
    "rank_correlation": ("rank correlation of wanted and written length", "{:+.2f}"),
}


def model_card(adapter: str | Path, merged: bool = False) -> str:
    """The README.md of a trained adapter's folder, or of the model it was merged into; "" for another's adapter."""
    from huggingface_hub import ModelCardData

    adapter = Path(adapter)
    meta = read_sidecar(adapter)
    if "summary" not in meta:
        return ""
    settings, summary, role = meta["settings"], meta["summary"], meta["role"]
    base = meta["base"]
    shown = shown_name(base)
    head = ModelCardData(
        base_model=shown if is_hub_id(shown) else None,
        base_model_relation="finetune" if merged else "adapter",
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        language=list(languages.chosen(settings["language"])),
        tags=[*TAGS, role] if merged else [*TAGS, "lora", role],
        **licence_of(base),
    )
    kind = "The merged weights" if merged else "A LoRA adapter"
    use = (
        'model = AutoModelForCausalLM.from_pretrained("THIS/REPOSITORY")'
        if merged
        else f'model = AutoModelForCausalLM.from_pretrained("{shown}")\n'
        'model = PeftModel.from_pretrained(model, "THIS/REPOSITORY")'
    )
    start = "the base model" if not settings["adapter"] else "the adapter of the iteration before"
    trained = {
        "pairs": f"{summary['pairs']:,} ({summary['left_out']:,} left out)",
        "tokens": f"{summary['tokens']:,}, {summary['target_tokens']:,} of them learned",
        "started from": start,
        **{
            name.replace("_", " "): settings[name]
            for name in ("epochs", "learning_rate", "rank", "alpha", "dropout", "targets", "seed")
        },
        "quantization of the base": meta.get("quantize", "none"),
        "loss, first and last tenth": f"{summary['first_loss']:.3f}, {summary['last_loss']:.3f}",
    }
    sections = [
        f"# {title_of(adapter.resolve())}",
        f"{kind} of {shown} that {ROLES[role]}: the {role.title()} of {PAPER}.",
        "## Use",
        f"```python\nfrom transformers import AutoModelForCausalLM\n{'' if merged else 'from peft import PeftModel'}\n"
        f"{use}\n```".replace("\n\n", "\n"),
        "## Data",
        "Texts that the base model and its own adapters wrote: no human answers, no other model's. Files, with the"
        " first 16 hex digits of their SHA-256:",
        table(("file", "SHA-256"), {shown_input(name): digest for name, digest in settings.get("inputs", {}).items()}),
        "## Training",
        table(("setting", "value"), trained),
        "## Scores",
        scores_of(adapter) or "Not evaluated.",
        "## Licence",
        licence_sentence(base),
    ]
    return front(head.to_yaml()) + "\n\n".join(sections) + "\n"


def data_card(run: str | Path) -> str:
    """The README.md of a run's folder: its texts as a data set."""
    from huggingface_hub import DatasetCardData

    run = Path(run)
    made: dict[str, dict[str, Any]] = {}
    for pattern, _ in FILES.values():
        for file in sorted(run.glob(pattern)):
            made[str(file.relative_to(run))] = read_sidecar(file)
    first: dict[str, Any] = next((meta for meta in made.values() if meta), {})
    base = first.get("info", {}).get("model", "")
    head = DatasetCardData(
        language=list(languages.chosen(first.get("settings", {}).get("language", languages.DEFAULT))),
        task_categories=["text-generation"],
        tags=TAGS + ["synthetic"],
        pretty_name=run.resolve().name,
        configs=[
            {"config_name": name, "data_files": pattern, "default": True} if name == "extended"
            else {"config_name": name, "data_files": pattern}
            for name, (pattern, _) in FILES.items() if any(run.glob(pattern))
        ],
        **licence_of(base),
    )  # fmt: skip
    rows = {
        name: f"{meta.get('accepted', 0):,} | {sum(meta.get('rejected', {}).values()):,} | "
        f"{meta.get('words', {}).get('median', 0):.0f} | {meta.get('words', {}).get('max', 0):.0f}"
        for name, meta in made.items()
    }
    drawn = first.get("settings", {})
    recipe = {
        name: drawn[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed") if name in drawn
    }
    sections = [
        f"# {run.resolve().name}",
        f"Texts that {shown_name(base)} wrote to teach itself longer ones, by the method of {PAPER}. No human and no"
        " other model wrote any of them (the instructions were invented after the project's seeds), and nobody has"
        " checked what they claim.",
        table(("file", "records | rejected | median words | most words"), rows),
        "\n".join(f"- `{name}`: {what}." for name, (_, what) in FILES.items()),
        "Every record has `id`, `parent_id` (what it was made of), `language`, and how its text ended (`finish`);"
        " lengths are in words and tokens. What the filters refused is in `*.rejected.jsonl`, with the `reason`.",
        "## Settings",
        table(("setting", "value"), {"model": shown_name(base), **recipe}),
        "## Licence",
        licence_sentence(base),
    ]
    return front(head.to_yaml()) + "\n\n".join(sections) + "\n"


def write_cards(run: str | Path) -> None:
    """The cards of a run and of every adapter in it, with the scores that there are by now."""
    for config in sorted(Path(run).glob("*/*/adapter_config.json")):
        if read_sidecar(config.parent).get("status") == "done":
            replace_file(config.with_name("README.md"), model_card(config.parent))
    replace_file(Path(run) / "README.md", data_card(run))


# ---------------------------------------------------------------------------------------------------------


def title_of(adapter: Path) -> str:
    """qwen/iter_1/generator of an adapter in a run's folder; of any other its own name, nothing of where it lies."""
    in_run = re.fullmatch(r"iter_\d+|final", adapter.parent.name)
    return "/".join(adapter.parts[-3:]) if in_run else adapter.name


def front(yaml: str) -> str:
    return f"---\n{yaml.strip()}\n---\n\n"


def table(heads: tuple[str, str], rows: Mapping[str, Any]) -> str:
    columns = heads[1].count("|") + 2
    lines = [f"| {heads[0]} | {heads[1]} |", "|---" * columns + "|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows.items()])


def shown_name(base: str) -> str:
    """A base model as others know it: a hub id as it is, a folder or a file by its name alone."""
    if base == "smollm2":
        return DEMO
    return base if is_hub_id(base) else Path(base).name or base


def shown_input(name: str) -> str:
    """An input as its sidecar names it, with its folder only where that is a part of a run, and nobody's name."""
    folder, _, file = name.rpartition("/")
    return name if re.fullmatch(r"iter_\d+|final|controls", folder) else file


def is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()


def licence_of(base: str) -> dict[str, Any]:
    """The fields of a card. The base model's licence where its own card is here, else a reference to it: no network."""
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from yaml import YAMLError

    if base == "smollm2":
        return {"license": "apache-2.0"}
    card: Any = Path(base) / "README.md"
    if not card.is_file() and is_hub_id(base):
        card = try_to_load_from_cache(base, "README.md")
    if isinstance(card, (str, Path)) and Path(card).is_file():
        try:
            known = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        except (ValueError, YAMLError):  # a damaged card is none
            known = {}
        if found := {name: known[name] for name in ("license", "license_name", "license_link") if known.get(name)}:
            return found
    where = {"license_link": f"https://huggingface.co/{base}"} if is_hub_id(base) else {}
    return {"license": "other", "license_name": "that-of-the-base-model", **where}


def licence_sentence(base: str) -> str:
    fields = licence_of(base)
    if fields["license"] == "other":
        return f"That of the base model, {shown_name(base)}: check it before you pass this on."
    return f"{fields['license']}, the licence of the base model, {shown_name(base)}."


def scores_of(adapter: Path) -> str:
    """A table of what an evaluation of the run says of this adapter, the base model beside it; "" = none does."""
    run = adapter.resolve().parent.parent
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(run.glob("eval/*/scores.json")):
        try:
            scores = json.loads(file.read_text("utf-8"))
        except ValueError:  # damaged: no reason to lose what was trained
            continue
        if not isinstance(scores, dict) or not {"answers", "rows", "source"} <= scores.keys():
            continue
        mine = Path(scores.get("adapter") or "base").parts[-2:] == (adapter.resolve().parent.name, adapter.name)
        if mine or (file.parent.name == "base" and not scores.get("adapter")):
            found["this model" if mine else "base model"] = scores
    if "this model" not in found:
        return ""

    def cell(scores: dict[str, Any], name: str, form: str) -> str:
        if scores.get(name) is None:
            return "-"
        bounds = (scores.get("intervals") or {}).get(name)
        return form.format(scores[name]) + (f" [{', '.join(map(form.format, bounds))}]" if bounds else "")

    this = found["this model"]
    rows = {
        text: " | ".join(cell(scores, name, form) for scores in found.values()) for name, (text, form) in SCORES.items()
    }
    said = (
        f"{this['answers']} answers to {this['rows']} queries of the benchmark `{Path(this['source']).name}`, with 95 %"
    )
    return f"{said} intervals over queries.\n\n" + table(("measure", " | ".join(found)), rows)
