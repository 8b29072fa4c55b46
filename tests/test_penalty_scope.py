"""pytest tests/test_penalty_scope.py: the logits processor for vLLM, against Hugging Face's, in a batch that changes.

vLLM itself is not needed: what the processor takes from it is played here, by vLLM's rules (removed, added, moved).
"""

import importlib
import random
import sys
from enum import Enum, auto
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

ROWS, VOCABULARY = 5, 40


class MoveDirectionality(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@pytest.fixture
def processor(monkeypatch):
    interface = ModuleType("vllm.v1.sample.logits_processor")
    interface.BatchUpdate = interface.LogitsProcessor = object
    interface.MoveDirectionality = MoveDirectionality
    for name in ("vllm", "vllm.v1", "vllm.v1.sample"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.v1.sample.logits_processor", interface)
    monkeypatch.delitem(sys.modules, "lengthen.sampling.penalty_scope", raising=False)
    module = importlib.import_module("lengthen.sampling.penalty_scope")
    monkeypatch.delitem(sys.modules, "lengthen.sampling.penalty_scope")
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY),
    )
    return module.PenaltyScope(config, torch.device("cpu"), False)


def request(rng: random.Random) -> SimpleNamespace:
    prompt = [rng.randrange(VOCABULARY) for _ in range(6)]
    extra = rng.choice([None, {}, {"penalty": 1.3, "penalty_from": rng.randrange(7)}, {"penalty": 2.0}])
    return SimpleNamespace(prompt=prompt, output=[], extra_args=extra)


def expected(batch: list[SimpleNamespace], logits: torch.Tensor) -> torch.Tensor:
    """Row by row, by Hugging Face's processor."""
    rows = []
    for one, scores in zip(batch, logits, strict=True):
        extra = one.extra_args or {}
        counted = one.prompt[extra.get("penalty_from", 0) :] + one.output
        penalty = extra.get("penalty", 1.0)
        if penalty != 1.0 and counted:
            scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([counted]), scores[None].clone())[0]
        rows.append(scores)
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(30))
def test_penalties_follow_their_rows_through_a_changing_batch(processor, seed):
    rng = random.Random(seed)
    batch: list[SimpleNamespace] = []
    for _ in range(60):
        removed, added, moved = [], [], []
        gone = [i for i in range(len(batch)) if rng.random() < 0.15]
        kept = {i: one for i, one in enumerate(batch) if i not in gone}
        new = [request(rng) for _ in range(rng.randrange(3))]
        free = sorted(gone) + list(range(len(batch), ROWS))
        for index, one in zip(free, new, strict=False):
            # A place may be taken without a word about who had it.
            if index in gone and rng.random() < 0.5:
                gone.remove(index)
            kept[index] = one
            added.append((index, one, one.prompt, one.output))
        removed = list(gone)
        # Condense: the last rows move down into the holes; and a swap now and then, as attention backends want it.
        while kept and sorted(kept) != list(range(len(kept))):
            hole, last = min(set(range(max(kept))) - kept.keys()), max(kept)
            kept[hole] = kept.pop(last)
            removed = [index for index in removed if index != hole]  # vLLM says of it only that it is overwritten
            moved.append((last, hole, MoveDirectionality.UNIDIRECTIONAL))
        if len(kept) > 1 and rng.random() < 0.5:
            a, b = rng.sample(sorted(kept), 2)
            kept[a], kept[b] = kept[b], kept[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        batch = [kept[i] for i in sorted(kept)]
        update = SimpleNamespace(batch_size=len(batch), removed=removed, added=added, moved=moved)
        processor.update_state(update if removed or added or moved else None)
        if batch:
            logits = torch.randn(len(batch), VOCABULARY)
            assert torch.equal(processor.apply(logits.clone()), expected(batch, logits))
            for one in batch:
                one.output.append(rng.randrange(VOCABULARY))


def test_a_token_still_on_its_way_is_counted_when_it_has_come(processor):
    """vLLM holds its place with -1 when it schedules ahead."""
    one = SimpleNamespace(prompt=[1], output=[-1], extra_args={"penalty": 2.0, "penalty_from": 1})
    added = [(0, one, one.prompt, one.output)]
    processor.update_state(SimpleNamespace(batch_size=1, removed=[], added=added, moved=[]))
    assert torch.equal(processor.apply(torch.ones(1, VOCABULARY)), torch.ones(1, VOCABULARY))
    one.output[0] = 7
    assert processor.apply(torch.ones(1, VOCABULARY))[0, 7] == 0.5


def test_a_penalty_of_nought_is_refused(processor):
    with pytest.raises(ValueError, match="above 0"):
        processor.validate_params(SimpleNamespace(extra_args={"penalty": 0.0}))
