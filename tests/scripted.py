"""What the stage tests put in place of a model: a sampler whose texts follow a script, and a process that dies."""

import itertools
import random
from collections.abc import Callable, Iterator

import torch
from tiny import WORDS, tiny_tokenizer

from lengthen import records
from lengthen.models.chat import Chat
from lengthen.sampling.request import Request, Sample

PLAIN = [w for w in WORDS if len(w) > 3 and w.islower()]  # no word that chatter or a judge would use


def prose(seed: int, num_words: int, paragraphs: int = 4) -> str:
    """Sentences of random English words, in paragraphs; passes every filter from about 12 words on."""
    words = random.Random(seed).choices(PLAIN, k=num_words)
    sentences = [" ".join(words[i : i + 9]).capitalize() + "." for i in range(0, num_words, 9)]
    size = -(-len(sentences) // paragraphs)
    return "\n\n".join(" ".join(sentences[i : i + size]) for i in range(0, len(sentences), size))


def chat() -> Chat:
    return Chat(tiny_tokenizer())


def prompt_of(request: Request) -> str:
    return tiny_tokenizer().decode(request.prompt_ids)


class ScriptedSampler:
    """`write(request)` gives (text, finish); the order of finishing is shuffled by `order`. Keeps every request."""

    context = 2048  # tokens

    def __init__(
        self,
        write: Callable[[Request], tuple[str, str]],
        order: int = 0,
        margin: Callable[[list[int]], float] = lambda prompt_ids: 1.0,
    ):
        self.write, self.margin, self.rng = write, margin, random.Random(order)
        self.waiting: list[Request] = []
        self.requests: list[Request] = []

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self.requests.append(request)

    def run(self) -> Iterator[Sample]:
        while self.waiting:
            request = self.waiting.pop(self.rng.randrange(len(self.waiting)))
            text, finish = self.write(request)
            error = "the prompt does not fit" if finish == "error" else ""
            yield Sample(request, text, [0] * len(text.split()), finish, error)

    def progress(self) -> str:
        return f"{len(self.requests)} asked for"

    def logprobs(self, pairs: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
        """Pairs come as yes, no, yes, no: yes gets `margin(prompt_ids)`, no gets 0."""
        values = [self.margin(prompt) * (i % 2 == 0) for i, (prompt, _) in enumerate(pairs)]
        return [torch.tensor([v]) for v in values]


class Killed(BaseException):
    """SIGKILL: no handler sees it coming, and nothing is written after it."""


def die_at(monkeypatch, step: int) -> Callable[[], int]:
    """From the `step`-th write or rename on, the process is dead: that write is torn, later ones do not happen.

    Returns a function that tells how many steps there were.
    """
    counter = itertools.count(1)
    last = [0]
    write, replace = records._write, records._replace

    def torn_write(descriptor: int, data: bytes) -> int:
        last[0] = next(counter)
        if last[0] == step:
            write(descriptor, bytes(data)[: len(data) // 2])
        if last[0] >= step:
            raise Killed
        return write(descriptor, data)

    def no_rename(source, target) -> None:
        last[0] = next(counter)
        if last[0] >= step:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(records, "_write", torn_write)
    monkeypatch.setattr(records, "_replace", no_rename)
    return lambda: last[0]
