"""Reading: every form in which people bring records is read, or refused in one line with file, place and a way out."""

import json
import shlex
import subprocess
import sys

import pytest

from lengthen import reading
from lengthen.reading import filter_language, read_answers, read_jsonl, read_prompts
from lengthen.records import Appender, UserError

A, B = {"prompt": "Write about tea", "response": "Tea is good."}, {"prompt": "Write about milk", "response": "It is."}


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def as_lines(*rows):
    return "\n".join(map(json.dumps, rows))


@pytest.fixture(autouse=True)
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(reading, "say_once", lambda line: line in lines or lines.append(line))
    return lines


# ---------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"prompt": "a"}', '{"prompt": '], "line 2"),
        (['{"prompt": "a"}', "[1]"], "line 2"),
        (['{"prompt": "a"}', "", '{"promt": "a"}'], "line 3: no field 'prompt'"),
        (['{"prompt": 7}'], "line 1: a int in the field 'prompt'"),
        (['{"prompt": " "}'], "line 1: the field 'prompt' is empty"),
        (['{"prompt": null}'], "line 1: no field 'prompt'"),
        (['{"prompt": "a", "language": "xx"}'], "line 1: language 'xx' is not served; there are: de, en, es"),
        (['{"prompt": "a", "language": ["en"]}'], "line 1: language ['en']"),
        (['{"prompt": "a", "id": "x"}', '{"prompt": "b", "id": "x"}'], "line 2: id 'x' was already used in line 1"),
        (['{"prompt": "a", "id": 1}', '{"prompt": "b", "id": "1"}'], "line 2: id '1' was already used in line 1"),
        (['{"prompt": "a", "id": [1]}'], "line 1: a list in the field 'id'"),
        (['{"prompt": "a", "id": {"x": 1}}'], "line 1: a dict in the field 'id'"),
        (['{"prompt": "a", "id": true}'], "line 1: a bool in the field 'id'"),
        (['{"prompt": "a", "parent_id": [1]}'], "line 1: a list in the field 'parent_id'"),
        (['{"prompt": "a", "finish": "content_filter"}'], "line 1: the field 'finish' says 'content_filter'"),
        (['{"prompt": "a", "response": "b", "finish_reason": 3}'], "line 1: the field 'finish_reason' says 3"),
        (['{"prompt": "x", "meta": ' + "[" * 3000 + "]" * 3000 + "}"], "line 1: nested too deeply"),
        (["[" * 100000], "nested too deeply"),
        (["[1, 2]"], "item 1: a int, an object is needed"),
        (["[", '{"prompt": "a"},', '{"prompt": ', "]"], "line 4: Expecting value"),
        (['["Write about tea"]'], "item 1: a str, an object is needed"),
        ([""], "holds no record"),
        (["[]"], "holds no record"),
    ],
)
def test_bad_records_are_named(tmp_path, lines, message):
    with pytest.raises(UserError) as error:
        read_jsonl(write(tmp_path / "in.jsonl", *lines))
    assert message in error.value.message and "in.jsonl" in error.value.message


def test_missing_folder_and_wrong_encoding_are_user_errors(tmp_path):
    (tmp_path / "gb.jsonl").write_bytes('{"prompt": "写一篇文章"}\n'.encode("gb18030"))
    for path in (tmp_path / "none.jsonl", tmp_path, tmp_path / "gb.jsonl"):
        with pytest.raises(UserError, match=path.name):
            read_jsonl(path)


def test_a_missing_column_names_those_that_are_there(tmp_path):
    path = write(tmp_path / "in.jsonl", '{"question": "Why?", "n": 3, "answer": "So."}')
    with pytest.raises(UserError) as error:
        read_jsonl(path)
    assert "question, answer" in error.value.hint


def test_a_field_of_ours_with_another_type_is_named(tmp_path):
    for field, value in (("sample", "x"), ("example_ids", "x"), ("example_ids", [1]), ("attempt", True), ("source", 1)):
        path = write(tmp_path / "in.jsonl", json.dumps({"prompt": "Write", field: value}))
        with pytest.raises(UserError, match=f"line 1: .*{field}"):
            read_prompts([path])


# ---------------------------------------------------------------------------------------------------------
# Forms of a file


