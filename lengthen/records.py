"""Records and their files: what is in a line, which id it has, how it is read, how it is written whole or not at all.

jobs.py holds what a stage does with them. Standard library, jsonlines and lengthen.text only.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jsonlines

from lengthen.text.thoughts import strip_thoughts
from lengthen.text.words import count_words, detect_language

LANGUAGES = ("en", "zh")


class UserError(Exception):
    """A mistake the user can fix: one line that says what and where, and a hint (a command where possible)."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message, self.hint = message, hint


class LowYield(UserError):
    """Fewer records than --min-yield came out: exit code 3."""


# ---------------------------------------------------------------------------------------------------------
# Record types. Flat, every field always present: tools that infer column types from early rows then agree.


class Instruction(TypedDict):
    id: str  # 16 hex digits, see record_id
    parent_id: str  # "" = none
    language: str  # "en" or "zh"
    run_id: str  # "NAME/iter_K", from the output's folders
    sample: int  # index among the samples of one parent
    attempt: int  # which draw succeeded, from 0
    prompt: str
    source: str  # "seed", "self-instruct" or "file"
    example_ids: list[str]  # the two seeds shown to the model
    prompt_words: int  # strict measure, lengthen.text.count_words


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


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()


def record_id(stage: str, parent_id: str, sample: int, scope: str = "") -> str:
    """16 hex digits over (scope, parent, stage, sample). `scope` is the run id where there is no parent."""
    return _digest(scope, parent_id, stage, sample)[:16]


def prompt_id(language: str, prompt: str, occurrence: int = 0) -> str:
    """The id of a seed or of a user's own record; `occurrence` counts equal prompts within one file."""
    return _digest(language, prompt, occurrence)[:16]


def draw_seed(run_seed: int, id_: str, attempt: int, *more: Any) -> int:
    """The sampling seed of one draw, 63 bits: the same whatever else is in the batch."""
    return int(_digest(run_seed, id_, attempt, *more)[:16], 16) >> 1


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
# Reading


def read_jsonl(path: str | Path, needs: Iterable[str] = ("prompt",)) -> list[dict]:
    """All records of a JSONL file. Each field in `needs` must be a non-empty string, ids unique.

    Raises UserError that names file and line for anything else, a missing or an empty file included.
    """
    return list(each_record(path, needs))


def each_record(path: str | Path, needs: Iterable[str] = ("prompt",)) -> Iterator[dict]:
    """The same, one at a time: a file of any size in little memory."""
    path = Path(path)
    seen: dict[str, int] = {}
    count = 0
    for line, record in numbered_lines(path):
        where = f"{path}, line {line}"
        for field in needs:
            value = record.get(field)
            if not isinstance(value, str):
                what = "no field" if field not in record else f"a {type(value).__name__} in the field"
                raise UserError(f"{where}: {what} {field!r}, a string is needed")
            if not value.strip():
                raise UserError(f"{where}: the field {field!r} is empty")
        if record.get("language", "en") not in LANGUAGES:
            raise UserError(f"{where}: language {record['language']!r} is neither 'en' nor 'zh'")
        if record.get("id") is not None:  # null, as exports write it, is none
            if isinstance(record["id"], (list, dict)):
                raise UserError(f"{where}: a {type(record['id']).__name__} in the field 'id', a string is needed")
            if record["id"] in seen:
                raise UserError(
                    f"{where}: id {record['id']!r} was already used in line {seen[record['id']]}",
                    "remove the second record, or its `id`",
                )
            seen[record["id"]] = line
        count += 1
        yield record
    if not count:
        raise UserError(f"{path} holds no record", "see what the stage before it printed, and its *.rejected.jsonl")


def numbered_lines(path: Path) -> Iterable[tuple[int, dict]]:
    number = 0

    def filled(handle: Iterable[str]) -> Iterable[str]:
        nonlocal number  # an empty line (an editor's last one) is skipped, yet counted
        for number, line in enumerate(handle, start=1):  # noqa: B007
            if line.strip():
                yield line

    try:
        with open(path, encoding="utf-8-sig") as handle:
            for record in jsonlines.Reader(filled(handle)).iter(type=dict):
                yield number, record
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "run the stage that writes it first, or check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, a JSONL file is needed") from None
    except jsonlines.InvalidLineError as error:
        raise UserError(f"{path}, line {number}: {str(error).split(' (line')[0]}", "fix or delete that line") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: {error}", f"iconv -f GB18030 -t UTF-8 {path}  (or what it is in)"
        ) from None


def read_prompts(paths: Sequence[str | Path], source: str = "file") -> list[dict]:
    """Seed files or a user's own: any JSONL with `prompt` (and optionally `language`, `id`) as instruction records."""
    records: list[dict] = []
    occurrences: Counter[tuple[str, str]] = Counter()
    origin: dict[str, str] = {}  # id -> where it was read
    for path in paths:
        for line, row in enumerate(read_jsonl(path), start=1):
            language = language_of(row, row["prompt"])
            known = {k: v for k, v in row.items() if k in Instruction.__annotations__}
            number = occurrences[language, row["prompt"]]
            occurrences[language, row["prompt"]] += 1
            record = new_record("instruction", **{"source": source, "sample": 0, "attempt": 0, **known})
            record["language"] = language
            record["id"] = str(row.get("id") or prompt_id(language, row["prompt"], number))
            record["prompt_words"] = count_words(row["prompt"])
            if record["id"] in origin:
                raise UserError(f"{path}, line {line}: id {record['id']!r} is also in {origin[record['id']]}")
            origin[record["id"]] = f"{path}, line {line}"
            records.append(record)
    return records


def read_answers(path: str | Path) -> list[dict]:
    """Rows with `prompt` and `response`, of a stage or a user's own; a missing `language` or `id` is filled in."""
    rows = read_jsonl(path, needs=("prompt", "response"))
    for row in rows:
        if not strip_thoughts(row):
            raise UserError(f"{path}: a response is a thought without an answer: {row['response'][:60]!r}", "delete it")
        row["language"] = language_of(row, row["response"])
        row["id"] = str(row.get("id") or prompt_id(row["language"], row["prompt"] + "\n" + row["response"]))
    return rows


def language_of(row: Mapping, text: str, default: str = "en") -> str:
    """The row's own language, else that of the text, else `default`: a user's file need not name any."""
    return row.get("language") or detect_language(text) or default


def filter_language(records: list[dict], language: str) -> list[dict]:
    """Those of one language; "both" keeps all."""
    return [r for r in records if language in ("both", r["language"])]


# ---------------------------------------------------------------------------------------------------------
# Writing


def _write(descriptor: int, data: bytes | memoryview) -> int:
    """os.write, on its own so that the tests can make it fail."""
    return os.write(descriptor, data)


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
            os.fsync(handle.fileno())
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
        os.fsync(self.descriptor)
        self.last_sync = time.monotonic()

    def close(self) -> None:
        self.sync()
        os.close(self.descriptor)
