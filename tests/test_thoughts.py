"""pytest tests/test_thoughts.py: a thought is closed in the prompt, and no part of a text wherever one comes from.

The templates are cut down from those of the models named; the prompts are compared with the template's own text.
"""

from types import SimpleNamespace

import pytest
from scripted import ScriptedSampler, prose
from test_chat import THINKS, byte_level, user
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from tokenizers import AddedToken

from lengthen.evaluation.benchmark import read_rows
from lengthen.models.chat import TODAY, Chat
from lengthen.reading import read_answers
from lengthen.records import UserError
from lengthen.sampling.request import Request
from lengthen.stage import Writer
from lengthen.text.filters import clean_answer
from lengthen.text.thoughts import closing_of, open_thought, without_thought
from lengthen.training.settings import PairFlags
from train import make_pairs

HEADER = "<|im_start|>assistant\n"


def opens(text: str, role: str = HEADER) -> str:
    """A template whose generation prompt goes on with `text`, as nothing in front of a given answer does."""
    return CHAT_TEMPLATE.replace("<|im_start|>assistant\n' }}", f"{role}' }}}}{text}")


def either(switch: str, off: str, on: str) -> str:
    """A template that thinks unless the switch is false."""
    return opens(f"{{% if {switch} is defined and not {switch} %}}{off}{{% else %}}{on}{{% endif %}}")


GPT_OSS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant<|channel|>final<|message|>' + m['content'] + '<|return|>' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '<|message|>' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
QWEN3_2507 = CHAT_TEMPLATE.replace(
    "message['content']", "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') + message['content']"
).replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>\n' }}")
ENDINGS = {  # template, what stands in front of the answer
    "Qwen3": (THINKS, HEADER + "<think>\n\n</think>\n\n"),
    "SmolLM3": (either("enable_thinking", "{{ '<think>\n\n</think>\n\n' }}", ""), HEADER + "<think>\n\n</think>\n\n"),
    "GLM-4.5": (either("enable_thinking", "<think></think>", ""), HEADER + "<think></think>"),
    "Hunyuan": (either("enable_thinking", "{{ '<think>\n\n</think>\n' }}", ""), HEADER + "<think>\n\n</think>\n"),
    "DeepSeek-V3.1": (either("thinking", "</think>", "<think>"), HEADER + "</think>"),
    "Command A": (
        either("reasoning", "<|START_THINKING|><|END_THINKING|>", "<|START_THINKING|>"),
        HEADER + "<|START_THINKING|><|END_THINKING|>",
    ),
    "Seed-OSS": (
        opens("{% if thinking_budget == 0 %}<seed:think></seed:think>{% endif %}"),
        HEADER + "<seed:think></seed:think>",
    ),
    # no switch: closed by us
    "QwQ, DeepSeek-R1": (opens("{{ '<think>\n' }}"), HEADER + "<think>\n\n</think>\n\n"),
    "GLM-Z1": (opens("<think>"), HEADER + "<think>\n\n</think>\n\n"),
    "EXAONE Deep": (opens("{{ '<thought>\n' }}"), HEADER + "<thought>\n\n</thought>\n\n"),
    "Magistral": (opens("[THINK]"), HEADER + "[THINK][/THINK]"),
    "Kimi": (opens("◁think▷"), HEADER + "◁think▷\n\n◁/think▷\n\n"),
    "OpenThinker": (opens("<|begin_of_thought|>"), HEADER + "<|begin_of_thought|><|end_of_thought|>"),
    "Apertus": (opens("<|inner_prefix|>"), HEADER + "<|inner_prefix|><|inner_suffix|>"),
    # the template itself shows what stands in front of an answer
    "gpt-oss": (GPT_OSS, "<|im_start|>assistant<|channel|>final<|message|>"),
    "Qwen3-Thinking-2507": (QWEN3_2507, HEADER + "<think>\n\n</think>\n\n"),
    "none": (CHAT_TEMPLATE, HEADER),
}


def tokenizer_with(template: str):
    tokenizer = byte_level(template)
    marks = [
        "<|channel|>",
        "<|message|>",
        "<|return|>",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        "[THINK]",
        "[/THINK]",
    ]
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
    return tokenizer


