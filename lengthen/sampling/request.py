"""What the sampler is asked for, and what it gives back. No torch here."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from lengthen.errors import UserError

ROWS = {"cpu": 96, "cuda": 256}  # texts at once: beyond, attention takes what reading weights for more would save
Pairs = Sequence[tuple[list[int], list[int]]]  # (prompt ids, continuation ids), to be scored


@dataclass(frozen=True)
class Sampling:
    """How logits become tokens. The defaults are the paper's release, everywhere."""

    temperature: float = 0.7  # 0 = greedy
    top_p: float = 0.8  # 1 = off
    top_k: int = 20  # 0 = off
    repetition_penalty: float = 1.1  # 1 = off
    max_new_tokens: int = 16384  # capped by the context that the prompt leaves
    min_new_tokens: int = 0  # no EOS is drawn before so many; stop strings still end a text
    stop: tuple[str, ...] = ()  # the text ends before the first of them to be complete

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        assert self.temperature >= 0, self.temperature
        assert 0 < self.top_p <= 1, self.top_p
        assert self.top_k >= 0, self.top_k
        assert self.repetition_penalty > 0, self.repetition_penalty
        assert self.max_new_tokens > 0, self.max_new_tokens
        assert self.min_new_tokens >= 0, self.min_new_tokens
        assert all(isinstance(s, str) and s for s in self.stop), self.stop


@dataclass
class Request:
    """One text to write. `key` is the caller's; `seed` any integer (its low 64 bits count)."""

    key: Hashable
    prompt_ids: list[int]
    seed: int
    sampling: Sampling = field(default_factory=Sampling)
    penalty_from: int = 0  # prompt ids from this index on count for the repetition penalty; output ids always do
    expected_tokens: int = 0  # a guess of the output's length: orders the queue, holds room; 0 = like those finished
    follows: bool = False  # another call of what was begun goes first: the prefix cache still has what they share

    def misfit(self, context: int) -> str:
        """Why it cannot be run in a context of so many tokens, "" = it can."""
        tokens = len(self.prompt_ids)
        if not tokens:
            return "the prompt is empty"
        return "" if tokens < context else f"the prompt has {tokens} tokens, the context {context}"


@dataclass
class Sample:
    """A finished text. `token_ids` are the output's, a final EOS included; `text` has neither EOS nor stop string."""

    request: Request
    text: str
    token_ids: list[int]
    finish: str  # "eos", "length", "stop", "repetition" or "error"
    error: str = ""  # why there is no text; the other requests go on

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def check_fits(pairs: Pairs, context: int) -> None:
    """Raises UserError for a pair that exceeds a context of so many tokens."""
    for prompt, continuation in pairs:
        if (total := len(prompt) + len(continuation)) > context:
            raise UserError(f"{total} tokens do not fit the context of {context}")
