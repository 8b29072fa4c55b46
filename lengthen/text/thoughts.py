"""What a reasoning model writes before its answer: a thought, between <think> and </think> or their like.

A thought is no part of the answer, wherever a text comes from: the sampler, a server, or a user's own records. Only one
in front of the answer is looked for: a text about such tags may hold them.
"""

import re

from lengthen.text.words import count_words

# The opening of a thought: what closes it. Other tags with such a name close as they open: </thought>, [/THINK].
IRREGULAR = {
    "<|begin_of_thought|>": "<|end_of_thought|>",  # OpenThinker
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
    "<|inner_prefix|>": "<|inner_suffix|>",  # Apertus
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<|channel|>analysis<|message|>": "<|start|>assistant<|channel|>final<|message|>",  # gpt-oss
    "<unused94>thought": "<unused95>",  # MedGemma
}
_NAME = r"(?!end)(?:[\w-]+[:_])?(?:think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad)"
_OPENS = re.compile(
    "|".join([*map(re.escape, IRREGULAR), rf"[<◁]\|?{_NAME}\|?[>▷]|\[\|?think(?:ing)?\|?\]"]), re.IGNORECASE
)
_BEGINS = re.compile(rf"\s*({_OPENS.pattern})", re.IGNORECASE)
# The end alone in its line, where the beginning stood in the prompt: text of a server, or of a data set made with one.
_END_ALONE = re.compile(r"(?:\A|\n)[ \t]*</(?:think|thought)>[ \t]*(?:\n|\Z)")
_WRAPPED = re.compile(  # Hunyuan, OpenThinker: the answer after a thought has marks of its own
    r"<answer>\s*(.*?)\s*(?:</answer>)?|<\|begin_of_solution\|>\s*(.*?)\s*(?:<\|end_of_solution\|>)?", re.DOTALL
)


def is_opening(token: str) -> bool:
    """Whether a token begins a thought, alone or with those after it."""
    return _OPENS.fullmatch(token) is not None or any(opening.startswith(token) for opening in IRREGULAR)


def closing_of(opening: str) -> str:
    """What ends the thought that `opening` begins, "" = not known."""
    if opening in IRREGULAR:
        return IRREGULAR[opening]
    regular = re.fullmatch(r"([<\[◁])([^|]+)([>\]▷])", opening)
    return f"{regular[1]}/{regular[2]}{regular[3]}" if regular else ""


def open_thought(prompt: str) -> str:
    """The opening of a thought that a prompt has begun and not ended, "" = none."""
    openings = [*_OPENS.finditer(prompt)]
    if not openings:
        return ""
    closing = closing_of(openings[-1][0])
    return "" if closing and closing in prompt[openings[-1].end() :] else openings[-1][0]


def without_thought(text: str) -> tuple[str, bool]:
    """(the text without the thoughts in front of it, whether the last of them has an end)."""
    rest = text
    while begins := _BEGINS.match(rest):
        _, closing, after = rest[begins.end() :].partition(closing_of(begins[1]) or "\0")
        if not closing:
            return "", False
        rest = after
    if rest == text:
        # Only where no thought began before it: else the end belongs to a text about thoughts.
        end = _END_ALONE.search(text)
        if end is None or _OPENS.search(text, 0, end.start()):
            return text, True
        rest = text[end.end() :]
    rest = rest.lstrip()
    wrapped = _WRAPPED.fullmatch(rest.rstrip())
    return (wrapped[1] or wrapped[2] or "" if wrapped else rest), True


def strip_thoughts(record: dict) -> bool:
    """Take the thoughts out of a record's `initial` and `response`; False = one is a thought and no answer.

    Such a record's `finish` becomes "length": it was cut short.
    """
    whole = True
    for field in ("initial", "response"):
        before = record.get(field)
        if not isinstance(before, str):  # absent, or a column of somebody else's with that name
            continue
        text, ended = without_thought(before)
        if text == before:
            continue
        if not (ended and text):
            whole, record["finish"] = False, "length"
        else:
            record[field] = text
            if f"{field}_words" in record:
                record[f"{field}_words"] = count_words(text)
    return whole