@pytest.mark.parametrize("model", ENDINGS)
def test_the_prompt_ends_outside_of_a_thought(model):
    """For an answer, for one that is begun, and in a conversation of several turns."""
    template, ending = ENDINGS[model]
    tokenizer = tokenizer_with(template)
    chat = Chat(tokenizer)
    prompt = tokenizer.decode(chat.encode(user("Tell <think> me.")))
    assert prompt.endswith(ending) and not open_thought(prompt.rpartition("me.")[2])
    turns = [*user("a"), {"role": "assistant", "content": "b"}, *user("c")]
    assert tokenizer.decode(chat.encode(turns)).endswith(ending)
    assert tokenizer.decode(chat.encode(user("c"), prefill="The")).endswith(ending + "The")
    ids = tokenizer.encode(ending, add_special_tokens=False)
    assert chat.encode(user("c"))[-len(ids) :] == ids  # tags are the tokenizer's own tokens, not their letters
    end = "<|return|>" if model == "gpt-oss" else "<|im_end|>"
    assert tokenizer.decode(chat.encode_answer("The end.")) == "The end." + end
    assert any("no thought" in note for note in chat.notes) == (model in list(ENDINGS)[7:-1])


@pytest.mark.parametrize("model", ["QwQ, DeepSeek-R1", "gpt-oss", "none"])
def test_a_training_shows_the_prompt_that_is_asked(model):
    chat = Chat(tokenizer_with(ENDINGS[model][0]))
    record = {"id": "a", "prompt": "Tell.", "response": "<think>\nHm.\n</think>\n\nOnce.", "language": "en"}
    (pair,), _ = make_pairs([record], chat, PairFlags(role="generator"), 0, 99)
    assert pair.ids == chat.encode(user("Tell.")) + chat.encode_answer("Once.")


@pytest.mark.parametrize("opening", ["<|reasoning|>", "[THINK|]"])
def test_a_thought_that_nothing_is_known_to_end_is_refused_by_name(opening):
    with pytest.raises(UserError, match="opens a thought") as error:
        Chat(byte_level(opens(opening)))
    assert opening in error.value.message and "chat_template" in error.value.hint


def test_a_system_prompt_may_speak_of_thoughts():
    """Phi-4's and Magistral's describe the tags: nothing is open there."""
    about = "{{ '<|im_start|>system\nThink in <think> or [THINK] first.<|im_end|>\n' }}"
    assert not Chat(byte_level(about + CHAT_TEMPLATE)).notes


ABOUT_THOUGHTS = [
    "Models write <think> first.\n</think>\nThen they answer.",
    "Write `</think>` where it ends.",
    "[Analysis of the river]\nIt flows.",
    "[Analysis]\nIt flows.",
    "[Reflection] It flows.",
    "<answer>42</answer>",
]
ANSWERS = [  # text, answer, whether its thought has an end
    ("Once upon a time.", "Once upon a time.", True),
    ("<think>\nHm.\n</think>\n\nOnce.", "Once.", True),
    ("\n<think>\n\n</think>\n\nOnce.", "Once.", True),
    ("<think>a</think><think>b</think>Once.", "Once.", True),
    ("<THINK>a</THINK>Once.", "Once.", True),
    ("<thinking>a</thinking>\nOnce.\n", "Once.\n", True),
    ("<thought>\na\n</thought>\n\nOnce.", "Once.", True),
    ("<reasoning>a</reasoning>Once.", "Once.", True),
    ("<seed:think>a</seed:think>Once.", "Once.", True),
    ("<longcat_think>a</longcat_think>Once.", "Once.", True),
    ("[THINK]a[/THINK]Once.", "Once.", True),
    ("◁think▷a◁/think▷Once.", "Once.", True),
    ("<|begin_of_thought|>a<|end_of_thought|>\n\n<|begin_of_solution|>Once.<|end_of_solution|>", "Once.", True),
    ("<|START_THINKING|>a<|END_THINKING|>Once.", "Once.", True),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>Once.", "Once.", True),
    ("<think>\na\n</think>\n<answer>\nOnce.\nTwice.\n</answer>", "Once.\nTwice.", True),
    ("<think>\na\n</think>\n<answer>\nOnce. Tw", "Once. Tw", True),
    ("I should begin.\n</think>\n\nOnce.", "Once.", True),  # the beginning stood in the prompt
    ("<think>\nHm, let me see", "", False),
    ("<think>a</think>\n<think>b", "", False),
    ("<think>a</think>", "", True),
    *((text, text, True) for text in ABOUT_THOUGHTS),
]


@pytest.mark.parametrize("text,answer,ended", ANSWERS)
def test_the_answer_without_its_thoughts(text, answer, ended):
    assert without_thought(text) == (answer, ended)


def test_every_regular_tag_is_closed_as_it_opens():
    assert closing_of("<think>") == "</think>" and closing_of("[THINK]") == "[/THINK]"
    assert closing_of("◁think▷") == "◁/think▷" and closing_of("<|reasoning|>") == ""


