"""The sampler against oracles: transformers' generate and logits processors, full forward passes, scripted tokens.

python -m pytest -q tests/test_sampler.py
"""

import json
import math
import sys
import tracemalloc

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lengthen.records import UserError
from lengthen.sampling.cache import PagedCache
from lengthen.sampling.draw import Drawer, draw, penalise, top_candidates
from lengthen.sampling.engine import Sampler
from lengthen.sampling.hook import Hook
from lengthen.sampling.memory import warm_up
from lengthen.sampling.request import Request, Sampling
from lengthen.sampling.scheduler import Row
from lengthen.sampling.stopping import loops

EOS = 2
TOKENIZER = tiny_tokenizer()


def make_prompts(count: int, longest: int = 45) -> list[list[int]]:
    """Ragged random prompts: lengths 1..longest cross the page size (8), the window (24) and the prefill budget."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(1, longest, count).long()[torch.randperm(count, generator=generator)]
    return [torch.randint(3, len(TOKENIZER), (int(n),), generator=generator).tolist() for n in lengths]


def make_sampler(model, **changes) -> Sampler:
    settings = {"eos_ids": {EOS}, "context": 2048, "max_rows": 4, "prefill_tokens": 30, "page_tokens": 8, **changes}
    return Sampler(model, TOKENIZER, **settings)


def write(model, requests, **changes) -> dict:
    """Samples by key, and the sampler under None."""
    sampler = make_sampler(model, **changes)
    for request in requests:
        sampler.add(request)
    samples = {sample.request.key: sample for sample in sampler.run()}
    assert len(samples) == len(requests)
    return {**samples, None: sampler}


def scripted(model, scripts: list[list[int]], **sampling) -> list:
    """Samples whose tokens are given: what is tested is what becomes of them."""
    sampler = make_sampler(model, eos_ids={EOS, 1})
    sampler.drawer.draw = lambda draws, _: [scripts[row.request.key][row.written + drafts] for row, drafts in draws]
    for i in range(len(scripts)):
        sampler.add(Request(i, TOKENIZER.encode("Write: "), 0, Sampling(**sampling)))
    return sorted(sampler.run(), key=lambda sample: sample.request.key)


# ---------------------------------------------------------------------------------------------------------
# The texts are those of transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generate_token_by_token(family):
    """8 ragged prompts through 4 rows, against one prompt at a time; windows (24) are shorter than most texts."""
    model, prompts = tiny_model(family), make_prompts(8)
    greedy = Sampling(temperature=0, max_new_tokens=24)
    samples = write(model, [Request(i, p, i, greedy) for i, p in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        want = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            repetition_penalty=1.1,
            max_new_tokens=24,
        )[0, len(prompt) :].tolist()
        assert samples[i].token_ids == want, i
        assert samples[i].finish == ("eos" if want[-1] == EOS else "length")
        assert samples[i].text == TOKENIZER.decode(want, skip_special_tokens=True).rstrip("\ufffd")


def test_attention_sinks_are_carried():
    """GPT-OSS: a learned sink per head, every other layer slides, experts. Same oracle."""
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=len(TOKENIZER),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    prompts = make_prompts(5)
    samples = write(
        model, [Request(i, p, i, Sampling(temperature=0, max_new_tokens=20)) for i, p in enumerate(prompts)]
    )
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "repetition_penalty": 1.1, "max_new_tokens": 20}
        want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        assert samples[i].token_ids == want, i


def test_a_row_returns_to_a_line_of_the_penalty_table_that_it_had_before():
    """Preempted twice, it is given its first line again, where nobody else has drawn meanwhile."""
    drawer = Drawer(slots=2, unknown=torch.tensor([], dtype=torch.long), eos_ids={EOS}, device=torch.device("cpu"))
    request = Request(0, [5, 6], 0, Sampling(temperature=0, repetition_penalty=1000))  # greedy: the highest new id
    row = Row(request, 0, [5, 6], 99, set(), [], {5, 6})
    for slot in (0, 1, 1, 0, 0):
        row.slot = slot
        (token,) = drawer.draw([(row, 0)], torch.arange(1.0, 301.0)[None])
        row.ids.append(token)
        row.distinct.add(token)
        row.unwritten.append(token)
    assert row.output == [299, 298, 297, 296, 295]


def test_penalty_from_leaves_the_head_of_the_prompt_alone():
    model, prompt = tiny_model(), make_prompts(1, 40)[0] * 40
    for start in (0, 13, len(prompt)):
        greedy = Sampling(temperature=0, max_new_tokens=20, repetition_penalty=1.5)
        got = write(model, [Request(0, prompt, 0, greedy, penalty_from=start)])[0].token_ids
        processor = RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=start)
        ids = torch.tensor([prompt])
        want = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            logits_processor=LogitsProcessorList([processor]),
        )[0, len(prompt) :].tolist()
        assert got == want, start


# ---------------------------------------------------------------------------------------------------------
# From logits to a token


def hugging_face(logits, seen, temperature, top_k, top_p, penalty) -> torch.Tensor:
    """The distribution [V] that transformers samples from."""
    scores = RepetitionPenaltyLogitsProcessor(penalty)(seen[None], logits[None].clone())
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores[0].double().softmax(-1)


def our_draws(logits, seen, temperature, top_k, top_p, penalty, count, chunk=2000) -> torch.Tensor:
    """`count` draws [count] from the same logits: seeds 0..count-1, position 7."""
    out = []
    for first in range(0, count, chunk):
        n = min(chunk, count - first)
        rows = logits.repeat(n, 1)
        penalise(rows, seen.repeat(n, 1), torch.full((n,), len(seen)), torch.full((n,), penalty))
        out.append(
            draw(
                rows,
                torch.full((n,), temperature),
                torch.full((n,), top_k),
                torch.full((n,), top_p),
                torch.arange(first, first + n),
                torch.full((n,), 7),
            )
        )
    return torch.cat(out)


# recipe; neither top-k nor top-p; top-p only; top-k beyond the candidates; the recipe with block-wise candidates
@pytest.mark.parametrize(
    "V,settings",
    [
        (300, (0.7, 20, 0.8, 1.1)),
        (300, (1.3, 0, 1.0, 1.0)),
        (300, (0.9, 0, 0.6, 1.1)),
        (300, (1.0, 100, 0.95, 1.3)),
        (4096, (0.7, 20, 0.8, 1.1)),
    ],
)
def test_draws_follow_hugging_face_distribution(V, settings):
    """Chi-square over 20,000 draws, tokens expected less than 5 times pooled. The threshold is the 1e-6 tail, so a
    correct sampler fails one of the five cases with probability 5e-6 (once: the seeds are fixed)."""
    torch.manual_seed(V)
    logits, seen, count = torch.randn(V), torch.randperm(V)[:40], 20_000
    want = hugging_face(logits, seen, *settings)
    drawn = torch.bincount(our_draws(logits, seen, *settings, count), minlength=V).double()
    assert not drawn[want == 0].any()  # nothing that top-k or top-p removes
    often = want * count >= 5
    expected = torch.cat([want[often], want[~often].sum()[None]]) * count
    observed = torch.cat([drawn[often], drawn[~often].sum()[None]])
    expected, observed = expected[expected > 0], observed[expected > 0]
    assert len(expected) > 5
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    # Wilson and Hilferty: the cube root of chi-square / freedom is normal; 4.75 is its 1e-6 tail
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert deviation < 4.75, (statistic, freedom)


@pytest.mark.parametrize("V,tied", [(200, 30), (200, 120), (4096, 30), (4096, 500)])  # fewer and more than CANDIDATES
def test_ties_at_the_top_k_edge_stay(V, tied):
    """Ten high logits and `tied` equal ones; top-k 20 cuts among the equal: all of them stay, as in transformers."""
    torch.manual_seed(0)
    order = torch.randperm(V)
    logits = torch.full((V,), -4.0)
    logits[order[:10]] = 1.5
    logits[order[10 : 10 + tied]] = 1.0
    settings = (1.0, 20, 1.0, 1.0)
    want = hugging_face(logits, order[:1], *settings)
    assert int((want > 0).sum()) == 10 + tied
    drawn = our_draws(logits, order[:1], *settings, 16 * (10 + tied), chunk=500)
    assert set(drawn.tolist()) == set(want.nonzero()[:, 0].tolist())  # any missed: < 1e-4


def test_candidates_are_the_highest_logits():
    torch.manual_seed(0)
    for V in (50, 1000, 4096, 4100, 49152):
        logits = torch.randn(7, V).bfloat16().float()  # many equal ones
        values, ids = top_candidates(logits)
        assert torch.equal(values, logits.topk(min(64, V)).values)
        assert torch.equal(logits.gather(1, ids), values)
        assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_temperature_zero_and_top_k_one_are_greedy_beside_sampled_rows():
    torch.manual_seed(0)
    logits = torch.randn(4, 500)
    temperature, top_k = torch.tensor([0.0, 5.0, 5.0, 0.0]), torch.tensor([20, 1, 0, 0])
    tokens = [
        draw(logits, temperature, top_k, torch.ones(4), torch.full((4,), seed), torch.zeros(4).long())
        for seed in range(20)
    ]
    best = logits.argmax(-1)
    assert all(t[i] == best[i] for t in tokens for i in (0, 1, 3))
    assert len({int(t[2]) for t in tokens}) > 10


# ---------------------------------------------------------------------------------------------------------
# A text does not depend on what is around it


def test_texts_depend_on_the_seed_alone():
    """Other rows, order, page size, prefill chunks, company: the same tokens. Another seed: other tokens."""
    model, prompts = tiny_model("qwen2"), make_prompts(9)
    recipe = Sampling(max_new_tokens=30)
    requests = [Request(i, p, 1000 + i, recipe) for i, p in enumerate(prompts)]
    first = write(model, requests)
    for again in (
        write(model, requests[::-1], max_rows=2),
        write(model, requests, max_rows=9, page_tokens=16, prefill_tokens=512),
        {i: write(model, [requests[i]])[i] for i in range(9)},
    ):
        assert all(again[i].token_ids == first[i].token_ids for i in range(9))
    other = write(model, [Request(i, p, 2000 + i, recipe) for i, p in enumerate(prompts)])
    assert sum(other[i].token_ids != first[i].token_ids for i in range(9)) >= 8


def assert_every_page_came_back(sampler) -> None:
    """It is free, or the tree of prompts holds it, and nobody else."""
    held = [node.page for node in sampler.scheduler.prefixes.order]
    assert sorted([*sampler.cache.free, *held]) == list(range(sampler.cache.num_pages))
    assert all(sampler.cache.holders[page] == 1 for page in held)


def test_preempted_texts_are_the_same():
    model, prompts = tiny_model("mistral"), make_prompts(8, 30)
    requests = [Request(i, p, i, Sampling(max_new_tokens=60)) for i, p in enumerate(prompts)]
    roomy = write(model, requests)
    sampler = make_sampler(model, kv_tokens=160, context=100)  # less than two of the longest texts
    sampler.scheduler.lengths.mean_output = 4.0  # it expects short texts, and lets too many in
    for request in requests:
        sampler.add(request)
    tight = {sample.request.key: sample for sample in sampler.run()}
    assert not roomy[None].stats["preemptions"] and sampler.stats["preemptions"] >= 2
    assert all(tight[i].token_ids == roomy[i].token_ids for i in range(8))
    assert_every_page_came_back(sampler)


def test_samples_of_one_prompt_share_its_prefill():
    model, prompt = tiny_model("gemma3"), make_prompts(1, 60)[0] + list(range(10, 90))
    requests = [Request(i, prompt, i, Sampling(max_new_tokens=20)) for i in range(4)]
    samples = write(model, requests, prefill_tokens=512)
    assert samples[None].stats["shared_tokens"] == 3 * (len(prompt) - 1)
    for i in range(4):
        assert samples[i].token_ids == write(model, [requests[i]])[i].token_ids


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_a_prompt_that_ran_before_is_remembered(family):
    """A retry shares its whole prompt with the try before it, a second stage its first half with the first one."""
    model, head = tiny_model(family), make_prompts(1, 60)[0] + list(range(10, 90))
    prompts = [head, head, head + list(range(200, 260)), head[:50] + list(range(300, 400)), list(range(30))]
    requests = [Request(i, p, i, Sampling(max_new_tokens=20)) for i, p in enumerate(prompts)]
    sampler = make_sampler(model)
    for request in requests:  # one after the other: none is running when the next comes
        sampler.add(request)
        (sample,) = sampler.run()
        assert sample.token_ids == write(model, [request])[request.key].token_ids
    assert sampler.stats["shared_tokens"] == (len(head) - 1) + len(head) + 50


def test_requests_join_while_samples_are_read():
    model, prompts = tiny_model(), make_prompts(6)
    sampler = make_sampler(model, max_rows=2)
    requests = [Request(i, p, i, Sampling(max_new_tokens=10)) for i, p in enumerate(prompts)]
    for request in requests[:3]:
        sampler.add(request)
    got = {}
    for sample in sampler.run():
        assert model.config._attn_implementation == "sdpa"  # in the caller's hands the model is its own
        got[sample.request.key] = sample.token_ids
        if sample.request.key < 3:
            sampler.add(requests[sample.request.key + 3])
            sampler.logprobs([(prompts[0], prompts[1])])  # between steps, while rows are running
    alone = write(model, requests)
    assert got == {i: alone[i].token_ids for i in range(6)}


# ---------------------------------------------------------------------------------------------------------
# Where a text ends


def test_stop_strings_are_cut_wherever_tokens_split_them():
    model = tiny_model()
    ids = TOKENIZER.encode("the river runs\nInstruction 4: over")  # the stop string spans several tokens
    (sample,) = scripted(model, [ids], stop=("\nInstruction 4", "never"))
    assert (sample.finish, sample.text) == ("stop", "the river runs")
    assert "\nInstruction 4" in TOKENIZER.decode(sample.token_ids)
    assert "\nInstruction 4" not in TOKENIZER.decode(sample.token_ids[:-1])  # no token after the one that completes it


def test_the_stop_string_that_is_complete_first_wins():
    model = tiny_model()
    ids = TOKENIZER.encode("one. two. three. four. five")
    # "two. three" begins first, "three" ends with it, "wo" ends first
    cases = {("five", "two. three"): "one. ", ("two. three", "wo. "): "one. t", ("wo", "two"): "one. t"}
    for stop, want in cases.items():
        assert scripted(model, [ids], stop=stop)[0].text == want, stop
    (tie,) = scripted(model, [ids], stop=("three", "two. three"))
    assert tie.text == "one. two. "  # both end in one place: the first given


def test_stop_strings_of_several_bytes_per_character():
    """Byte tokens: for two steps out of three the text ends in half a character."""
    model = tiny_model()
    ids = TOKENIZER.encode("春天来了。\n指令4：夏天")
    assert len(ids) > 20
    (sample,) = scripted(model, [ids], stop=("\n指令4",))
    assert (sample.finish, sample.text) == ("stop", "春天来了。")
    (sample,) = scripted(model, [ids], max_new_tokens=5)
    assert (sample.finish, sample.text) == ("length", "春")  # the half character is dropped


def test_every_eos_ends_a_text_and_special_stop_strings_are_ids():
    model = tiny_model()
    words = TOKENIZER.encode("the river")
    samples = scripted(model, [[*words, EOS, 5], [*words, 1, 5]])
    for sample, last in zip(samples, (EOS, 1), strict=True):
        assert (sample.finish, sample.text) == ("eos", "the river")
        assert sample.token_ids == [*words, last] and sample.num_tokens == len(words) + 1
    endoftext = TOKENIZER.convert_tokens_to_ids("<|endoftext|>")
    (sample,) = scripted(model, [[*words, endoftext, 5]], stop=("<|endoftext|>",))
    assert (sample.finish, sample.text) == ("stop", "the river")


def test_no_eos_before_the_least_number_of_tokens():
    """Oracle: generate's min_new_tokens, token by token, greedy and beside rows that may end at once."""
    model, prompts = tiny_model(), make_prompts(8)
    free = write(model, [Request(i, p, i, Sampling(temperature=0, max_new_tokens=24)) for i, p in enumerate(prompts)])
    ends = {free[i].token_ids[2 + i] for i in range(8)}  # what this model is likely to write early
    bounds = [0, 0, 5, 12, 12, 12, 20, 24]
    asked = [
        Request(i, p, i, Sampling(temperature=0, max_new_tokens=24, min_new_tokens=least))
        for i, (p, least) in enumerate(zip(prompts, bounds, strict=True))
    ]
    samples = write(model, asked, eos_ids=ends)
    ended_early = 0
    for i, (prompt, least) in enumerate(zip(prompts, bounds, strict=True)):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "repetition_penalty": 1.1, "max_new_tokens": 24, "min_new_tokens": least}
        options["eos_token_id"] = sorted(ends)
        want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        assert samples[i].token_ids == want, i
        assert samples[i].num_tokens >= least and ends.isdisjoint(samples[i].token_ids[:least])
        early = model.generate(ids, attention_mask=torch.ones_like(ids), **{**options, "min_new_tokens": 0})
        ended_early += early.shape[1] - len(prompt) < least
    assert ended_early  # else nothing was banned


