"""Where a text ends, and what it then reads: end-of-sequence tokens, stop strings, length, loops. No torch here."""

from collections.abc import Sequence
from typing import Any

from lengthen.sampling.scheduler import Row

LOOP_BLOCK, LOOP_TIMES = 64, 8  # a suffix that repeats a block of <= 64 tokens >= 8 times is a loop (vLLM's rule)
LEAD = 8  # tokens of the prompt that an output is decoded after
HALF = "\ufffd"  # what an incomplete character decodes to


class Stopping:
    """Looks at the newest token of a row. `eos_ids` end any text; a row has its own stop strings.

    `special`: ids of the tokenizer's special tokens by their text, which `Row.of` takes.
    """

    def __init__(self, tokenizer: Any, eos_ids: set[int]):
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.special = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}

    def end_of(self, row: Row) -> tuple[str, str] | None:
        """(finish reason, text) if the row's text ends with its newest token, else None.

        "eos" and "stop": without the token or the string that ended it. "length" and "repetition": all of it but half a
        character at its end.
        """
        token = row.ids[-1]  # the newest
        if token in self.eos_ids:
            return "eos", self.text(row, row.output[:-1])  # the token stays in the sample, not in its text
        if token in row.stop_ids:
            return "stop", self.text(row, row.output[:-1])
        if row.stop_texts and (text := self._before_stop(row)) is not None:
            return "stop", text
        if len(row.ids) >= row.limit:
            return "length", self.text(row, row.output).rstrip(HALF)
        # every so often is enough: a loop found up to seven tokens late is still a loop
        if row.written % LOOP_TIMES == 0 and loops(row.ids, row.prompt_tokens):
            return "repetition", self.text(row, row.output).rstrip(HALF)
        return None

    def text(self, row: Row, output: list[int]) -> str:
        """The output as it continues the prompt: decoded after the prompt's last ids, for some tokenizers drop a
        leading space of whatever they are given."""
        lead = row.request.prompt_ids[-LEAD:]
        before, both = self._decode(lead), self._decode(lead + output)  # the difference is the output
        return both[len(before) :] if both.startswith(before) else self._decode(output)

    def _before_stop(self, row: Row) -> str | None:
        """The text before the stop string that is complete first (ties: the first given), None = none is.

        Looked for after every token, in the last few only; found there, it is located in the whole text.
        """
        reach = max(len(s.encode()) for s in row.stop_texts) + 4  # every token but special ones has a byte or more
        tail = self._decode(row.ids[max(row.prompt_tokens, len(row.ids) - reach) :])
        if not any(s in tail for s in row.stop_texts):
            return None
        text = self.text(row, row.output)
        ends = [text.find(s) + len(s) if s in text else len(text) + 1 for s in row.stop_texts]
        end = min(ends)
        # not in the text after all: the tail began in the middle of a character or of a word
        return None if end > len(text) else text[: end - len(row.stop_texts[ends.index(end)])]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def loops(ids: Sequence[int], start: int) -> bool:
    """Whether ids[start:] ends in a block of at most LOOP_BLOCK tokens, LOOP_TIMES times in a row."""
    for block in range(1, min(LOOP_BLOCK, (len(ids) - start) // LOOP_TIMES) + 1):
        span = block * (LOOP_TIMES - 1)  # a loop equals itself, one block earlier
        if ids[-1] == ids[-1 - block] and ids[-span:] == ids[-span - block : -block]:
            return True
    return False
