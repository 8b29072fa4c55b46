"""pytest tests/test_to_gguf.py: a GGUF file of ours is the model it was made of.

Two oracles: transformers' reader of the format (quick), and llama.cpp itself (marker real_model): the same ids for the
same texts, the same greedy texts. llama.cpp is this interpreter's, or that of the one that LLAMA_CPP_PYTHON names:
    pip install llama-cpp-python==0.3.36
    LLAMA_CPP_PYTHON=/path/to/python python -m pytest tests/test_to_gguf.py -m ""
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny import CHAT_TEMPLATE, save_tiny, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, trainers
from tokenizers import models as token_models
from tokenizers import pre_tokenizers as pre
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lengthen.models import to_gguf
from lengthen.models.gguf import demo_file
from lengthen.models.loading import folder_of
from lengthen.models.to_gguf import check_gguf, llama3_factors, vocabulary_of, write_gguf
from lengthen.records import UserError

TEXTS = [
    "A river, a garden and 1234567 lanterns: it's 3.14 o'clock!",
    "  two blanks\n\nand a paragraph\t— “quoted” … 河流很长。",
    "<|im_start|>user\nDon't stop<|im_end|>\n",
    "ÄÖÜ naïve 🌊 x=y+z; foo_bar(42)\r\n   end ",
]
LLAMA_CPP = """
import json, sys
from llama_cpp import Llama
asked = json.load(sys.stdin)
# Keys and values in fp32, one thread: the difference that is left is the weights' type.
llm = Llama(asked["file"], n_ctx=1024, n_threads=1, type_k=0, type_v=0, verbose=False)
ids = [llm.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]]
greedy = []
for prompt in asked["prompts"]:
    llm.reset()
    tokens = []
    for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
        tokens.append(token)
        if len(tokens) == asked["count"]:
            break
    greedy.append(tokens)
chat = llm.metadata.get("tokenizer.chat_template", "")
print(json.dumps({"ids": ids, "greedy": greedy, "chat": chat, "eos": llm.token_eos()}))
"""


def llama_cpp(file: Path, texts: list[str], prompts: list[list[int]], count: int = 64) -> dict:
    """What llama.cpp makes of a file: the ids of texts, and `count` greedy tokens after each prompt."""
    python = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip("no llama.cpp: pip install llama-cpp-python==0.3.36, or LLAMA_CPP_PYTHON=/path/to/python")
    asked = json.dumps({"file": str(file), "texts": texts, "prompts": prompts, "count": count})
    done = subprocess.run([python, "-c", LLAMA_CPP], input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def with_tokenizer(folder: Path, tokenizer: Tokenizer, **special: str) -> Path:
    """A folder's tokenizer replaced by another."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special).save_pretrained(folder)
    return folder


