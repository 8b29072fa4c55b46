"""Drafts: the texts are the same with and without, and they are made where they pay.

python -m pytest -q tests/test_lookup.py
"""

import itertools
import random

import pytest
import torch
from test_sampler import EOS, TOKENIZER, assert_every_page_came_back, make_prompts, make_sampler, write
from tiny import tiny_model

from lengthen.sampling.cache import PagedCache
from lengthen.sampling.hook import Hook
from lengthen.sampling.lookup import COSTS, LONGEST, DraftCosts, Lookup, allot
from lengthen.sampling.request import Request, Sampling


@pytest.fixture(scope="module", params=["llama", "mistral"])
def copier(request):
    """A model that repeats itself, as random ones with small weights do. Mistral's attention slides: 24 tokens."""
    return tiny_model(request.param, initializer_range=0.05)


def compare(model, requests: list[Request], accepted: int = 1, **changes) -> tuple[dict, dict]:
    """Samples with and without drafts; they must be equal, and so many guesses must have been right."""
    without = write(model, requests, lookup=False, **changes)
    with_drafts = write(model, requests, **changes)
    stats = with_drafts[None].stats
    assert not without[None].stats["drafted_tokens"] and stats["accepted_tokens"] >= accepted, stats
    assert stats["decode_tokens"] == without[None].stats["decode_tokens"]
    for request in requests:
        one, other = with_drafts[request.key], without[request.key]
        assert (one.token_ids, one.text, one.finish) == (other.token_ids, other.text, other.finish), request.key
    return with_drafts, without


# ---------------------------------------------------------------------------------------------------------
# The same text


