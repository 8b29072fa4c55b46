"""Mutated records over every reader: each file is read, or refused in one line.

FUZZ=12000 python -m pytest -m soak tests/test_fuzz_readers.py       # as many files; 1,200 without
"""

import json
import os
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
import extend
import generate
import train
from lengthen import cli
from lengthen.records import KINDS, UserError, new_record, to_line
from lengthen.training.pairs import left_out_notes, records_of

TEXT = "The river went on past the mill. In winter the garden was still, and they came back to the village."
SEED = {"id": "a", "language": "en", "kind": "story", "prompt": "Write about tea", "sample": 0, "example_ids": ["x"]}
ANSWER = {**SEED, "response": TEXT, "response_words": 20, "response_tokens": 30, "finish": "eos", "initial": TEXT[:32]}
DEMANDED = {**ANSWER, "query": "Write around 20 words about tea", "constraint": "around 20 words", "type": "about"}
MORE = {"parent_id": "p", "min_words": 20, "max_words": 20, "longen_words": 20, "length_score": 1.0}
OUTPUT = new_record("output", **{k: v for k, v in DEMANDED.items() if k in KINDS["output"].__annotations__}, **MORE)
VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2.5,
        10**30,
        float("inf"),
        float("nan"),
        "",
        " ",
        "x",
        "\ud83d",
        "中文",
        "\x00\u2028",
    ),
    *([], [1], ["a"], [None], {}, {"a": 1}, [{"role": "user", "content": "x"}], [{"from": "human"}], "word " * 300),
    *("stop", "length", "eos", "max_tokens", "English", "zh-CN", "fr", "about", "range", "more than 10 words"),
]


class Reached(Exception):
    """The stage has read its input: here it would load a model."""


def reached(*_: object, **__: object) -> None:
    raise Reached


def mutated(rng: random.Random, record: dict) -> bytes:
    """A file of two to five records, with one to three faults in it."""
    rows = [{**record, **({"id": f"a{i}"} if "id" in record else {})} for i in range(rng.randint(2, 3))]
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(rows)
        name = rng.choice([*row, "query", "finish_reason", "instruction", "messages", "reason", "tokens"])
        match rng.randrange(8):
            case 0:
                row.pop(name, None)
            case 1:
                rows.append(dict(row))
            case 2:
                row[rng.choice([*VALUES[10:12], "instruction", "conversations", "query", "text"])] = row.pop(name, "x")
            case _:
                row[name] = rng.choice(VALUES)
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass") for row in rows]
    match rng.randrange(14):
        case 0:
            return b"[" + b",\n".join(lines) + b"]"
        case 1:
            return json.dumps({"data": rows}, indent=rng.choice([None, 1])).encode()
        case 2:
            return b"\n".join(lines).replace(b"}", b', "deep": ' + b"[" * 3000 + b"]" * 3000 + b"}", 1)
        case 3:
            data = b"\r\n".join(lines)
            return data[: rng.randrange(len(data) + 1)]
        case 4:
            data = bytearray(b"\n".join(lines))
            for _ in range(3):
                data[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(data)
        case 5:
            return b"\n".join(json.dumps(row, indent=2).encode() for row in rows)
        case 6:
            return b"\xef\xbb\xbf\n" + b"\n".join(lines)
    return b"\n".join(lines) + b"\n"


def stage(main: Callable, *argv: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        main([word.replace("FILE", str(path)).replace("OUT", str(path.parent / "out" / "x")) for word in argv])

    return read


def train_reader(role: str) -> Callable[[Path], None]:
    flags = SimpleNamespace(role=role, kept_lines=0.8)
    chat = SimpleNamespace(encode_many=lambda m: [[1] * len(x) for x in m], encode_answers=lambda a: [[1]] * len(a))

    def read(path: Path) -> None:
        needs = ("prompt", "response", "initial") if role == "extender" else ("prompt", "response")
        block = list(records_of([path], needs, "both"))
        _, left_out = train.make_pairs(block, chat, flags, 0, 100)
        b"".join(map(to_line, left_out))
        left_out_notes(block, left_out, 100)

    return read


def run_reader(*argv: str) -> Callable[[Path], None]:
    """Of a run's own answers, which people edit."""

    def read(path: Path) -> None:
        run = path.parent / "run" / "eval" / "base"
        shutil.copy(path, run / "outputs.jsonl")
        evaluate.main([{"ANSWERS": str(run), "RUN": str(path.parent / "run")}.get(word, word) for word in argv])

    return read


MODEL = ("--model", "none", "--output", "OUT.jsonl", "--overwrite")
READERS = {
    "instructions": (SEED, stage(generate.main, "instructions", "--seeds", "FILE", *MODEL)),
    "responses": (SEED, stage(generate.main, "responses", "--input", "FILE", *MODEL)),
    "constrain": (ANSWER, stage(generate.main, "constrain", "--demand-min", "1", "--input", "FILE", *MODEL)),
    "extend": (ANSWER, stage(extend.main, "--input", "FILE", *MODEL)),
    "generator": (ANSWER, train_reader("generator")),
    "extender": (DEMANDED, train_reader("extender")),
    "answer": (DEMANDED, stage(evaluate.main, "answer", "--benchmark", "FILE", *MODEL)),
    "score": (DEMANDED, stage(evaluate.main, "score", "FILE", "--output", "OUT", "--overwrite")),
    "judge": (OUTPUT, run_reader("judge", "ANSWERS", "--judge", "none")),
    "compare": (OUTPUT, run_reader("compare", "ANSWERS", "ANSWERS")),
    "report": (OUTPUT, run_reader("report", "RUN")),
}


@pytest.mark.soak
@pytest.mark.parametrize("name", READERS)
def test_mutated_records_are_read_or_refused_in_one_line(tmp_path, monkeypatch, capsys, name):
    record, read = READERS[name]
    for module in (generate, extend, evaluate):
        monkeypatch.setattr(module, "run_tasks", reached)
    monkeypatch.setattr(evaluate, "judge_answers", reached)
    monkeypatch.setattr(evaluate, "open_writer", reached)
    monkeypatch.setattr(cli, "save_figure", lambda *_: None)
    monkeypatch.setattr(cli.console, "quiet", True)
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(DEMANDED))
    evaluate.main(["score", str(good), "--output", str(tmp_path / "run" / "eval" / "base")])
    (tmp_path / "in.jsonl").write_bytes(b"".join(to_line({**record, "id": f"a{i}"}) for i in range(2)))
    try:  # without a fault it is read to the end
        read(tmp_path / "in.jsonl")
    except Reached:
        pass
    rng, path, failures = random.Random(name), tmp_path / "in.jsonl", []
    for number in range(int(os.environ.get("FUZZ", "1200")) // len(READERS) + 1):
        path.write_bytes(mutated(rng, record))
        try:
            read(path)
        except Reached:
            pass
        except UserError as error:
            assert error.message and "\n" not in error.message, (number, error.message)
        except Exception:
            failures.append((number, path.read_bytes()[:300], traceback.format_exc()[-400:]))
        capsys.readouterr()
    assert not failures, f"{len(failures)}: " + "\n".join(map(str, failures[:3]))
