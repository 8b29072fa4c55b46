"""The training pairs of a run as token ids on disk: made once, mapped into memory, in the same bytes for every resume.

    pairs.bin    int32 ids of all pairs, one behind the other
                 int64 [N + 1] where each begins, int32 [N] how many ids are its prompt
                 a JSON footer, its length (8 bytes), 8 magic bytes

10,000 pairs of 8,000 tokens are 320 MB here, and 3 GB as Python's lists. The footer holds the key (what the ids depend
on: hashes of the input files, of the tokenizer and of the templates, and the flags), a checksum of all before it, and
facts for people. A file with another key or a wrong checksum is not used. No torch here.
"""

import hashlib
import json
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lengthen.records import no_room

NAME = "pairs.bin"
MAGIC = b"pairs\x00\x00\x01"


@dataclass(frozen=True)
class Pair:
    """One training sample. Only tokens behind the prompt are targets, the EOS among them."""

    ids: list[int]  # prompt, then answer, then EOS
    num_prompt: int


class PairFile(Sequence):
    """The pairs of a file; each is read when it is asked for. `facts` is what the writer left for people."""

    def __init__(self, path: Path, facts: dict, count: int, num_ids: int):
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
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, int64 [N]."""
        return np.diff(self.starts)

    @property
    def num_targets(self) -> np.ndarray:
        """Tokens behind the prompt of each pair, int64 [N]."""
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


def write_pairs(path: Path, blocks: Iterator[list[Pair]], key: dict, facts: dict) -> None:
    """Write the pairs as they come, a block at a time; whole under its name, or not at all.

    facts: read when the last block has come, so a generator of blocks may fill it.
    """
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
            footer = json.dumps({**footer, "sha256": checksum.hexdigest()}).encode()
            handle.write(footer + struct.pack("<Q", len(footer)) + MAGIC)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise no_room(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)  # there only where something was raised


def read_pairs(path: Path, key: dict) -> tuple[PairFile | None, str]:
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
