"""records.py and jobs.py: nothing lost, nothing twice.   python -m pytest tests/test_records.py"""

import json
import os
import signal
from pathlib import Path

import cold
import pytest

from lengthen import records
from lengthen.jobs import Job, check_inputs, input_hashes, read_sidecar
from lengthen.reading import read_jsonl
from lengthen.records import Appender, LowYield, UserError, new_record

ROOT = Path(__file__).parents[1]


def row(id_: str, words: int = 10, **more: object) -> dict:
    return new_record("response", id=id_, language="en", prompt="p", response="r", response_words=words, **more)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------
# Records and identity


@pytest.mark.parametrize("kind", records.KINDS)
def test_new_record_has_every_field_and_no_null(kind):
    record = new_record(kind)
    assert list(record) == list(records.KINDS[kind].__annotations__)
    assert None not in record.values()
    for name, type_ in records.KINDS[kind].__annotations__.items():
        assert isinstance(record[name], list if "list" in str(type_) else type_), name


def test_new_record_refuses_an_unknown_field():
    with pytest.raises(AssertionError, match="reponse"):
        new_record("response", reponse="typo")


def test_ids_differ_by_scope_parent_stage_and_sample_and_are_stable():
    ids = {
        records.record_id(stage, parent, sample, scope)
        for stage in ("responses", "extend")
        for parent in ("", "a")
        for sample in (0, 1)
        for scope in ("runs/iter_1", "runs/iter_2")
    }
    assert len(ids) == 16
    assert records.record_id("responses", "abc", 1) == "35152fff0cf8af3d"
    assert records.record_id("a", "bc", 1) != records.record_id("ab", "c", 1)  # parts are separated


def test_draw_seeds_fit_63_bits_and_differ_by_attempt():
    seeds = {records.draw_seed(0, "x", attempt) for attempt in range(100)}
    assert len(seeds) == 100
    assert all(0 <= s < 1 << 63 for s in seeds)