def test_loops_end_early():
    model = tiny_model()
    block = list(range(20, 57))
    (sample,) = scripted(model, [list(range(100, 110)) + block * 100])
    assert sample.finish == "repetition"
    assert 10 + 8 * len(block) <= sample.num_tokens < 10 + 8 * len(block) + 8
    assert not loops(block * 7 + block[:-1], 0) and loops(block * 8, 0)
    assert not loops(block * 8, 1)  # the prompt does not count
    assert loops([9] * 8, 0) and not loops(list(range(65)) * 8, 0)  # blocks of 1 to 64 tokens


def test_a_prompt_too_long_is_an_error_of_its_own():
    model = tiny_model()
    prompts = [[5] * 10, [6] * 64, [7] * 20, []]
    samples = write(model, [Request(i, p, i, Sampling()) for i, p in enumerate(prompts)], context=64)
    assert samples[1].finish == samples[3].finish == "error"
    assert "64 tokens" in samples[1].error and "empty" in samples[3].error
    for i in (0, 2):
        assert samples[i].finish in ("eos", "repetition", "length") and samples[i].num_tokens <= 64 - len(prompts[i])
    filled = write(model, [Request(0, [5] * 60, 0, Sampling(repetition_penalty=1.3))], context=64)[0]
    assert filled.finish == "eos" or (filled.finish == "length" and filled.num_tokens == 4)


