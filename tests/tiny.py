"""Tiny models for the tests: random ones of each family, and a hand-built one whose texts can pass the filters.

Nothing is downloaded: the tokenizer is trained on the word list below, the weights are random or written by hand.
"""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

WORDS = """the a of and to in is was for on that with as at by from this they we you he she it not have are were be
will can had one all there when who which their more time would about out if up no so some could them other than then
its only new these may two first any my now such like our over man me even most made after also did many before must
through years where much your way well down should because each just those people state good very make world still own
see men work long get here between both life being under never day same another know while last might us great old year
off come since against go came right used take three river garden winter morning window letter market bridge school
teacher mountain harbour story village summer evening kitchen journey forest paper music silence harvest lantern stone
water light shadow colour number question answer reason method measure table chapter section detail example pattern
shape season weather coast island valley meadow orchard street corner station engine wheel clock mirror photograph
memory custom craft trade price value union council record history language grammar sentence paragraph verse rhythm
Yes No Instruction article write describe explain user assistant system""".split()

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTEXT = 2048  # tokens


@cache
def tiny_tokenizer(chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE over WORDS; any text round-trips. PAD is EOS, as SmolLM2 has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" " + " ".join(WORDS), *WORDS, "a. b.\n\n", "c\n"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        bos_token=None,
        chat_template=chat_template,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3")


def tiny_config(family: str, vocab_size: int = 0, **changes: object) -> AutoConfig:
    """Two layers, grouped-query attention, and what makes each family different (sliding windows, soft caps, ...)."""
    sizes = {
        "vocab_size": vocab_size or len(tiny_tokenizer()),
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,  # far from uniform outputs, so that a wrong logit changes the greedy token
        "eos_token_id": 2,
        "pad_token_id": 2,
        "bos_token_id": None,
        "tie_word_embeddings": False,  # tied and random, Gemma would only repeat its last token
    }
    special = {
        "mistral": {"sliding_window": 24},
        "gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 16},
        "gemma3": {"sliding_window": 24, "query_pre_attn_scalar": 16, "num_hidden_layers": 6},
        "phi3": {"sliding_window": 24},
    }.get(family, {})
    name = {"gemma3": "gemma3_text"}.get(family, family)
    return AutoConfig.for_model(name, **{**sizes, **special, **changes})


def tiny_model(family: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random fp32 model of that family, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 2
    return model.eval()


def save_tiny(folder: Path, family: str = "llama", seed: int = 0, **changes: object) -> Path:
    """A folder that --model takes: tiny_model and tiny_tokenizer."""
    tiny_model(family, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def save_writer(folder: Path, stop: float = 2.8) -> Path:
    """A model of ~2 layers that writes sentences of random English words, paragraphs, and then its EOS.

    Written by hand, so that drafts and extensions of an untrained model can pass the filters. Three axes of the hidden
    state are kept apart: one that is always on, one for "the last token was a full stop", one for "was a paragraph
    break"; the rest is a random code of the last token, read by a random head: a bigram model. `stop` is the logit of
    EOS after a full stop (an ordinary word has 0 +- 1.4): the larger, the shorter the texts.
    """
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    size, width = len(tokenizer), 96
    config = tiny_config(
        "llama", hidden_size=width, num_attention_heads=4, num_key_value_heads=2, head_dim=24, initializer_range=0.002
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    full_stop, paragraph = tokenizer.convert_tokens_to_ids("."), tokenizer.convert_tokens_to_ids("ĊĊ")
    assert None not in (full_stop, paragraph), "the tokenizer must know '.' and a blank line as single tokens"
    # Sorted: the order of a vocabulary differs from process to process, and the weights below follow it.
    vocabulary = sorted(tokenizer.get_vocab().items())
    words = [i for t, i in vocabulary if t.startswith("Ġ") and len(t) > 2 and t[1:] in set(WORDS)]

    code = torch.nn.functional.normalize(torch.randn(size, width - 3), dim=1)
    state = torch.zeros(size, width)
    state[:, 0], state[full_stop, 1], state[paragraph, 2] = 1, 1, 1
    state[:, 3:] = code
    head = torch.zeros(size, width)
    head[:, 0] = -3.0  # bytes and pieces of words: never
    head[words, 0] = 0.0
    head[words, 3:] = 2.0 * torch.nn.functional.normalize(torch.randn(len(words), width - 3), dim=1)
    plain, after = (width / 2) ** 0.5, (width / 3) ** 0.5  # what the final norm makes of the "always on" axis
    head[full_stop, :3] = torch.tensor([3.2 / plain, -2.0, -2.0])
    for token, logit in ((tokenizer.eos_token_id, stop), (paragraph, 4.0)):
        head[token, :3] = torch.tensor([-6.0 / plain, logit / after + 6.0 / plain, -2.0])
    head[tokenizer.convert_tokens_to_ids("Yes"), 0] = -1.0  # the judge's answer: yes, by a clear margin
    head[tokenizer.convert_tokens_to_ids("No"), 0] = -1.5
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(state)
        model.lm_head.weight.copy_(head)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