@pytest.mark.parametrize(
    "text, words",
    [
        (json.dumps([A, B]), "a JSON array: its 2 items"),
        (json.dumps([A, B], indent=2), "a JSON array: its 2 items"),
        ("\ufeff \n" + json.dumps([A, B]), "a JSON array"),
        (json.dumps({"version": 1, "data": [A, B]}), "2 items of its list 'data'"),
        (json.dumps({"data": [A, B], "info": {"n": [1]}}, indent=1), "2 items of its list 'data'"),
        (json.dumps(A, indent=2) + "\n" + json.dumps(B, indent=2), ""),  # jq's output
        (as_lines(A, B), ""),
        (as_lines(A, B).replace("\n", "\n\n\r\n"), ""),
    ],
)
def test_json_in_one_piece_is_read_and_it_is_said(tmp_path, said, text, words):
    path = tmp_path / "in.json"
    path.write_text(text, encoding="utf-8")
    assert read_jsonl(path) == read_jsonl(path) == [A, B]
    assert said == [] if not words else len(said) == 1 and words in said[0]


def test_a_record_with_lists_inside_is_a_record(tmp_path):
    row = {**A, "tags": [{"name": "x"}]}
    assert read_jsonl(write(tmp_path / "in.jsonl", json.dumps(row))) == [row]
    assert read_jsonl(write(tmp_path / "in.jsonl", json.dumps(row, indent=1))) == [row]


@pytest.mark.parametrize("head", [b"PAR1\x15\x04", b"ARROW1\0\0", b"PK\3\4\x14\0"])
def test_a_table_is_refused_with_its_conversion(tmp_path, head):
    (tmp_path / "in.jsonl").write_bytes(head + b"\xff\xfe" * 20)
    with pytest.raises(UserError, match="JSONL is needed") as error:
        read_jsonl(tmp_path / "in.jsonl")
    compile(shlex.split(error.value.hint)[2], "hint", "exec")  # python -c CODE


def test_a_csv_and_a_compressed_file_are_refused_with_their_conversion(tmp_path):
    with pytest.raises(UserError, match="a csv file") as error:
        read_jsonl(write(tmp_path / "in.csv", "prompt,response", "a,b"))
    assert "read_csv" in error.value.hint and "in.jsonl" in error.value.hint
    (tmp_path / "in.jsonl.gz").write_bytes(b"\x1f\x8b\x08\0")
    with pytest.raises(UserError, match="compressed"):
        read_jsonl(tmp_path / "in.jsonl.gz")


# ---------------------------------------------------------------------------------------------------------
# Columns of other formats


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Write about tea", "input": "", "output": "Tea is good."},
        {"instruction": "Write about tea", "output": "Tea is good.", "input": None},
        {"conversations": [{"role": "user", "content": A["prompt"]}, {"role": "assistant", "content": A["response"]}]},
        {"conversations": [{"from": "human", "value": A["prompt"]}, {"from": "gpt", "value": A["response"]}]},
        {"messages": [{"role": "user", "content": A["prompt"]}, {"role": "assistant", "content": A["response"]}]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": A["prompt"]},
                {"role": "assistant", "content": A["response"]},
            ]
        },
    ],
)
def test_alpaca_sharegpt_and_messages_are_read_and_it_is_said(tmp_path, said, row):
    path = write(tmp_path / "in.jsonl", json.dumps(row), json.dumps(row))
    for record in read_answers(path):
        assert (record["prompt"], record["response"], record["language"]) == (A["prompt"], A["response"], "en")
    assert len(said) == 2 and "prompt" in said[0] and "the same record" in said[1]
    assert ("system" in said[0]) == ("system" in json.dumps(row))
    assert read_prompts([path])[0]["prompt"] == A["prompt"]


def test_alpacas_input_is_part_of_the_prompt(tmp_path):
    row = {"instruction": "Continue this story.", "input": "It was a dark night.", "output": "Then it rained."}
    assert read_answers(write(tmp_path / "in.jsonl", json.dumps(row)))[0]["prompt"] == (
        "Continue this story.\n\nIt was a dark night."
    )


def test_a_prompt_of_our_own_wins_over_other_columns(tmp_path):
    row = {**A, "instruction": "another", "messages": [1]}
    assert read_jsonl(write(tmp_path / "in.jsonl", json.dumps(row))) == [row]