def test_ids_the_tokenizer_does_not_know_are_never_drawn():
    model = tiny_model("llama", vocab_size=len(TOKENIZER) + 200)
    hot = Sampling(temperature=50.0, top_k=0, top_p=1.0, max_new_tokens=60)
    sample = write(model, [Request(0, [5, 6, 7], 0, hot)])[0]
    assert max(sample.token_ids) < len(TOKENIZER)  # a tail of 200 ids would be missed 60 times with p < 0.01


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_with_holes_and_its_end_at_the_far_end(tied):
    """Ids above len(tokenizer) are drawn if the tokenizer has them, holes never are: greedy text is generate's."""
    state = json.loads(TOKENIZER.backend_tokenizer.to_str())
    size = 2 * len(TOKENIZER) + 300
    moved = {token: id_ if id_ < 500 else id_ + 700 for token, id_ in state["model"]["vocab"].items()}
    end = moved["<|im_end|>"] = size - 3
    state["model"]["vocab"] = moved
    for token in state["added_tokens"]:
        token["id"] = moved[token["content"]]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>")
    assert tokenizer.eos_token_id == end and len(tokenizer) == len(TOKENIZER)
    holes = sorted(set(range(size)) - set(tokenizer.get_vocab().values()))
    model = tiny_model("llama", vocab_size=size, tie_word_embeddings=tied)
    with torch.no_grad():
        model.lm_head.weight[end] *= 2.5  # or a text of 80 tokens would rarely end
    # One EOS more that the tokenizer lacks, as a generation config may name one.
    ends, prompts = {end, holes.pop(1)}, make_prompts(8)
    sampler = Sampler(model, tokenizer, eos_ids={*ends, size + 5}, context=2048)  # one that the head lacks
    for i, prompt in enumerate(prompts):
        sampler.add(Request(i, prompt, i, Sampling(temperature=0, max_new_tokens=80)))
    samples = {sample.request.key: sample for sample in sampler.run()}
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "repetition_penalty": 1.1, "max_new_tokens": 80, "eos_token_id": sorted(ends)}
        options |= {"suppress_tokens": holes, "attention_mask": torch.ones_like(ids)}
        want = model.generate(ids, **options)[0, len(prompt) :].tolist()
        assert samples[i].token_ids == want or samples[i].finish == "repetition", i
    assert {"eos"} <= {sample.finish for sample in samples.values()}
    assert max(max(sample.token_ids[:-1], default=0) for sample in samples.values()) > len(tokenizer)
    early = Sampling(min_new_tokens=10, max_new_tokens=12, temperature=0)
    sampler.add(Request(0, prompts[0], 0, early))
    assert all(token not in ends for sample in sampler.run() for token in sample.token_ids[:10])


