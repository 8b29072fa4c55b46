"""Run: pytest tests/test_text.py

Words, filters and selection. "Defect" names the list of the release's faults that docs/departures.md answers.
"""

import random
import re
import statistics
from collections import Counter

import pytest
from linear import assert_linear

from lengthen.text import filters as f
from lengthen.text import selection as select
from lengthen.text import words as w

# ---------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(
    "text, strict, longen",
    [
        ("", 0, 0),
        ("  \n\t ", 0, 0),
        ("Hello, world!", 2, 2),
        ("don't stop", 2, 2),
        ("a well-known e-mail", 3, 3),
        ("It costs 3,000.50 dollars.", 4, 4),
        ("U.S.A. and U.K.", 3, 3),
        ("He left - at last.", 4, 5),  # a dash between blanks is a word for LonGen
        ("one—two", 2, 1),
        ("## Heading", 1, 2),
        ("- item\n* item\n1. item", 4, 6),
        ("**bold** _text_", 2, 2),
        ("| a | b |\n|---|---|\n| 1 | 2 |", 4, 11),
        ("---\n***\n===", 0, 3),
        ("naïve café", 2, 2),
        ("re\u0301sume\u0301", 1, 1),  # decomposed accents do not split a word
        ("你好世界", 4, 4),
        ("你好，世界。", 4, 6),  # CJK punctuation counts for LonGen only
        ("全角！＂＃", 2, 5),
        ("第3章", 3, 3),
        ("我用Python写程序。", 6, 7),
        ("中 English 混排 text", 5, 5),
        ("中English文", 3, 3),
        ("“你好”", 2, 2),  # curly quotes are neither CJK nor a word of their own here …
        ("— 你 —", 1, 3),
        ("人々", 2, 2),
        ("𠀀", 1, 1),
        ("\u3000\u3000段首", 2, 4),  # the ideographic space is in LonGen's range
    ],
)
def test_word_counts_follow_their_definitions(text, strict, longen):
    if text == "“你好”":
        longen = 4  # … but stand alone once the ideographs between them are taken out
    assert (w.count_words(text), w.longen_words(text)) == (strict, longen)


def test_longen_words_is_the_published_definition_on_random_text():
    def by_character(text: str) -> int:
        def is_cjk(char: str) -> bool:
            return any(a <= ord(char) <= b for a, b in ((0x4E00, 0x9FFF), (0x3000, 0x303F), (0xFF00, 0xFFEF)))

        return sum(map(is_cjk, text)) + len("".join(" " if is_cjk(char) else char for char in text).split())

    rng = random.Random(0)
    alphabet = "ab1 .,-|#\n\t你好，。！\u3000\uff01\uffef\u303f\u3040\u9fff\ua000é"
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        assert w.longen_words(text) == by_character(text), repr(text)


def test_strict_measure_ignores_punctuation_marks_and_tables_defect_16():
    words = "the quick brown fox 敏捷的狐狸"
    marked = "## **the** | _quick_ | `brown`\n\n- fox，敏捷的。（狐狸）！\n|---|---|\n***"
    assert w.count_words(words) == w.count_words(marked) == 9


ENGLISH = "The harbour was quiet in the morning. Fishermen mended their nets, and nobody spoke of the storm."
CHINESE = "清晨的港口十分安静，渔民们在岸边修补渔网，没有人再提起那场暴风雨。"


@pytest.mark.parametrize(
    "text, language",
    [
        (ENGLISH, "en"),
        (CHINESE, "zh"),
        ("Explain quantum computing", "en"),
        ("你好", "zh"),
        ("用 Python 和 pandas 处理数据，并用 matplotlib 画图。", "zh"),
        ("The word 道 (dào) is hard to translate into English.", "en"),
        (ENGLISH + " " + CHINESE * 3, "zh"),
        ("В гавани было тихо, рыбаки чинили сети.", ""),
        ("항구는 조용했고 어부들은 그물을 고치고 있었다.", ""),
        ("12345 67.8 %", ""),
        ("", ""),
    ],
)
def test_detect_language_knows_english_chinese_and_neither(text, language):
    assert w.detect_language(text) == language


