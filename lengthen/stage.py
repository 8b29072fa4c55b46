"""What the stages that sample have in common: their settings, their model with its sampler, the length bias.

torch is loaded by `open_model`, not by the import: --help, a mistake in the input and a finished stage do not wait for
it.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from lengthen import cli
from lengthen.cli import ModelFlags, OutputFlags, SamplingFlags
from lengthen.endpoint import check_address, key_from
from lengthen.jobs import Job, read_sidecar
from lengthen.records import UserError, draw_seed, fingerprint
from lengthen.sampling.request import Request, Sample, Sampling
from lengthen.text.selection import length_bias

if TYPE_CHECKING:
    from torch import Tensor

    from lengthen.models.chat import Chat
    from lengthen.models.loading import LoadedModel
    from lengthen.sampling.engine import Sampler
    from lengthen.sampling.served import Served

KEY = "LENGTHEN_ENDPOINT_KEY"
UNKNOWN = "servers"  # the setting `engine` until one of them has said what it is


@dataclass(frozen=True)
class Stage:
    """The flags of every stage that samples: where it writes, which model it asks, how tokens are drawn."""

    out: OutputFlags
    model: ModelFlags
    sampling: SamplingFlags


def open_job(name: str, stage: Stage, inputs: Sequence[str], settings: dict[str, Any]) -> Job:
    """The stage's output, with a journal; `settings`: what shapes it besides the flags that all stages have."""
    # Not in it: what changes no text (max_rows, device). They may differ when a run is continued.
    shared = {
        "seed": stage.out.seed,
        "language": stage.out.language,
        "quantize": stage.model.quantize,
        "kv_cache": stage.sampling.kv_cache,
        **stage.sampling.recipe(),
        "model": fingerprint(stage.model.model),
        "adapter": fingerprint(stage.model.adapter),
    }
    if stage.sampling.endpoint:
        check_endpoint(stage)
        before = {} if stage.out.overwrite else read_sidecar(stage.out.output).get("settings", {})
        shared["engine"] = before.get("engine", UNKNOWN)  # a finished file is read without a server
    return Job(
        name,
        stage.out.output,
        inputs=inputs,
        settings={**settings, **shared},
        info={"model": stage.model.model, "adapter": stage.model.adapter},
        overwrite=stage.out.overwrite,
        allow_partial=stage.out.allow_partial,
        journal=True,
        min_yield=stage.out.min_yield,
    )


def smaller_values(stage: Stage, name: str, value: int) -> list[int]:
    """The values below `value` that a setting of this output had in earlier runs, the first one first."""
    meta = {} if stage.out.overwrite else read_sidecar(stage.out.output)
    before = [*meta.get("history", {}).get(name, []), meta.get("settings", {}).get(name, value)]
    return [old for old in dict.fromkeys(before) if old < value]


def open_model(stage: Stage, job: Job) -> "tuple[LoadedModel, Sampler] | tuple[Vocabulary, Served]":
    """Load the model that the flags name, and print once what is in force and why."""
    if stage.sampling.endpoint:
        return open_served(stage, job)
    from lengthen.models.loading import load_model
    from lengthen.sampling.cache import FP8
    from lengthen.sampling.engine import Sampler
    from lengthen.sampling.layouts import recorded

    loaded = load_model(
        stage.model.model,
        adapter=stage.model.adapter,
        device=stage.model.device,
        dtype=stage.model.dtype,
        quantize=stage.model.quantize,
        trust_remote_code=stage.model.trust_remote_code,
    )
    sampler = Sampler(
        loaded.model,
        loaded.tokenizer,
        eos_ids=loaded.chat.eos_ids,
        context=loaded.context,
        max_rows=stage.sampling.max_rows,
        kv_dtype=FP8 if stage.sampling.kv_cache == "fp8" else None,
    )
    job.update_info(device=str(loaded.device), dtype=str(loaded.dtype), quantize=loaded.quantize, date=loaded.chat.date)
    if sampler.hook.replaced:  # a CPU's: sums are rounded in their order
        job.update_info(layouts=recorded())
    say_settings(stage, [*loaded.notes, *sampler.notes])
    return loaded, sampler


