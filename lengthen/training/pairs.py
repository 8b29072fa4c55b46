"""The training pairs of a run as token ids on disk: made once, mapped into memory, in the same bytes for every resume.

    pairs.bin    int32 ids of all pairs, one after the other
                 int64 [N + 1] where each begins, int32 [N] how many ids are its prompt
                 a JSON footer, its length (8 bytes), 8 magic bytes

10,000 pairs of 8,000 tokens are 320 MB here, and 3 GB as Python's lists. The footer holds the key (what the ids depend
on: hashes of the input files, of the tokenizer and of the templates, and the flags), a checksum of all before it, and
facts for people. A file with another key or a wrong checksum is not used. No torch here, and NumPy only once there are
pairs: --help does not wait for it.
"""

import hashlib
import itertools
import json
import os
import struct
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lengthen import cli
from lengthen.reading import each_record
from lengthen.records import LowYield, no_room, sync, to_line
from lengthen.text import languages
from lengthen.text.words import count_words
from lengthen.training.parallel import Processes

if TYPE_CHECKING:
    import numpy as np

NAME = "pairs.bin"
MAGIC = b"pairs\x00\x00\x01"
BLOCK = 64  # records that are encoded at a time


@dataclass(frozen=True)
class Pair:
    """One training sample. Only tokens after the prompt are targets, the EOS among them."""

    ids: list[int]  # prompt, then answer, then EOS
    num_prompt: int

    @property
    def num_targets(self) -> int:
        return len(self.ids) - self.num_prompt


class PairFile:
    """The pairs of a file, a sequence; each is read when it is asked for. `facts`: what the writer left for people."""

    def __init__(self, path: Path, facts: dict[str, Any], count: int, num_ids: int):
        import numpy as np

        self.path, self.facts = path, facts
        self.ids = np.memmap(path, np.int32, "r", shape=(num_ids,)) if num_ids else np.empty(0, np.int32)
        self.starts = np.fromfile(path, np.int64, count + 1, offset=4 * num_ids)
        self.prompts = np.fromfile(path, np.int32, count, offset=4 * num_ids + 8 * (count + 1))

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self.starts[index : index + 2]
        return Pair(self.ids[start:stop].tolist(), int(self.prompts[index]))

    @property
    def lengths(self) -> "np.ndarray":
        """Tokens of each pair, int64 [N]."""
        return self.starts[1:] - self.starts[:-1]

    @property
    def num_targets(self) -> "np.ndarray":
        """Tokens after the prompt of each pair, int64 [N]."""
        return self.lengths - self.prompts


def ahead(blocks: Iterator[list[Pair]]) -> Iterator[list[Pair]]:
    """The blocks, the next one made in a thread while the caller works on this one.

    What the tokenizer does it does on all cores and without Python's lock; reading, checking and writing fill its gaps.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, blocks, None)
            yield block


def write_pairs(path: Path, blocks: Iterator[list[Pair]], key: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the pairs as they come, a block at a time; whole under its name, or not at all.

    facts: read when the last block has come, so a generator of blocks may fill it.
    """
    import numpy as np

    temporary = path.with_name(f".{path.name}.tmp")
    starts, prompts, checksum = array("q", [0]), array("i"), hashlib.sha256()
    try:
        with open(temporary, "wb") as handle:

            def put(data: bytes) -> None:
                checksum.update(data)
                handle.write(data)

            for block in blocks:
                for pair in block:
                    put(np.array(pair.ids, np.int32).tobytes())
                    starts.append(starts[-1] + len(pair.ids))
                    prompts.append(pair.num_prompt)
            put(starts.tobytes())
            put(prompts.tobytes())
            footer = {"key": key, "facts": facts, "count": len(prompts), "num_ids": starts[-1]}
            encoded = json.dumps({**footer, "sha256": checksum.hexdigest()}).encode()
            handle.write(encoded + struct.pack("<Q", len(encoded)) + MAGIC)
            handle.flush()
            sync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise no_room(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)  # there only where something was raised


