"""Records and their files: what is in a line, which id it has, how it is written whole or not at all.

reading.py reads them, jobs.py holds what a stage does with them. Standard library only.
"""

import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from lengthen.errors import LowYield as LowYield
from lengthen.errors import UserError

# ---------------------------------------------------------------------------------------------------------
# Record types. Flat, every field always present: tools that infer column types from early rows then agree.


class Instruction(TypedDict):
    id: str  # 16 hex digits, see record_id
    parent_id: str  # "" = none
    language: str  # a code of prompts/: "en", "zh", ...
    run_id: str  # "NAME/iter_K", from the output's folders
    sample: int  # index among the samples of one parent
    attempt: int  # which draw succeeded, from 0
    prompt: str
    source: str  # "seed", "self-instruct" or "file"
    example_ids: list[str]  # the two seeds shown to the model
    prompt_words: int  # strict measure, lengthen.text.words.count_words


class Response(TypedDict):
    id: str
    parent_id: str
    language: str
    run_id: str
    sample: int
    attempt: int
    prompt: str
    response: str
    response_words: int
    response_tokens: int  # generated tokens, EOS included
    finish: str  # "eos", "length", "stop" or "repetition"


class Extended(TypedDict):
    id: str
    parent_id: str
    language: str
    run_id: str
    sample: int
    attempt: int
    prompt: str
    initial: str  # the draft before any round
    initial_words: int
    response: str
    response_words: int
    response_tokens: int
    finish: str
    rounds: int  # accepted two-stage rounds
    round_words: list[int]  # words after each accepted round
    gain: float  # response_words / initial_words


class Constrained(TypedDict):
    id: str
    parent_id: str
    language: str
    run_id: str
    sample: int
    attempt: int
    prompt: str
    query: str  # the prompt with the length demand written into it
    type: str  # "about", "range", "above" or "below"
    constraint: str  # the demand in words
    min_words: int  # the literal demand: about N = (N, N), above t = (t, -1), below t = (-1, t)
    max_words: int
    response: str
    response_words: int
    response_tokens: int
    origin: str  # "extended" or "response"


class Output(TypedDict):
    id: str
    parent_id: str
    language: str
    run_id: str
    sample: int
    attempt: int
    query: str
    range: str  # the benchmark's own label
    type: str
    constraint: str
    min_words: int
    max_words: int
    response: str
    response_words: int
    longen_words: int  # the published measure, used for the length score only
    response_tokens: int
    finish: str
    length_score: float  # 0..1, -1 = no demand
    perplexity: float  # of the answer's tokens under the model that wrote it, at temperature 1; -1 = not known
    base_tokens: int  # of the response, encoded again for the probes below; -1 = not probed
    base_losses: list[float]  # nats per token after its query, of the base model, in the buckets of scores.POSITIONS
    own_loss: float  # the same over the response's beginning (measures.OPENING_TOKENS); -1 = not probed
    shuffled_loss: float  # the same after the next query of its language; -1 = not probed, or there is no other


class Judgement(TypedDict):
    id: str
    parent_id: str  # the answer's id
    language: str
    run_id: str
    sample: int
    attempt: int  # which reply of the judge was usable, from 0
    answer_hash: str  # 16 hex digits over query and answer: another answer under the same id is judged again
    judge: str  # as given to --judge
    model: str  # what answered: the model name at an endpoint, the fingerprint of a local model
    relevance: int  # 1 to 10, as the six below; -1 in a rejected record
    coherence: int
    accuracy: int
    consistency: int
    clarity: int
    creativity: int
    engagement: int
    mean: float  # of the seven
    cut: int  # characters left out of the texts because the judge's context is too short for them
    reply: str  # what the judge wrote


class Preference(TypedDict):
    id: str
    parent_id: str  # id of the answer of run A
    other_id: str  # id of the answer of run B
    language: str
    run_id: str
    sample: int
    attempt: int
    answer_hash: str  # over query and both answers
    judge: str
    model: str
    order: str  # "ab" = the judge saw A's answer first, "ba" = B's
    winner: str  # "a", "b" or "tie", whatever the order; "" in a rejected record
    cut: int
    reply: str


KINDS = {
    "instruction": Instruction,
    "response": Response,
    "extended": Extended,
    "constrained": Constrained,
    "output": Output,
    "judgement": Judgement,
    "preference": Preference,
}
EMPTY = {str: "", int: -1, float: -1.0}  # lists: []


def new_record(kind: str, **fields: Any) -> dict:
    """A record of `kind` with every field present: those given, and "" / -1 / [] for the rest."""
    types = KINDS[kind].__annotations__
    unknown = set(fields) - set(types)
    assert not unknown, f"{kind} records have no field {sorted(unknown)}"
    return {name: fields[name] if name in fields else EMPTY.get(type_, []) for name, type_ in types.items()}


# ---------------------------------------------------------------------------------------------------------
# Identity. Ids and seeds are hashes, so they depend on neither batch, order nor resume.


