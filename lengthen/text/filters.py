"""Which answers are accepted: complete, no loop, in the record's language, no chatter (method section 4).

Each function is linear in the length of its text. `language` is "en" or "zh" throughout.
"""

import re
from collections import Counter

from lengthen.text.words import detect_language, tokens

# ---------------------------------------------------------------------------------------------------------------------
# Loops

NGRAM = {"en": 10, "zh": 13}  # words / tokens of Chinese text, as in the release
LOOP_COUNT = 3  # occurrences of one n-gram
MAX_REPEATED_SHARE = 0.02  # of the text; lets a long name occur twice in thousands of words
# One to four characters, a hundred times on end: loops without words (dashes, "hahaha…") that n-grams cannot see.
_RUN = re.compile(r"(\S.{0,3}?)\1{99}")


def repeats(text: str, language: str) -> tuple[int, float]:
    """Return how often the most frequent n-gram occurs, and the share of the words that repeated n-grams cover.

    An n-gram is 10 words, in Chinese 13 ideographs or words, and repeated when it occurs twice or more; every
    occurrence counts. A text shorter than an n-gram gives (0, 0.0).
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
    return repeats(text, language)[0] >= LOOP_COUNT or _RUN.search(text) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Chatter: what a model says about its answer, not in it. Whole phrases, and only at the start of a sentence: a text may
# well speak of conversion, of versions or of a paragraph (the release rejects all three).
#
# One phrase a line, a regular expression but for these: a space is any white space, "is", "am", "have" … also match
# their short forms, "…" is the rest of a clause, "~" up to four words, WORK and REWORKED are the words below.

_WORK = (
    "version|rewrite|revision|draft|outline|article|essay|story|text|piece|post|guide|report|response|answer|"
    "expansion|continuation|instruction|query|prompt|content|paper|speech|script|poem|chapter"
)
_REWORKED = "rewritten|revised|expanded|extended|enriched|enhanced|improved|updated|polished|refined|edited|rephrased"
_OPENINGS = r"""
(sure|sure thing|certainly|of course|absolutely|okay|ok|alright|great|awesome|got it|understood)!
(sure|sure thing|certainly|of course|absolutely|okay|ok|alright|great)[,.:]? (here is|here are|i can|i would|let me)
(here is|here are|below is|the following is) ~(REWORKED) ~(WORK)
(here is|here are|below is|the following is) …(WORK)…:
here is (how|what) (i|you) …:
i am ~(excited|happy|glad|pleased|thrilled|delighted) to (share|help|assist|present|provide|offer|write)
i am here to (help|assist)
i would (be (happy|glad|delighted)|love) to (help|assist|share|provide|write|rewrite|expand)
i am ~(glad|happy) (that )?you (enjoyed|liked|found)
i will be (happy|glad|ready) (to|with) (help|assist|share|a|the|your)
(please )?share (the|your) (outline|draft|instructions?) with me
i have (now |also |carefully )?(REWORKED) (the|your|this) ~(WORK)
i have made (some|a few) ~(changes|edits|revisions|improvements)
i will (rewrite|expand|enrich|extend|revise)
let me (rewrite|expand|enrich|revise|help you|provide you)
as (requested|per your request|you requested|an ai|a language model|a large language model)
(thank you|thanks) for (sharing|providing|your (request|input|draft|outline|question|feedback))
based on your (draft|outline|request|instructions?|prompt|text)
your (opening|first|closing|original|introductory|REWORKED) (paragraph|sentence|line|WORK) (is|has|does|could|sets)
your (draft|outline) (is|has|does|could|provides|sets|needs|looks|was)
you have (done|written|provided|created) (a|an)
(in )?(the|this) (rewritten|revised|expanded|enriched|extended) (version|text|draft|outline|article|essay|story|piece)
(REWORKED) ~(WORK):
(当然|当然可以|好的|没问题|明白了?|收到)[!！。]
(当然|当然可以|好的|没问题)[，,](以下|下面|这是|这里|我来|我将|我会|我可以|我很|请)
(以下|下面)就?是(我|为您|为你|根据|按照|一[篇份个]|对|您|你|经过|完整|改写|扩写|扩展|丰富|润色|修改)…[：:。]
这就?是我?(为您|为你|根据|按照)…[：:。]
(根据|按照)[您你]所?(提供)?的?(要求|大纲|草稿|提纲|提示|指令|需求)
我(已经?|将|会|来)(为[您你]|根据|按照|对)…(改写|扩写|扩展|丰富|润色|修改)
作为(一个|一名|一款)?(AI|人工智能|大?语言)(语言)?(模型|助手)
我?很高兴能?(为[您你]|帮助|协助)
感谢[您你]的?(提供|分享|信任|提问)
[您你]的(开头|开篇|草稿|大纲|提纲|原文|第一段)(已经?|很|非常|可以|需要|写得)
"""
_CLOSINGS = r"""
i hope (this|these|that this|it|the above) …(helps?|helped|helpful|meets?|useful|expectations|requirements|looking for)
i hope (this|the|these) ~(REWORKED|WORK) (is|was|are|has|helps|meets|provides|gives|captures)
i hope (that )?you (find|found|like|liked|enjoy|enjoyed) (this|these|the|it)
(please )?(do )?let me know (if|what|how|whether|your|should)
(please )?feel free to (ask|let me|reach|adjust|modify|customi[sz]e|edit|expand|adapt|contact me)
if you (would|have|need|want|are) …(let me know|feel free|just ask|please ask|i would be|i am here|i can (help|also))
(would|do) you (like|want|need) me to
how does (this|that|it) (sound|look)
i would love to (hear|know) (your|what you)
what do you (think|want)\?
do you think (this|the) (topic|story|WORK) could be
you can (continue|expand|extend) (the|this) (story|WORK) or (add|change|include)
is there anything else (you|i)
(please )?note that (this is a|(this|the) (response|above|REWORKED|WORK))
[(（[【]?\s*(total )?words?( count)?( is| =|\s*[:：])\W*(about |approximately )?[\d,]+
[(（[【]\s*(about |approximately |~\s*)?[\d,]+ words\s*[)）\]】]
[(（[【]\s*(please )?note\s*[:：]
note\s*[:：] (i|this (is|WORK)|the (above|following|text|REWORKED|WORK)|please)
(the|this) (rewritten|revised|expanded|enriched|extended) (version|text|draft|outline|article|essay|story|piece)
i have (now |also |carefully )?(REWORKED) (the|your|this) ~(WORK)
希望(以上|这[篇份个些]|本文|上述|我的|能够?|对[您你]|[您你])…(帮助|满足|符合|满意|喜欢|有用|启发|参考)
如果?[您你]还?(有|需要|想|对|希望)…(告诉我|联系我|随时|请(让我知道|说明|提出|指出)|我(可以|会|很乐意))
请?随时(告诉我|联系我|提问|让我知道)
[(（[【]?\s*(全文|本文|正文|文章)?[总共约]?字数\s*(统计)?\s*(:|：|约|为|共)
[(（[【]\s*(全文|本文|正文)?[共约大计]+\s*[\d,]+\s*个?字\s*[)）\]】]
[(（[【]\s*注\s*[:：]
注\s*[:：]\s*(以上|本文|此文|这|上述|该|为)
以上[就便]?是(我|为[您你]|根据|对|扩写|改写|丰富|本次)
以上内容(仅供|是|为|由)
"""
# In the middle of a text a line that starts so begins a second answer, or talk about the first: there is no cutting it.
_INSIDE = r"""
here is (a|an|the|my|your) ~(rewritten|revised|expanded|enriched|extended|rephrased) ~(WORK)
i have (rewritten|expanded|enriched|extended|rephrased) (the|your|this) ~(WORK)
your (opening|REWORKED) (paragraph|sentence|line|WORK) (is|has|does|could|provides|sets)
i hope this (helps|meets|(REWORKED|version|rewrite|revision|expansion|draft))
let me know if (you would like|you (need|want|have) (me to|any|further)|there is anything)
in this (rewritten|revised|expanded|enriched|extended) (version|text|draft)
(the|this) (rewritten|revised|expanded|enriched) (version|text|draft|rewrite) (is|has|includes?|provides?|adds?|now|of)
(以下|下面)是我?(为[您你])?(改写|扩写|扩展|润色|修改|丰富)后?的
希望(以上|这篇|上述)…(对[您你]有|能帮助[您你]|满足[您你]|符合[您你])
[您你]的(草稿|大纲|提纲|原文)(已经?|很|非常|写得)
"""
_SELF = (
    r"\bas an ai (?:language )?(?:model|assistant)\b|\bas a (?:large )?language model,"
    r"|作为一[个名](?:AI|人工智能)(?:语言)?(?:模型|助手)"
)
_SHORT = {" is": "'s", " are": "'re", " am": "'m", " have": "'ve", " will": "'ll", " would": "'d"}


def _compile(phrases: str) -> re.Pattern:
    pattern = "|".join(line for line in phrases.split("\n") if line)
    pattern = pattern.replace("REWORKED", _REWORKED).replace("WORK", _WORK)
    pattern = pattern.replace("~", r"(?:[\w'-]+\s+){0,4}?").replace("…", r"[^.!?。！？:：\n]{0,200}?")
    for long, short in _SHORT.items():
        pattern = re.sub(rf"{long}\b", rf"(?: {long.strip()}|{short})", pattern)
    return re.compile(rf"(?:{pattern.replace(' ', chr(92) + 's+')})(?![a-z])", re.IGNORECASE)


_OPENING, _CLOSING, _MIDDLE = map(_compile, (_OPENINGS, _CLOSINGS, _INSIDE))
_SPEAKS_OF_ITSELF = re.compile(_SELF, re.IGNORECASE)
# What may stand before a sentence; no quotes: what a character says is not what the model says.
_MARKS = re.compile(r"[\s>#*_~-]*")
_RULE = re.compile(r"\s*(?:[-*_=]\s*){3,}")
# The look-behind keeps a long row of dots linear: only its first one is tried.
_SENTENCE = re.compile(r"(?:(?<![.!?…])[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+[”’」』）*_]*)\s*")
_ANNOUNCED = re.compile(rf"(?:[:：]\**(?=\s|$)|：)\s*|{_SENTENCE.pattern}")  # after "Here is the article:" it begins


def _starts(phrases: re.Pattern, line: str, position: int = 0) -> re.Match | None:
    marks = _MARKS.match(line, position)
    return phrases.match(line.replace("’", "'"), marks.end() if marks else position)


def _without_opening(line: str) -> str:
    """The line without the chatty sentences it begins with; all of it goes when it also ends in an announcement."""
    rest = line
    while chat := _starts(_OPENING, rest):
        if line.rstrip(" *_").endswith((":", "：")):
            return ""
        # A phrase that ends in "!" or ":" is whole; any other runs to the end of its sentence.
        end = _ANNOUNCED.search(rest, chat.end() - 1)
        rest = rest[end.end() :] if end else ""
    return rest


def _without_closing(line: str) -> str:
    """The line without the chatty sentences it ends with; a remark in brackets goes from its bracket on."""
    starts = [0] + [match.end() for match in _SENTENCE.finditer(line) if match.end() < len(line)]
    while starts and _starts(_CLOSING, line, starts[-1]):
        line = line[: starts.pop()]
    return line.rstrip()


def strip_chatter(text: str, language: str) -> tuple[str, bool]:
    """Strip chatty sentences off the first two and the last three lines; return (text, whether any was stripped).

    Rules ("---") at the edges go too. Models answer Chinese requests with English remarks and the other
    way round, so the phrases of both languages apply, whatever `language` is.
    """
    original = text.strip().replace("\r\n", "\n")
    lines = _trim(original.split("\n"))
    for _ in range(2):
        if lines and (rest := _without_opening(lines[0])) != lines[0]:
            lines = _trim([rest, *lines[1:]])
    for _ in range(3):
        if lines and (rest := _without_closing(lines[-1])) != lines[-1].rstrip():
            lines = _trim([*lines[:-1], rest])
    stripped = "\n".join(lines)
    return stripped, stripped != original


def _trim(lines: list[str]) -> list[str]:
    """Without blank lines and rules at either edge."""
    keep = [i for i, line in enumerate(lines) if line.strip() and not _RULE.fullmatch(line)]
    return lines[keep[0] : keep[-1] + 1] if keep else []


def has_chatter(text: str) -> bool:
    """True when a line starts with talk about the answer, or a sentence speaks as an AI model."""
    return _SPEAKS_OF_ITSELF.search(text) is not None or any(_starts(_MIDDLE, line) for line in text.split("\n"))


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance (method section 4)

_ENDS = tuple(".!?…。！？")
_CLOSERS = "\"'”’»)]}」』）］】》*_` "  # quotes, brackets and Markdown's marks may follow the end of a sentence
_GOES_ON = tuple(",;:-–—，；：、")
_LIST_ITEM = re.compile(r"\s*(?:[-+•]|\*(?=\s)|\d{1,3}[.)、．]|[(（]?\d{1,3}[)）]|[一二三四五六七八九十]+、)\s*\S")
# Alone in the last line: a list or a text that was cut before its next part.
_LIST_MARK = re.compile(
    r"\s*(?:[-*+•]|\d{1,3}[.)、．]|\**(?:\d{1,3}|[A-Z]|[IVX]+)\.\**|[(（].{1,3}[)）]|[一二三四五六七八九十]+、)\s*"
)
_HEADING = re.compile(r"\s{0,3}#{1,6}\s")
_NAME_OF_PART = re.compile(r"(?:\s*[-*+•]|\s*\d{1,3}[.)、．])\s*\*\*[^*]+\*\*")  # "3. **Cost**", where others go on
_TABLE_ROW = re.compile(r"\s*\|.*\|\s*")
_NEXT_NUMBER = re.compile(r"[.!?:] \d{1,3}\.$")  # a list in one line: "… a chair. 22."
_FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)
_ABBREVIATION = re.compile(r"(?:\b(?:mr|mrs|ms|dr|prof|e\.g|i\.e|vs|cf|fig|approx|incl))\.$", re.IGNORECASE)
# No sentence ends in these: a line that does was cut.
_JOINING = re.compile(
    r"(?:.*[\W_])?(?:and|or|but|nor|the|a|an|of|to|for|at|with|from|as|that|which|because|if|than|into|their|its|our|my"
    r"|your|whose|such|every|between)|.*(?:[的和与及或在把被对从而但是以为向于将就也都还]|因为|所以|例如|比如)",
    re.IGNORECASE,
)
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_ZH_NUMBER = r"[\d〇零○一二三四五六七八九十]"
# Whole last lines that end a text without a full stop.
_LAST_LINE = re.compile(
    r"[\W_]*(?:(?:the )?end|fin|finis|to be continued|end of [\w ]{1,40}|amen|q\.?e\.?d"
    r"|(?:全文|本文|故事|本章|全书|全剧)?(?:完|终|完结|结束|待续|剧终)|未完待续|全剧终|此致敬礼|敬礼|祝好|阿门)[\W_]*"
    rf"|\W*(?:date: *)?(?:\w+day, *)?(?:{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}|\d{{1,2}} {_MONTH},? \d{{4}})\W*"
    rf"|\W*(?:日期[:：] *)?(?:{_ZH_NUMBER}{{2,4}}年)?{_ZH_NUMBER}{{1,3}}月{_ZH_NUMBER}{{1,3}}[日号]\W*"
    r"|\W*(?:date: *|日期[:：] *)?\d{4}[-/.]\d{1,2}[-/.]\d{1,2}\W*"
    r"|[^。！？]{1,20}(?:敬上|谨上|敬启|谨启|敬呈|亲笔|手书)"
    r"|(?:written by|author:|signed,?|作者[:：]|署名[:：]) *\S.{1,50}|[—–]{1,2} *(?-i:[A-Z\u4e00-\u9fff]).{1,50}"
    r"|(?:[^\w#]*#\w+)+\W*",  # hashtags
    re.IGNORECASE,
)
# What stands last in its line and ends a text: a link or an address, a closing tag, the end of a formula, an emoticon,
# an emoji (with what may follow it), a printer's end mark.
_LAST_MARK = re.compile(
    r"(?:(?:https?://|www\.)[\w-]+\.[\w.-]+\S*|\]\([^\s)]+\)|[\w.+-]+@[\w-]+(?:\.[\w-]+)+|</\w+>|-->|\$\$|\\\]"
    r"|\\end\{\w+\*?\}|(?<!\S)[:;]-?[)D]|[\u4e00-\u9fff][~～]|[∎■□◆\u2600-\u27bf\u2b50\U0001f000-\U0001faff][\ufe0f\u200d♀♂]*)\s*"
)
_FAREWELL = re.compile(
    r"\W*(?:yours|sincerely|best(?=\W*$| *,| regards| wishes)"
    r"|(?:kind|warm|with|much|many)(?:est)? ?(?:regards|love|thanks|gratitude|wishes)|regards"
    r"|warmly|with (?:love|all|deep|sincere|heartfelt|warm|great|kind|best|much|hope)|love|respectfully|faithfully"
    r"|cordially|thank you|thanks|cheers|signed|your (?:\w+ )?(?:friend|son|daughter|colleague|neighbou?r|brother"
    r"|sister|mother|father|servant)|affectionately|all the best|take care|until|in (?:solidarity|gratitude)|xoxo"
    r"|forever|ever yours|此致|敬礼|祝|谢谢|顺祝|顺颂|谨启|您的|你的|爱你|签名|落款|致礼)",
    re.IGNORECASE,
)
SIGNATURE_LINES, VERSE_LINES = 7, 4  # at most under a farewell; at least of a poem


def is_complete(text: str) -> bool:
    """True when a text ends as texts end.

    With . ! ? … 。！？ and closing marks; a list item or a table row; a closed code block, formula or tag; a link, an
    emoji; a signature or a date, words like THE END, a hashtag; or as verse.
    """
    lines = text.strip().split("\n")
    last = lines[-1].rstrip()
    bare = last.rstrip(_CLOSERS)
    if len(_FENCE.findall(text)) % 2 or text.count("$$") % 2:  # a block that was never closed
        return False
    if _LAST_LINE.fullmatch(last) and not _JOINING.fullmatch(bare):
        return True
    if (
        _HEADING.match(last)
        or _LIST_MARK.fullmatch(last)
        or _ABBREVIATION.search(bare[-8:])
        or _NEXT_NUMBER.search(bare[-6:])
    ):
        return False
    if bare.endswith(_ENDS) or _TABLE_ROW.fullmatch(last) or _FENCE.match(last) or _ends_in_mark(last):
        return True
    if not bare or bare.endswith(_GOES_ON) or _JOINING.fullmatch(bare):
        return False
    if _LIST_ITEM.match(last):
        named = [line for line in lines[:-1] if _NAME_OF_PART.match(line)]
        return not (_NAME_OF_PART.fullmatch(last) and any(not _NAME_OF_PART.fullmatch(line.rstrip()) for line in named))
    filled = [line.strip() for line in lines if line.strip()]
    return _is_signed(filled) or _is_verse(filled)


def _ends_in_mark(line: str) -> bool:
    tail = line[-400:]  # of a long line only its end: each start of a match is tried
    return any(match.end() == len(tail) for match in _LAST_MARK.finditer(tail))


def _is_signed(lines: list[str]) -> bool:
    """A farewell ("Best regards,"), and below it, or after it, a name and what goes with a name: short lines."""
    for i in range(len(lines) - 1, max(-1, len(lines) - 2 - SIGNATURE_LINES), -1):
        # Names begin with a capital, "[Your name]" with its bracket.
        if len(lines[i]) > 60 or not re.match(r"[^a-z]", lines[i]) or lines[i].count("[") > lines[i].count("]"):
            return False
        if _FAREWELL.match(lines[i]):
            return i < len(lines) - 1 or re.search(r"[,，:：] *[A-Z\u4e00-\u9fff\[]", lines[i]) is not None
    return False


def _is_verse(lines: list[str]) -> bool:
    """Short lines to the end that begin with capitals (or ideographs) and mostly end in no full stop."""
    verse = lines[-4 * VERSE_LINES :]
    while verse and (len(verse[0]) > 70 or len(tokens(verse[0])) > 14):
        verse = verse[1:]
    sizes = [len(tokens(line)) for line in verse]
    if len(verse) < VERSE_LINES or max(sizes) > 14 or min(sizes) < 1 or max(map(len, verse)) > 70:
        return False
    if any(_HEADING.match(line) or _LIST_ITEM.match(line) or re.search("[:：](?:\\s|$)", line) for line in verse[1:]):
        return False
    capitals = sum(re.match(r"[\W_]*[^\Wa-z_]", line) is not None for line in verse)
    stops = sum(line.rstrip(_CLOSERS).endswith(_ENDS) for line in verse)
    middle = sorted(sizes)[len(sizes) // 2]
    return 4 * capitals >= 3 * len(verse) and 2 * stops <= len(verse) and 2 * sizes[-1] >= middle >= 3


def finish_reason(finish: str, ends: tuple[str, ...] = ("eos",)) -> str:
    """Why a text that finished like this is of no use; "" = it ended as it should, by one of `ends`.

    "error" and "repetition" say more than "unfinished", which stands for all others ("length", an unwanted "stop").
    """
    if finish in ends:
        return ""
    return finish if finish in ("error", "repetition") else "unfinished"


def clean_answer(text: str, finish: str, language: str) -> tuple[str, str]:
    """Strip chatter off a model's answer and judge it as a draft, an extension or a target.

    Returns:
        (the text without chatty first and last lines, reason). "" = accepted; else that of `finish_reason`, or the
        first of "empty", "ending", "repetition" (an n-gram three times, or repeated ones over 2 % of the text),
        "language" and "chatter" that applies.
    """
    if reason := finish_reason(finish):
        return text.strip(), reason
    if not tokens(text):
        return text.strip(), "empty"
    cleaned, stripped = strip_chatter(text, language)
    if not tokens(cleaned):
        return cleaned, "chatter"
    if not is_complete(cleaned):
        return cleaned, "ending"
    most, share = repeats(cleaned, language)
    if most >= LOOP_COUNT or share > MAX_REPEATED_SHARE or _RUN.search(cleaned):
        return cleaned, "repetition"
    # Halves as well, so that a text which drifts into the other language midway is not outvoted by its start.
    middle, other = len(cleaned) // 2, {"en": "zh", "zh": "en"}[language]
    if detect_language(cleaned) != language or other in map(detect_language, (cleaned[:middle], cleaned[middle:])):
        return cleaned, "language"
    # What is left must stand alone: nothing that goes on from the sentence cut off.
    if has_chatter(cleaned) or (stripped and re.match(r"[a-z,;:)]", cleaned)):
        return cleaned, "chatter"
    return cleaned, ""
