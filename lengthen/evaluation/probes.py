"""Probes: what a model that is loaded makes of texts that are there, in a few forward passes; it writes nothing.

The answers are measured under the base model, without the adapter that wrote them: is the beginning of an answer
likelier after its own query than after the next one, and how does perplexity run along the answer? The short tasks are
measured under the evaluated model, adapter included: has it forgotten how to be brief?
"""

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lengthen import cli
from lengthen.evaluation.measures import OPENING_TOKENS
from lengthen.evaluation.scores import POSITIONS
from lengthen.jobs import Job
from lengthen.reading import read_jsonl
from lengthen.records import hash_of
from lengthen.stage import Stage, Writer
from lengthen.text.languages import files

if TYPE_CHECKING:
    from torch import Tensor

    from lengthen.models.chat import Chat
    from lengthen.sampling.engine import Sampler
    from lengthen.sampling.served import Served

SHORT_TASKS = "short_tasks.jsonl"  # of prompts/LANGUAGE/
BATCH = 8  # answers measured between two writes to disk


def probe(job: Job, rows: Sequence[dict], stage: Stage, writer: Writer) -> dict[str, Any]:
    """Measure the answers under the base model (into their records) and the short tasks under the evaluated one."""
    began = time.monotonic()
    found = files(SHORT_TASKS, stage.out.language)
    tasks = [task for file in found for task in read_jsonl(file, ("prompt", "answer"))]
    losses = short_losses(tasks, writer.chat, writer.sampler)
    with writer.base() as base:
        probe_answers(job, rows, writer.chat, base)
    cli.say(f"probes: {len(job.records)} answers and {len(losses)} short tasks in {time.monotonic() - began:.1f} s")
    return {"short_losses": losses, "short_tasks": hash_of(json.dumps(tasks))}


def short_losses(tasks: Sequence[dict], chat: "Chat", sampler: "Sampler | Served") -> list[float]:
    """Nats per token of the short tasks' answers, their ends included: long writers find an early end unlikely."""
    pairs = [(prompt_of(chat, task["prompt"]), chat.encode_answer(task["answer"])) for task in tasks]
    return [round(-values.mean().item(), 4) for values in sampler.logprobs(pairs)]


def probe_answers(job: Job, rows: Sequence[dict], chat: "Chat", sampler: "Sampler | Served") -> None:
    """base_tokens, base_losses, own_loss and shuffled_loss of every answer; each batch is on disk when it is done.

    Texts are tokenized again, so that an answer read back from disk is measured like one that was just sampled.
    """
    has_answer = {r["parent_id"] for r in job.records}
    queries = [(r["language"], r["query"]) for r in rows if r["parent_id"] in has_answer]
    prompts = {query: prompt_of(chat, query[1]) for query in queries}
    other = next_queries(list(prompts))
    fields = {note["probed"]: note["fields"] for note in job.journal if "probed" in note}
    todo = [r for r in job.records if r["id"] not in fields]
    with cli.progress("probes", len(job.records)) as bar:
        for start in range(0, len(todo), BATCH):
            bar.update(len(fields))
            batch, pairs = todo[start : start + BATCH], []
            for row in batch:
                query = row["language"], row["query"]
                own, shuffled = prompts[query], prompts[other[query]]
                # Tokenized again, or after a longer prompt, a text may no longer fit: its end is left out.
                ids = chat.encode_text(row["response"])[: sampler.context - max(len(own), len(shuffled))]
                pairs += [(own, ids), (shuffled, ids[:OPENING_TOKENS])] if other[query] != query else [(own, ids)]
            losses = iter([-values for values in sampler.logprobs(pairs)])  # nats [tokens] of each pair
            for row in batch:
                query = row["language"], row["query"]
                fields[row["id"]] = probed(next(losses), next(losses) if other[query] != query else None)
                job.note({"probed": row["id"], "fields": fields[row["id"]]})
    # The journal is what survives a kill; the records are rewritten as a whole, and only once all are measured.
    job.amend(fields)


def prompt_of(chat: "Chat", query: str) -> list[int]:
    return chat.encode([{"role": "user", "content": query}])


def next_queries(queries: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
    """(language, text) -> the next query of its language, the first one after the last; itself if it is alone."""
    by_language = {language: [q for q in queries if q[0] == language] for language in {q[0] for q in queries}}
    return {a: b for same in by_language.values() for a, b in zip(same, [*same[1:], same[0]], strict=True)}


def probed(own: "Tensor", shuffled: "Tensor | None") -> dict[str, Any]:
    """The fields of an "output" record, from its tokens' losses after their own query and after another one."""
    if not len(own):
        return {}
    buckets = [own[a:b] for a, b in pairwise(POSITIONS) if a < len(own)]  # of growing width: 64, 64, 128, 256, ...
    return {
        "base_tokens": len(own),
        "base_losses": [round(bucket.mean().item(), 4) for bucket in buckets],
        "own_loss": round(own[:OPENING_TOKENS].mean().item(), 4),
        "shuffled_loss": -1.0 if shuffled is None else round(shuffled.mean().item(), 4),
    }