# ---------------------------------------------------------------------------------------------------------
# Logits that are not finite


def break_forward(sampler: Sampler, value: float) -> None:
    """From now on column 7 of what every pass returns is that value."""
    own = sampler.hook.forward
    sampler.hook.forward = lambda *args, **more: own(*args, **more).index_fill(1, torch.tensor([7]), value)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(), Sampling(top_k=0, top_p=1)], ids=str)
def test_logits_that_are_not_finite_end_the_run(sampling, value):
    """In the middle of it, too: not token 0 for ever, and not a text drawn from the other logits."""
    sampler = make_sampler(tiny_model())
    sampler.add(Request(0, [5, 6, 7], 0, sampling))
    break_forward(sampler, value)
    with pytest.raises(UserError, match="logits are not finite in float32"):
        list(sampler.run())
    with pytest.raises(UserError, match="logits are not finite in float32"):
        sampler.logprobs([([5, 6], [7, 8])])


def test_a_model_without_finite_logits_is_not_called_one_that_cannot_be_carried():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = math.nan
    with pytest.raises(UserError, match="logits are not finite in float32") as error:
        make_sampler(model)
    assert "softmax" not in error.value.hint and "copy or download" in error.value.hint


def test_values_that_float16_cannot_hold_are_said_to_be_its_fault():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 3e4
    make_sampler(model)  # in float32 all is well
    with pytest.raises(UserError, match="largest that float16 has") as error:
        make_sampler(model.half())
    assert error.value.hint == "--dtype bfloat16, or float32"


