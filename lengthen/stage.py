"""What the stages that sample have in common: their settings, their model with its sampler, the length bias.

torch comes with the first call of `open_model` or `sampling_of`, not with the import: --help, a mistake in the input
and a finished stage do not wait for it.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lengthen import cli
from lengthen.jobs import Job
from lengthen.records import LANGUAGES, fingerprint
from lengthen.text import length_bias

if TYPE_CHECKING:
    from lengthen.model import LoadedModel
    from lengthen.sampler import Sampler, Sampling


def open_job(stage: str, args: argparse.Namespace, inputs: Sequence[str], settings: dict) -> Job:
    """The stage's output, with a journal; `settings`: what shapes it besides the flags that all stages have."""
    adapter = getattr(args, "adapter", "")  # stages of the base model have none
    shared = {k: getattr(args, k) for k in ("seed", "language", "quantize", "kv_cache")}
    return Job(
        stage,
        args.output,
        inputs=inputs,
        settings={
            **settings,
            **shared,
            **cli.sampling_settings(args),
            "model": fingerprint(args.model),
            "adapter": fingerprint(adapter),
        },
        info={"model": args.model, "adapter": adapter},
        overwrite=args.overwrite,
        allow_partial=args.allow_partial,
        journal=True,
    )


def open_model(args: argparse.Namespace, job: Job) -> "tuple[LoadedModel, Sampler]":
    """Load what the flags name; say once what is in force, and why."""
    from lengthen.attention import FP8
    from lengthen.model import load_model
    from lengthen.sampler import Sampler

    loaded = load_model(
        args.model,
        adapter=getattr(args, "adapter", ""),
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
        trust_remote_code=args.trust_remote_code,
    )
    sampler = Sampler(
        loaded.model,
        loaded.tokenizer,
        eos_ids=loaded.chat.eos_ids,
        context=loaded.context,
        max_rows=args.max_rows,
        kv_dtype=FP8 if args.kv_cache == "fp8" else None,
    )
    job.update_info(device=str(loaded.device), dtype=str(loaded.dtype), quantize=loaded.quantize)
    flags = ", ".join(f"{k} {v}" for k, v in cli.sampling_settings(args).items())
    for line in [*loaded.notes, *sampler.notes, f"sampling: {flags}, seed {args.seed}"]:
        cli.say(line)
    return loaded, sampler


def sampling_of(args: argparse.Namespace, limit: int = 0, stop: tuple[str, ...] = ()) -> "Sampling":
    """The flags as Sampling; `limit` is the number of new tokens where the user set none, 0 = the sampler's own."""
    from lengthen.sampler import Sampling

    settings = cli.sampling_settings(args)
    tokens = settings.pop("max_new_tokens") or limit
    return Sampling(**settings, stop=stop, **({"max_new_tokens": tokens} if tokens else {}))


def length_bias_drops(records: Sequence[dict], seed: int) -> dict[str, str]:
    """{id: "length-bias"} of the answers to drop; a Chinese word is a character, so each language is ranked alone."""
    drops = {}
    for language in LANGUAGES:
        same = [r for r in records if r["language"] == language]
        gone = length_bias([r["response_words"] for r in same], [r["id"] for r in same], seed)
        drops |= {same[i]["id"]: "length-bias" for i in gone}
    return drops