SETTINGS = {
    "greedy": Sampling(temperature=0, repetition_penalty=1.0, max_new_tokens=60),
    "greedy with penalty": Sampling(temperature=0, repetition_penalty=1.02, max_new_tokens=60),
    "sampled": Sampling(temperature=0.05, repetition_penalty=1.0, max_new_tokens=60),
    "sampled with penalty": Sampling(temperature=0.05, repetition_penalty=1.02, max_new_tokens=60),
    "least length": Sampling(temperature=0, repetition_penalty=1.0, max_new_tokens=60, min_new_tokens=30),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_texts_are_the_same(copier, name):
    """Ragged prompts beside each other, pages of 8: drafts cross page borders, and rejected ones leave stale keys."""
    requests = [Request(i, p, i, SETTINGS[name]) for i, p in enumerate(make_prompts(8))]
    with_drafts, without = compare(copier, requests, accepted=20)
    assert with_drafts[None].stats["steps"] < without[None].stats["steps"]
    assert with_drafts[None].stats["drafted_tokens"] > with_drafts[None].stats["accepted_tokens"]  # some were wrong


def test_preempted_in_the_middle_of_a_copy(copier):
    settings = Sampling(temperature=0.05, repetition_penalty=1.02, max_new_tokens=60)
    requests = [Request(i, p, i, settings) for i, p in enumerate(make_prompts(8, 30))]
    roomy, _ = compare(copier, requests)
    sampler = make_sampler(copier, kv_tokens=160, context=100)
    sampler.scheduler.lengths.mean_output = 4.0
    for request in requests:
        sampler.add(request)
    tight = {sample.request.key: sample.token_ids for sample in sampler.run()}
    assert sampler.stats["preemptions"] >= 2 and sampler.stats["accepted_tokens"] > 20
    assert tight == {i: roomy[i].token_ids for i in range(8)}
    assert_every_page_came_back(sampler)


def scripted(script: list[int], prompt: list[int], **sampling) -> tuple:
    """The sample, and the sampler, of a text whose draws are given; with a lookup that believes in itself."""
    sampler = make_sampler(tiny_model())
    sampler.drawer.draw = lambda draws, _: [script[row.written + drafts] for row, drafts in draws]
    sampler.add(Request(0, prompt, 0, Sampling(**sampling)))
    (sample,) = sampler.run()
    return sample, sampler


COPIED = TOKENIZER.encode("the river runs under the bridge and the old mountain village sleeps")


@pytest.mark.parametrize(
    "end,sampling,finish",
    [
        ([EOS, 5, 6, 7], {}, "eos"),
        ([*TOKENIZER.encode("\nstop here now"), 5], {"stop": ("stop",)}, "stop"),
        ([], {"max_new_tokens": len(COPIED) - 2}, "length"),
        (list(range(40, 45)) * 30, {}, "repetition"),
    ],
    ids=["EOS", "stop string", "length", "loop"],
)
def test_a_text_that_ends_inside_a_draft(end, sampling, finish):
    """The prompt holds the text, its end and what would follow: the draft reaches beyond the end."""
    text = COPIED + end
    sample, sampler = scripted(text + [9] * 20, [*text, 9, 9, 9, 9, *range(50, 60)], **sampling)
    quiet = make_sampler(tiny_model(), lookup=False)
    quiet.drawer.draw = lambda draws, _: [(text + [9] * 20)[row.written + drafts] for row, drafts in draws]
    quiet.add(Request(0, sample.request.prompt_ids, 0, Sampling(**sampling)))
    (plain,) = quiet.run()
    assert (sample.token_ids, sample.text, sample.finish) == (plain.token_ids, plain.text, plain.finish)
    assert sample.finish == finish
    assert sampler.stats["accepted_tokens"] > 4 and sampler.stats["steps"] < quiet.stats["steps"]
    assert sampler.stats["drafted_tokens"] > sampler.stats["accepted_tokens"] or finish == "length"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral", "qwen3"])
def test_several_tokens_of_a_text_in_one_pass(family):
    """Rows with 1, 4 and 8 tokens beside each other against the model's own pass; then over their stale keys."""
    model = tiny_model(family)
    hook, texts = Hook(model), [torch.randint(3, 400, (n,)) for n in (31, 40, 50, 44)]
    cache = PagedCache(hook.shapes, 32, 8, torch.device("cpu"), torch.float32)
    tables = [[cache.take() for _ in range(8)] for _ in texts]
    with torch.no_grad():
        own = [model(input_ids=ids[None]).logits[0] for ids in texts]
        for counts in ((1, 4, 8, 1), (8, 1, 1, 1), (2, 2, 2, 2), (1, 1, 1, 1)):
            starts = [len(ids) - count for ids, count in zip(texts, counts, strict=True)]
            for table, ids, start in zip(tables, texts, starts, strict=True):
                hook.forward(cache.batch([], [(table, 0, start)]), ids[:start], torch.arange(start), torch.tensor([0]))
                hook.forward(  # a draft that was wrong
                    cache.batch([(table, start, 8)], []),
                    torch.full((8,), 7),
                    start + torch.arange(8),
                    torch.tensor([0]),
                )
            batch = cache.batch(list(zip(tables, starts, counts, strict=True)), [])
            ids = torch.cat([ids[start:] for ids, start in zip(texts, starts, strict=True)])
            at = torch.cat([torch.arange(start, len(ids)) for ids, start in zip(texts, starts, strict=True)])
            got = hook.forward(batch, ids, at, torch.arange(sum(counts)))
            want = torch.cat([logits[start:] for logits, start in zip(own, starts, strict=True)])
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
            assert batch.counts.tolist() == list(counts)


# ---------------------------------------------------------------------------------------------------------
# Where drafts pay


def guesses(lookup: Lookup, text: list[int]) -> list[list[int]]:
    """What would have been guessed before each token of `text`."""
    out = []
    for token in text:
        out.append(lookup.guess(LONGEST))
        lookup.ids.append(token)
        lookup.learn()
    return out


def test_guesses_are_what_followed_the_last_time():
    prompt = [1, 2, 3, 4, 5, 6, 1, 2, 3, 9, 8, 7]
    lookup = Lookup(list(prompt))
    first = guesses(lookup, [1, 2, 3, 9])
    assert first[:3] == [[], [], []]  # (8, 7, 1) and (7, 1, 2) are new
    assert first[3] == [9, 8, 7, 1, 2, 3]  # not 4: the later place counts
    assert lookup.guess(2) == [8, 7]
    # Oracle: a search backwards through the whole text
    rng = random.Random(0)
    ids = [rng.randrange(4) for _ in range(300)]
    lookup = Lookup(ids[:5])
    for at, guess in enumerate(guesses(lookup, ids[5:]), start=5):
        places = [i for i in range(3, at) if ids[i - 3 : i] == ids[at - 3 : at]]
        assert guess == (ids[places[-1] : min(at, places[-1] + LONGEST)] if places else []), at


def test_an_index_entry_is_made_once_a_token():
    """O(1) a token: what `learn` looks at does not grow with the text."""

    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    lookup, per_token = Lookup(Counted([1, 2, 3])), []
    for n in range(4000):
        before = Counted.reads
        lookup.ids.append(n * 7919 % 101)
        lookup.learn()
        per_token.append(Counted.reads - before)
    assert max(per_token[2000:]) <= 5 and len(lookup.after) <= 4000


def test_right_guesses_raise_the_chances_and_wrong_ones_end_drafting():
    copying = Lookup(list(range(100)))
    guesses(copying, list(range(10, 60)))
    assert copying.copying and copying.chances(3)[2] > 0.9
    rng = random.Random(0)
    noise = Lookup([rng.randrange(5) for _ in range(300)])  # every three tokens have stood before, any may follow
    guesses(noise, [rng.randrange(5) for _ in range(100)])
    assert noise.chances(1)[0] < 0.45
    assert allot([noise.chances(7)] * 8, 8, COSTS["cpu"].free_tokens)[0] <= 1
    assert allot([copying.chances(7)] * 8, 8, COSTS["cpu"].free_tokens) == [7] * 8
    guesses(noise, [noise.ids[-1]] * 40)  # it begins to repeat: the guesses nobody computed were right, and count
    assert allot([noise.chances(7)] * 8, 8, COSTS["cpu"].free_tokens) == [7] * 8


def test_drafts_are_given_as_long_as_they_make_the_pass_more_worth_its_time():
    """Oracle: yield over time, (tokens + sum of chances) / (free + tokens in the pass), of every possible allotment."""
    rng = random.Random(0)
    for _ in range(50):
        chances = [sorted((rng.random() for _ in range(3)), reverse=True) for _ in range(3)]
        tokens, free = rng.randrange(3, 20), rng.choice([0.5, 4, 24])

        values = {}
        for counts in itertools.product(range(4), repeat=3):
            right = sum(c for some, n in zip(chances, counts, strict=True) for c in some[:n])
            values[counts] = (tokens + right) / (free + tokens + sum(counts))
        assert values[tuple(allot(chances, tokens, free))] == pytest.approx(max(values.values()))


def test_hardly_any_draft_is_worth_it_beside_many_rows():
    good = [0.8 * 0.8**i for i in range(7)]
    counts = [allot([good] * rows, rows, COSTS["cpu"].free_tokens)[0] for rows in (1, 4, 16, 48, 256)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 7 and counts[-1] == 0
    assert allot([good] * 8, 8 + 512, COSTS["cpu"].free_tokens) == [0] * 8  # nor beside prefill chunks


def drafting(scripts: list[list[int]], prompts: list[list[int]]) -> tuple[float, float]:
    """Drafted and accepted tokens a token, of texts with given draws beside each other, behind their first 50."""
    sampler = make_sampler(tiny_model(), max_rows=len(scripts))
    sampler.drawer.draw = lambda draws, _: [scripts[row.request.key][row.written + drafts] for row, drafts in draws]
    for i, prompt in enumerate(prompts):
        sampler.add(Request(i, prompt, 0, Sampling(max_new_tokens=len(scripts[i]))))
    while not sampler.scheduler.rows or min(row.written for row in sampler.scheduler.rows) < 50:
        sampler.step()
    before = dict(sampler.stats)
    assert all(sample.finish == "length" for sample in sampler.run())
    done = {key: sampler.stats[key] - before[key] for key in ("drafted_tokens", "accepted_tokens", "decode_tokens")}
    return done["drafted_tokens"] / done["decode_tokens"], done["accepted_tokens"] / done["decode_tokens"]


def test_random_texts_switch_themselves_off_and_copies_do_not():
    rng = random.Random(0)
    noise = [[rng.randrange(10, 16) for _ in range(400)] for _ in range(8)]  # any three tokens have stood before
    copies = [[rng.randrange(10, 500) for _ in range(300)] for _ in range(8)]
    drafted, accepted = drafting([text[100:] for text in noise], [text[:100] for text in noise])
    assert drafted < 0.15
    drafted, accepted = drafting(copies, [text + [5, 6] for text in copies])
    assert accepted > 0.8 and drafted < 1.1 * accepted


def test_drafts_below_the_hurdle_are_not_made():
    """Where a pass without drafts is a replayed graph, one with drafts must promise more."""
    copies = [[100 + i for i in range(60)] for _ in range(2)]
    drafted = []
    for hurdle in (0.0, 1.0, 7.0):
        sampler = make_sampler(tiny_model(), max_rows=2)
        sampler.scheduler.drafts = DraftCosts(COSTS["cpu"].free_tokens, hurdle)
        sampler.drawer.draw = lambda draws, _: [copies[row.request.key][row.written + drafts] for row, drafts in draws]
        for i, text in enumerate(copies):
            sampler.add(Request(i, [*text, 5, 6], 0, Sampling(max_new_tokens=60)))
        assert len(list(sampler.run())) == 2
        drafted.append(sampler.stats["drafted_tokens"])
    assert drafted[0] >= drafted[1] > 20 and drafted[2] == 0
