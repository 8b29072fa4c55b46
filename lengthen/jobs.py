"""The promise that nothing is lost and nothing is done twice: one stage, one output file, one writer.

A stage reads JSONL, appends one line per finished sample, and leaves a sidecar `X.meta.json` beside `X.jsonl`.

    X.jsonl            accepted records, one per line
    X.rejected.jsonl   records rejected for good, with a `reason`
    X.meta.json        the sidecar: stage, status ("running" or "done"), settings, input hashes, counts, times
    X.work.jsonl       a journal of work inside a job; exists only while the stage runs

`Job` holds the rules: one writer at a time, torn last lines cut before anything is appended, other settings
refused, whole-file decisions made last and by rename. Settings that only add work (GROWING) may get larger: the job is
open again, and the tasks take it up (lengthen.tasks). No torch here, so a no-op resume takes a fraction of a second.
"""

import datetime
import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import statistics
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lengthen.reading import numbered_lines, readable
from lengthen.records import Appender, LowYield, UserError, no_room, replace_file, say_once, to_line
from lengthen.text.words import quantile

DISCARDED = "discarded"  # the status of an output that --overwrite is about to delete
LAYOUT = 2  # of journals: one that was begun in another layout cannot be continued
EARLIER = " #-"  # of inputs with equal names: "iter_1/extended.jsonl #-1" is the one before the last
# Decided over the finished file, not record by record. input-gone: the input no longer has what it was made of.
WHOLE_FILE_REASONS = ("length-bias", "near-duplicate", "input-gone")
# Settings that only add work, and the flag that sets each: an output goes on with a larger value. Ids and seeds of what
# is there stay the same, so it becomes the file that one run with the larger value had written (docs/files.md says
# where not). Of --limit, 0 is the largest: all.
GROWING = {
    "count": "--count",
    "limit": "--limit",
    "max_attempts": "--max-attempts",
    "samples": "--samples",
    "judge_attempts": "--judge-attempts",
}
# What helps against a reason for which draws fail; the hint where too little comes out.
REMEDIES = {
    "unfinished": "a larger --max-new-tokens, or shorter texts to start from",
    "repetition": "a higher --repetition-penalty or --temperature",
    "gain": "a smaller --min-gain, or shorter drafts",
    "not-longer": "shorter drafts, or a larger --max-new-tokens",
    "refusal": "other --seeds or prompts, or another --model",
    "judge": "a smaller --judge-margin or --long-words",
    "duplicate": "more --seeds, or a smaller --count",
    "language": "a --model that writes this language, or another --language",
    "outside-demand": "--demand-min and --demand-max that the answers' lengths are between",
    "no-demand": "smaller --demand-steps",
    "error": "shorter input: it does not fit the model's context",
    "length-bias": "--no-length-bias",
}
SUMS = ("attempts", "calls", "tries", "tries_passed", "tokens", "prefix_tokens")  # statistics that add up
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems say


def versions() -> dict[str, str]:
    """Versions of what shapes a result; "" where not installed."""
    result = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "triton", "bitsandbytes", "flash-attn"):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = ""
    return result


def sidecar_path(output: str | Path) -> Path:
    """X.meta.json beside X.jsonl; meta.json inside a folder (an adapter)."""
    output = Path(output)
    return output / "meta.json" if output.is_dir() else output.with_name(output.stem + ".meta.json")


def read_sidecar(output: str | Path) -> dict:
    """The sidecar of an output, {} where there is none. UserError when it is damaged."""
    path = sidecar_path(output)
    if not os.path.exists(path):
        return {}
    try:
        with readable(path):
            meta = json.loads(path.read_text("utf-8"))
        if not isinstance(meta, dict):
            raise ValueError("an object is needed")
        return meta
    except ValueError as error:  # of json, too
        raise UserError(f"{path} is damaged: {error}", "run the stage that wrote it again with --overwrite") from None


def discard(output: Path, files: Iterable[Path]) -> None:
    """Delete an output. Its sidecar says so first and goes last: killed in between, nothing looks finished."""
    sidecar = sidecar_path(output)
    if os.path.exists(sidecar):
        replace_file(sidecar, json.dumps({"status": DISCARDED}) + "\n")
    for path in files:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    sidecar.unlink(missing_ok=True)