def test_a_long_conversation_is_refused_with_a_command_that_works(tmp_path):
    texts = [A["prompt"], A["response"], B["prompt"], B["response"]]
    for field, role, content, roles in (
        ("messages", "role", "content", ("user", "assistant")),
        ("conversations", "from", "value", ("human", "gpt")),
    ):
        turns = [{role: roles[i % 2], content: text} for i, text in enumerate(texts)]
        row = {field: [{role: "system", content: "Be brief."}, *turns]}
        path = write(tmp_path / f"{field}.jsonl", json.dumps(row if role == "role" else [row]))
        with pytest.raises(UserError, match="(line|item) 1: a conversation") as error:
            read_jsonl(path)
        command = error.value.hint.replace("python -c", f"{sys.executable} -c", 1)
        subprocess.run(command, shell=True, check=True, timeout=3600)
        assert read_jsonl(path.with_suffix(".pairs.jsonl")) == [A]


# ---------------------------------------------------------------------------------------------------------
# Values in other spellings


def test_null_means_absent_in_any_column(tmp_path):
    nulls = dict.fromkeys(("id", "language", "parent_id", "finish", "sample", "run_id", "example_ids", "mine"))
    path = write(tmp_path / "in.jsonl", *(json.dumps({**nulls, "prompt": f"Write about {x}"}) for x in ("tea", "milk")))
    first, second = read_prompts([path])
    assert first["language"] == "en" and first["sample"] == 0 and first["id"] != second["id"]
    assert None not in first.values()


def test_ids_are_texts(tmp_path):
    path = write(tmp_path / "in.jsonl", as_lines({**A, "id": 1}, {**B, "id": "x"}, {**B, "id": 2.5, "parent_id": 7}))
    rows = read_answers(path)
    assert [row["id"] for row in rows] == ["1", "x", "2.5"] and rows[2]["parent_id"] == "7"


@pytest.mark.parametrize("name", ["American English", "en", "EN", "En", "English", "en-US", "en_GB", " eng ", "英文"])
def test_english_by_its_names(tmp_path, name):
    assert read_prompts([write(tmp_path / "in.jsonl", json.dumps({**A, "language": name}))])[0]["language"] == "en"


@pytest.mark.parametrize(
    "name",
    [
        "Chinese (Simplified)",
        "普通话",
        "zh",
        "ZH",
        "zh-CN",
        "zh_Hans",
        "zh-TW",
        "Chinese",
        "zho",
        "cmn",
        "中文",
        "简体中文",
    ],
)
def test_chinese_by_its_names(tmp_path, name):
    assert read_prompts([write(tmp_path / "in.jsonl", json.dumps({**A, "language": name}))])[0]["language"] == "zh"


@pytest.mark.parametrize(
    "prompt",
    [
        "Scrivi una poesia",
        "Escreva um conto",
        "Напиши рассказ о море.",
        "바다에 대한 이야기를 써 주세요.",
        "اكتب قصة عن البحر",
    ],
)
def test_a_short_prompt_in_another_language_is_one_line_not_english(tmp_path, prompt):
    path = write(tmp_path / "in.jsonl", json.dumps(A), json.dumps({"prompt": prompt}))
    with pytest.raises(UserError, match="line 2: no language .* there are: de, en, es") as error:
        read_prompts([path])
    assert '"language": "en"' in error.value.hint
    assert read_prompts([write(path, json.dumps({"prompt": prompt, "language": "en"}))])[0]["prompt"] == prompt


@pytest.mark.parametrize(
    "prompt",
    [
        "Write about jalapeños",
        "Explain El Niño.",
        "1 2 3",
        "Poem, please",
        "How do I do a handstand?",
        "Describe Don Quijote de la Mancha to a child.",
    ],
)
def test_a_short_english_prompt_stays_english(tmp_path, prompt):
    assert read_prompts([write(tmp_path / "in.jsonl", json.dumps({"prompt": prompt}))])[0]["language"] == "en"


@pytest.mark.parametrize(
    "field, value, ours",
    [
        ("finish", "stop", "eos"),
        ("finish", "eos", "eos"),
        ("finish_reason", "stop", "eos"),
        ("finish_reason", "eos_token", "eos"),
        ("stop_reason", "end_turn", "eos"),
        ("finish_reason", "STOP", "eos"),
        ("finish_reason", "FinishReason.MAX_TOKENS", "length"),
        ("finish", "max_tokens", "length"),
        ("finish", "length", "length"),
        ("finish", "repetition", "repetition"),
        ("finish", "", ""),
    ],
)
def test_other_engines_words_for_the_end_are_ours(tmp_path, field, value, ours):
    assert read_jsonl(write(tmp_path / "in.jsonl", json.dumps({**A, field: value})))[0]["finish"] == ours


