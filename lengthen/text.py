"""Measures and filters of plain text in English and Chinese: words, language, loops, chatter, selection.

Everything the stages decide about a text without a model is decided here, once, for both languages. Only the standard
library; each function is linear in the length of its text, because the texts are thousands of words and come by the
thousand. `language` is "en" or "zh" throughout; method sections are those of the paper (arXiv 2410.23933).
"""

import hashlib
import random
import re
import unicodedata
from collections import Counter

# Ideographs and the two signs written among them (々 repeats one, 〇 is a zero); kana and hangul are letters, not these.
IDEOGRAPHS = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3040-\u30ff"
# A letter or digit that is no ideograph; combining accents stay inside their word.
_LETTER = rf"(?:[^\W_{IDEOGRAPHS}][\u0300-\u036f]*)"
_IDEOGRAPH = re.compile(rf"[{IDEOGRAPHS}]")
_WORD = re.compile(rf"{_LETTER}+(?:['’.,\-‐‑]{_LETTER}+)*")
_TOKEN = re.compile(rf"[{IDEOGRAPHS}]|{_WORD.pattern}")
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+")
_OTHER_LETTER = re.compile(rf"[^\W\d_A-Za-z\u00aa\u00ba\u00b5\u00c0-\u024f{IDEOGRAPHS}]")

# Common short words of the languages that share the Latin alphabet: enough to tell English from its neighbours.
_ENGLISH = frozenset("the of and to is that it was for with are this be by from not have his her their which you".split())
_NOT_ENGLISH = frozenset(
    "le la les des du une et est dans que qui pour au aux sur il elle nous vous ce cette "
    "der das und ist den dem ein eine nicht mit von zu sich auf auch für "
    "el los las del y en por para con una su como más pero es lo al "
    "il di che per non della dei gli sono nel o os um uma não com do da dos das em mais se".split()
)

# ---------------------------------------------------------------------------------------------------------------------
# Words and language


def tokens(text: str) -> list[str]:
    """The words that `count_words` counts, in order, lower-cased: ideographs one by one, other words whole."""
    return _TOKEN.findall(text.lower())


def count_words(text: str) -> int:
    """Words by the strict measure, for `*_words` fields and every statement about growth.

    An ideograph is one word; so is a run of letters and digits with ' - . , inside ("don't", "3,000.5"). Punctuation of
    either script, Markdown marks and table bars are none.
    """
    return len(_TOKEN.findall(text))


_LONGEN_CJK = re.compile(r"[\u4e00-\u9fff\u3000-\u303f\uff00-\uffef]")


def longen_words(text: str) -> int:
    """Words by the measure that LonGen publishes, for its score only.

    Every character of U+4E00-9FFF, U+3000-303F and U+FF00-FFEF is one, its punctuation included; the rest is split on
    white space, so that a table bar or a dash between blanks is a word too.
    """
    rest, num_cjk = _LONGEN_CJK.subn(" ", text)
    return num_cjk + len(rest.split())


def detect_language(text: str) -> str:
    """Return "en", "zh" or "" (neither): the script and language of more than half of the words."""
    num_cjk = len(_IDEOGRAPH.findall(text))
    latin = _LATIN_WORD.findall(text)
    num_other = len(_OTHER_LETTER.findall(text))
    half = (num_cjk + len(latin) + num_other) / 2
    if num_cjk > half:
        # Japanese can be mostly ideographs, but never goes without kana.
        num_kana = len(re.findall(rf"[{KANA}]", text))
        return "zh" if 10 * num_kana < num_cjk else ""
    if len(latin) > half:
        counts = Counter(word.lower() for word in latin)
        english = sum(counts[word] for word in _ENGLISH)
        foreign = sum(counts[word] for word in _NOT_ENGLISH)
        return "en" if foreign <= max(english, 1) else ""
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Paragraphs and lines

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


def split_paragraphs(text: str) -> tuple[list[str], str]:
    """Return the non-empty paragraphs and the separator that joins them again (method section 3).

    Paragraphs end at blank lines ("\\n\\n"); where that gives two or fewer, and lines give more, lines are paragraphs
    ("\\n"). A text of one line is one paragraph: the caller must be ready for it.
    """
    text = text.replace("\r\n", "\n")
    blocks = [part.strip("\n") for part in _BLANK_LINES.split(text) if part.strip()]
    if len(blocks) > 2:
        return blocks, "\n\n"
    lines = [line for line in text.split("\n") if line.strip()]
    return (lines, "\n") if len(lines) > len(blocks) else (blocks, "\n\n")