def input_hashes(inputs: Sequence[str | Path]) -> dict[str, str]:
    """File name with its folder -> sha256 of its bytes, 16 hex digits. Of equal names the earlier ones are numbered."""
    paths = list(dict.fromkeys(map(Path, inputs)))  # one file named twice is one input
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    later = [names[i + 1 :].count(name) for i, name in enumerate(names)]
    keys = [f"{name}{EARLIER * bool(n)}{n or ''}" for name, n in zip(names, later, strict=True)]
    return {key: _file_hash(path) for key, path in zip(keys, paths, strict=True)}


def _file_hash(path: Path) -> str:
    with readable(path), open(path, "rb") as handle:
        if hasattr(hashlib, "file_digest"):  # from Python 3.11 on
            return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
        return hashlib.sha256(handle.read()).hexdigest()[:16]


def check_inputs(inputs: Sequence[str | Path], allow_partial: bool) -> None:
    """A stage's input must be complete: its sidecar, where it has one, says "done"."""
    for path in inputs:
        meta = read_sidecar(path)
        if meta and meta.get("status") != "done" and not allow_partial:
            raise UserError(
                f"{path} is not finished: its sidecar says {meta.get('status')!r}",
                "run the stage that writes it again until it is done, or pass --allow-partial",
            )


def check_settings(meta: dict, settings: dict, output: Path, growing: Iterable[str] = ()) -> dict[str, Any]:
    """Refuse to mix two runs in one file: the sidecar's settings must be ours. `growing` ones may be larger than there.

    Returns the sidecar's values of those that are.
    """
    before = meta.get("settings", {})
    now = json.loads(json.dumps(settings))  # as JSON would give it back: tuples are lists
    if before.get("inputs") and now.get("inputs"):
        names = {digest: name for name, digest in now["inputs"].items()}  # a file that was only renamed is the same
        renamed = {k if k in now["inputs"] else names.get(v, k): v for k, v in before["inputs"].items()}
        before = {**before, "inputs": renamed}
    # Templates are compared in the languages that both know of: another folder in prompts/ changes no text.
    before, now = _common_templates(before, now), _common_templates(now, before)
    grown = {}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) == now.get(name):
            continue
        old, new = before.get(name, "(not set)"), now.get(name, "(not set)")
        if name in growing and name == "inputs":
            if before.get(name, {}).keys() <= new.keys():  # what is in them is compared record by record
                grown[name] = old
                continue
        elif name in growing and name in before and name in now:
            if _size(name, old) < _size(name, new):
                grown[name] = old
                continue
            raise UserError(
                f"{output} was made with {name} = {old}, this command says {new}, and what is there is not taken back",
                f"{GROWING[name]} {old}{' or more' * bool(old)} goes on from it; --overwrite starts it afresh",
            )
        raise UserError(
            f"{output} was made with {name} = {old!r}, this command says {new!r}",
            "--overwrite starts it afresh, another --output keeps both",
        )
    return grown


