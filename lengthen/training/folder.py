"""The folder of a training run: one writer, a sidecar, a log, and checkpoints that survive kill -9.

    meta.json             the sidecar: status, settings, input hashes, counts
    train_log.jsonl       a line per step; lines after the checkpoint are cut when a run resumes
    checkpoint/           state.safetensors + state.json, whole or absent
    checkpoint.previous/  the one before: used when the newest is damaged
    pairs.bin             the pairs as token ids (lengthen/training/pairs.py), for resumes; removed when the run is done
    adapter_*             only when the run is done: whoever finds an adapter may use it

No pickles: tensors are safetensors (lengthen/training/checkpoint.py), the rest is JSON. No torch here, so that a
finished training started again ends at once.
"""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from lengthen.jobs import DISCARDED, OneWriter, check_precision, check_settings, discard, read_sidecar, versions
from lengthen.reading import numbered_lines
from lengthen.records import Appender, UserError, replace_file
from lengthen.training.pairs import NAME as PAIRS
from lengthen.training.parallel import Processes

FILES = ("adapter_model.safetensors", "adapter_config.json", "train_log.jsonl", "rejected.jsonl", "loss.png", PAIRS)
NEWEST, PREVIOUS, HALF_WRITTEN = "checkpoint", "checkpoint.previous", "checkpoint.tmp"


class TrainingFolder(OneWriter):
    """Use as a context manager. `settings` are all that changes the result; they must match to resume.

    Of several processes the first opens it; the others wait for that, read what it has prepared, and write nothing.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        inputs: list[str],
        settings: dict[str, Any],
        overwrite: bool,
        allow_partial: bool,
        processes: Processes = Processes(),  # noqa: B008  frozen
    ):
        self.folder, self.inputs, self.settings = Path(folder), inputs, settings
        self.processes, self.writes = processes, processes.first
        self.overwrite, self.allow_partial = overwrite, allow_partial
        self.started, self.seconds_before = time.monotonic(), 0.0
        self.meta: dict[str, Any] = {}
        self.complete = False
        self.log_file: Appender | None = None

    def __enter__(self) -> "TrainingFolder":
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--output {self.folder} is a file, a folder is needed", "an adapter is a folder")
        if self.writes:
            self.take(self.folder, self.folder)
            self.processes.wait()
        else:
            self.processes.wait()
            self.meta = read_sidecar(self.folder)
            self.settings = self.meta["settings"]  # with the inputs' hashes, which the first has taken
            self.complete = self.meta["status"] == "done"
        return self

    def _open(self) -> None:
        if self.overwrite or read_sidecar(self.folder).get("status") == DISCARDED:
            discard(self.folder, (self.folder / name for name in (*FILES, NEWEST, PREVIOUS, HALF_WRITTEN)))
        self.meta = read_sidecar(self.folder)
        if self.meta:
            check_settings(self.meta, self.settings, self.folder)
        elif any(p.name in FILES or p.name == NEWEST for p in self.folder.iterdir()):
            raise UserError(
                f"{self.folder} holds an adapter or a checkpoint, but not the meta.json of a training run",
                "--overwrite replaces it, another --output keeps it",
            )
        self.complete = self.meta.get("status") == "done"
        self.seconds_before = self.meta.get("seconds", 0.0)
        # Of a process that was killed before a rename, or between "done" and the end; we hold the lock.
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        if self.complete:
            self.drop_checkpoints()
        else:
            self.save_meta("running")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self.log_file:
                self.log_file.close()
        finally:
            if self.writes:
                self.lock.release()

    def save_meta(self, status: str, **facts: Any) -> None:
        """Replace the sidecar; `facts` stay in it. UserError where a checkpoint was trained in another precision."""
        if not self.writes:
            return
        if "quantize" in facts and (self.folder / NEWEST).exists():
            before, now = (some.get("info", {}) | {"quantize": some.get("quantize")} for some in (self.meta, facts))
            check_precision(self.folder, before, now)
        self.meta.update(facts, stage="train", status=status, settings=self.settings, versions=versions())
        self.meta["seconds"] = round(self.seconds_before + time.monotonic() - self.started, 2)
        replace_file(self.folder / "meta.json", json.dumps(self.meta, ensure_ascii=False, indent=1) + "\n")

    # -- the log -------------------------------------------------------------------------------------------

    def open_log(self, steps_done: int) -> list[dict]:
        """Start appending after `steps_done` steps; returns the entries of those."""
        path = self.folder / "train_log.jsonl"
        if self.writes:
            Appender(path).close()  # cuts a torn last line
        size = path.stat().st_size if path.exists() else 0
        entries = [e for _, e in numbered_lines(path) if e["step"] <= steps_done] if size else []
        if self.writes:
            replace_file(path, "".join(json.dumps(e) + "\n" for e in entries))
            self.log_file = Appender(path)
        return entries

    def log(self, entry: dict) -> None:
        if self.log_file:
            self.log_file.append(entry)

    # -- checkpoints ---------------------------------------------------------------------------------------

    def save_checkpoint(self, tensors: bytes, state: dict[str, Any]) -> None:
        """Make (tensors, state) the newest checkpoint, and the newest the previous: three renames, each whole."""
        if not self.writes:
            return
        state = {**state, "sha256": hashlib.sha256(tensors).hexdigest()}
        newest, previous, half = (self.folder / n for n in (NEWEST, PREVIOUS, HALF_WRITTEN))
        try:
            if self.log_file:
                self.log_file.sync()  # a checkpoint is never ahead of its log
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            replace_file(half / "state.safetensors", tensors)
            replace_file(half / "state.json", json.dumps(state) + "\n")
            shutil.rmtree(previous, ignore_errors=True)
            if newest.exists():
                rename(newest, previous)
            rename(half, newest)
        except OSError as error:
            hint = "mend that and run the same command again: it goes on from the last checkpoint"
            raise UserError(f"cannot write {newest}: {error.strerror or error}", hint) from error

    def load_checkpoint(self) -> tuple[bytes, dict[str, Any], list[str]]:
        """(tensors, state, lines to say) of the newest checkpoint that is whole; (b"", {}, lines) if there is none."""
        notes: list[str] = []
        for path in (self.folder / NEWEST, self.folder / PREVIOUS):
            if not path.exists():
                continue
            try:
                tensors = (path / "state.safetensors").read_bytes()
                state = json.loads((path / "state.json").read_text("utf-8"))
                if hashlib.sha256(tensors).hexdigest() == state["sha256"]:
                    return tensors, state, notes
                notes.append(f"{path} is damaged (its checksum is another)")
            except (OSError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
                notes.append(f"{path} is damaged ({type(error).__name__})")
        return b"", {}, notes

    def drop_checkpoints(self) -> None:
        """The run is done: what only a resume needs goes."""
        if not self.writes:
            return
        for name in (NEWEST, PREVIOUS, HALF_WRITTEN):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / PAIRS).unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """os.replace of a folder, on its own so that the tests can kill or fail it."""
    os.replace(source, target)


def target_tokens_of(folder: str) -> int:
    """How many target tokens a finished training learned from, epoch after epoch."""
    meta = read_sidecar(folder) if Path(folder).is_dir() else {}
    if meta.get("status") != "done" or "target_tokens" not in meta.get("summary", {}):
        raise UserError(f"--budget-of {folder} is not a finished training", "train.py … --output FOLDER writes one")
    return meta["summary"]["target_tokens"]