def remove_lines(draft: str, keep: float = 0.8, seed: int = 0) -> str:
    """Drop each non-blank line with probability 1 - keep (method section 2, row 3), so that the Extender learns to add.

    What is left has the shape of a draft: surviving lines stay in their paragraph, one blank line stands between
    paragraphs, a paragraph that lost all its lines is gone without a trace. At least one line survives.
    """
    rng = random.Random(seed)
    paragraphs = [block.split("\n") for block in _BLANK_LINES.split(draft.replace("\r\n", "\n"))]
    kept = [[line for line in lines if line.strip() and rng.random() < keep] for lines in paragraphs]
    if not any(kept):
        lines = [line for block in paragraphs for line in block if line.strip()]
        return rng.choice(lines) if lines else ""
    return "\n\n".join("\n".join(lines) for lines in kept if lines)


# ---------------------------------------------------------------------------------------------------------------------
# Loops

NGRAM = {"en": 10, "zh": 13}  # words / tokens of Chinese text, as in the release
MAX_REPEATED_SHARE = 0.02  # of the text; lets a long name occur twice in thousands of words
# One to ten characters, a hundred times on end: loops without words (dashes, "hahaha…") that n-grams cannot see.
_RUN = re.compile(r"(\S.{0,9}?)\1{99}")


def repeats(text: str, language: str) -> tuple[int, float]:
    """Return how often the most frequent n-gram occurs, and the share of the words inside n-grams that occur twice or more.

    An n-gram is 10 words, in Chinese 13 ideographs or words; a text shorter than that gives (0, 0.0).
    """
    words, n = tokens(text), NGRAM[language]
    if len(words) < n:
        return 0, 0.0
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(ngrams)
    covered, end = 0, 0  # `end`: first word not yet counted, so that overlapping n-grams count a word once
    for start, ngram in enumerate(ngrams):
        if counts[ngram] > 1:
            covered += start + n - max(start, end)
            end = start + n
    return max(counts.values()), covered / len(words)


def is_loop(text: str, language: str) -> bool:
    """True when an n-gram occurs three times or more, or a few characters repeat a hundred times on end."""
    return repeats(text, language)[0] >= 3 or _RUN.search(text) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Chatter: what a model says about its answer rather than as its answer. Whole phrases at the start of a sentence only:
# a text may well speak of conversion, of versions or of a paragraph (the release rejects all three).

