"""What the tests of training train: records, pairs, tiny models with LoRA, and transformers' own loss as the oracle."""

import functools
import json
import random
from pathlib import Path

import torch
from tiny import WORDS, tiny_model

from lengthen.models import lora
from lengthen.records import new_record
from lengthen.training.budget import Budget
from lengthen.training.learner import Learner
from lengthen.training.packed import checkpointed, examine
from lengthen.training.pairs import Pair
from lengthen.training.policy import Memory, set_checkpointing
from lengthen.training.settings import MemoryFlags
from lengthen.training.shapes import shape_of, trace

EOS = 2


def words(n: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n))


def record(number: int, **fields) -> dict:
    draft = "\n\n".join("\n".join(words(6, 100 * number + 10 * i + j) for j in range(3)) for i in range(4))
    fields = {"initial": draft, "response": words(30 + 8 * number, number), "finish": "eos", **fields}
    return new_record("extended", id=f"r{number}", language="en", prompt=words(7, 1000 + number), **fields)


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return path


def with_lora(family: str = "llama", sizes: dict | None = None, **options) -> torch.nn.Module:
    """A tiny model in training mode; B is not zero, so that both A and B have gradients."""
    model = tiny_model(family, **sizes or {})
    lora.attach(model, **{"rank": 4, "alpha": 8, **options})
    generator = torch.Generator().manual_seed(2)
    for layer in lora.lora_layers(model).values():
        layer.B.data.normal_(0, 0.05, generator=generator)
    return model.train()


def memory_for(model, room: float = 1e12) -> Memory:
    """Plans for transformers' own layers within so many bytes."""
    options = {"rank": 4, "targets": "all-linear", "dtype": torch.float32}
    budget = Budget(shape_of(model, cuda=False, **options), trace(model.config, **options))
    follow = functools.partial(set_checkpointing, checkpointed(model))
    return Memory(budget, MemoryFlags(), room, 1000, follow)


def learner_for(model, optimizer: torch.optim.Optimizer, room: float = 1e12) -> Learner:
    """The model examined, with transformers' own layers, within so many bytes."""
    abilities = examine(model)
    return Learner(model, abilities, memory_for(model, room), optimizer)


def some_pairs(*lengths: int) -> list[Pair]:
    rng = random.Random(0)
    return [Pair([rng.randrange(3, 500) for _ in range(n - 1)] + [EOS], max(1, n // 3)) for n in lengths]


def gradients(model) -> list[torch.Tensor]:
    return [p.grad.clone() for p in lora.lora_parameters(model)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


def alone(model, pairs: list[Pair]) -> torch.Tensor:
    """The oracle: transformers' own forward pass and loss, one sample at a time, through its eager attention."""
    model.set_attn_implementation("eager")
    total = torch.zeros(())
    for pair in pairs:
        ids = torch.tensor([pair.ids])
        labels = ids.clone()
        labels[0, : pair.num_prompt] = -100
        total = total + model(input_ids=ids, labels=labels).loss * (len(pair.ids) - pair.num_prompt)
    return total


def likeliest(model, pair: Pair) -> int:
    """The targets of a sample that get the model's highest logit."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([pair.ids])).logits[0, pair.num_prompt - 1 : -1]
    return (logits.argmax(-1) == torch.tensor(pair.ids[pair.num_prompt :])).sum().item()