def hash_of(*parts: Any) -> str:
    """16 hex digits that are the same for the same parts."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def record_id(stage: str, parent_id: str, sample: int, scope: str = "") -> str:
    """16 hex digits over (scope, parent, stage, sample). `scope` is the run id where there is no parent."""
    return hash_of(scope, parent_id, stage, sample)


def prompt_id(language: str, prompt: str, occurrence: int = 0) -> str:
    """The id of a seed or of a user's own record; `occurrence` counts equal prompts within one file."""
    return hash_of(language, prompt, occurrence)


def draw_seed(run_seed: int, id_: str, attempt: int, *more: Any) -> int:
    """The sampling seed of one draw, 63 bits: the same whatever else is in the batch."""
    return int(hash_of(run_seed, id_, attempt, *more), 16) >> 1


def run_id_of(output: str | Path) -> str:
    """'NAME/iter_K' out of runs/NAME/iter_K/file.jsonl."""
    folder = Path(output).resolve().parent
    return f"{folder.parent.name}/{folder.name}"


def fingerprint(path: str | Path | None) -> str:
    """A cheap identity of a model, adapter or file: names, sizes, and contents (of large files the first and last MiB).

    A name that is not a path (a hub id, "smollm2") stands for itself. 15 GB of weights are told apart by their headers.
    """
    if not path:
        return ""
    root = Path(path)
    if not root.exists():
        return str(path)
    # A folder of a run holds logs and checkpoints beside the weights: only what a loader reads counts.
    names = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt") if root.is_dir() else ()
    files = sorted({p for n in names for p in root.glob(n) if p.name != "meta.json"}) if root.is_dir() else [root]
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.name}\x1f{size}\x1f".encode())
        with open(file, "rb") as handle:
            total.update(handle.read(1 << 20))
            if size > 2 << 20:
                handle.seek(-(1 << 20), os.SEEK_END)
            total.update(handle.read(1 << 20))
    return total.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------
# Writing


def _write(descriptor: int, data: bytes | memoryview) -> int:
    """os.write, on its own so that the tests can make it fail."""
    return os.write(descriptor, data)


NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems without fsync say
_said: set[str] = set()


def say_once(line: str) -> None:
    """A line for people, on stderr; the second time nothing."""
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr, flush=True)


def sync(descriptor: int) -> None:
    """os.fsync; where the file system has none (FUSE, some network mounts) it goes on, and says so once."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
        say_once("this file system cannot sync files: a power cut may cost what was written last")


def _replace(source: Path, target: Path) -> None:
    """os.replace, on its own so that the tests can make it fail."""
    os.replace(source, target)


def no_room(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror or error}",
        "finished samples are on disk: fix this and run the same command again, it continues where it was",
    )


def replace_file(path: str | Path, content: str | bytes) -> None:
    """Write the whole file or nothing: a temporary file in the same folder, fsync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb", buffering=0) as handle:
            view = memoryview(data)
            while view:
                view = view[_write(handle.fileno(), view) :]
            sync(handle.fileno())
        _replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise no_room(path, error) from error


def to_line(record: Mapping) -> bytes:
    """One JSONL line. A lone surrogate (half a character) cannot be encoded: it becomes a question mark."""
    text = json.dumps(record, ensure_ascii=False, separators=(", ", ": "))
    return text.encode("utf-8", "replace") + b"\n"


class Appender:
    """Appends records to one JSONL file, one write per line, fsync at most every `sync_seconds`.

    A torn last line (the process died inside a write) is cut first: appending to it would lose two records.
    """

    def __init__(self, path: Path, sync_seconds: float = 2.0):
        self.path, self.sync_seconds, self.last_sync = path, sync_seconds, time.monotonic()
        try:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise no_room(path, error) from error
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        size = os.fstat(self.descriptor).st_size
        end, block = size, b""
        while end > 0 and b"\n" not in block:
            start = max(0, end - 65536)
            block = os.pread(self.descriptor, end - start, start)
            if b"\n" in block:
                end = start + block.rindex(b"\n") + 1
            else:
                end = start
        if end < size:
            os.ftruncate(self.descriptor, end)

    def append(self, record: Mapping) -> None:
        data, start = to_line(record), os.fstat(self.descriptor).st_size
        try:
            written = _write(self.descriptor, data)
            if written < len(data):  # a full disk takes part of a line and says no only to the next write
                raise OSError(28, "No space left on device")
            if time.monotonic() - self.last_sync > self.sync_seconds:
                self.sync()
        except OSError as error:
            os.ftruncate(self.descriptor, start)
            raise no_room(self.path, error) from error

    def sync(self) -> None:
        try:
            sync(self.descriptor)
        except OSError as error:  # a quota on a network mount says no only now
            raise no_room(self.path, error) from error
        self.last_sync = time.monotonic()

    def close(self) -> None:
        self.sync()
        os.close(self.descriptor)