def read_pairs(path: Path, key: dict[str, Any]) -> tuple[PairFile | None, str]:
    """(the pairs, ""), or (None, why they must be made again); ("" where there is no file)."""
    try:
        with open(path, "rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, size - 16))
            length, magic = struct.unpack("<Q8s", handle.read(16))
            if magic != MAGIC or length > size - 16:
                return None, f"{path} is damaged (it has no footer)"
            handle.seek(size - 16 - length)
            footer = json.loads(handle.read(length))
            if footer["key"] != json.loads(json.dumps(key)):
                return None, f"{path} is of other inputs, templates or another tokenizer"
            handle.seek(0)
            checksum, left = hashlib.sha256(), size - 16 - length
            while left and (data := handle.read(min(left, 1 << 24))):
                checksum.update(data)
                left -= len(data)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None, f"{path} is damaged (it cannot be read)"
    if checksum.hexdigest() != footer["sha256"]:
        return None, f"{path} is damaged (its checksum is another)"
    return PairFile(path, footer["facts"], footer["count"], footer["num_ids"]), ""


# ---------------------------------------------------------------------------------------------------------
# Records -> pairs


def encode_pairs(
    folder: Path,
    key: dict[str, Any],
    records: Callable[[], Iterable[dict]],
    make: Callable[[list[dict]], tuple[list[Pair], list[dict]]],
    processes: Processes,
) -> PairFile:
    """The pairs in the folder if they are of this key, else made afresh; the first process makes them.

    records: each call reads them from the first. make: a block of records -> (pairs, records left out with `reason`).
    Those left out are listed in rejected.jsonl; the facts hold their number and the lines to say of them.
    """
    path, rejected = folder / NAME, folder / "rejected.jsonl"
    pairs, why = read_pairs(path, key) if processes.first else (None, "")
    if processes.first and (pairs is None or not rejected.exists()):
        if why:
            cli.say(f"{why}: encoding the pairs again")
        started = time.monotonic()
        facts: dict[str, Any] = {}
        write_pairs(path, ahead(_encoded_blocks(records, make, rejected, key["max_length"], facts)), key, facts)
        pairs, why = read_pairs(path, key)
        assert pairs is not None, why
        seconds = time.monotonic() - started
        cli.say(f"encoded {len(pairs)} pairs, {pairs.lengths.sum():,} tokens, in {seconds:.1f} s: kept in {path}")
    processes.wait()
    pairs = pairs or read_pairs(path, key)[0]
    assert pairs is not None, f"the first process left no {path}"
    return pairs


def records_of(paths: Iterable[str], needs: Iterable[str], language: str) -> Iterator[dict]:
    """The records of all files, in the wanted language; `language` is detected where a user's file has none."""
    seen, wanted, chosen = 0, 0, languages.chosen(language)
    for record in (record for path in paths for record in each_record(path, needs, spoken=("prompt", "response"))):
        seen += 1
        if record["language"] in chosen:
            wanted += 1
            yield record
    if not wanted:
        raise LowYield(f"none of the {seen} records is in the language {language!r}", "--language all")


def _encoded_blocks(
    records: Callable[[], Iterable[dict]],
    make: Callable[[list[dict]], tuple[list[Pair], list[dict]]],
    rejected: Path,
    max_length: int,
    facts: dict[str, Any],
) -> Iterator[list[Pair]]:
    """A block at a time, so that memory stays flat; those left out go to `rejected`, the counts to `facts`."""
    temporary = rejected.with_name(f".{rejected.name}.tmp")  # after a kill the next start removes it
    facts.update(records=0, left_out=0)
    try:
        with open(temporary, "wb") as handle:
            remaining = iter(records())
            while block := list(itertools.islice(remaining, BLOCK)):
                pairs, left_out = make(block)
                handle.writelines(map(to_line, left_out))
                facts["records"] += len(block)
                facts["left_out"] += len(left_out)
                yield pairs
            handle.flush()
            sync(handle.fileno())
        os.replace(temporary, rejected)
    except OSError as error:
        raise no_room(rejected, error) from error
    listed = each_record(rejected, ("prompt", "response")) if facts["left_out"] else ()
    facts["notes"] = left_out_notes(records(), listed, max_length)


def left_out_notes(records: Iterable[dict], left_out: Iterable[dict], max_length: int) -> list[str]:
    """Lines to say. The longest pairs are what the method is for, so losing them is a warning."""

    def words(record: dict) -> int:
        known = record.get("response_words", -1)
        return known if known >= 0 else count_words(record["response"])

    lost = [(len(r["response"]), words(r), r["reason"], r.get("tokens", 0)) for r in left_out]
    if not lost:
        return []
    sizes = [(len(r["response"]), words(r)) for r in records]  # characters, words
    note = f"left out {len(lost)} of {len(sizes)} pairs (rejected.jsonl)"
    note += f", {sum(w for _, w, *_ in lost):,} of {sum(w for _, w in sizes):,} words"
    longest_tenth = sorted(length for length, _ in sizes)[-max(1, len(sizes) // 10)]
    too_long = [(length, tokens) for length, _, reason, tokens in lost if reason == "too-long"]
    if len(lost) > 0.05 * len(sizes) or any(length >= longest_tenth for length, _ in too_long):
        note = f"warning: {note}; the longest pair has {max((t for _, t in too_long), default=0)} tokens"
        note += f", --max-length is {max_length}: a larger one keeps them, where the model's context allows"
    return [note]
