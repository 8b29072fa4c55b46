"""Reading records: JSONL of a stage, or of somebody's own, in the forms that people have.

A user's file is read if only one reading of it is possible, and what was done is said once: a JSON array, an object
with one list inside, indented JSON, Alpaca's columns, ShareGPT's and OpenAI's conversations of one turn, `null` for
"absent", numbers as ids, a language by its name, another engine's word for why a text ended. Anything else raises
UserError, which names file and line, and has a conversion where one is known.
"""

import json
import re
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonlines

from lengthen.records import Instruction, UserError, new_record, prompt_id, say_once
from lengthen.text import languages
from lengthen.text.thoughts import strip_thoughts
from lengthen.text.words import count_words, detect_language

# ---------------------------------------------------------------------------------------------------------
# Files: JSONL, or JSON in one piece

TO_JSONL = "python -c \"import pandas; pandas.read_{0}({1!r}).to_json({2!r}, orient='records', lines=True)\""
MAGIC = {b"PAR1": "parquet", b"ARROW1": "feather", b"PK\3\4": "excel"}


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """What the system says of a file that cannot be read, as a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "run the stage that writes it first, or check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, a JSONL file is needed") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """The objects of a JSONL file with their line numbers, as they are. Empty lines are skipped, yet counted."""
    number = 0

    def filled(handle: Iterable[str]) -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(handle, start=1):  # noqa: B007
            if line.strip():
                yield line

    try:
        with readable(path), open(path, encoding="utf-8-sig") as handle:
            for record in jsonlines.Reader(filled(handle)).iter(type=dict):
                yield number, record
    except jsonlines.InvalidLineError as error:
        raise UserError(f"{path}, line {number}: {str(error).split(' (line')[0]}", "fix or delete that line") from None
    except RecursionError:
        raise UserError(f"{path}, line {number}: nested too deeply", "fix or delete that line") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: {error}", f"iconv -f GB18030 -t UTF-8 {path}  (or what it is in)"
        ) from None


def located_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a file of any form, each with the words that say where it is."""
    refuse_tables(path)
    items = in_one_piece(path)
    if items is None:
        yield from ((f"{path}, line {number}", row) for number, row in numbered_lines(path))
        return
    for number, row in enumerate(items, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, item {number}: a {type(row).__name__}, an object is needed")
        yield f"{path}, item {number}", row


def refuse_tables(path: Path) -> None:
    """UserError with a conversion for Parquet, Arrow, Excel, CSV and compressed files."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(8)
    except OSError:
        return  # numbered_lines says what is wrong
    kind = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), "")
    if not kind and path.suffix.lower() in (".csv", ".tsv"):
        kind = "csv"
    if kind:
        target = str(path.with_suffix(".jsonl"))
        raise UserError(f"{path} is a {kind} file, JSONL is needed", TO_JSONL.format(kind, str(path), target))
    if head.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is compressed, JSONL is needed", f"gunzip -k {path}")


def in_one_piece(path: Path) -> list | None:
    """The items of a file that is JSON rather than JSONL: an array, an object around one, indented objects; else None.

    Only the first line of a JSONL file is looked at.
    """
    try:
        with open(path, encoding="utf-8-sig") as handle:
            first = next((line for line in handle if line.strip()), "").strip()
            more = any(line.strip() for line in handle)
            if not first.startswith(("{", "[")):
                return None
            if first.startswith("{"):
                try:
                    row = json.loads(first)
                    if more or wrapped(row) is None:
                        return None
                except json.JSONDecodeError:
                    pass  # it may go on in the next line
            handle.seek(0)
            values = list(decoded(handle.read().rstrip()))
    except json.JSONDecodeError as error:
        if first.startswith("["):  # an array, and nothing else
            raise UserError(f"{path}, line {error.lineno}: {error.msg}", "it is a JSON array: mend it there") from None
        return None  # read as JSONL, which says what is wrong and where
    except (OSError, ValueError, RecursionError):
        return None  # the same
    if len(values) == 1 and isinstance(values[0], list):
        say_once(f"{path} is a JSON array: its {len(values[0]):,} items are read as records")
        return values[0]
    if len(values) == 1 and isinstance(values[0], dict) and (inside := wrapped(values[0])):
        name, items = inside
        say_once(f"{path} is one JSON object: the {len(items):,} items of its list {name!r} are read as records")
        return items
    return values if all(isinstance(value, dict) for value in values) else None


def decoded(text: str) -> Iterator[Any]:
    """The JSON values of a text, one after the other, white space between them. Raises JSONDecodeError."""
    decoder, end = json.JSONDecoder(), 0
    while match := re.compile(r"\s*(?=\S)").match(text, end):
        value, end = decoder.raw_decode(text, match.end())
        yield value


def wrapped(row: Any) -> tuple[str, list] | None:
    """(name, items) if an object is no record but has one list of objects inside."""
    if not isinstance(row, dict) or row.keys() & {"prompt", "query", "instruction", *TURNS}:
        return None
    lists = [(k, v) for k, v in row.items() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)]
    return lists[0] if len(lists) == 1 else None


# ---------------------------------------------------------------------------------------------------------
# Rows: the columns of other formats, and values in other spellings

TURNS = ("messages", "conversations", "conversation")  # a turn has role and content, or from and value
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}

FINISHES = {  # other engines' words for ours
    **dict.fromkeys(("", "unknown", "none", "null"), ""),
    **dict.fromkeys(
        "eos eos_token eos_token_id stop stop_sequence end_turn end ended complete completed done".split(), "eos"
    ),
    **dict.fromkeys(
        "length max_tokens max_length max_new_tokens max_output_tokens token_limit truncated".split(), "length"
    ),
    **dict.fromkeys(("repetition", "loop"), "repetition"),
    "error": "error",
}


def read_jsonl(path: str | Path, needs: Iterable[str] = ("prompt",), spoken: Sequence[str] = ()) -> list[dict]:
    """All records of a file. Each field in `needs` must be a non-empty string, ids unique.

    `spoken`: the fields whose text gives the language where the record does not. Raises UserError that names file and
    line for anything else, a missing or an empty file included.
    """
    return list(each_record(path, needs, spoken))


def each_record(path: str | Path, needs: Iterable[str] = ("prompt",), spoken: Sequence[str] = ()) -> Iterator[dict]:
    """The same, one at a time: a JSONL file of any size in little memory."""
    return (record for _, record in located_records(path, needs, spoken))


def located_records(
    path: str | Path, needs: Iterable[str] = ("prompt",), spoken: Sequence[str] = ()
) -> Iterator[tuple[str, dict]]:
    """The same, each with the words that say where it is."""
    path = Path(path)
    seen: dict[str, str] = {}
    count = halves = 0
    for where, row in located_rows(path):
        record = common_columns({k: v for k, v in row.items() if v is not None}, path, where)
        halves += make_encodable(record)
        for field in needs:
            value = record.get(field)
            if not isinstance(value, str):
                what = "no field" if field not in record else f"a {type(value).__name__} in the field"
                raise UserError(f"{where}: {what} {field!r}, a string is needed", columns_hint(field, record))
            if not value.strip():
                raise UserError(f"{where}: the field {field!r} is empty")
        read_ids(record, where)
        read_finish(record, where)
        read_language(record, spoken, where)
        if id_ := record.get("id"):
            if id_ in seen:
                raise UserError(
                    f"{where}: id {id_!r} was already used in {seen[id_]}", "remove the second record, or its `id`"
                )
            seen[id_] = where.removeprefix(f"{path}, ")
        count += 1
        yield where, record
    if halves:
        say_once(f"{path}: {halves:,} texts hold half a character (a lone surrogate), read as a question mark")
    if not count:
        raise UserError(f"{path} holds no record", "see what the stage before it printed, and its *.rejected.jsonl")


def common_columns(record: dict, path: Path, where: str) -> dict:
    """`prompt` and `response` out of Alpaca's columns or a conversation, where the record has no text of ours."""
    if record.keys() & {"prompt", "query"}:
        return record
    if isinstance(record.get("instruction"), str):
        parts = [record["instruction"], record.get("input", "")]
        record["prompt"] = "\n\n".join(part for part in parts if isinstance(part, str) and part.strip())
        if isinstance(record.get("output"), str):
            record["response"] = record["output"]
        say_once(f"{path}: Alpaca's columns: instruction and input are read as prompt, output as response")
    for field in TURNS:
        if isinstance(turns := record.get(field), list) and all(isinstance(turn, dict) for turn in turns):
            said = [(str(t.get("role", t.get("from"))), t.get("content", t.get("value"))) for t in turns]
            spoken = [(ROLES.get(role), text) for role, text in said if role != "system"]
            texts = [text for _, text in spoken if isinstance(text, str)]
            roles = [role for role, _ in spoken]
            if roles not in (["user"], ["user", "assistant"]) or len(texts) < len(spoken):
                raise UserError(
                    f"{where}: a conversation in {field!r} that is not one question in text and one answer",
                    to_pairs(path, field, array=", item " in where),
                )
            record |= dict(zip(("prompt", "response"), texts, strict=False))
            less = " (system messages are left out)" if len(spoken) < len(turns) else ""
            say_once(f"{path}: {field}: a question is read as prompt, its answer as response{less}")
            break
    return record


def to_pairs(path: Path, field: str, array: bool) -> str:
    """A command that keeps the first question and answer of each conversation."""
    rows = f"json.load(open({str(path)!r}))" if array else f"map(json.loads, open({str(path)!r}))"
    spoken = f"[t for t in r[{field!r}] if t.get('role', t.get('from')) != 'system']"
    pair = "dict(zip(('prompt', 'response'), [t.get('content', t.get('value')) for t in turns]))"
    code = f"import json; [print(json.dumps({pair})) for r in {rows} for turns in [{spoken}]]"
    return f'python -c "{code}" > {path.with_suffix(".pairs.jsonl")}'


def columns_hint(field: str, record: Mapping) -> str:
    texts = [name for name, value in record.items() if isinstance(value, str)]
    return f"its columns with text: {', '.join(texts[:8])}; rename the one that is meant" if texts else ""


def make_encodable(record: dict) -> int:
    """Replace half characters (lone surrogates) in the texts of a record by question marks; how many texts had one."""
    found = 0
    for name, value in record.items():
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                record[name], found = value.encode("utf-8", "replace").decode(), found + 1
    return found


def read_ids(record: dict, where: str) -> None:
    """Ids are texts; a number, as a database writes it, stands for its digits."""
    for field in ("id", "parent_id", "other_id"):
        value = record.get(field, "")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise UserError(f"{where}: a {type(value).__name__} in the field {field!r}, a string or a number is needed")
        if field in record:
            record[field] = str(value)


def read_finish(record: dict, where: str) -> None:
    """`finish` in our words, also out of the fields and words of other engines."""
    field = next((f for f in ("finish", "finish_reason", "stop_reason") if f in record), "")
    if not field or (field != "finish" and "response" not in record):  # a file of prompts has columns of its own
        return
    value = record[field]
    if field == "stop_reason" and not isinstance(value, str):  # vLLM's: a token id
        return
    ours = FINISHES.get(value.rpartition(".")[2].strip().casefold()) if isinstance(value, str) else None
    if ours is None:
        raise UserError(
            f"{where}: the field {field!r} says {value!r}, which is not known",
            f"remove it, or say one of: {', '.join(sorted(set(filter(None, FINISHES.values()))))}",
        )
    record["finish"] = ours


def check_types(record: Mapping, types: Mapping[str, Any], where: str) -> None:
    """UserError for a field whose value is of another type than `types` says."""
    for name, value in record.items():
        wanted = typing.get_origin(types[name]) or types[name]  # list of list[str]
        inner = typing.get_args(types[name])
        fits = isinstance(value, (int, float) if wanted is float else wanted) and not isinstance(value, bool)
        if not fits or (inner and not all(isinstance(item, inner) for item in value)):
            needed = getattr(types[name], "__name__", str(types[name]))
            raise UserError(
                f"{where}: {str(value)[:40]!r} in the field {name!r}, {needed} is needed", f"remove {name!r}"
            )


def read_language(record: dict, spoken: Sequence[str], where: str) -> None:
    """`language` as a code of prompts/: as given, by any of its names, else as detected in the first of `spoken` that
    shows one.

    A text without letters ("1 2 3") is taken for the first of the default languages.
    """
    if given := record.get("language"):
        language = languages.by_name(given) if isinstance(given, str) else ""
        if not language:
            raise UserError(f"{where}: language {given!r} is not served; there are: {', '.join(languages.codes())}")
        record["language"] = language
    elif spoken:
        texts = [record[field] for field in spoken if isinstance(record.get(field), str)]
        language, first = next(filter(None, map(detect_language, texts)), ""), languages.chosen(languages.DEFAULT)[0]
        if not language and any(character.isalpha() for text in texts for character in text):
            raise UserError(
                f"{where}: no language is given, and the text is in none that is served; there are: "
                f"{', '.join(languages.codes())}",
                f'if it is one of these, say so in the record: "language": "{first}"',
            )
        record["language"] = language or first


# ---------------------------------------------------------------------------------------------------------
# Prompts and answers


def read_prompts(paths: Sequence[str | Path], source: str = "file") -> list[dict]:
    """Seed files or a user's own: any records with `prompt` (and optionally `language`, `id`) as instructions."""
    records: list[dict] = []
    occurrences: Counter[tuple[str, str]] = Counter()
    origin: dict[str, str] = {}  # id -> where it was read
    for path in paths:
        for where, row in located_records(path, spoken=("prompt",)):
            language = row["language"]
            known = {k: v for k, v in row.items() if k in Instruction.__annotations__}
            check_types(known, Instruction.__annotations__, where)
            occurrence = occurrences[language, row["prompt"]]
            occurrences[language, row["prompt"]] += 1
            record = new_record("instruction", **{"source": source, "sample": 0, "attempt": 0, **known})
            record["id"] = row.get("id") or prompt_id(language, row["prompt"], occurrence)
            record["prompt_words"] = count_words(row["prompt"])
            if record["id"] in origin:
                raise UserError(f"{where}: id {record['id']!r} is also in {origin[record['id']]}")
            origin[record["id"]] = where
            records.append(record)
    return records


def read_answers(path: str | Path) -> list[dict]:
    """Rows with `prompt` and `response`, of a stage or a user's own; a missing `language` or `id` is filled in."""
    rows: list[dict] = []
    left_out: list[str] = []
    made, twice = set[str](), list[str]()  # ids that are none of the file's
    for where, row in located_records(path, needs=("prompt", "response"), spoken=("response", "prompt")):
        if not strip_thoughts(row):
            left_out.append(where)
            continue
        if not row.get("id"):
            row["id"] = prompt_id(row["language"], row["prompt"] + "\n" + row["response"])
            if row["id"] in made:  # one row twice: it would be done twice
                twice.append(where)
                continue
            made.add(row["id"])
        rows.append(row)
    if left_out:
        say_once(f"{left_out[0]}: a thought without an answer; {len(left_out):,} such records are left out")
    if twice:
        say_once(f"{twice[0]}: the same record as before; {len(twice):,} such records are left out")
    if not rows:
        raise UserError(f"{path} holds no answer, only thoughts", "draw the answers again with more tokens")
    return rows


def filter_language(records: list[dict], asked: str, source: str = "") -> list[dict]:
    """Those in the languages that --language names; of the others one line says how many there were.

    UserError where none is left.
    """
    chosen = languages.chosen(asked)
    kept = [r for r in records if r["language"] in chosen]
    others = sorted({r["language"] for r in records} - set(chosen))
    if others and not kept:
        raise UserError(
            f"{source}{': ' * bool(source)}none of the {len(records):,} records is in --language {asked}, they are in "
            f"{', '.join(others)}",
            f"--language {','.join(others)}",
        )
    if others:
        less = f"{len(records) - len(kept):,} of {len(records):,} records"
        say_once(f"--language {asked} leaves out {less}, in {', '.join(others)}")
    return kept
