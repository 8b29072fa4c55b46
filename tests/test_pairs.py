"""pairs.py and how train.py fills it: the same pairs, checked, in flat memory.  python -m pytest tests/test_pairs.py"""

import threading
import tracemalloc

import numpy as np
import pytest
from tiny import tiny_tokenizer
from trainees import record, words, write

import train
from lengthen.cli import InputFlags, ModelFlags, OutputFlags
from lengthen.models.chat import Chat
from lengthen.records import UserError
from lengthen.training.folder import TrainingFolder
from lengthen.training.pairs import Pair, ahead, read_pairs, write_pairs
from lengthen.training.parallel import Processes
from lengthen.training.settings import PairFlags, Training

KEY = {"inputs": {"a": "1"}, "max_length": 10}
PAIRS = [Pair([1, 2, 3, 2_000_000], 2), Pair([4], 0), Pair(list(range(1000)), 999)]


def test_pairs_come_back_as_they_were(tmp_path):
    facts = {}

    def blocks():
        yield PAIRS[:1]
        facts["left_out"] = 7
        yield []
        yield PAIRS[1:]

    write_pairs(tmp_path / "p", blocks(), KEY, facts)
    found, why = read_pairs(tmp_path / "p", KEY)
    assert why == "" and list(found) == PAIRS and found.facts == {"left_out": 7}
    assert found.lengths.tolist() == [4, 1, 1000] and found.num_targets.tolist() == [2, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    with pytest.raises(IndexError):
        found[3]
    write_pairs(tmp_path / "empty", iter(()), KEY, {})
    assert len(read_pairs(tmp_path / "empty", KEY)[0]) == 0


def test_what_is_damaged_or_of_something_else_is_not_used(tmp_path):
    path = tmp_path / "p"
    assert read_pairs(path, KEY) == (None, "")
    write_pairs(path, iter([PAIRS]), KEY, {})
    assert "other inputs" in read_pairs(path, {**KEY, "max_length": 11})[1]
    whole = path.read_bytes()
    for damaged, why in (
        (whole[:-1], "no footer"),
        (whole[:100], "no footer"),
        (b"", "cannot be read"),
        (whole[:8] + b"\x01" + whole[9:], "checksum is another"),
        (whole[:-17] + b"{" + whole[-16:], "cannot be read"),
    ):
        path.write_bytes(damaged)
        assert read_pairs(path, KEY)[0] is None and why in read_pairs(path, KEY)[1], damaged[-80:]


def test_a_failing_write_leaves_nothing(tmp_path):
    def blocks():
        yield PAIRS
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_pairs(tmp_path / "p", blocks(), KEY, {})
    assert list(tmp_path.iterdir()) == []


# ---- in a run -------------------------------------------------------------------------------------------


@pytest.fixture
def encode(tmp_path, capsys):
    """Call pairs_of as train.py does -> (pairs, stderr)."""
    write(tmp_path / "x.jsonl", [record(i) for i in range(150)])

    def call(chat=None, most=2048, role="extender", seed=0):
        files = [str(tmp_path / "x.jsonl")]
        out = OutputFlags(str(tmp_path / "out"), seed=seed)
        training = Training(InputFlags(files), out, ModelFlags("tiny"), PairFlags(role))
        settings = {**training.recorded(), "templates": {"extend": "1"}}
        io = {"inputs": files, "overwrite": False, "allow_partial": False}
        (tmp_path / "out" / "meta.json").unlink(missing_ok=True) if (tmp_path / "out").is_dir() else None
        for name in ("pairs.bin", "rejected.jsonl"):  # a folder with them but no sidecar would be refused
            if (tmp_path / "out" / name).exists():
                (tmp_path / "out" / name).rename(tmp_path / name)
        with TrainingFolder(tmp_path / "out", settings=settings, **io) as folder:
            for name in ("pairs.bin", "rejected.jsonl"):
                if (tmp_path / name).exists():
                    (tmp_path / name).rename(tmp_path / "out" / name)
            pairs = train.pairs_of(training, folder, chat or Chat(tiny_tokenizer()), most, Processes())
        return pairs, capsys.readouterr().err

    return call


def test_blocks_are_the_records_one_by_one(encode):
    """Batches of 64 records give what each record gives alone, in the order of the file."""
    pairs, err = encode()
    chat, alone = Chat(tiny_tokenizer()), []
    for i in range(150):
        prompt = chat.encode(train.to_messages(record(i), "extender", 0.8, 0))
        alone.append(Pair(prompt + chat.encode_answer(record(i)["response"]), len(prompt)))
    assert [p for p in alone if len(p.ids) <= 2048] == list(pairs) and "encoded" in err


def test_they_are_kept_by_file_tokenizer_and_template(encode, tmp_path, monkeypatch):
    first, _ = encode()
    calls = []
    original = train.make_pairs
    monkeypatch.setattr(train, "make_pairs", lambda *args: calls.append(1) or original(*args))
    again, err = encode()
    assert not calls and list(again) == list(first) and "encoded" not in err

    def rebuilt(why: str, **changes) -> bool:
        calls.clear()
        err = encode(**changes)[1]
        return bool(calls) and why in err and "encoding the pairs again" in err

    other = CHAT_WITH_SYSTEM(tiny_tokenizer().chat_template)
    assert rebuilt("other inputs", chat=Chat(tiny_tokenizer(other)))
    assert rebuilt("other inputs", seed=1) and rebuilt("other inputs", seed=1, most=400)
    write(tmp_path / "x.jsonl", [record(i) for i in range(20)])
    assert rebuilt("other inputs")
    path = tmp_path / "out" / "pairs.bin"
    path.write_bytes(path.read_bytes()[:-40])
    assert rebuilt("is damaged")
    (tmp_path / "out" / "rejected.jsonl").unlink()
    calls.clear()
    encode()
    assert calls, "the list of what is left out is made with the pairs"


def CHAT_WITH_SYSTEM(template: str) -> str:
    return template.replace("{% for message", "{{ '<|im_start|>system\nWrite.<|im_end|>\n' }}{% for message")


def test_memory_stays_flat(encode, tmp_path):
    """Three times the records: Python's memory at its peak grows by less than a third."""
    peaks = []
    for count in (128, 384):
        write(tmp_path / "x.jsonl", [record(i % 5, response=words(800, i)) | {"id": f"r{i}"} for i in range(count)])
        tracemalloc.start()
        encode(role="generator")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.33 * peaks[0]


def test_one_block_is_made_ahead_and_an_error_is_passed_on():
    made = []

    def blocks():
        for i in range(4):
            made.append(PAIRS)
            yield PAIRS[: i % 2]  # an empty one is no end
        raise UserError("the last line is no JSON")

    seen = []
    with pytest.raises(UserError, match="no JSON"):
        for block in ahead(blocks()):
            seen.append(block)
            assert len(made) <= len(seen) + 1
    assert seen == [[], PAIRS[:1]] * 2 and list(ahead(iter([]))) == []
    stopped = ahead(iter(made))
    assert next(stopped) == PAIRS
    stopped.close()  # the writer gave up: no thread is left behind
    assert not any("ThreadPoolExecutor" in thread.name for thread in threading.enumerate())


def test_targets_are_counted_without_reading_the_ids(encode):
    pairs, _ = encode(role="generator")
    expected, left_out = train.make_pairs(
        [record(i) for i in range(150)], Chat(tiny_tokenizer()), PairFlags("generator"), 0, 2048
    )
    assert not left_out or len(pairs) == len(expected)
    assert pairs.num_targets.tolist() == [len(p.ids) - p.num_prompt for p in expected]
    assert np.array_equal(pairs.lengths, [len(p.ids) for p in expected])
    needed = train.steps_for(int(pairs.num_targets.sum()), pairs.num_targets, 4, 0)
    assert needed == -(-len(pairs) // 4)