# ---------------------------------------------------------------------------------------------------------
# Scores, memory, models


@pytest.mark.parametrize("known_head", [True, False], ids=["loss kernel", "logits"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logprobs_are_those_of_a_full_pass(family, known_head):
    model, prompts = tiny_model(family), make_prompts(6)
    if not known_head:  # LoRA on the head, or one that the kernel does not know
        head = model.lm_head
        model.lm_head = torch.nn.Sequential(head)
    pairs = [(p, q) for p, q in zip(prompts, prompts[1:], strict=False)]
    pairs += [(prompts[0], [5]), (prompts[0], [6]), (prompts[1], []), ([4], [7])]
    sampler = make_sampler(model)
    assert (sampler.scores.head is not None) == known_head
    assert bool([note for note in sampler.notes if "whole logits" in note]) == (not known_head)  # and it is said
    for got, (prompt, continuation) in zip(sampler.logprobs(pairs), pairs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation]), use_cache=False).logits[0].float()
        want = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(continuation).long()[:, None])[:, 0]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_out_of_memory_backs_off_and_the_texts_stay():
    model, prompts = tiny_model(), [p + list(range(300)) for p in make_prompts(5)]
    requests = [Request(i, p, i, Sampling(max_new_tokens=8)) for i, p in enumerate(prompts)]
    want = write(model, requests)
    sampler = make_sampler(model, prefill_tokens=1024)
    forward = sampler.hook.forward

    def limited(batch, ids, *rest):
        if len(ids) > 300 or len(batch.lengths) > 2:
            raise torch.OutOfMemoryError("no memory")
        return forward(batch, ids, *rest)

    sampler.hook.forward = limited
    for request in requests:
        sampler.add(request)
    assert {s.request.key: s.token_ids for s in sampler.run()} == {i: want[i].token_ids for i in range(5)}
    assert any("chunks of 256" in note for note in sampler.notes) and any("rows at once" in n for n in sampler.notes)