def test_fingerprint_sees_a_changed_weight_and_ignores_logs(tmp_path):
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"a" * (5 << 20))
    before = records.fingerprint(tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    (tmp_path / "train_log.jsonl").write_text("{}")
    assert records.fingerprint(tmp_path) == before
    weights.write_bytes(b"b" + b"a" * ((5 << 20) - 1))
    assert records.fingerprint(tmp_path) != before
    assert records.fingerprint("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"
    assert records.fingerprint("") == ""


# ---------------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("torn", ['{"prompt": "half', '{"prompt": "whole"}', "x" * 200_000])
def test_a_torn_last_line_is_cut_before_appending(tmp_path, torn):
    """Appending to it would lose two records: the torn one and the next."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n' + torn)
    out = Appender(path)
    out.append({"prompt": "b"})
    out.close()
    assert [r["prompt"] for r in read_jsonl(path)] == ["a", "b"]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"pro')
    Appender(path).close()
    assert path.read_bytes() == b""


def test_a_full_disk_leaves_whole_lines_and_says_so(tmp_path, monkeypatch):
    out = Appender(tmp_path / "x.jsonl")
    out.append({"prompt": "a"})
    real = records._write
    monkeypatch.setattr(records, "_write", lambda fd, data: real(fd, data[:5]))  # a full disk takes part of the line
    with pytest.raises(UserError, match="No space left"):
        out.append({"prompt": "b"})
    monkeypatch.undo()
    out.append({"prompt": "c"})
    out.close()
    assert [r["prompt"] for r in read_jsonl(tmp_path / "x.jsonl")] == ["a", "c"]


def test_replace_file_writes_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    records.replace_file(path, "old")

    def broken(*_):
        raise OSError(28, "No space left on device")

    for name in ("_write", "_replace"):
        monkeypatch.setattr(records, name, broken)
        with pytest.raises(UserError):
            records.replace_file(path, "new")
        monkeypatch.undo()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


# ---------------------------------------------------------------------------------------------------------
# Jobs


def job(tmp_path: Path, **more: object) -> Job:
    return Job("responses", tmp_path / "run" / "iter_1" / "x.jsonl", **{"settings": {"a": 1}, **more})


def test_job_resumes_and_a_finished_one_is_complete(tmp_path):
    with pytest.raises(RuntimeError), job(tmp_path) as j:
        j.accept(row("1"))
        j.reject(row("2"), "ending")
        j.count("ending", 3)
        raise RuntimeError
    assert read_sidecar(j.output)["status"] == "running"
    with job(tmp_path) as j:
        assert j.done_ids == {"1", "2"} and not j.complete and j.counts["ending"] == 3
        j.accept(row("3", words=30))
        summary = j.finish(tokens=7)
    assert summary["accepted"] == 2 and summary["rejected"] == {"ending": 1} and summary["tokens"] == 7
    with job(tmp_path) as j:
        assert j.complete and j.finish() == summary
    meta = read_sidecar(j.output)
    assert meta["status"] == "done" and meta["words"]["max"] == 30 and meta["versions"]["torch"]


def test_other_settings_are_refused_by_name_and_overwrite_starts_afresh(tmp_path):
    with job(tmp_path) as j:
        j.accept(row("1"))
        j.finish()
    with pytest.raises(UserError, match="a = 1, this command says 2") as error, job(tmp_path, settings={"a": 2}):
        pass
    assert "--overwrite" in error.value.hint
    with job(tmp_path, settings={"a": 2}, overwrite=True) as j:
        assert not j.records and not j.complete


def test_what_the_system_says_of_a_path_is_one_line(tmp_path):
    """Not only that it is missing: a file among its folders, a name that is too long, a folder."""
    plain = write(tmp_path / "plain.jsonl", "{}")
    for path, words in (
        (plain / "x.jsonl", "cannot be read: Not a directory"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        (tmp_path, "is a folder"),
        (tmp_path / "none.jsonl", "does not exist"),
    ):
        for read in (read_jsonl, lambda path: input_hashes([path])):
            with pytest.raises(UserError, match=words):
                read(path)


def test_a_sidecar_that_is_no_object_is_damaged(tmp_path):
    write(tmp_path / "x.meta.json", "[]")
    with pytest.raises(UserError, match="x.meta.json is damaged"):
        read_sidecar(tmp_path / "x.jsonl")


def test_a_disk_that_is_full_only_when_asked_to_sync_says_so(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(122, "Disk quota exceeded")

    with job(tmp_path) as j:
        j.accept(row("1"))
        monkeypatch.setattr(records.os, "fsync", full)
        with pytest.raises(UserError, match="x.jsonl: Disk quota exceeded"):
            j.finish()
        monkeypatch.undo()
    with job(tmp_path) as j:
        assert j.done_ids == {"1"}


def test_killed_while_it_is_deleted_an_output_does_not_look_finished(tmp_path, monkeypatch):
    def begin(**flags) -> Job:
        return job(tmp_path, **flags)

    with begin() as j:
        j.accept(row("1"))
        j.reject(row("2"), "gain")
        j.finish()
    with monkeypatch.context() as patch:
        unlink = Path.unlink

        def dies_at_the_output(path: Path, missing_ok: bool = False) -> None:
            if path.name == "x.jsonl":
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        patch.setattr(Path, "unlink", dies_at_the_output)
        with pytest.raises(KeyboardInterrupt), begin(overwrite=True):
            pass
    assert read_sidecar(j.output)["status"] == "discarded"
    with pytest.raises(UserError, match="not finished"):
        check_inputs([j.output], allow_partial=False)
    with begin() as again:  # without --overwrite: it was asked for
        assert not again.complete and not again.done_ids


def test_a_file_is_not_continued_in_another_precision(tmp_path):
    """What auto is, differs from card to card: half of a file in NF4 and half in bf16 is neither."""
    with job(tmp_path) as j:
        j.update_info(dtype="torch.bfloat16", quantize="nf4")
        j.accept(row("1"))
    with job(tmp_path) as j:
        j.update_info(device="cuda:1", dtype="torch.bfloat16", quantize="nf4")
        with pytest.raises(UserError, match="begun with quantize nf4, this command or machine takes none") as caught:
            j.update_info(dtype="torch.bfloat16", quantize="none")
    assert caught.value.hint.startswith("--quantize nf4 goes on as before")
    with job(tmp_path, overwrite=True) as j:
        j.update_info(dtype="torch.bfloat16", quantize="none")


def test_a_changed_input_is_noticed(tmp_path):
    source = write(tmp_path / "in.jsonl", '{"prompt": "a"}')
    with job(tmp_path, inputs=[source]) as j:
        j.accept(row("1"))
    write(source, '{"prompt": "b"}')
    with pytest.raises(UserError, match="inputs"), job(tmp_path, inputs=[source]):
        pass


def test_inputs_of_equal_names_are_all_hashed(tmp_path):
    a, b = (tmp_path / run / "iter_1" / "extended.jsonl" for run in "ab")
    for path in (a, b):
        path.parent.mkdir(parents=True)
        write(path, json.dumps({"prompt": str(path)}))
    with job(tmp_path, inputs=[a, b]) as j:
        pass
    meta = read_sidecar(j.output)
    inputs = meta["settings"]["inputs"]
    assert len(set(inputs.values())) == 2 and "iter_1/extended.jsonl" in inputs
    with job(tmp_path, inputs=[a, b]):
        pass
    write(a, '{"prompt": "edited"}')
    with pytest.raises(UserError, match="inputs"), job(tmp_path, inputs=[a, b]):
        pass


def test_an_unfinished_input_is_refused_unless_allowed(tmp_path):
    with job(tmp_path) as first:
        first.accept(row("1"))
    second = Job("extend", tmp_path / "y.jsonl", inputs=[first.output])
    with pytest.raises(UserError, match="not finished"), second:
        pass
    with Job("extend", tmp_path / "y.jsonl", inputs=[first.output], allow_partial=True):
        pass


def test_a_second_writer_is_refused_and_the_lock_goes_with_the_process(tmp_path):
    with job(tmp_path) as j:
        with pytest.raises(UserError, match="another process"), job(tmp_path):
            pass
    assert not list(j.output.parent.glob(".*lock"))
    with job(tmp_path):
        pass
    code = f"""
import os, signal
from lengthen.jobs import Job, check_inputs, input_hashes, read_sidecar
with Job("responses", {str(j.output)!r}, settings={{"a": 1}}):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert cold.run("-c", code).returncode == -signal.SIGKILL
    with job(tmp_path):
        pass


def test_a_file_of_somebody_else_is_not_appended_to(tmp_path):
    path = tmp_path / "x.jsonl"
    write(path, '{"prompt": "mine"}')
    with pytest.raises(UserError, match="not its sidecar"), Job("responses", path):
        pass
    assert path.read_text() == '{"prompt": "mine"}\n'


def test_too_little_yield_is_counted_and_exits_3(tmp_path):
    for _ in range(2):  # and says so again when asked again
        with (
            pytest.raises(LowYield, match="0 records, --min-yield asks for 1 .*2 x ending, 1 x length"),
            job(tmp_path) as j,
        ):
            if not j.complete:
                j.reject(row("1"), "length")
                j.count("length")  # the attempt that was its last one
                j.count("ending", 2)
            j.finish()
    with job(tmp_path, min_yield=0) as j:
        assert j.finish()["accepted"] == 0


def test_journal_is_found_again_and_removed_at_the_end(tmp_path):
    with job(tmp_path, journal=True) as j:
        j.note({"id": "1", "prefix": "a"})
    with open(j.work_path, "a") as handle:
        handle.write('{"id": "1", "pref')  # torn by a kill
    with job(tmp_path, journal=True) as j:
        assert j.journal == [{"id": "1", "prefix": "a"}]
        j.note({"id": "1", "prefix": "b"})
        j.accept(row("1"))
        j.finish()
    assert not j.work_path.exists()


def test_journal_left_by_a_kill_inside_finish_goes_away(tmp_path):
    with job(tmp_path, journal=True) as j:
        j.accept(row("1"))
        j.finish()
    j.work_path.write_text("{}\n")
    with job(tmp_path, journal=True) as j:
        j.finish()
    assert not j.work_path.exists()


def fill(j: Job) -> dict:
    """A dozen records, two of them dropped over the whole file."""
    for i in range(12):
        if str(i) not in j.done_ids:
            j.accept(row(str(i), words=i))
    j.drop({"0": "length-bias", "1": "length-bias"})
    return j.finish()


def test_whole_file_decision_moves_records(tmp_path):
    with job(tmp_path) as j:
        assert fill(j)["accepted"] == 10
    assert {r["id"] for r in read_jsonl(j.output)} == {str(i) for i in range(2, 12)}
    assert {(r["id"], r["reason"]) for r in read_jsonl(j.rejected_path)} == {("0", "length-bias"), ("1", "length-bias")}


def test_amended_records_keep_their_other_fields_and_are_on_disk(tmp_path):
    with job(tmp_path) as j:
        for i in range(3):
            j.accept(row(str(i), words=i))
        j.amend({"1": {"response_words": 70}, "elsewhere": {"response_words": 1}})
        j.accept(row("3", words=3))  # the file can still be appended to
        assert [r["response_words"] for r in read_jsonl(j.output, ())] == [0, 70, 2, 3]
        assert j.records == read_jsonl(j.output, ())


# Twenty places to die in: the n-th write and the n-th rename of one job, each as an error and then resumed.
@pytest.mark.parametrize("name, nth", [("_write", n) for n in range(16)] + [("_replace", n) for n in range(4)])
def test_a_fault_at_any_write_or_rename_loses_nothing(tmp_path, monkeypatch, name, nth):
    with job(tmp_path / "clean") as clean:
        fill(clean)
    real, calls = getattr(records, name), []

    def faulty(*args):
        calls.append(1)
        if len(calls) - 1 == nth:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(records, name, faulty)
    with pytest.raises(UserError, match="No space left"):
        with job(tmp_path) as j:
            fill(j)
    monkeypatch.undo()
    with job(tmp_path) as j:
        fill(j)
    for kind in ("output", "rejected_path"):
        again, want = (sorted(map(json.dumps, read_jsonl(getattr(x, kind)))) for x in (j, clean))
        assert again == want
    assert not list(j.output.parent.glob(".*"))  # no temporary file, no lock


@pytest.mark.parametrize("nth", range(4))
def test_killed_at_a_rename_of_the_last_decision_gives_the_same_files(tmp_path, nth):
    """SIGKILL instead of an error: the process gets no chance to tidy up."""
    code = f"""
import os, signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
from lengthen import records
import test_records
real, calls = records._replace, []
def deadly(*args):
    calls.append(1)
    if len(calls) - 1 == {nth}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
records._replace = deadly
with test_records.job(Path({str(tmp_path)!r})) as j:
    test_records.fill(j)
"""
    assert cold.run("-c", code).returncode == -signal.SIGKILL
    with job(tmp_path) as j:
        fill(j)
    assert {r["id"] for r in read_jsonl(j.output)} == {str(i) for i in range(2, 12)}
    assert sorted(r["id"] for r in read_jsonl(j.rejected_path)) == ["0", "1"]


def test_unwritable_output_is_one_line(tmp_path):
    blocked = write(tmp_path / "file", "x")
    with pytest.raises(UserError, match="cannot write"), Job("responses", blocked / "x.jsonl"):
        pass
    with pytest.raises(UserError, match="is a folder"), Job("responses", tmp_path):
        pass