# ---------------------------------------------------------------------------------------------------------------------
# Paragraphs and lines


@pytest.mark.parametrize(
    "text, parts, separator",
    [
        ("a\n\nb\n\nc", ["a", "b", "c"], "\n\n"),
        ("a\n \t\nb\n\n\n\nc\nd", ["a", "b", "c\nd"], "\n\n"),
        ("a\r\n\r\nb\r\n\r\nc", ["a", "b", "c"], "\n\n"),
        ("a\nb\nc", ["a", "b", "c"], "\n"),
        ("a\nb\n\nc", ["a", "b", "c"], "\n"),  # two blocks: lines
        ("a\n\nb", ["a", "b"], "\n\n"),  # lines would give no more
        ("one line", ["one line"], "\n\n"),
        ("\n\n  indented\n\n\nb\n\nc\n", ["  indented", "b", "c"], "\n\n"),
        ("", [], "\n\n"),
        ("\n \n", [], "\n\n"),
    ],
)
def test_split_paragraphs(text, parts, separator):
    assert w.split_paragraphs(text) == parts
    assert w.split_paragraphs(separator.join(parts)) == parts


def numbered_draft(num_paragraphs: int, num_lines: int) -> str:
    return "\n\n".join("\n".join(f"p{p} line{i}" for i in range(num_lines)) for p in range(num_paragraphs))


def test_remove_lines_keeps_the_shape_of_a_draft_defect_12():
    """No runs of blank lines and no merged paragraphs, whatever was removed."""
    draft = numbered_draft(12, 3)
    for seed in range(50):
        left = w.remove_lines(draft, 0.8, seed)
        assert "\n\n\n" not in left and left == left.strip("\n")
        for block in left.split("\n\n"):
            assert len({line.split()[0] for line in block.split("\n")}) == 1, "lines of two paragraphs in one"
        order = [draft.split("\n").index(line) for line in left.split("\n") if line]
        assert order == sorted(order)
        paragraphs = [block.split()[0] for block in left.split("\n\n")]
        assert len(paragraphs) == len(set(paragraphs)), "a paragraph was split"


def test_remove_lines_removes_a_fifth_and_repeats_itself():
    draft = numbered_draft(500, 4)
    left = w.remove_lines(draft, 0.8, 7)
    # 2,000 lines: the standard deviation is 0.9 %, so four of them fail once in 16,000 seeds, and the seed is fixed.
    assert abs(left.count("line") / 2000 - 0.8) < 0.036
    assert left == w.remove_lines(draft, 0.8, 7) != w.remove_lines(draft, 0.8, 8)
    assert w.remove_lines(draft, 1.0, 7) == draft


def test_remove_lines_never_leaves_nothing():
    assert all(w.remove_lines("only line", 0.8, seed) == "only line" for seed in range(40))
    assert all(w.remove_lines("a\n\nb\n\nc", 0.0, seed) in ("a", "b", "c") for seed in range(10))
    assert w.remove_lines("", 0.8, 0) == ""


# ---------------------------------------------------------------------------------------------------------------------
# Loops


def test_repeats_agrees_with_counting_by_hand():
    rng = random.Random(1)
    for _ in range(200):
        words = [rng.choice(("red", "blue")) for _ in range(rng.randrange(1, 60))]
        grams = [tuple(words[i : i + 10]) for i in range(len(words) - 9)]
        counts = Counter(grams)
        covered = {i + j for i, gram in enumerate(grams) if counts[gram] > 1 for j in range(10)}
        expected = (max(counts.values(), default=0), len(covered) / len(words))
        assert f.repeats(" ".join(words), "en") == pytest.approx(expected)


def words(num: int, seed: int = 0) -> list[str]:
    """English-looking words in which no 10-gram repeats (a 10-gram recurs with probability < 1e-20)."""
    rng = random.Random(seed)
    return ["".join(rng.choices("aeioutnrsl", k=rng.randrange(2, 9))) for _ in range(num)]


