"""Draft tokens of a text out of the text itself (prompt lookup decoding).

An Extender copies: names, phrases, whole sentences of the draft in its prompt. Where a text's last three tokens have
stood before, what followed them then is a guess at what follows now. The sampler computes the drafted tokens together
with the newest one, and draws after each of them as it always does: as long as a draw equals the draft, the next draft
was computed after the right text, and one pass has made several tokens. The text is the same as without, only sooner.

1. An index of the last place of each three tokens, one entry a token: O(1) in time, no search.
2. Every drawn token is compared with what the index would have guessed, drafted or not. So the share of right guesses
   is known without a pass spent on it: apart for guesses that follow a right one (a text in the middle of a copy goes
   on copying) and for others. A text whose guesses are wrong stops drafting, and begins again when they would be right.
3. A pass over n tokens takes about as long as free + n: reading the weights takes as long as computing `free` tokens.
   A token that will be right with probability p makes the pass worth its time if p is above (tokens the pass is
   expected to yield) / (free + tokens in the pass). `allot` gives drafts to the rows, the likeliest token first, down
   to there: with many rows hardly any draft is worth it, with few rows most are.
"""

from collections.abc import Sequence
from typing import NamedTuple

NGRAM, LONGEST = 3, 7  # tokens that must have stood before; tokens of a draft
BITS = 20  # of a token's id in the number that stands for three of them
RATE, START = 1 / 8, 0.5  # of the running shares: the weight of the newest guess; what is believed before the first


class DraftCosts(NamedTuple):
    """What draft tokens cost on a device."""

    free_tokens: int  # how many tokens are computed in the time that reading the weights takes
    hurdle: float  # accepted tokens a row that a pass with drafts must promise to be made at all


# On a GPU the host reads steps without drafts eight at a time, the next eight running meanwhile, and waits for each
# step with drafts. So these must promise more: by estimate, a half millisecond of a small model's two. No GPU has run
# this yet.
COSTS = {"cpu": DraftCosts(24, 0.0), "cuda": DraftCosts(256, 0.25)}


class Lookup:
    """The index of one text: `ids` is the sampler's own list, which grows; `learn` reads what has been appended."""

    def __init__(self, ids: list[int]):
        self.ids, self.known = ids, 0
        self.after: dict[int, int] = {}  # the last three tokens, as one number -> where their successor stands
        self.key = 0  # of the last three tokens read
        self.right = [START, START]  # share of right guesses: after a wrong one (or none), after a right one
        self.copying = 0  # whether the last guess was right
        self._read(judge=False)

    def learn(self) -> None:
        """Take in the tokens that were appended to `ids`."""
        self._read(judge=True)

    def _read(self, judge: bool) -> None:
        for index in range(self.known, len(self.ids)):
            token = self.ids[index]
            if index >= NGRAM:
                if judge:
                    guess = self.after.get(self.key)
                    hit = int(guess is not None and self.ids[guess] == token)
                    if guess is not None:
                        self.right[self.copying] += RATE * (hit - self.right[self.copying])
                    self.copying = hit
                self.after[self.key] = index  # the latest place counts
            self.key = (self.key << BITS | token) & (1 << NGRAM * BITS) - 1
        self.known = len(self.ids)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the last three the last time; [] if they are new."""
        start = self.after.get(self.key) if most > 0 else None
        return [] if start is None else self.ids[start : start + most]

    def chances(self, count: int) -> list[float]:
        """The probability of each of the next `count` guessed tokens to be right, and all before it."""
        first, then = self.right[self.copying], self.right[1]
        return [first * then**i for i in range(count)]


def allot(chances: Sequence[Sequence[float]], tokens: int, free: float) -> list[int]:
    """How many guessed tokens of each row are worth computing in a pass that has `tokens` anyway, one a row.

    chances[row][i]: that the row's i-th guess is right (and all before), never rising with i. free: see above.
    """
    counts, worth = [0] * len(chances), float(tokens)
    for chance, row in sorted(((c, row) for row, some in enumerate(chances) for c in some), reverse=True):
        if chance <= worth / (free + tokens):
            break  # the bar only rises from here
        counts[row] += 1
        worth, tokens = worth + chance, tokens + 1
    return counts