def say_settings(stage: Stage, notes: Sequence[str]) -> None:
    recipe = ", ".join(f"{name} {value}" for name, value in stage.sampling.recipe().items())
    for line in [*notes, f"sampling: {recipe}, seed {stage.out.seed}"]:
        cli.say(line)


@dataclass
class Vocabulary:
    """What is left of a LoadedModel where servers hold the weights."""

    chat: "Chat"


def check_endpoint(stage: Stage) -> None:
    """Mistakes in --endpoint, found before anything is opened."""
    for url in stage.sampling.endpoint:
        check_address("--endpoint", url, KEY)
    for pair in stage.sampling.endpoint_path:
        if "=" not in pair:
            raise UserError(f"--endpoint-path {pair} names one folder", "--endpoint-path LOCAL=REMOTE")
    decided = {"--device": stage.model.device, "--dtype": stage.model.dtype, "--quantize": stage.model.quantize}
    for name, value in {**decided, "--kv-cache": stage.sampling.kv_cache}.items():
        if value != "auto":
            raise UserError(f"{name} {value} beside --endpoint: the server decides that", f"leave {name} out")


def open_served(stage: Stage, job: Job) -> "tuple[Vocabulary, Served]":
    """The servers of --endpoint, with the tokenizer and the template of --model. No weights are loaded."""
    from lengthen.models.loading import context_length, load_chat, load_config
    from lengthen.sampling.served import Served, same_weights

    key, flags = key_from(KEY), stage.sampling
    config = load_config(stage.model.model, stage.model.trust_remote_code)
    chat = load_chat(stage.model.model, stage.model.trust_remote_code)
    served = Served(
        [check_address("--endpoint", url, KEY) for url in flags.endpoint],
        chat.tokenizer,
        eos_ids=chat.eos_ids,
        context=context_length(config, chat.tokenizer)[0],
        key=key,
        max_rows=flags.max_rows,
        adapter=stage.model.adapter,
        paths=[(os.path.abspath(ours), theirs) for ours, theirs in (p.split("=", 1) for p in flags.endpoint_path)],
    )
    before, [(url, likely)] = job.settings.get("engine", UNKNOWN), served.likely.values()
    other = f"begun through {before}, {url} is {served.kind}" if before not in (UNKNOWN, served.kind) else ""
    if not same_weights(job.info.get("likely", likely), likely):
        other = f"begun with other weights than {url} holds"
    if other:
        served.close()
        raise UserError(f"{job.output} was {other}", "--overwrite starts it afresh, another --output keeps both")
    job.settings["engine"] = served.kind
    job.update_info(endpoint=served.notes, key=bool(key), date=chat.date, likely=likely)
    say_settings(
        stage,
        [
            f"model: {stage.model.model} (tokenizer and template; the servers hold the weights)",
            *chat.notes,
            *served.notes,
        ],
    )
    return Vocabulary(chat), served


def open_writer(stage: Stage, job: Job) -> "Writer":
    """`open_model`, as the engine of lengthen.tasks."""
    return Writer(stage, *open_model(stage, job))