def prose(num_words: int, seed: int = 0) -> str:
    sentences = []
    for start in range(0, num_words, 12):
        sentences.append("The " + " ".join(words(11, seed * 100_000 + start)) + ".")
    return "\n\n".join(" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5))


def zh_prose(num_chars: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    chars = [chr(0x4E00 + rng.randrange(3000)) for _ in range(num_chars)]
    return "。".join("".join(chars[i : i + 20]) for i in range(0, num_chars, 20)) + "。"


def test_a_loop_is_seen_in_either_language_whatever_the_record_says_defect_6():
    """The release counts a run of ASCII as one token, so its Chinese filter passes an English loop."""
    english = "The cat sat on the mat and looked at the dog again. " * 50
    chinese = "从前有座山，山里有座庙，庙里有个老和尚在讲故事。" * 50
    for language in ("en", "zh"):
        assert f.is_loop(english, language) and f.is_loop(chinese, language)
        assert f.clean_answer(english, "eos", language)[1] == "repetition"
        assert f.clean_answer(chinese, "eos", language)[1] == "repetition"


def test_a_long_name_may_occur_twice_in_a_long_text_defect_6():
    name = "the International Commission for the Protection of the Upper Danube and Its Many Old Tributaries"
    assert w.count_words(name) > 10
    text = prose(4000, 1) + f"\n\nThey wrote to {name}.\n\n" + prose(4000, 2) + f"\n\nAt last {name} answered."
    assert f.repeats(text, "en")[0] == 2
    assert f.clean_answer(text, "eos", "en")[1] == ""
    name = "联合国教育科学及文化组织世界遗产保护委员会"
    text = zh_prose(4000, 1) + f"{name}来信了。" + zh_prose(4000, 2) + f"{name}又来信了。"
    assert f.clean_answer(text, "eos", "zh")[1] == ""


def test_the_same_name_three_times_or_twice_in_a_short_text_is_repetition():
    sentence = "All of the people in the old town came out to see the ship that day. "
    filler = prose(300)
    assert f.clean_answer(filler + " " + sentence + sentence, "eos", "en")[1] == "repetition"
    long = prose(3000, 1) + sentence + prose(3000, 2) + sentence + prose(3000, 3) + sentence
    assert f.repeats(long, "en")[0] == 3 and f.repeats(long, "en")[1] < 0.02
    assert f.clean_answer(long, "eos", "en")[1] == "repetition"


@pytest.mark.parametrize("unit", ["-", "ha", "| ", "…", "=-", "...!"])
def test_loops_without_words_are_loops(unit):
    assert f.is_loop("Some text. " + unit * 300, "en")
    assert not f.is_loop("Some text. " + unit * 20 + " Some more.", "en")


@pytest.mark.parametrize(
    "function",
    [
        lambda text: f.repeats(text, "en"),
        lambda text: f.clean_answer(text, "eos", "en"),
        lambda text: f.clean_answer("Sure! " + text.replace("\n", " "), "eos", "en"),
        lambda text: f.clean_answer("." * len(text) + "x", "eos", "en"),
        lambda text: f.clean_answer("if you want " * (len(text) // 12) + "x.", "eos", "en"),
        lambda text: f.clean_answer("Here is a text " * (len(text) // 15), "eos", "en"),
        lambda text: f.clean_answer("-" * len(text), "eos", "en"),
        lambda text: f.is_complete("#tea " * (len(text) // 5) + "x", "en"),
        lambda text: f.is_complete("x" + "\n" * len(text) + "x.", "en"),
        lambda text: w.split_paragraphs(text.replace(" ", "\n")),
        lambda text: w.split_paragraphs("\n" * len(text) + "x"),
        lambda text: w.remove_lines(text.replace(" ", "\n"), 0.8, 0),
        lambda text: f.clean_answer(text.replace(" ", "\n"), "eos", "en"),
    ],
)
def test_filters_take_linear_time(function):
    assert_linear(function, prose, 1000)


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance

BODY = (
    "The sun rose over the quiet harbour. Fishermen mended their nets, and gulls cried above the masts.\n\n"
    "Nobody knew what the day would bring. The old captain had seen many mornings like this one."
)
ZH_BODY = (
    "清晨的阳光洒在安静的港口上。渔民们修补着渔网，海鸥在桅杆上鸣叫。\n\n"
    "没有人知道这一天会发生什么。老船长见过许多这样的早晨。"
)


@pytest.mark.parametrize(
    "finish, reason",
    [("length", "unfinished"), ("stop", "unfinished"), ("repetition", "repetition"), ("error", "error")],
)
def test_only_answers_that_ended_by_themselves_are_accepted_defect_7(finish, reason):
    assert f.clean_answer(BODY, finish, "en") == (BODY, reason)
    assert f.finish_reason(finish) == reason
    assert f.finish_reason("eos") == "" == f.finish_reason("stop", ends=("eos", "stop"))


@pytest.mark.parametrize(
    "ending", [",", ":", ";", " and", " -", "，", "：", "\n\n2.", "\n\n-", "\n- eggs,", "\n1. first:"]
)
def test_texts_that_go_on_are_no_ending_defect_7(ending):
    assert f.clean_answer(BODY.rstrip(".") + ending, "eos", "en")[1] == "ending"


@pytest.mark.parametrize(
    "ending",
    [".", "!", "?", "…", "...", '."', ".”", "!)", ".]", ".**", "?!", ".*", "\n- eggs\n- milk", "\n2. **Stop** at night"]
    + ["\n| a | b |\n|---|---|\n| 1 | 2 |", "\n* one\n* two (2)"],
)
def test_finished_english_texts_are_accepted(ending):
    assert f.clean_answer(BODY.rstrip(".") + ending, "eos", "en") == (BODY.rstrip(".") + ending, "")


@pytest.mark.parametrize(
    "ending", ["。", "！", "？", "……", "。”", "！』", "。）", "。**", "\n一、鸡蛋", "\n- 牛奶", "."]
)
def test_finished_chinese_texts_are_accepted_defect_6(ending):
    text = ZH_BODY.rstrip("。") + ending
    assert f.clean_answer(text, "eos", "zh") == (text, "")


@pytest.mark.parametrize("ending", ["，", "：", "、", "的", "\n二、"])
def test_unfinished_chinese_texts_are_not(ending):
    assert f.clean_answer(ZH_BODY.rstrip("。") + ending, "eos", "zh")[1] == "ending"


def test_empty_and_wordless_answers():
    assert [f.clean_answer(text, "eos", "en")[1] for text in ("", "  \n", "---\n***", "…")] == ["empty"] * 4


def test_each_language_is_judged_by_its_own_record_defect_1():
    assert f.clean_answer(BODY, "eos", "en")[1] == f.clean_answer(ZH_BODY, "eos", "zh")[1] == ""
    assert f.clean_answer(BODY, "eos", "zh")[1] == f.clean_answer(ZH_BODY, "eos", "en")[1] == "language"


def test_a_text_that_drifts_into_the_other_language_is_rejected():
    assert f.clean_answer(zh_prose(300) + "\n\n" + prose(200), "eos", "zh")[1] == "language"
    assert f.clean_answer(prose(400) + "\n\n" + zh_prose(350), "eos", "en")[1] == "language"


# ---------------------------------------------------------------------------------------------------------------------
# Chatter

OPENINGS = {
    "en": [
        "Sure! ",
        "Sure thing!\n\n",
        "Certainly! Here is the story:\n\n",
        "Certainly! ",
        "Of course! I'd be happy to help you with that.\n\n",
        "Of course, here's an expanded version of the outline:\n\n---\n\n",
        "Sure, I'd be happy to help you with that! Here's the article:\n\n",
        "Here's a rewritten version of your story:\n\n",
        "Here’s a rewritten version of the draft with more detail:\n\n",
        "Here's a rewritten version of the text with more detail: ",
        "Here is an enriched and more detailed version of the outline:\n",
        "Here is the full text:\n\n",
        "Here's a possible article on the harbour:\n\n",
        "Below is a revised and extended version of your essay.\n\n",
        "I'm excited to share my thoughts on this topic. ",
        "I’m excited to share this story with you!\n\n",
        "I am happy to help with your article.\n\n",
        "I've expanded the outline as requested.\n\n",
        "I have rewritten your text to make it longer and more detailed. ",
        "Your opening paragraph has a strong hook, but it could be more vivid.\n\n",
        "Your outline is clear and well organised.\n\n",
        "You've done a great job with this draft. Here's a revised version:\n\n",
        "Thank you for sharing your draft.\n\n",
        "As requested, here is the article:\n\n",
        "**Rewritten Version:**\n\n",
        "Expanded Article:\n",
        "Based on your outline, here is the full article:\n\n",
        "This revised version has more detail.\n\n",
        "Awesome! I'll be happy to help you with this. Please share the outline with me.\n\n",
        "I'm glad you enjoyed the instructions and outline. ",
        "I'll be ready with a full text when needed.\n\n",
        "In this rewritten version, the harbour is described at length.\n\n",
        "当然！\n\n",
    ],
    "zh": [
        "当然！",
        "好的！\n",
        "当然可以！以下是为您扩写的文章：\n\n",
        "当然，以下是扩写后的文章：\n\n",
        "以下是根据您的要求扩写的文章：\n\n",
        "好的，下面是一篇关于港口的文章：\n",
        "下面是改写后的全文：\n\n---\n\n",
        "这是为您扩写的内容：\n\n",
        "根据您提供的大纲，我扩写如下：\n\n",
        "很高兴为您撰写这篇文章。\n\n",
        "您的草稿很有意思，我做了一些修改。\n\n",
        "感谢您提供的提纲。\n\n",
        "Sure! Here is the article:\n\n",
    ],
}
CLOSINGS = {
    "en": [
        "\n\nI hope this helps!",
        " I hope this helps! Let me know if you have any questions.",
        "\n\nLet me know if you'd like any changes.",
        "\n\nPlease let me know if you would like me to continue.",
        "\n\nI hope this rewritten version meets your expectations.\n\nFeel free to ask for more.",
        "\n\n---\n\n(Note: This is a fictional story.)",
        "\n\n[Note: the names are invented.]",
        "\n\nNote: This is a work of fiction.",
        "\n\nWord count: 532",
        "\n\n**Word Count:** 532 words",
        "\n\n(512 words)",
        "\n\n(Word count: 512)",
        "\n\n---",
        "\n\nIf you have any other questions, feel free to ask.",
        "\n\nWould you like me to add another chapter?",
        "\n\nPlease note that this is a fictional account.",
        "\n\nThis revised version has more detail than the outline.",
        "\n\nHow does this sound? Do you think this topic could be explored further?",
        "\n\nI would love to hear your thoughts! What do you think?",
        "\n\nYou can continue the story or add more details. What do you want?",
    ],
    "zh": [
        "\n\n希望以上内容对您有所帮助！",
        "希望这篇文章能满足您的要求。如果您有其他需要，请随时告诉我。",
        "（注：本文为虚构。）",
        "\n\n注：本文情节纯属虚构。",
        "\n\n（全文约1200字）",
        "\n字数：1200字",
        "\n\n（字数：1200）",
        "\n\n以上就是我为您扩写的文章。",
        "\n\n如果你还有其他问题，请随时告诉我。",
        "\n\nI hope this helps!",
    ],
}
BODIES = {"en": BODY, "zh": ZH_BODY}


@pytest.mark.parametrize("language, chatter", [(key, phrase) for key, some in OPENINGS.items() for phrase in some])
def test_a_chatty_opening_is_stripped_and_the_rest_kept(language, chatter):
    assert f.clean_answer(chatter + BODIES[language], "eos", language) == (BODIES[language], "")


@pytest.mark.parametrize("language, chatter", [(key, phrase) for key, some in CLOSINGS.items() for phrase in some])
def test_a_chatty_closing_is_stripped_and_the_rest_kept(language, chatter):
    assert f.clean_answer(BODIES[language] + chatter, "eos", language) == (BODIES[language], "")


@pytest.mark.parametrize(
    "text",
    [
        "Conversion is the version of the paragraph that a responsive designer prefers.",  # defect 7's stop-words
        "The revised edition of the response was longer than the first version.",
        "Certainly, the war had many causes. They are well known.",
        "Of course I went. Here is where the story begins.",
        "This is a story of two brothers who lived by the sea.",
        "This is the final report of the expedition to the pole.",
        "Here is a story that my mother told me.",
        "Here is the harbour. Here are the boats and the nets.",
        "“Sure! I'd be happy to help,” she said. He did not believe her.",
        '"Here is a rewritten version," the clerk whispered. Nobody answered.',
        "In this essay, we will look at rivers.",
        "I have a small, polished stone on my desk. It came from the sea.",
        "I have always improved my drafts by reading them aloud.",
        "I hope it rains tomorrow. I hope you are well, my friend.",
        "Let me tell you about the sea. Let me begin with the storm.",
        "He asked for an opinion. If you want peace, prepare for the long winter.",
        "Note: the tide tables of that year were wrong. Everybody knew it.",
        "As an artist, she worked at night. As a language, Latin is not quite dead.",
        "Great cities are built slowly. Okay was never an answer that he gave.",
        "Your opening hours decide who comes. Your draft horse needs rest.",
        "Thank you for coming tonight. Thanks for everything that you have done.",
    ],
)
def test_ordinary_english_is_not_chatter(text):
    assert f.clean_answer(text, "eos", "en") == (text, "")
    assert f.clean_answer(BODY + "\n\n" + text + "\n\n" + "It was over.", "eos", "en")[1] == ""


@pytest.mark.parametrize(
    "text",
    [
        "当然，战争的原因很多，这里只谈其中的三个。",
        "好的文章需要反复修改，好的版本往往是最后一个。",
        "以下的故事发生在一个小镇上。",
        "这是一个关于大海的故事。",
        "希望是一盏灯，照亮了他的路。",
        "作为一名人工智能研究员，他常常工作到深夜。",
        "如果你有一天来到这里，一定要看看那棵树。",
        "我们注意到，字数多并不等于内容好。",
        "根据史书的记载，这座城建于唐代。",
        "感谢你们多年的陪伴。",
    ],
)
def test_ordinary_chinese_is_not_chatter(text):
    assert f.clean_answer(text, "eos", "zh") == (text, "")
    assert f.clean_answer(ZH_BODY + "\n\n" + text + "\n\n一切都结束了。", "eos", "zh")[1] == ""


@pytest.mark.parametrize(
    "language, line",
    [
        ("en", "Here's a rewritten version of the second half:"),
        ("en", "I've expanded the outline to include more details."),
        ("en", "Your opening paragraph has a strong hook."),
        ("en", "I hope this helps! Let me know if you need anything."),
        ("en", "Let me know if you'd like me to continue."),
        ("en", "He paused. As an AI language model, I cannot say more."),
        ("en", "**In this revised version, the captain is older.**"),
        ("zh", "以下是扩写后的第二部分："),
        ("zh", "希望以上内容对您有所帮助。"),
        ("zh", "作为一个AI语言模型，我没有个人经历。"),
    ],
)
def test_chatter_inside_rejects(language, line):
    body = BODIES[language]
    first, second = body.split("\n\n")
    assert f.clean_answer(f"{first}\n\n{line}\n\n{second}", "eos", language)[1] == "chatter"


def test_what_is_left_must_stand_alone():
    assert f.clean_answer("I've rewritten your text as follows.", "eos", "en")[1] == "chatter"
    assert f.clean_answer("Sure! and then the sun rose over the harbour. It was day.", "eos", "en")[1] == "chatter"


def test_strip_chatter_says_whether_it_stripped():
    assert f.strip_chatter(BODY, "en") == (BODY, False)
    assert f.strip_chatter("\n" + BODY + "\n\n", "en") == (BODY, False)
    assert f.strip_chatter("Sure! " + BODY, "en") == (BODY, True)


# ---------------------------------------------------------------------------------------------------------------------
# Length bias


def keys(num: int, seed: int = 0) -> list[str]:
    return [f"{seed}-{i}" for i in range(num)]


def test_length_bias_drops_the_shortest_fifth_and_40_percent_on_average():
    """1,000 lengths, 40 seeds: the mean share is 0.405 with a standard deviation of 0.0012; 4 of them are allowed."""
    lengths = list(range(100, 1100))
    random.Random(3).shuffle(lengths)
    shares, ever_kept = [], set()
    for seed in range(40):
        dropped = select.length_bias(lengths, keys(1000), seed)
        shares.append(len(dropped) / 1000)
        ever_kept |= {lengths[i] for i in range(1000) if i not in dropped}
    assert statistics.mean(shares) == pytest.approx(0.405, abs=0.005)
    # 2 r^3 >= 1 from r = 0.7937: the 206 shortest never survive; the one above does with probability 0.004 a seed.
    assert min(ever_kept) == pytest.approx(306, abs=12) and min(ever_kept) >= 306


def test_length_bias_follows_its_curve_at_every_rank():
    """100 lengths, 2,000 seeds: at each rank the drop rate is min(1, 2 r^3) within 5 standard deviations (< 1e-4)."""
    drops = Counter(i for seed in range(2000) for i in select.length_bias(list(range(100)), keys(100), seed))
    for i in range(100):
        r = 1 - (i + 0.5) / 100
        p = min(1.0, 2 * r**3)
        assert abs(drops[i] / 2000 - p) <= 5 * (p * (1 - p) / 2000) ** 0.5 + 1e-12, (i, drops[i])


def test_equal_lengths_do_not_all_vanish_defect_8():
    """All of one length: r = 1/2 for each, a quarter goes (standard deviation 1.4 %); the release keeps none."""
    dropped = select.length_bias([500] * 1000, keys(1000), 0)
    assert abs(len(dropped) - 250) < 60
    # Ties amid others: lengths on either side keep their places.
    dropped = select.length_bias([10] * 300 + [20] * 400 + [30] * 300, keys(1000), 0)
    rates = [sum(a <= i < b for i in dropped) / (b - a) for a, b in ((0, 300), (300, 700), (700, 1000))]
    assert rates[0] == 1.0 and abs(rates[1] - 0.25) < 0.1 and rates[2] < 0.05


def test_few_answers_are_thinned_by_the_same_share_as_many():
    for num in (1, 2, 4, 8):
        mean = statistics.mean(len(select.length_bias(list(range(num)), keys(num), seed)) for seed in range(3000)) / num
        assert mean == pytest.approx(0.25 if num == 1 else 0.405, abs=0.04), num


def test_length_bias_is_by_words_so_languages_compare_defect_8():
    """Equal words, unequal characters: neither language may be preferred."""
    english, chinese = [prose(n, n) for n in range(120, 600, 12)], [zh_prose(n, n) for n in range(120, 600, 12)]
    lengths = [w.count_words(text) for text in english + chinese]
    drops = [select.length_bias(lengths, keys(80), seed) for seed in range(200)]
    shares = [statistics.mean(sum(a <= i < a + 40 for i in dropped) / 40 for dropped in drops) for a in (0, 40)]
    assert shares[0] == pytest.approx(shares[1], abs=0.03)
    assert statistics.mean(map(len, english)) > 3 * statistics.mean(map(len, chinese))


def test_length_bias_is_a_pure_function_of_seed_and_keys():
    lengths = [random.Random(5).randrange(1000) for _ in range(300)]
    order = list(range(300))
    random.Random(6).shuffle(order)
    dropped = select.length_bias(lengths, keys(300), 1)
    shuffled = select.length_bias([lengths[i] for i in order], [keys(300)[i] for i in order], 1)
    assert {order[i] for i in shuffled} == dropped == select.length_bias(lengths, keys(300), 1)
    assert dropped != select.length_bias(lengths, keys(300), 2) and dropped != select.length_bias(
        lengths, keys(300, 1), 1
    )
    assert select.length_bias([], [], 0) == set()


def test_length_bias_of_many_answers_is_fast_defect_8():
    """It was quadratic: hours for 40,000 answers."""

    def dropped(lengths: list[int]) -> set[int]:
        return select.length_bias(lengths, keys(len(lengths)), 0)

    assert_linear(dropped, lambda count: [i * 7919 % 9000 for i in range(count)], 2500)


# ---------------------------------------------------------------------------------------------------------------------
# Near-duplicates


def shingles(text: str) -> set[tuple]:
    tokens = w.tokens(text)
    return {tuple(tokens[i : i + 5]) for i in range(max(len(tokens) - 4, 1))}


def test_exact_repeats_after_normalisation():
    seen = select.NearDuplicates()
    assert seen.add("Write a story about a fox.", "en")
    assert not seen.add("write a STORY -- about a fox", "en")
    assert seen.add("写一个关于狐狸的故事。", "zh")
    assert not seen.add("写一个关于狐狸的故事！", "zh")
    assert not seen.add("Ｗrite a story about a fox", "en")  # full-width letter
    assert seen.add("Hi", "en") and not seen.add("hi!", "en")


def test_near_duplicates_are_decided_as_by_comparing_all_pairs_defect_11():
    """Against all pairs compared exactly: nothing is dropped wrongly; at most 1 in 50 similar ones slips through.

    A pair at the threshold shares no band with probability 0.13 %, a more similar one with less.
    """
    rng = random.Random(0)
    base = [words(40, seed) for seed in range(60)]
    texts = []
    for _ in range(600):
        chosen = rng.choice(base).copy()
        for _ in range(rng.randrange(5)):
            chosen[rng.randrange(40)] = f"changed{rng.randrange(10_000)}"
        texts.append(" ".join(chosen))
    seen, kept, missed, similar = select.NearDuplicates(), [], 0, 0
    for text in texts:
        mine = shingles(text)
        is_similar = any(len(mine & other) >= 0.6 * len(mine | other) for other in kept)
        new = seen.add(text, "en")
        assert new or is_similar, "dropped a text that is like no other"
        similar += is_similar
        missed += new and is_similar
        if new:
            kept.append(mine)
    assert similar > 200 and missed <= similar / 50


def test_chinese_near_duplicates_by_characters():
    seen = select.NearDuplicates()
    text = "请写一篇关于老街变迁的散文，从街上的店铺、人物和声音写起，写出时代的变化与人们的情感。"
    assert seen.add(text, "zh")
    assert not seen.add(text.replace("情感", "感情"), "zh")
    assert seen.add("请写一份家庭阳台种菜手册，介绍光照、土壤、品种、浇水施肥和病虫害防治。", "zh")


def test_near_duplicates_are_stable_between_processes():
    """A resumed run must decide as the first did: no use of hash(), which is salted per process."""
    assert select._hash(["a", "b"]) == int.from_bytes(
        __import__("hashlib").blake2b(b"a b", digest_size=7).digest(), "big"
    )


@pytest.mark.parametrize("module", [w, f, select])
def test_the_module_loads_with_the_standard_library_only(module):
    source = open(module.__file__, encoding="utf-8").read()
    imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imported <= {
        "collections",
        "functools",
        "hashlib",
        "lengthen",
        "math",
        "random",
        "re",
        "typing",
        "unicodedata",
    }
