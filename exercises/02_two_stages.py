"""Exercise 2, 60 minutes: a text longer than the model can write.

A model has a habit: it writes about as much per call as the answers it was trained on. `Writer` below is that and
nothing else: it spreads HABIT words evenly over the paragraphs that it still has to write. Asked to enrich a draft of
HABIT words it gives HABIT words back. Two calls get around it:

    stage 1   enrich the first half of the draft alone; keep the first two thirds of the paragraphs that come back
              (the last third goes, because an ending may be in it)
    stage 2   enrich the whole draft, with the answer prefilled by what stage 1 left; the text is prefix + continuation

1. On paper: a draft of 4 paragraphs and HABIT words. How many words after one call, how many after two stages?
2. Write `first_share` for texts whose paragraphs are divided by one blank line. Round down, but take at least one
   paragraph, so that neither half nor prefix is empty. What it returns does not end with a blank line.
3. Write `extend`. The text is prefix + continuation, with nothing put between them, and a continuation never begins
   with a blank line. So what must the second call be given as its prefix?

Leads to: `Extension` in extend.py. It does the same for real, with filters, retries, rounds and a journal.

    python -m pytest -q exercises/02_two_stages.py
"""

import random
from types import SimpleNamespace
from typing import Any

import extend as project
from lengthen.records import new_record
from lengthen.text.words import count_words

HABIT = 240  # words in a call
WORDS = """the of and to is that it was for with are this by from not have river garden winter morning window letter
market bridge school teacher mountain harbour story village summer evening kitchen journey forest paper music silence
harvest lantern stone water light shadow colour number question answer reason method table example pattern shape season
weather coast island valley meadow orchard street corner station engine wheel clock mirror memory custom craft trade
price value council record history grammar sentence rhythm old new small bright quiet early""".split()


def prose(words: int, key: str) -> str:
    """A paragraph of exactly so many words, always the same for a key. Given."""
    rng, sentences, left = random.Random(f"{words} {key}"), [], words
    while left:
        length = left if left < 18 else 9  # words of the sentence
        sentences.append(" ".join(rng.choices(WORDS, k=length)).capitalize() + ".")
        left -= length
    return " ".join(sentences)


class Writer:
    """The model. Given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []  # (draft, prefix) of each

    def __call__(self, draft: str, prefix: str = "") -> str:
        """What it writes after the prefix when it is asked to enrich the draft."""
        self.calls.append((draft, prefix))
        written = len(prefix.split("\n\n")) if prefix.strip() else 0
        if prefix.endswith("\n\n"):
            written -= 1
        todo = draft.split("\n\n")[written:]
        return "\n\n".join(prose(HABIT // len(todo), paragraph) for paragraph in todo)


def first_share(text: str, share: tuple[int, int]) -> str:
    """The first share[0] / share[1] of the paragraphs of a text."""
    raise NotImplementedError


def extend(draft: str, write: Writer) -> str:
    """The draft after one round of two-stage extension; `write` is called twice."""
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------


def draft_of(paragraphs: int) -> str:
    return "\n\n".join(prose(HABIT // paragraphs, str(i)) for i in range(paragraphs))


def test_the_shares_are_those_of_the_project():
    for paragraphs in (2, 3, 4, 5, 8, 12):
        for share in ((1, 2), project.KEPT):
            assert first_share(draft_of(paragraphs), share) == project.first_share(draft_of(paragraphs), share)[0]
    assert first_share("Only one paragraph.", (1, 2)) == "Only one paragraph."


def test_two_stages_write_more_than_one_call():
    draft = draft_of(4)
    extended = extend(draft, Writer())
    assert count_words(Writer()(draft)) == count_words(draft) == HABIT
    assert count_words(extended) == HABIT // 2 + HABIT  # half of what stage 1 wrote, and a whole habit after it
    assert len(extended.split("\n\n")) == 4


def test_the_calls_and_the_text_are_those_of_the_project():
    """`Extension` itself, with the same writer in place of a model."""
    for paragraphs in (4, 6, 8):
        draft, ours, theirs = draft_of(paragraphs), Writer(), Writer()
        text = extend(draft, ours)
        fields = {"id": "x", "language": "en", "prompt": "Write.", "initial": draft, "initial_words": HABIT}
        task = project.Extension(new_record("extended", **fields), project.ExtendFlags(rounds=1, max_attempts=1))
        engine: Any = SimpleNamespace(chat=SimpleNamespace(encode_answer=str.split))
        while not task.over:
            reply: Any = SimpleNamespace(text=theirs(task.draft(), task.prefix), finish="eos", num_tokens=0)
            task.apply(task.examine(task.draw(), reply, engine))
        assert task.outcome()[1] == "", "the project rejects it"
        assert ours.calls == theirs.calls
        assert text == task.text