class Writer:
    """A loaded model as the tasks of a stage ask it: their prompts are rendered, their draws get seeds."""

    def __init__(self, stage: Stage, loaded: "LoadedModel | Vocabulary", sampler: "Sampler | Served"):
        self.stage, self.loaded, self.sampler, self.chat = stage, loaded, sampler, loaded.chat

    def encode(self, content: str) -> list[int]:
        """The ids of one user turn, up to where the answer begins."""
        return self.chat.encode([{"role": "user", "content": content}])

    def request(
        self,
        id_: str,
        draw: tuple[int, ...],
        content: str,
        prefill: str = "",
        *,
        limit: int = 0,
        stop: tuple[str, ...] = (),
        min_new_tokens: int = 0,
        penalize_prompt: bool = True,
        expected_tokens: int = 0,
        follows: bool = False,
    ) -> Request:
        """One draw of a task. `limit`: as in `sampling_of`; `expected_tokens`, `follows`: as in Request.

        penalize_prompt: False = the repetition penalty counts the prefill and the output, but not the user's turn.
        """
        sampling = replace(sampling_of(self.stage.sampling, limit, stop), min_new_tokens=min_new_tokens)
        # Of id and draw alone: a text does not depend on what else is in the batch, nor on a resume.
        seed = draw_seed(self.stage.out.seed, id_, *draw)
        ids = self.encode(content)
        penalty_from = 0 if penalize_prompt else len(ids)
        ids += self.chat.encode_text(prefill) if prefill else []
        return Request((id_, draw), ids, seed, sampling, penalty_from, expected_tokens, follows)

    def add(self, request: Request) -> None:
        self.sampler.add(request)

    def run(self) -> Iterator[Sample]:
        for sample in self.sampler.run():
            request = sample.request
            text, finish = self.chat.answer_of(sample.text, sample.token_ids, sample.finish, request.sampling.stop)
            if (text, finish) != (sample.text, sample.finish):  # its thought is no part of its length either
                ids = self.chat.encode_text(text) + sample.token_ids[-1:] * (finish == "eos")
                sample = replace(sample, text=text, finish=finish, token_ids=ids)
            yield sample

    def progress(self) -> object:
        return self.sampler.progress()

    def logprobs(self, pairs: list[tuple[list[int], list[int]]]) -> "list[Tensor]":
        """One value per continuation token, nats."""
        return self.sampler.logprobs(pairs)

    @contextlib.contextmanager
    def base(self) -> "Iterator[Sampler | Served]":
        """What gives the base model's log-probabilities, without the adapter. Nothing is sampled from it."""
        loaded, sampler = self.loaded, self.sampler
        if not self.stage.model.adapter:
            yield sampler
        elif isinstance(loaded, Vocabulary):
            with cast("Served", sampler).base() as base:
                yield base
        else:
            from lengthen.models.lora import without_adapter
            from lengthen.sampling.engine import Sampler

            sampler.close()  # it holds copies of the weights with the adapter merged in
            context = sampler.context  # also the room for keys and values: one text at a time, nothing is decoded
            with without_adapter(loaded.model, self.stage.model.adapter):
                eos_ids = sampler.eos_ids
                with Sampler(
                    loaded.model, loaded.tokenizer, eos_ids=eos_ids, context=context, kv_tokens=context
                ) as own:
                    yield own


def sampling_of(flags: SamplingFlags, limit: int = 0, stop: tuple[str, ...] = ()) -> Sampling:
    """The flags as Sampling; `limit`: new tokens where the user set none, 0 = the sampler's own."""
    recipe = flags.recipe()
    tokens = recipe.pop("max_new_tokens") or limit  # 0 = Sampling's default, capped by the context
    return Sampling(**recipe, stop=stop, **({"max_new_tokens": tokens} if tokens else {}))


def length_bias_drops(records: Sequence[dict], seed: int, min_yield: int = 1) -> dict[str, str]:
    """{id: "length-bias"} of the answers to drop. Each language is ranked alone: a Chinese word is a character.

    Never so many that fewer than `min_yield` are left, nor all of a language: the longest of them stay.
    """
    drops: dict[str, str] = {}
    for language in sorted({r["language"] for r in records}):
        # All records of the language at once: which are dropped depends on the ranks of all of them.
        same = [r for r in records if r["language"] == language]
        gone = length_bias([r["response_words"] for r in same], [r["id"] for r in same], seed)
        longest = _longest_first([same[i] for i in gone])
        drops |= {r["id"]: "length-bias" for r in longest[len(gone) == len(same) :]}
    spared = _longest_first([r for r in records if r["id"] in drops])[: max(0, min_yield - len(records) + len(drops))]
    return {id_: reason for id_, reason in drops.items() if id_ not in {r["id"] for r in spared}}


def _longest_first(records: Sequence[dict]) -> list[dict]:
    return sorted(records, key=lambda r: (-r["response_words"], r["id"]))