_WORKS = (
    r"(?:version|rewrite|rewriting|revision|draft|outline|article|essay|story|text|piece|post|guide|report|response|answer|"
    r"expansion|continuation|instruction|query|prompt|example|sample|attempt|content|paper|speech|script|poem|chapter)"
)
_REWORKED = (
    r"(?:rewritten|revised|expanded|extended|enriched|enhanced|improved|updated|polished|refined|detailed|edited|"
    r"modified|longer|final|full|complete|possible|sample)"
)
# Openings that end with their own sentence or colon; the rest of the line may be the answer.
_OPENING = re.compile(
    rf"""(?:
    (?:sure(?:\s+thing)?|certainly|of\s+course|absolutely|okay|ok|alright|great|got\s+it|understood)\s*!
    |(?:sure(?:\s+thing)?|certainly|of\s+course|absolutely|okay|ok|alright|great)[,.:]?\s+(?=here(?:['’]s|\s+(?:is|are))|i\s+can\b|i['’](?:d|ll)\b|let\s+me\b)
    |(?:here(?:['’]s|\s+is|\s+are)|below\s+is|the\s+following\s+is|this\s+is)\s+(?:(?:my|your|the|a|an|one|some)\s+)+
        (?:[\w-]+\s+){{0,3}}?(?:{_REWORKED}\s+(?:[\w-]+\s+){{0,4}}?{_WORKS}|{_WORKS}\s*(?:of\s+(?:the|your)\b[^.:!\n]*|that\s+(?:meets|follows|incorporates|includes)\b[^.:!\n]*|based\s+on\b[^.:!\n]*|for\s+you\b[^.:!\n]*)?:)
    |here(?:['’]s|\s+is)\s+(?:how|what)\s+(?:i|you|it)\b[^.:!\n]*:
    |i(?:['’]m|\s+am)\s+(?:so\s+|very\s+|really\s+|more\s+than\s+)?(?:excited|happy|glad|pleased|thrilled|delighted|here)\s+to\s+(?:share|help|assist|present|provide|offer|write|rewrite|expand|be\s+of)
    |i(?:['’]d|\s+would)\s+(?:be\s+(?:happy|glad|delighted|more\s+than\s+happy)|love)\s+to\s+(?:help|assist|share|provide|write|rewrite|expand)
    |i(?:['’]ve|\s+have)\s+(?:now\s+|also\s+|carefully\s+)?(?:rewritten|revised|expanded|extended|enriched|edited|rephrased|made\s+(?:some|a\s+few|the))\b
    |i(?:['’]ll|\s+will)\s+(?:do\s+my\s+best|now\s+)?(?:rewrite|expand|enrich|extend|revise)\b
    |let\s+me\s+(?:help\s+you|rewrite|expand|enrich|revise|provide)
    |as\s+(?:requested|per\s+your\s+request|you\s+requested|an\s+ai\b|a\s+(?:large\s+)?language\s+model)
    |(?:thank\s+you|thanks)\s+for\s+(?:sharing|providing|your\s+(?:request|input|draft|outline|question|feedback))
    |based\s+on\s+your\s+(?:draft|outline|request|instructions?|prompt|text)
    |your\s+(?:opening|first|introductory|revised|rewritten|draft|outline|original|closing)(?:\s+(?:paragraph|sentence|line|draft|text|version|outline|story|essay|article))*\s+(?:is|has|does|could|can|should|provides|effectively|sets|captures|needs|looks|was)
    |you(?:['’]ve|\s+have)\s+(?:done\s+a|written\s+a|provided\s+a|created\s+a)\s
    |(?:the|this)\s+(?:rewritten|revised|expanded|enriched|extended)\s+(?:version|text|draft|article|essay|story|outline|piece|rewrite)\b
    |in\s+this\s+(?:rewritten|revised|expanded|enriched|extended)\s+(?:version|text|draft|article|essay|story|outline|piece)\b
    |(?:rewritten|revised|expanded|enriched|enhanced|extended|updated)\s+(?:[\w-]+\s+)?(?:{_WORKS})\s*:
    |(?:当然(?:可以)?|好的|没问题|明白了?|收到)\s*[!！。]
    |(?:当然(?:可以)?|好的|没问题)[，,]\s*(?=以下|下面|这是|这里|我(?:来|将|会|可以|很)|请)
    |(?:以下|下面|这)(?:就)?是\s*(?:我|为您|为你|根据|按照|按您|一[篇份个]|对|您|你|经过|改写|扩写|扩展|丰富|润色|修改|完整)[^。！？\n：:]{{0,60}}[：:。]
    |(?:以下|下面)(?:就)?是\s*(?:改写|扩写|扩展|丰富|润色|修改)后?的[^。！？\n：:]{{0,60}}[：:。]
    |(?:根据|按照)(?:您|你)(?:所)?(?:提供)?的?(?:要求|大纲|草稿|提纲|提示|指令|需求)
    |我(?:已经?|将|会|来)(?:为(?:您|你)|根据|按照|对)[^。！？\n]{{0,40}}(?:改写|扩写|扩展|丰富|润色|修改)
    |作为(?:一个|一名|一款)?(?:AI|人工智能|大?语言模型)(?:语言)?(?:助手|模型)?
    |(?:我)?很高兴(?:能)?(?:为您|为你|帮助|协助)
    |感谢(?:您|你)(?:的)?(?:提供|分享|信任|提问)
    |(?:您|你)的(?:开头|开篇|草稿|大纲|提纲|原文|第一段)(?:已经?|很|非常|可以|需要|写得)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_CLOSING = re.compile(
    r"""(?:
    i\s+hope\s+(?:this|that\s+this|these|the\s+(?:above|revised|expanded|rewritten)|you\s+(?:find|found|like|enjoy)|it)\b[^.!?\n]*
    |(?:please\s+)?(?:do\s+)?let\s+me\s+know\s+(?:if|what|how|whether|your|should)\b
    |(?:please\s+)?feel\s+free\s+to\s+(?:ask|let\s+me|reach|adjust|modify|customi[sz]e|edit|expand|adapt|contact\s+me)\b
    |if\s+you(?:['’]d|\s+would|\s+have|\s+need|\s+want|['’]re)\b[^.!?\n]*(?:let\s+me\s+know|feel\s+free|just\s+ask|please\s+ask|i['’]d\s+be|i['’]m\s+here|i\s+can\b)
    |(?:would|do)\s+you\s+(?:like|want|need)\s+me\s+to\b
    |is\s+there\s+anything\s+else\b
    |(?:please\s+)?note\s+that\s+(?:this|the)\s+(?:is\s+a|response|rewrite|rewritten|revised|expanded|enriched|above|outline|version)
    |[(\[（【]?\s*(?:(?:total\s+)?word\s+count|total\s+words)\s*(?:[:：]|is\b|=)
    |[(\[（【]\s*(?:about\s+|approximately\s+|~\s*)?[\d,]+\s+words\s*[)\]）】]\s*$
    |[(\[（【]\s*(?:please\s+)?note\s*[:：]
    |note\s*[:：]\s*(?:i\s|i['’]|this\s+(?:is|response|version|article|essay|story|text|draft|rewrite)|the\s+(?:above|following|text|rewritten|revised|expanded|response)|please)
    |the\s+(?:rewritten|revised|expanded|enriched|extended)\s+(?:version|text|draft|article|essay|story|outline)\b
    |i(?:['’]ve|\s+have)\s+(?:also\s+)?(?:rewritten|revised|expanded|enriched|extended|rephrased)\b
    |希望(?:以上|这篇|这份|这个|这些|本文|上述|我的|能够?|对您|对你|您|你)[^。！？\n]{0,40}(?:帮助|满足|符合|满意|喜欢|有用|启发|参考)
    |如果?(?:您|你)(?:还)?(?:有|需要|想|对|希望)[^。！？\n]{0,40}(?:告诉我|联系我|随时|请(?:让我知道|说明|提出|指出)|我(?:可以|会|很乐意))
    |(?:请)?随时(?:告诉我|联系我|提问|让我知道)
    |[(\[（【]?\s*(?:全文|本文|正文|文章)?(?:总|共|约)?字数\s*(?:统计)?\s*(?:[:：]|约|为|共)
    |[(\[（【]\s*(?:全文|本文|正文)?(?:共|约|大约|共计)+\s*[\d,]+\s*个?字\s*[)\]）】]?
    |[(\[（【]\s*注\s*[:：]
    |注\s*[:：]\s*(?:以上|本文|此文|这|上述|该|为)
    |以上(?:就|便)?是\s*(?:我|为您|为你|根据|对|扩写|改写|丰富|本次)
    |以上内容(?:仅供|是|为|由)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
# In the middle of a text a line that starts so is a second answer or a talk about the first; nothing can be cut there.
_INSIDE = re.compile(
    rf"""(?:
    here(?:['’]s|\s+is)\s+(?:a|an|the|my|your)\s+(?:[\w-]+\s+){{0,2}}?(?:rewritten|revised|expanded|enriched|extended|edited|rephrased)\s+(?:[\w-]+\s+){{0,3}}?{_WORKS}
    |i(?:['’]ve|\s+have)\s+(?:rewritten|expanded|enriched|extended|rephrased)\s+(?:the|your|this)
    |your\s+(?:opening|revised|rewritten)\s+(?:paragraph|draft|text|version|outline)\s+(?:is|has|does|could|provides|sets)
    |i\s+hope\s+this\s+(?:helps|(?:rewritten|revised|expanded|enriched)?\s*(?:version|rewrite|revision|expansion|draft)\b|meets)
    |let\s+me\s+know\s+if\s+(?:you(?:['’]d\s+like|\s+(?:need|want|would\s+like|have))\s+(?:me\s+to|any\s+(?:further|other|more|changes|adjustments)|further)|there\s+is\s+anything)
    |in\s+this\s+(?:rewritten|revised|expanded|enriched)\s+(?:version|text|draft)
    |(?:the|this)\s+(?:rewritten|revised|expanded|enriched)\s+(?:version|text|draft|rewrite)\s+(?:is|has|includes?|provides?|adds?|maintains?|now|expands?|of)
    |(?:以下|下面)是\s*(?:我)?(?:为您|为你)?(?:改写|扩写|扩展|润色|修改|丰富)后?的
    |希望(?:以上|这篇|上述)(?:内容|文章|回答|扩写|改写)?[^。！？\n]{{0,12}}(?:对您有|对你有|能帮助您|能帮助你|满足您|满足你|符合您)
    |(?:您|你)的(?:草稿|大纲|提纲|原文)(?:已经?|很|非常|写得)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_ANYWHERE = re.compile(
    r"\bas\s+an\s+ai(?:\s+language)?\s+(?:model|assistant)\b|\bas\s+a\s+(?:large\s+)?language\s+model,|作为(?:一个|一名)?(?:AI|人工智能)(?:语言)?(?:模型|助手)，我",
    re.IGNORECASE,
)
_MARKS = re.compile(r"^[\s>#*_`\"“”'~-]*")
_RULE = re.compile(r"\s*(?:[-*_=]\s*){3,}")
_SENTENCE = re.compile(r"(?:[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+[”’」』）*_]*)\s*")
_ANNOUNCED = re.compile(rf"(?:[:：]\**(?=\s|$)|：)\s*|{_SENTENCE.pattern}")  # after "Here is the article:" it begins


def _without_opening(line: str) -> str:
    """The line without the chatty sentences it begins with; all of it goes when it also ends in an announcement."""
    rest, found = line, False
    while (marks := _MARKS.match(rest)) and (chat := _OPENING.match(rest, marks.end())):
        if line.rstrip(" *_").endswith((":", "：")):
            return ""
        # A phrase that already ends in "!" or ":" is whole; any other runs to the end of its sentence.
        end = _ANNOUNCED.search(rest, max(chat.end() - 1, marks.end()))
        found, rest = True, rest[end.end() :] if end else ""
    return rest if found else line


def _without_closing(line: str) -> str:
    """The line without the chatty sentences it ends with; a remark in brackets goes from its bracket on."""
    starts = [0] + [match.end() for match in _SENTENCE.finditer(line) if match.end() < len(line)]
    cut = len(line)
    for start in reversed(starts):
        if not _CLOSING.match(line, _MARKS.match(line, start).end() if start == 0 else start):
            break
        cut = start
    return line[:cut].rstrip()


def strip_chatter(text: str, language: str) -> tuple[str, bool]:
    """Strip chatty sentences off the first two and the last three lines; return (text, whether anything was stripped).

    Rules ("---") that then stand at an edge go too. `language` is not needed to find a phrase, both lists apply.
    """
    lines, stripped = text.strip().split("\n"), False
    for _ in range(2):
        rest = _without_opening(lines[0]) if lines else ""
        if not lines or rest == lines[0]:
            break
        lines, stripped = _trim(([rest] if rest.strip() else []) + lines[1:]), True
    for _ in range(3):
        rest = _without_closing(lines[-1]) if lines else ""
        if not lines or rest == lines[-1]:
            break
        lines, stripped = _trim(lines[:-1] + ([rest] if rest.strip() else [])), True
    return "\n".join(lines), stripped


def _trim(lines: list[str]) -> list[str]:
    """Without blank lines and rules at either edge."""
    keep = [i for i, line in enumerate(lines) if line.strip() and not _RULE.fullmatch(line)]
    return lines[keep[0] : keep[-1] + 1] if keep else []


def has_chatter(text: str) -> bool:
    """True when a line inside the text starts like chatter, or a sentence speaks as an AI model."""
    lines = text.split("\n")
    return _ANYWHERE.search(text) is not None or any(_INSIDE.match(line, _MARKS.match(line).end()) for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance (method section 4)

_ENDING = re.compile(r"[.!?…。！？]+[\"'”’»)\]}」』）］】》*_`]*$")
_LIST_ITEM = re.compile(r"\s*(?:[-*+•]|\d{1,3}[.)、]|[(（]?\d{1,3}[)）]|[一二三四五六七八九十]+、)\s*\S")
_LIST_MARK = re.compile(r"\s*(?:[-*+•]|\d{1,3}[.)、]|\**\d{1,3}\.\**)\s*")
_TABLE_ROW = re.compile(r"\s*\|.*\|\s*")


def is_complete(text: str) -> bool:
    """True when a text ends as texts end: with . ! ? … 。！？ and closing marks, or with a list item or a table row."""
    last = text.rstrip().rsplit("\n", 1)[-1]
    if _LIST_MARK.fullmatch(last):  # "3." alone is a list cut short
        return False
    if _ENDING.search(last) or _TABLE_ROW.fullmatch(last):
        return True
    return _LIST_ITEM.match(last) is not None and last.rstrip("*_`\"'”’ ")[-1:] not in set(",;:-–—(，；：、（")


def clean_answer(text: str, finish: str, language: str) -> tuple[str, str]:
    """Strip chatter off a model's answer and judge it as a draft, an extension or a target.

    Returns:
        (the text without chatty first and last lines, reason). "" = accepted; else the first of "unfinished" (`finish`
        is not "eos"), "empty", "ending", "repetition" (an n-gram three times, or repeated ones over 2 % of the text),
        "language" and "chatter" that applies.
    """
    if finish != "eos":
        return text.strip(), "unfinished"
    if not tokens(text):
        return text.strip(), "empty"
    cleaned, stripped = strip_chatter(text, language)
    if not tokens(cleaned):
        return cleaned, "chatter"
    if not is_complete(cleaned):
        return cleaned, "ending"
    if is_loop(cleaned, language) or repeats(cleaned, language)[1] > MAX_REPEATED_SHARE:
        return cleaned, "repetition"
    # Halves as well, so that a text which drifts into the other language midway is not outvoted by its start.
    middle = len(cleaned) // 2
    halves = {detect_language(cleaned[:middle]), detect_language(cleaned[middle:])} if count_words(cleaned) > 60 else set()
    if detect_language(cleaned) != language or {"en": "zh", "zh": "en"}[language] in halves:
        return cleaned, "language"
    # What is left must stand alone: nothing that goes on from the sentence cut off.
    if has_chatter(cleaned) or (stripped and re.match(r"[a-z,;:)]", cleaned)):
        return cleaned, "chatter"
    return cleaned, ""


# ---------------------------------------------------------------------------------------------------------------------
# Selection over a whole file: pure functions of their arguments, so that a resumed run decides the same


def length_bias(words: list[int], keys: list[str], seed: int) -> set[int]:
    """Return the indices to drop so that the longer answers are learnt from (method section 2, rows 1b and 2b).

    With r the rank from the longest (near 0) to the shortest (near 1), an answer goes with probability min(1, 2 r^3):
    the shortest 20.6 % always, 40.5 % on average. r is the middle of the places that answers of equal length share,
    over their number: so equal lengths are treated alike, and few answers are thinned by the same share as many.

    Args:
        words: strict word counts, comparable between languages as characters are not.
        keys: the records' ids; the draw depends on (seed, key) only, not on order.
    """
    assert len(words) == len(keys), (len(words), len(keys))
    counts = Counter(words)
    rank, longer = {}, 0
    for length in sorted(counts, reverse=True):
        rank[length] = (longer + counts[length] / 2) / len(words)
        longer += counts[length]
    return {i for i, (length, key) in enumerate(zip(words, keys, strict=True)) if _uniform(seed, key) < 2 * rank[length] ** 3}


def _uniform(seed: int, key: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


_PRIME = (1 << 61) - 1
NUM_BANDS, BAND_ROWS = 48, 4  # a pair of Jaccard 0.6 shares no band with probability (1 - 0.6^4)^48 = 0.13 %


class NearDuplicates:
    """Texts seen so far; `add` tells whether the next one is new.

    A near-duplicate has the same words as an earlier text, or at least 0.6 Jaccard similarity of 5-shingles (of words,
    in Chinese of characters). MinHash bands find the candidates in time linear in the number of texts, and an exact
    comparison decides. Refused texts are not remembered.
    """

    def __init__(self, threshold: float = 0.6, shingle: int = 5) -> None:
        self.threshold, self.shingle = threshold, shingle
        self.seen: list[set[int]] = []
        self.buckets: dict[tuple, list[int]] = {}
        rng = random.Random(0)
        self.hashes = [(rng.randrange(1, _PRIME), rng.randrange(_PRIME)) for _ in range(NUM_BANDS * BAND_ROWS)]

    def add(self, text: str, language: str) -> bool:
        """Remember the text and return True, or return False when it is a near-duplicate of a remembered one."""
        words = tokens(unicodedata.normalize("NFKC", text))
        num_shingles = max(len(words) - self.shingle + 1, 1)
        shingles = {_hash(words[i : i + self.shingle]) for i in range(num_shingles)}
        signature = [min((a * value + b) % _PRIME for value in shingles) for a, b in self.hashes]
        bands = [(i, *signature[i : i + BAND_ROWS]) for i in range(0, len(signature), BAND_ROWS)]
        candidates = {index for band in bands for index in self.buckets.get(band, ())}
        if any(self._similar(shingles, self.seen[index]) for index in candidates):
            return False
        for band in bands:
            self.buckets.setdefault(band, []).append(len(self.seen))
        self.seen.append(shingles)
        return True

    def _similar(self, a: set[int], b: set[int]) -> bool:
        common = len(a & b)
        return common >= self.threshold * (len(a) + len(b) - common)


def _hash(words: list[str]) -> int:
    """Stable between processes, unlike hash()."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=7).digest(), "big")