def check_precision(output: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """What "auto" became when the output was begun is what it is now: a file half in NF4, half in bf16 is neither."""
    for name in ("dtype", "quantize"):
        was, is_ = (str(some.get(name) or "").removeprefix("torch.") for some in (before, now))
        if was and is_ and was != is_:
            raise UserError(
                f"{output} was begun with {name} {was}, this command or machine takes {is_}",
                f"--{name} {was} goes on as before, --overwrite starts it afresh",
            )


def _common_templates(settings: dict, other: dict) -> dict:
    kept = {k: v for k, v in settings.items() if not k.endswith(".md") or k in other}
    if isinstance(kept.get("templates"), dict) and isinstance(other.get("templates"), dict):
        kept["templates"] = {k: v for k, v in kept["templates"].items() if k in other["templates"]}
    return kept


def _size(name: str, value: float) -> float:
    return float("inf") if name == "limit" and not value else value


def try_lock(descriptor: int, path: Path, wait: bool = False) -> bool:
    """Lock an open file, waiting for its holder where asked to; False = held by another process.

    Where the file system has no locks (NFS, FUSE and their like) it goes on without one, and says so once.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise no_room(path, error) from error
        say_once(f"{path.parent}: this file system has no locks, so start one process at a time there")
    return True


class Lock:
    """One writer per file. The operating system releases it when the process dies, however it dies."""

    def __init__(self, output: Path):
        self.path = output.with_name(f".{output.name}.lock")
        while True:
            try:
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise no_room(self.path, error) from error
            if not try_lock(self.descriptor, self.path):
                os.close(self.descriptor)
                raise UserError(
                    f"{output} is being written by another process", "wait for it, or choose another --output"
                ) from None
            try:
                if os.stat(self.path).st_ino == os.fstat(self.descriptor).st_ino:
                    return
            except FileNotFoundError:
                pass  # the previous holder removed the file between our open and our lock: take a new one
            os.close(self.descriptor)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


class OneWriter(ABC):
    """What `Job` and folder.TrainingFolder share: complete inputs, one writer, a lock that a failed start releases.

    A subclass sets the three attributes below.
    """

    inputs: list[Any]  # paths
    settings: dict[str, Any]
    allow_partial: bool

    @abstractmethod
    def _open(self) -> None:
        """Read what is there, with the lock held."""

    def take(self, output: Path, folder: Path) -> None:
        """Lock the output, read what is there; `folder` is created where it is missing."""
        check_inputs(self.inputs, self.allow_partial)
        self.settings["inputs"] = input_hashes(self.inputs)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise no_room(output, error) from error
        self.lock = Lock(output)
        try:
            self._open()
        except BaseException:
            self.lock.release()
            raise


class Job(OneWriter):
    """One stage writing one JSONL file: see the module's docstring. Use as a context manager.

    settings: everything that changes the result (it must match to resume); info: what does not (device, rows).
    With `journal`, work inside a record is noted too, and read back into `.journal` after a kill (lengthen.tasks).
    """

    def __init__(
        self,
        stage: str,
        output: str | Path,
        *,
        inputs: Sequence[str | Path] = (),
        settings: Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        allow_partial: bool = False,
        journal: bool = False,
        min_yield: int = 1,
    ):
        self.stage, self.output = stage, Path(output)
        self.rejected_path = self.output.with_name(self.output.stem + ".rejected.jsonl")
        self.work_path = self.output.with_name(self.output.stem + ".work.jsonl")
        self.inputs, self.info, self.overwrite = list(inputs), dict(info or {}), overwrite
        self.settings = dict(settings or {})
        self.allow_partial, self.use_journal = allow_partial, journal
        self.counts: Counter[str] = Counter()
        self.min_yield, self.before = min_yield, ""
        self.places: dict[str, int] = {}  # id -> its place in the finished files; set by run_tasks
        self.grown: dict[str, Any] = {}  # settings that got larger since what is there was made: their values then
        self.started = self.saved = time.monotonic()

    # -- opening and closing -------------------------------------------------------------------------------

    def __enter__(self) -> "Job":
        if self.output.is_dir():
            raise UserError(f"--output {self.output} is a folder", f"--output {self.output}/{self.stage}.jsonl")
        self.take(self.output, self.output.parent)
        return self

    def _open(self) -> None:
        files = (self.output, self.rejected_path, self.work_path)
        if self.overwrite or read_sidecar(self.output).get("status") == DISCARDED:
            discard(self.output, files)
        for path in (*files, sidecar_path(self.output)):
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                # Left by a process that was killed before its rename; nobody else can be writing, we hold the lock.
                leftover.unlink(missing_ok=True)
        meta = read_sidecar(self.output)
        if meta:
            # Only the tasks can tell whether what was made of an input is still what it says.
            growing = [*GROWING, "inputs"] if self.use_journal else GROWING
            if grown := check_settings(meta, self.settings, self.output, growing):
                self._grow(meta, grown)
        elif self.output.exists() and self.output.stat().st_size:
            raise UserError(
                f"{self.output} exists, but not its sidecar {sidecar_path(self.output).name}: not made by this stage?",
                "--overwrite replaces it, another --output keeps it",
            )
        self.complete = meta.get("status") == "done"
        if meta and not self.complete and self.use_journal and meta.get("layout") != LAYOUT:
            raise UserError(
                f"{self.output} was begun by another version of this program and is not finished",
                "--overwrite starts it afresh, another --output keeps both; the version that began it can finish it",
            )
        self.info = {**meta.get("info", {}), **self.info}
        self.meta = meta or {"stage": self.stage, "layout": LAYOUT, "created": _now("microseconds"), "seconds": 0.0}
        # By these run.py knows whether an input has grown, or was made afresh.
        self.meta["inputs_created"] = {p: c for p in map(str, self.inputs) if (c := read_sidecar(p).get("created"))}
        self.grown = self.meta.get("grown", {})
        self.seconds_before = self.meta.get("seconds", 0.0)
        if self.complete or not self.use_journal:  # else they are counted again from the journal
            self.counts.update(self.meta.get("attempt_reasons", {}))
        else:
            self.counts.update(self.meta.get("earlier", {}).get("attempt_reasons", {}))
        self.writers = {p: Appender(p) for p in (self.output, self.rejected_path)}
        if self.use_journal and not self.complete:
            self.writers[self.work_path] = Appender(self.work_path)
        self.records = [r for _, r in numbered_lines(self.output)]
        self.rejected = [r for _, r in numbered_lines(self.rejected_path)]
        self.journal = [r for _, r in numbered_lines(self.work_path)] if self.work_path in self.writers else []
        if not self.complete:
            self._undo_whole_file_decisions()
            if "judge_attempts" in self.grown:  # what the judges that are asked now gave up, they are asked again
                self.rejected = [row for row in self.rejected if row["judge"] not in self.info["judges"]]
                self._rewrite(self.rejected_path, self.rejected)
            if not self.use_journal:  # nothing waits for the tasks
                self.grown = {}
                self.meta.pop("grown", None)
            self._save("running")
            # Killed in the middle of `take_back`: what the journal has is to be decided again.
            self._forget([entry["stored"] for entry in self.journal if entry.get("again")])
        self.done_ids = {r["id"] for r in self.records} | {r["id"] for r in self.rejected}

    def _grow(self, meta: dict, grown: dict[str, Any]) -> None:
        """A larger setting: the output is unfinished again. What it changes waits in the sidecar for `take_back`."""
        self.before = json.dumps(meta, ensure_ascii=False, indent=1) + "\n"
        changes = {name: self.settings[name] for name in grown if name != "inputs"}
        for name, new in changes.items():
            meta.setdefault("history", {}).setdefault(name, [grown[name]]).append(new)
        if changes:
            said = ", ".join(f"{GROWING[name]} {grown[name]} -> {new}" for name, new in changes.items())
            say_once(f"{self.output} goes on with {said}")
        if meta["status"] == "done":  # its journal is gone: what that had counted is kept
            meta["earlier"] = {name: meta.get(name, {}) for name in ("attempt_reasons", "stats")}
        meta |= {"status": "running", "grown": {**grown, **meta.get("grown", {})}}

    def take_back(self, stored: Sequence[dict], decided: Sequence[dict] = ()) -> None:
        """Records that are to be decided again, from where they stand; `decided`: others that the journal must know.

        On disk in this order: the journal has them, the sidecar says so, the files lose them. A kill loses nothing.
        """
        attempts = self.grown.get("max_attempts", self.settings.get("max_attempts", 0))
        for again, records in ((True, stored), (False, decided)):
            for record in records:
                entry = {"id": record["id"], "stored": record, "attempts": attempts, "again": again}
                self.note(entry)
                self.journal.append(entry)
        self.writers[self.work_path].sync()
        self.grown = {}
        self.meta.pop("grown", None)
        self._save("running")
        self._forget(stored)

    def refuse(self, message: str, hint: str) -> UserError:
        """The error for what cannot go on from here; the files are again what they were."""
        if self.before:
            replace_file(sidecar_path(self.output), self.before)
        if self.work_path in self.writers and not self.journal:
            self.writers.pop(self.work_path).close()
            self.work_path.unlink()
        self.complete = True  # nothing is to be saved on the way out
        return UserError(message, hint)

    def refuse_input(self, why: str) -> UserError:
        """The same for an input that says something else than before."""
        return self.refuse(
            f"{self.output} was made with inputs that have changed: {why}",
            "records may be added to an input, not changed; --overwrite starts it afresh, another --output keeps both",
        )

    def _forget(self, stored: Sequence[dict]) -> None:
        known = {record["id"]: record for record in stored}
        if known:  # what the whole-file decisions had moved is in the output before the rejected file loses it
            self._rewrite(self.output, self.records)
        for path, rows in ((self.rejected_path, self.rejected), (self.output, self.records)):
            kept = [row for row in rows if row != known.get(row["id"])]
            if len(kept) < len(rows):
                rows[:] = kept
                self._rewrite(path, rows)
        self.done_ids = {r["id"] for r in self.records} | {r["id"] for r in self.rejected}

    def _undo_whole_file_decisions(self) -> None:
        """Killed between the two renames of drop(): what it moved counts as accepted until it is decided again."""
        have = {r["id"] for r in self.records}
        moved = [r for r in self.rejected if r["reason"] in WHOLE_FILE_REASONS]
        self.rejected = [r for r in self.rejected if r["reason"] not in WHOLE_FILE_REASONS]
        for record in moved:
            if record["id"] not in have:
                self.records.append({k: v for k, v in record.items() if k != "reason"})

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            for writer in self.writers.values():
                writer.close()
            if kind is not None and not self.complete:
                try:
                    self._save("running")
                except UserError:
                    pass  # a full disk is already being reported, and that message must not be replaced by this one
        finally:
            self.lock.release()

    # -- while it runs -------------------------------------------------------------------------------------

    def accept(self, record: dict) -> None:
        """A finished sample: on disk when this returns."""
        self.writers[self.output].append(record)
        self.records.append(record)
        self.done_ids.add(record["id"])
        self._save_now_and_then()

    def reject(self, record: dict, reason: str) -> None:
        """A record rejected for good: what it would have been, and why."""
        self.writers[self.rejected_path].append({**record, "reason": reason})
        self.rejected.append({**record, "reason": reason})
        self.done_ids.add(record["id"])

    def count(self, reason: str, n: int = 1) -> None:
        """A single failed attempt: only counted."""
        self.counts[reason] += n
        self._save_now_and_then()

    def note(self, entry: dict) -> None:
        """One step inside a record, so that a kill costs only the texts being decoded."""
        self.writers[self.work_path].append(entry)

    def update_info(self, **info: Any) -> None:
        """UserError where what is there was made in another precision."""
        if self.records or self.rejected or self.journal:
            check_precision(self.output, self.info, info)
        self.info.update(info)

    def reopen(self) -> None:
        """More is wanted of a finished output (a second judge's opinion, say): it is unfinished again."""
        assert not self.use_journal, "the journal of a finished output is gone"
        if self.complete:
            self.complete = False
            self._save("running")

    def drop(self, reasons: Mapping[str, str]) -> None:
        """The last, whole-file decision: the records named by id move to the rejected file, both files by rename."""
        assert set(reasons.values()) <= set(WHOLE_FILE_REASONS), reasons
        moved = [r for r in self.records if r["id"] in reasons]
        self.records = [r for r in self.records if r["id"] not in reasons]
        self.rejected += [{**r, "reason": reasons[r["id"]]} for r in moved]
        # The rejected file first: after a kill in between, a record is in both files, never in neither.
        self._rewrite(self.rejected_path, self.rejected)
        self._rewrite(self.output, self.records)

    def amend(self, fields: Mapping[str, Mapping]) -> None:
        """Fill in fields of accepted records, by id. Note them first: a kill before the rename then loses nothing."""
        self.records = [{**r, **fields.get(r["id"], {})} for r in self.records]
        self._rewrite(self.output, self.records)

    def _put_in_order(self) -> None:
        """Which text ended first depends on kills and on the batch. The next stage sees nothing of that: training, say,
        draws its steps by the pairs' places in the file."""
        for path, rows in ((self.output, self.records), (self.rejected_path, self.rejected)):
            ordered = sorted(rows, key=lambda row: self.places.get(row["id"], len(self.places)))
            if ordered != rows:
                rows[:] = ordered
                self._rewrite(path, rows)

    def _rewrite(self, path: Path, rows: Sequence[Mapping]) -> None:
        self.writers.pop(path).close()
        replace_file(path, b"".join(map(to_line, rows)))
        self.writers[path] = Appender(path)

    def finish(self, **stats: Any) -> dict:
        """Mark the output complete and return the summary; LowYield when fewer than `min_yield` records came out.

        `stats` of a finished run are kept in the sidecar: a no-op resume returns the same numbers.
        """
        if not self.complete:
            if self.use_journal:  # judgements are asked for judge by judge, and looked up by id
                self._put_in_order()
            earlier = self.meta.get("earlier", {}).get("stats", {})
            sums = {k: v + earlier.get(k, 0) for k, v in stats.items() if k in SUMS}
            self.meta["stats"] = {**stats, **sums}
            for writer in self.writers.values():
                writer.sync()
            self._save("done")
            self.complete = True
            if self.work_path in self.writers:
                self.writers.pop(self.work_path).close()
        self.work_path.unlink(missing_ok=True)
        reasons: Counter[str] = Counter(r["reason"] for r in self.rejected)
        summary = {
            "stage": self.stage,
            "output": str(self.output),
            "accepted": len(self.records),
            "rejected": dict(reasons.most_common()),
            "failed_attempts": dict(self.counts.most_common()),
            "words": word_statistics(self.records),
            "seconds": round(self.meta["seconds"], 1),
            **self.meta.get("stats", {}),
        }
        if len(self.records) < self.min_yield:
            # A rejected record's last attempt is in both, so the larger count of each reason is the true one.
            counted = reasons | self.counts
            why = ", ".join(f"{n} x {r}" for r, n in counted.most_common()) or "nothing was tried"
            raise LowYield(
                f"{self.output}: {len(self.records)} records, --min-yield asks for {self.min_yield} ({why})",
                f"{self.remedy(counted)}; *.rejected.jsonl shows what was written",
            )
        return summary

    def remedy(self, reasons: Counter[str]) -> str:
        """What helps where too little comes out: by the commonest reason, then what always helps."""
        known = [f"{REMEDIES[r]} (with --overwrite)" for r, _ in reasons.most_common(1) if r in REMEDIES]
        tries = self.settings.get("max_attempts")
        more = [f"--max-attempts {2 * tries} (it goes on from what is there)"] if tries else []
        return ", or ".join([*known, *more, "more input", "a stronger --model"])

    def _save_now_and_then(self) -> None:
        if time.monotonic() - self.saved > 5.0:  # seconds; after a kill the counts are at most that old
            self._save("running")

    def _save(self, status: str) -> None:
        self.saved = time.monotonic()
        self.meta.update(
            status=status,
            settings=self.settings,
            info=self.info,
            versions=versions(),
            updated=_now(),
            seconds=self.seconds_before + time.monotonic() - self.started,
            accepted=len(self.records),
            rejected=dict(Counter(r["reason"] for r in self.rejected).most_common()),
            attempt_reasons=dict(self.counts.most_common()),
            words=word_statistics(self.records),
        )
        replace_file(sidecar_path(self.output), json.dumps(self.meta, ensure_ascii=False, indent=1) + "\n")


def _now(precision: str = "seconds") -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec=precision)


def word_statistics(records: Sequence[dict]) -> dict[str, float]:
    """Median, p90, maximum and sum of the words of the records (of their prompts where they hold no response)."""
    words = [r.get("response_words", r.get("prompt_words", -1)) for r in records]
    words = [w for w in words if w >= 0]
    p90 = quantile(words, 0.9)
    if p90 is None:
        return {}
    return {"median": statistics.median(words), "p90": round(p90, 1), "max": max(words), "sum": sum(words)}