def test_room_that_is_not_there_is_shrunk(monkeypatch):
    """Out of memory while the pool is made: the largest that fits, and it is said. Nothing fits: an error in words."""
    make, most = PagedCache.__init__, [400]

    def limited(self, shapes, pages, *rest):
        if pages > most[0]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        make(self, shapes, pages, *rest)

    monkeypatch.setattr(PagedCache, "__init__", limited)
    sampler = make_sampler(tiny_model(), kv_tokens=1000 * 8)
    assert 360 < sampler.cache.num_pages <= 400 and sampler.scheduler.prefixes.room == -(-sampler.cache.num_pages // 2)
    assert any("have room for" in note and "not 8000" in note for note in sampler.notes)
    sampler.add(Request(0, [5, 6, 7], 0, Sampling(max_new_tokens=3)))
    assert len(list(sampler.run())) == 1
    most[0] = 3  # the probe's
    sampler = make_sampler(tiny_model(), kv_tokens=1000 * 8)
    assert sampler.cache.num_pages <= 3 and any("context held at" in note for note in sampler.notes)
    hook = Hook(tiny_model())
    monkeypatch.setattr("lengthen.sampling.engine.Hook", lambda model: hook)
    most[0] = 0
    with pytest.raises(UserError, match="no memory"):
        make_sampler(hook.model)


def test_the_warm_up_makes_chunks_smaller_until_one_fits():
    hook = Hook(tiny_model())
    forward, seen, sizes = hook.forward, [], {"page_tokens": 8, "context": 2048, "rows": 4}

    def limited(batch, ids, at, last, *_):
        seen.append((len(ids), len(last)))
        if len(ids) > 600:
            raise torch.OutOfMemoryError("no memory")
        return forward(batch, ids, at, last)

    hook.forward = limited
    assert warm_up(hook, torch.float32, chunk=2000, **sizes) == (0, 500)  # bytes, on CUDA only; tokens
    assert seen == [(2000, 4), (1000, 4), (500, 4)]
    hook.forward = lambda *_: limited(None, range(10**4), None, [])
    with pytest.raises(UserError, match="no memory"):
        warm_up(hook, torch.float32, chunk=500, **sizes)


def test_ctrl_c_hands_out_what_has_finished():
    """Three texts end in one step, which is interrupted before it is over: they come first, then the interrupt."""
    sampler = make_sampler(tiny_model())
    for i in range(4):
        sampler.add(Request(i, [5 + i, 6, 7], i, Sampling(max_new_tokens=2 if i < 3 else 50)))
    end_of = sampler.stopping.end_of

    def interrupted(row):
        if row.request.key == 3 and row.written == 2:
            raise KeyboardInterrupt
        return end_of(row)

    sampler.stopping.end_of, got = interrupted, []
    with pytest.raises(KeyboardInterrupt):
        for sample in sampler.run():
            got.append(sample.request.key)
    assert got == [0, 1, 2]


# ---------------------------------------------------------------------------------------------------------
# Who is next


def test_the_longest_start_first_what_follows_before_and_preempted_texts_before_all():
    sampler = make_sampler(tiny_model(), max_rows=1)
    for key, expected in (("a", 5), ("b", 50), ("c", 0), ("d", 50), ("e", 7)):
        sampler.add(Request(key, [5, 6, 7], 0, Sampling(max_new_tokens=3), expected_tokens=expected))
    sampler.step()
    sampler.scheduler.preempt(sampler.scheduler.rows[0])
    for key, expected in (("f", 6), ("g", 8)):
        more = Request(key, [5, 6, 7], 0, Sampling(max_new_tokens=3), expected_tokens=expected, follows=True)
        sampler.add(more)
    done = [sample.request.key for sample in sampler.run()]
    assert done == ["b", "g", "f", "d", "e", "a", "c"]  # equal ones in the order they came; no guess = last


def test_texts_are_let_in_by_the_length_they_are_expected_to_reach():
    """Room for 640 tokens. Told 30 tokens a text, all four run at once; told 500, one; and what it learns counts."""
    model = tiny_model()
    for expected, rows in ((30, 4), (300, 2), (500, 1)):
        sampler = make_sampler(model, kv_tokens=640, context=600)
        for i in range(4):
            sampler.add(Request(i, [5 + i] * 9, i, Sampling(max_new_tokens=550), expected_tokens=expected))
        sampler.scheduler.schedule()
        assert len(sampler.scheduler.rows) == rows
    sampler = make_sampler(model, kv_tokens=640, context=600)
    scheduler = sampler.scheduler
    scheduler.lengths.mean_output = 500.0
    for i in range(12):
        sampler.add(Request(i, [5 + i] * 9, i, Sampling(max_new_tokens=5)))
    most = 0
    while scheduler.queue or scheduler.rows:
        sampler.step()
        most = max(most, len(scheduler.rows))
    assert most > 2 and scheduler.lengths.mean_output < 250  # it began with one at a time
    request = Request(0, [5] * 9, 0, Sampling(max_new_tokens=5), expected_tokens=20)
    assert scheduler.lengths.remaining(request, 0) == 20
    for _ in range(40):  # texts four times as short as was said
        sampler.add(request)
    assert len(list(sampler.run())) == 12 + 40
    assert 4 < scheduler.lengths.remaining(request, 0) < 10 and scheduler.lengths.remaining(request, 100) == 25


def test_progress_says_what_runs_and_how_fast():
    sampler = make_sampler(tiny_model(), eos_ids=set())
    for i in range(6):
        sampler.add(Request(i, [5 + i] * 9, i, Sampling(max_new_tokens=40), expected_tokens=40))
    first = sampler.progress()
    assert (first.rows, first.kv, first.tokens_per_second) == (0, 0.0, 0.0)
    for _ in range(10):
        sampler.step()
    middle = sampler.progress()
    assert middle.rows == 4 and 0 < middle.kv < 0.1
    assert middle.tokens_per_second > 0 and middle.roofline > 0
    assert len(list(sampler.run())) == 6
    last = sampler.progress()
    assert (last.rows, last.kv) == (0, 0.0)


def test_a_step_costs_the_same_however_many_wait():
    """100,000 queued prompts, a model that computes nothing: calls made a step, and memory held for a request."""
    counts, held = {}, {}
    prompts = [[5, 6, 7 + i] * 20 for i in range(50)]
    for queued in (1_000, 100_000):
        sampler = make_sampler(tiny_model(), max_rows=16, lookup=False)
        sampler.hook.forward = lambda batch, ids, at, keep, _: torch.zeros(len(keep), len(TOKENIZER))
        sampler.drawer.draw = lambda draws, _: [EOS if row.written >= 2 + row.order % 5 else 9 for row, _ in draws]
        requests = [Request(i, prompts[i % 50], i, Sampling(max_new_tokens=20)) for i in range(queued)]
        tracemalloc.start()
        for request in requests:
            sampler.add(request)
        held[queued] = tracemalloc.get_traced_memory()[0] / queued
        tracemalloc.stop()
        for _ in range(60):
            sampler.step()
        events = []
        sys.setprofile(lambda frame, event, arg, seen=events: seen.append(event))
        for _ in range(100):
            sampler.step()
        sys.setprofile(None)
        counts[queued] = sum(event.endswith("call") for event in events)
        assert sampler.stats["samples"] > 200
    assert counts[100_000] < 1.05 * counts[1_000]
    assert held[100_000] < 300  # bytes: an entry of the queue, and no copy of the prompt


def test_the_model_is_its_own_again_after_the_sampler():
    model, ids = tiny_model(), torch.tensor([make_prompts(1, 30)[0]])
    before, where = model(ids).logits, [p.data_ptr() for p in model.parameters()]
    with make_sampler(model) as sampler:
        sampler.add(Request(0, ids[0].tolist(), 0, Sampling(max_new_tokens=3)))
        assert len(list(sampler.run())) == 1
        torch.testing.assert_close(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert all(p.is_contiguous() for p in model.parameters()) and len(where) == len(list(model.parameters()))
    assert torch.equal(model(ids).logits, before)
    model(ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


SIZES = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    "name,sizes,why",
    [
        ("mamba", {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, "Mamba"),
        ("qwen3_next", {**SIZES, "num_key_value_heads": 2, "num_experts": 0, "head_dim": 16}, "linear_attention"),
        ("bloom", {"vocab_size": 500, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "Bloom"),
    ],
)
def test_models_that_cannot_be_carried_are_refused_by_name(name, sizes, why):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval()
    with pytest.raises(UserError, match=why) as error:
        Sampler(model, TOKENIZER, eos_ids={EOS}, context=128)
    assert type(model).__name__ in error.value.message and error.value.hint


def test_a_wrong_answer_of_the_hook_is_noticed():
    """A model that bends its attention behind the interface's back (here: scores that forget the first token)."""
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    plain = attention.forward

    def bent(hidden_states, **kwargs):
        out, weights = plain(hidden_states, **kwargs)
        return out * (1 + (model.config._attn_implementation == "lengthen_paged")), weights

    attention.forward = bent
    with pytest.raises(UserError, match="differ from the model's own"):
        make_sampler(model)


def test_a_model_that_does_not_hand_the_batch_down():
    """To its attention, as Nemotron does not: the modules hold it instead. One that does not take it is refused: never
    an attention that mixes the texts of a batch."""
    requests = [Request(i, prompt, i, Sampling(max_new_tokens=20)) for i, prompt in enumerate(make_prompts(5))]
    want, model = write(tiny_model("gemma3"), requests), tiny_model("gemma3")
    for layer in model.model.layers:
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, lengthen_batch=None, plain=plain, **kwargs: plain(*args, **kwargs)
    got = write(model, requests)
    assert got[None].hook.holders and all(got[i].token_ids == want[i].token_ids for i in range(5))
    assert not any(hasattr(module, "lengthen_batch") for module in model.modules())
    model = tiny_model()
    whole = model.forward
    model.forward = lambda input_ids, position_ids=None, use_cache=None, logits_to_keep=0: whole(
        input_ids=input_ids, position_ids=position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep
    )
    with pytest.raises(UserError, match="takes no keyword arguments"):
        make_sampler(model)


def test_nemotron_whose_layers_keep_keyword_arguments_to_themselves():
    model, prompts = tiny_model("nemotron"), make_prompts(3)
    samples = write(
        model, [Request(i, p, i, Sampling(temperature=0, max_new_tokens=12)) for i, p in enumerate(prompts)]
    )
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "repetition_penalty": 1.1, "max_new_tokens": 12}
        want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        assert samples[i].token_ids == want, i
