"""Folders of a model that others read, too: transformers 4, vLLM, mlx-lm, and llama.cpp's converter.

A merged model is its base with other weights: what else lies in the base's folder (generation config, chat template,
tokenizer, code) is copied as it is. What transformers 5 writes by itself is said in the words of transformers 4 as
well, which takes a `rope_parameters` that it does not know for a theta of 10,000, in silence.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lengthen.jobs import Lock
from lengthen.models.lora import lora_layers
from lengthen.records import UserError, sync

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
LOCAL = {"is_local", "local_files_only", "backend"}  # of tokenizer_config.json: how it was loaded last, and by what


def check_target(folder: Path, base: Path) -> None:
    """UserError unless a merged model may be written to `folder`: also asked before a training, which takes hours."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise UserError(f"{folder} holds other files than a model's: it is not replaced", "--merge-to a new folder")
    if folder.resolve() == base.resolve():
        raise UserError(f"{folder} is the base model itself: it is not replaced", "--merge-to a new folder")


def merge_to(model: Any, base: Path, folder: str | Path, card: str = "") -> None:
    """Write a merged model as a folder that any loader takes: whole, or not at all. `base`: the base model's folder.

    card: its README.md. A folder that is there already stays until the new one is whole.
    """
    assert not lora_layers(model), "merge_adapter first"
    folder = Path(folder)
    check_target(folder, base)
    temporary, before = (folder.with_name(f".{folder.name}.{name}") for name in ("tmp", "old"))
    lock = only_writer(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        if before.exists() and not folder.exists():  # killed between the two renames below
            os.replace(before, folder)
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        (temporary / "generation_config.json").unlink(missing_ok=True)  # reduced to its EOS (models/loading.py)
        # Of a vision model the text decoder alone has a config of its own.
        whole = type(model).__name__ in (_read(base / "config.json").get("architectures") or ())
        for file in sorted(base.iterdir()):
            weights = file.suffix in WEIGHTS or file.name.endswith(".index.json")
            ours = file.name == "gguf.json" or (file.name == "config.json" and not whole)
            if file.is_file() and not weights and not ours and not file.name.startswith("."):
                shutil.copyfile(file, temporary / file.name)  # what a link on the hub's cache points to
        for_older_readers(temporary)
        if card:
            (temporary / "README.md").write_text(card, "utf-8")
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                sync(handle.fileno())  # a half-written file must not survive a power cut under its name
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            os.replace(folder, before)
        os.replace(temporary, folder)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the second is what safetensors makes of the first
        shutil.rmtree(temporary, ignore_errors=True)
        if before.exists() and not folder.exists():
            os.replace(before, folder)
        why = getattr(error, "strerror", "") or error
        raise UserError(f"cannot write the merged model {folder}: {why}") from error
    finally:
        lock.release()


def only_writer(folder: Path) -> Lock:
    """The lock of a folder that is written: what a killed export has left beside it is then nobody's."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Lock(folder)
    except OSError as error:
        raise UserError(f"cannot write the merged model {folder}: {error.strerror}") from error
    except UserError as error:  # held by another process, or no room for it
        raise UserError(error.message, "wait for it, or --merge-to another folder") from None


def for_older_readers(folder: Path) -> None:
    """Add to a folder's JSON files what transformers 4 asks for; one that it reads already stays as it is."""
    for name, change in (("config.json", _older_config), ("tokenizer_config.json", _older_tokenizer)):
        before = _read(folder / name)
        after = change(before)
        if after != before:
            (folder / name).write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _older_config(config: dict) -> dict:
    """With `torch_dtype`, `rope_theta` and `rope_scaling`; the newer names stay."""
    config = {name: _older_config(value) if name == "text_config" else value for name, value in config.items()}
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:  # one for each type of layer, as Gemma 3 has it
        config.setdefault("rope_local_base_freq", rope.get("sliding_attention", {}).get("rope_theta", 10_000.0))
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        config.setdefault("rope_scaling", scaling if scaling.get("rope_type", "default") != "default" else None)
    return config


def _older_tokenizer(config: dict) -> dict:
    config = {name: value for name, value in config.items() if name not in LOCAL}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # both take all they do from tokenizer.json
    if isinstance(config.get("extra_special_tokens"), list):  # a dict of names there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