def test_texts_of_the_sampler_hold_no_thoughts():
    """Not in drafts, word counts or token counts; a thought without an end is an unfinished text."""
    chat, texts = Chat(tiny_tokenizer()), {}
    texts[0] = "<think>\nA long thought about it.\n</think>\n\n" + prose(1, 40)
    texts |= {1: "<think>\nA thought that", 2: prose(2, 40), 3: "<think>a</think>"}
    sampler = ScriptedSampler(lambda request: (texts[request.key], "eos"))
    loaded = SimpleNamespace(chat=chat)
    writer = Writer(None, loaded, sampler)
    for key in texts:
        writer.add(Request(key, [5], 0))
    samples = {sample.request.key: sample for sample in writer.run()}
    assert samples[0].text == prose(1, 40) and samples[0].finish == "eos"
    assert samples[0].num_tokens == len(chat.encode_text(prose(1, 40))) + 1
    assert clean_answer(samples[0].text, samples[0].finish, "en")[1] == ""
    assert clean_answer(samples[1].text, samples[1].finish, "en")[1] == "unfinished"
    assert clean_answer(samples[3].text, samples[3].finish, "en")[1] == "unfinished"
    assert samples[2].text == texts[2] and samples[2].token_ids == [0] * 40


def test_tags_that_are_special_tokens_are_seen_though_no_text_shows_them():
    """Magistral's, Command A's, gpt-oss': a decoded text has the thought, and neither its beginning nor its end."""
    chat = Chat(tokenizer_with(CHAT_TEMPLATE.replace("'<|im_start|>'", "bos_token + '<|im_start|>'")))
    tokenizer, end = chat.tokenizer, chat.end_id
    for raw, answer in (("[THINK]Hm.[/THINK]Once.", "Once."), ("[THINK]Hm", ""), ("Once.", "Once.")):
        ids = tokenizer.encode(raw, add_special_tokens=False) + [end]
        shown = tokenizer.decode(ids, skip_special_tokens=True)
        assert "[" not in shown
        assert chat.answer_of(shown, ids, "eos") == (answer, "eos" if answer else "length")
    assert chat.answer_of("Once", [5], "error") == ("Once", "error")


def test_records_of_a_user_hold_no_thoughts(tmp_path):
    path = tmp_path / "drafts.jsonl"
    path.write_text(
        '{"prompt": "Tell.", "query": "Tell.", "response": "<think>a</think>Once upon a time, long ago."}\n'
    )
    assert read_answers(path)[0]["response"] == "Once upon a time, long ago."
    (row,) = read_rows(path, ready_made=True)
    assert row["response"] == "Once upon a time, long ago."
    path.write_text('{"prompt": "Tell.", "query": "Tell.", "response": "<think>\\nHm"}\n')
    with pytest.raises(UserError, match="only thoughts"):
        read_answers(path)
    (row,) = read_rows(path, ready_made=True)
    assert row["finish"] == "length"
    record = {"prompt": "Tell.", "response": "<think>\nHm", "language": "en"}
    pairs, left_out = make_pairs([record], Chat(tiny_tokenizer()), PairFlags(role="generator"), 0, 99)
    assert not pairs and left_out[0]["reason"] == "unfinished"


# ---- today's date ---------------------------------------------------------------------------------------

LLAMA3 = (  # 3.1 and later: a date of the caller's, else the clock's, else a fixed one
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = "
    "strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{{ '<|im_start|>system\nToday Date: ' + date_string + '<|im_end|>\n' }}" + CHAT_TEMPLATE
)
GRANITE = "{{ '<|im_start|>system\nToday is ' + strftime_now('%B %d, %Y') + '.<|im_end|>\n' }}" + CHAT_TEMPLATE


@pytest.mark.parametrize(
    "template,date", [(LLAMA3, "26 Jul 2024"), (GRANITE, "July 26, 2024")], ids=["llama", "granite"]
)
def test_a_template_that_prints_the_date_prints_one(template, date):
    """On every day: a run that is resumed, and its training, show what was asked."""
    tokenizer = byte_level(template)
    chat = Chat(tokenizer)
    assert date in tokenizer.decode(chat.encode(user("a"))) and chat.date == f"{TODAY:%Y-%m-%d}"
    with pytest.raises(UserError, match="in a way that is not known"):
        Chat(byte_level("{{ strftime_now(form) }}" + CHAT_TEMPLATE))
    assert [note for note in chat.notes if chat.date in note] and Chat(byte_level(CHAT_TEMPLATE)).date == ""