def split_by(regex: str, vocab_size: int = 900) -> Tokenizer:
    """Byte-level BPE whose text is split by a regular expression, as Llama 3's and Qwen's is."""
    tokenizer = Tokenizer(token_models.BPE())
    behaviour = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre.Sequence([pre.Split(Regex(regex), "isolated"), behaviour])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "12 123 1234 12345 the river's long way"] * 4, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """What Llama 2 and Mistral have: pieces with ▁ for a blank, bytes for what is in none of them."""
    tokenizer = Tokenizer(token_models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator([TEXTS[0], "a garden of the river, and the garden again"] * 4, trainer)
    rules = json.loads(tokenizer.to_str())
    rules["added_tokens"] = [added for added in rules["added_tokens"] if added["content"] not in bytes_]
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def tiny(folder: Path, family: str, plain: bool = False) -> Path:
    """A random fp32 model of a family, with the tokenizer that such models have; plain: without what few have."""
    changes = {"sliding_window": None} if family == "mistral" else {}
    if family == "llama" and not plain:
        scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaled |= {"original_max_position_embeddings": 256, "rope_theta": 5e5}
        changes |= {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": scaled}
    # Seed 1: with seed 0 the Mistral's two best logits once differ by less than llama.cpp rounds its fp16 products.
    save_tiny(folder, family, seed=1, vocab_size=1024, **changes)
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    regexes = {name: regex for regex, name in to_gguf.SPLITS.items()}
    match family:
        case "llama":
            with_tokenizer(folder, split_by(regexes["llama-bpe"]), **ends)
        case "qwen2":
            with_tokenizer(folder, split_by(regexes["qwen2"]), **ends)
        case "mistral":
            with_tokenizer(folder, sentencepiece_like(), unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return folder


FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


def rounded(folder: Path) -> torch.nn.Module:
    """The model with its matrices in the precision of the file, computing in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
    return model


def greedy(model: torch.nn.Module, prompt: list[int], count: int = 64) -> list[int]:
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None  # llama.cpp is not stopped either
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # its reader takes the others' sizes for granted
def test_transformers_reads_back_the_model_that_was_written(family, tmp_path):
    folder = tiny(tmp_path / family, family, plain=True)
    write_gguf(folder, tmp_path / "out" / "model.gguf")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.gguf"]
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    ours = rounded(folder)
    ids = torch.arange(7, 47)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.real_model
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_reads_the_same_ids_and_writes_the_same_text(family, tmp_path):
    folder = tiny(tmp_path / family, family)
    write_gguf(folder, tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    model, prompts = rounded(folder), [ids[0], list(range(300, 330))]
    theirs = llama_cpp(tmp_path / "model.gguf", TEXTS, prompts)
    assert theirs["ids"] == ids
    assert theirs["chat"] == CHAT_TEMPLATE and theirs["eos"] == tokenizer.eos_token_id
    assert theirs["greedy"] == [greedy(model, prompt) for prompt in prompts]


@pytest.mark.real_model
def test_llama_cpp_writes_what_the_real_model_writes(tmp_path):
    """SmolLM2, with an adapter merged in by train.py itself: its text of 64 tokens after a chat prompt is the same."""
    import train

    folder, records = folder_of("smollm2"), tmp_path / "extended.jsonl"
    row = {"prompt": "Write about a river.", "initial": "A river.", "response": "A river runs to the sea. " * 4}
    records.write_text("".join(json.dumps({**row, "id": str(i), "language": "en"}) + "\n" for i in range(2)))
    train.main(
        [
            *(
                "--role",
                "generator",
                "--model",
                "smollm2",
                "--input",
                str(records),
                "--output",
                str(tmp_path / "adapter"),
            ),
            *("--epochs", "1", "--merge-to", str(tmp_path / "merged"), "--gguf", str(tmp_path / "model.gguf")),
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Why is the sky blue? Answer in three paragraphs."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    theirs = llama_cpp(tmp_path / "model.gguf", TEXTS, [prompt])
    assert theirs["ids"] == [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    mine = greedy(rounded(tmp_path / "merged"), prompt)
    assert tokenizer.decode(theirs["greedy"][0]) == tokenizer.decode(mine)
    assert demo_file().exists() and theirs["chat"] == tokenizer.chat_template


def test_q8_0_holds_each_block_of_32_to_one_part_in_254(tmp_path):
    folder = tiny(tmp_path / "m", "qwen2")
    for kind in ("f16", "q8_0"):
        write_gguf(folder, tmp_path / f"{kind}.gguf", kind)
    assert (tmp_path / "q8_0.gguf").stat().st_size < 0.75 * (tmp_path / "f16.gguf").stat().st_size
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "q8_0.gguf").tensors}
    tensor, want = tensors["token_embd.weight"], state["model.embed_tokens.weight"].float().numpy()
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    largest = np.abs(want.reshape(-1, 32)).max(1)
    assert (np.abs(values - want).reshape(-1, 32).max(1) <= 1.01 * largest / 254 + 1e-3 * largest).all()
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert tensors["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16  # 112: no whole blocks


def test_llama_3s_scaling_is_that_of_transformers(tmp_path):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(tiny(tmp_path / "m", "llama"))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(torch.from_numpy(llama3_factors(config)), plain / scaled, rtol=1e-5, atol=0)


def test_what_llama_cpp_would_misread_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="and this is gemma2") as error:
        check_gguf(tmp_path / "m.gguf", save_tiny(tmp_path / "gemma", "gemma2"))
    assert "convert_hf_to_gguf.py" in error.value.hint
    odd = with_tokenizer(save_tiny(tmp_path / "odd", "llama", vocab_size=1024), split_by(r"\p{N}{2}|\s+"))
    with pytest.raises(UserError, match="no known name"):
        check_gguf(tmp_path / "m.gguf", odd)
    (tmp_path / "thesis.gguf").write_text("years of work")
    with pytest.raises(UserError, match="not a GGUF file: it is not replaced"):
        check_gguf(tmp_path / "thesis.gguf", save_tiny(tmp_path / "fine", "qwen2"))
    with pytest.raises(UserError, match="is a folder"):
        check_gguf(tmp_path, tmp_path / "fine")
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UserError, match="'dynamic'"):
        check_gguf(tmp_path / "m.gguf", save_tiny(tmp_path / "dynamic", "llama", rope_parameters=scaled))


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    folder, file = save_tiny(tmp_path / "m", "qwen2"), tmp_path / "model.gguf"
    write_gguf(folder, file)
    before, calls = file.read_bytes(), []

    def full(tensor, kind):
        calls.append(tensor)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return real(tensor, kind)

    real = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", full)
    with pytest.raises(UserError, match="No space left"):
        write_gguf(folder, file)
    assert file.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_the_names_of_the_rules_are_those_that_our_reader_knows(tmp_path):
    """What is written here is read by --model again."""
    from lengthen.models.gguf import KNOWN_SPLITS

    assert {*to_gguf.SPLITS.values(), "gpt-2", "smollm"} <= KNOWN_SPLITS
    assert vocabulary_of(save_tiny(tmp_path / "m", "llama")).split == "gpt-2"
    assert len(tiny_tokenizer()) == len(vocabulary_of(tmp_path / "m").tokens)