def test_columns_of_a_prompt_file_and_token_ids_are_no_finish(tmp_path):
    rows = [{"prompt": "Write", "finish_reason": "content_filter"}, {**A, "stop_reason": 128009}]
    assert read_jsonl(write(tmp_path / "in.jsonl", as_lines(*rows))) == rows


def test_a_thought_without_an_answer_is_left_out_and_said(tmp_path, said):
    path = write(tmp_path / "in.jsonl", as_lines({**A, "response": "<think>Tea is"}, B))
    assert [row["prompt"] for row in read_answers(path)] == [B["prompt"]] and "1 such records" in said[0]
    with pytest.raises(UserError, match="only thoughts"):
        read_answers(write(path, as_lines({**A, "response": "<think>Tea is"})))


def test_half_a_character_is_a_question_mark_and_counted(tmp_path, said):
    path = write(tmp_path / "in.jsonl", '{"prompt": "Write about tea \\ud83d", "response": "Tea."}', as_lines(B))
    rows = read_answers(path)
    assert rows[0]["prompt"] == "Write about tea ?" and json.dumps(rows, ensure_ascii=False).encode()
    assert len(said) == 1 and "1 texts hold half a character" in said[0]
    assert read_jsonl(write(path, '{"prompt": "\\ud83d\\ude00"}'))[0]["prompt"] == "\U0001f600"  # both halves


def test_text_is_verbatim_through_a_file(tmp_path):
    text = 'tab\t quote" line\u2028separator \u0000 emoji \U0001f600 zh 中文 \r\n end  '
    out = Appender(tmp_path / "x.jsonl")
    out.append({"prompt": text})
    out.append({"prompt": "half a character \ud800"})
    out.close()
    assert read_jsonl(tmp_path / "x.jsonl")[0]["prompt"] == text
    assert read_jsonl(tmp_path / "x.jsonl")[1]["prompt"] == "half a character ?"


# ---------------------------------------------------------------------------------------------------------
# Prompts, answers, inputs


def test_own_prompts_get_language_id_and_words(tmp_path):
    path = write(
        tmp_path / "own.jsonl",
        '{"prompt": "写一篇关于河流的文章。"}',
        '{"prompt": "Write a tale."}',
        '{"prompt": "Write a tale."}',
    )
    zh, first, second = read_prompts([path])
    assert (zh["language"], first["language"]) == ("zh", "en")
    assert first["id"] != second["id"]  # equal prompts are told apart by their occurrence
    assert first["prompt_words"] == 3 and first["source"] == "file"
    assert [r["id"] for r in read_prompts([path])] == [zh["id"], first["id"], second["id"]]
    with pytest.raises(UserError, match="is also in"):
        read_prompts(
            [
                write(tmp_path / "a.jsonl", '{"prompt": "a", "id": "1"}'),
                write(tmp_path / "b.jsonl", '{"prompt": "b", "id": "1"}'),
            ]
        )


def test_own_answers_get_language_and_id(tmp_path):
    path = write(
        tmp_path / "own.jsonl",
        '{"prompt": "Write a tale.", "response": "从前有一条河。"}',
        '{"prompt": "Write a tale.", "response": "1 2 3"}',
        '{"prompt": "Write a tale.", "response": "One day.", "id": "mine", "language": "zh"}',
    )
    by_text, default, given = read_answers(path)
    assert (by_text["language"], default["language"], given["language"]) == ("zh", "en", "zh")
    assert given["id"] == "mine" and by_text["id"] != default["id"] != read_answers(path)[0]["id"]
    assert read_answers(path) == [by_text, default, given]
    without = write(tmp_path / "null.jsonl", *(f'{{"prompt": "{p}", "response": "b", "id": null}}' for p in "ac"))
    assert len({row["id"] for row in read_answers(without)}) == 2


def test_a_row_that_stands_twice_is_read_once(tmp_path, said):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a b", "response": "c d"}\n' * 3 + '{"prompt": "a b", "response": "e f"}\n')
    assert [row["response"] for row in read_answers(path)] == ["c d", "e f"]
    assert [line.partition("own.jsonl, ")[2] for line in said] == [
        "line 2: the same record as before; 2 such records are left out"
    ]


def test_records_of_no_language_that_is_asked_for_are_an_error_that_names_theirs():
    rows = [{"language": "de"}, {"language": "fr"}]
    with pytest.raises(UserError, match="none of the 2 records is in --language both, they are in de, fr") as caught:
        filter_language(rows, "both")
    assert caught.value.hint == "--language de,fr" and filter_language(rows, caught.value.hint.split()[1]) == rows
