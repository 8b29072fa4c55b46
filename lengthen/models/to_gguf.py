"""A model's folder as one GGUF file, for llama.cpp, Ollama and their like: weights, vocabulary, chat template.

llama.cpp keeps a model under names of its own, and the rows of a Llama's query and key matrices in another order: its
rotary embedding turns neighbouring pairs, that of transformers the two halves of a head. It splits text by rules that a
file only names (`tokenizer.ggml.pre`), so a tokenizer is recognised by its rules, and one that is not is refused: the
model would read other ids than it has learned. The `gguf` package knows the names and the format; the weights go
through it one by one, so a 7B model needs no more memory than its largest matrix.

The oracle is llama.cpp itself (tests/test_to_gguf.py): the same ids for the same text, the same greedy texts.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lengthen import cli
from lengthen.models.loading import load_chat, load_config
from lengthen.records import UserError, no_room, sync

if TYPE_CHECKING:
    from transformers import PretrainedConfig

QUANTIZED = {"f16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
             "q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0)}  # fmt: skip
ARCHITECTURES = {  # model_type -> llama.cpp's; a Mistral is a Llama to it
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
# Names of the rules by which text is split before merges, by the regular expression of tokenizer.json's Split.
_ENDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    _ENDS % "{1,3}": "llama-bpe",
    _ENDS % "": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}"
    r"\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
INSTEAD = "llama.cpp's convert_hf_to_gguf.py reads the folder of --merge-to, and knows more models"


def check_gguf(file: str | Path, folder: str | Path, trust_remote_code: bool = False) -> None:
    """UserError unless the model in `folder`, merged or not, can be written to `file`: asked before a training, too."""
    file = Path(file)
    if file.is_dir():
        raise UserError(f"--gguf {file} is a folder", f"--gguf {file}/model.gguf")
    try:
        with open(file, "rb") as there:
            replaceable = there.read(4) == b"GGUF"
    except FileNotFoundError:
        replaceable = True
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}", "--gguf another file") from None
    if not replaceable:
        raise UserError(f"{file} is there and is not a GGUF file: it is not replaced", "--gguf another file")
    config = load_config(str(folder), trust_remote_code)
    architecture_of(config)
    tokens = len(vocabulary_of(Path(folder), trust_remote_code).tokens)
    if tokens > config.vocab_size:
        raise UserError(f"--gguf: the tokenizer knows {tokens} ids, the model {config.vocab_size}", INSTEAD)


def write_gguf(folder: str | Path, file: str | Path, kind: str = "f16", trust_remote_code: bool = False) -> None:
    """Write the model of a folder (config.json, tokenizer.json, *.safetensors) into a file: whole, or not at all.

    kind: of the matrices, "f16" or "q8_0"; vectors stay fp32. UserError for a model that llama.cpp would misread.
    """
    folder, file = Path(folder), Path(file)
    check_gguf(file, folder, trust_remote_code)
    config = load_config(str(folder), trust_remote_code)
    architecture, vocabulary = architecture_of(config), vocabulary_of(folder, trust_remote_code)
    temporary = file.with_name(f".{file.name}.tmp")
    cli.say(f"writing {file} ({kind})")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
        add_sizes(writer, config, kind, folder.resolve().name)
        vocabulary.add_to(writer, config.vocab_size)
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        tensors = list(tensors_of(folder, config, names))
        for name, shape, _ in tensors:  # the list of all tensors stands before the first of them
            type_ = type_of(shape, kind)
            per_block, size = gguf.GGML_QUANT_SIZES[type_]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // per_block * size, type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, shape, values in tensors:
            writer.write_tensor_data(gguf.quants.quantize(values(), type_of(shape, kind)))
        writer.close()
        with open(temporary, "rb") as handle:
            sync(handle.fileno())
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise no_room(file, error) if isinstance(error, OSError) else UserError(f"{folder}: {error}") from error


# ---------------------------------------------------------------------------------------------------------
# Sizes


def architecture_of(config: "PretrainedConfig") -> gguf.MODEL_ARCH:
    """llama.cpp's name of it. UserError for what it does not compute as transformers does."""
    family = config.model_type
    if family not in ARCHITECTURES:
        raise UserError(f"--gguf writes {', '.join(ARCHITECTURES)} models, and this is {family}", INSTEAD)
    if (kind := rope_of(config).get("rope_type", "default")) not in ("default", "linear", "yarn", "llama3"):
        raise UserError(f"--gguf: positions that are scaled by {kind!r} are not written", INSTEAD)
    return ARCHITECTURES[family]


def rope_of(config: "PretrainedConfig") -> dict[str, Any]:
    """Theta and scaling of the rotary embedding, in transformers 5's words."""
    return config.rope_parameters or {}


def add_sizes(writer: gguf.GGUFWriter, config: "PretrainedConfig", kind: str, name: str) -> None:
    """All that llama.cpp wants to know of a model beside its tensors and its vocabulary."""
    heads, rope = config.num_attention_heads, rope_of(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
    scaling = rope.get("rope_type", "default")
    if scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(rope["factor"])
    if scaling == "yarn":
        before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(before)
    writer.add_file_type(QUANTIZED[kind][0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and window < config.max_position_embeddings:
        cli.say(f"llama.cpp gives this family no sliding window: beyond {window:,} tokens its texts are others")


# ---------------------------------------------------------------------------------------------------------
# Weights


Tensor = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]  # llama.cpp's name, shape, its fp32 values when called


def tensors_of(folder: Path, config: "PretrainedConfig", names: gguf.TensorNameMap) -> Iterator[Tensor]:
    """The weights of a folder."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in sorted(weights.keys()):
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue  # the embedding is used
                ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if ours is None:
                    raise UserError(f"--gguf: {name} of {file} has no place in llama.cpp's model", INSTEAD)
                shape = tuple(weights.get_slice(name).get_shape())
                yield ours, shape, partial(values_of, file, name, config)
    if rope_of(config).get("rope_type") == "llama3":
        factors = llama3_factors(config)
        yield gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight", factors.shape, lambda: factors


def values_of(file: Path, name: str, config: "PretrainedConfig") -> np.ndarray:
    """A weight in fp32, in the order of llama.cpp."""
    heads = {"q_proj": config.num_attention_heads}
    heads["k_proj"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    with safe_open(file, "pt") as weights:
        values = weights.get_tensor(name).to(torch.float32).numpy()
    layer = name.split(".")[-2]
    if layer in heads and ARCHITECTURES[config.model_type] == gguf.MODEL_ARCH.LLAMA:
        return neighbours(values, heads[layer])
    return values


def neighbours(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads x (2 halves of a head)] in the order of llama.cpp: the two that turn together side by side."""
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def llama3_factors(config: "PretrainedConfig") -> np.ndarray:
    """By what Llama 3.1's scaling divides each rotary frequency, fp32 [head size / 2]."""
    rope = rope_of(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    lengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head, 2, dtype=np.float64) / head)  # tokens per turn
    smooth = np.clip((old / lengths - low) / (high - low), 0.0, 1.0)  # 0: long waves, divided; 1: short ones, kept
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def type_of(shape: Sequence[int], kind: str) -> gguf.GGMLQuantizationType:
    """The type of a tensor in the file: matrices as asked, vectors (norms, biases) in fp32."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    blocks = kind == "q8_0" and shape[-1] % 32 == 0  # a block has 32 values of one row
    return QUANTIZED["q8_0" if blocks else "f16"][1]


# ---------------------------------------------------------------------------------------------------------
# Vocabulary


@dataclass
class Vocabulary:
    """A tokenizer in llama.cpp's words."""

    model: str  # "gpt2": merges of bytes; "llama": SentencePiece's pieces, by score
    split: str  # the name of its rules, "default" for SentencePiece
    tokens: list[tuple[str, gguf.TokenType, float]]  # by id: text, type, score
    merges: list[str]
    space_first: bool  # SentencePiece: a blank is put before the text
    roles: dict[str, int]  # bos, eos, unk, pad -> id
    begins: bool  # BOS is put before the text
    template: str

    def add_to(self, writer: gguf.GGUFWriter, size: int) -> None:
        """size: of the model's embedding, which may have rows to spare."""
        spare = [(f"[PAD{i}]", gguf.TokenType.UNUSED, -1e4) for i in range(len(self.tokens), size)]
        texts, types, scores = zip(*self.tokens, *spare, strict=True)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(texts)
        writer.add_token_types(types)
        if self.model == "llama":
            writer.add_token_scores(scores)
            writer.add_add_space_prefix(self.space_first)
        else:
            writer.add_token_merges(self.merges)
        for role, number in self.roles.items():
            getattr(writer, f"add_{role}_token_id")(number)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(False)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary_of(folder: Path, trust_remote_code: bool = False) -> Vocabulary:
    """The tokenizer of a folder. UserError where llama.cpp has no name for its rules."""
    chat = load_chat(str(folder), trust_remote_code)
    tokenizer = chat.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"--gguf: {folder} has no tokenizer.json", INSTEAD)
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise UserError(f"--gguf: a tokenizer of type {model['type']} is not written", INSTEAD)
    pieces = bool(model.get("byte_fallback"))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    # SentencePiece joins the two neighbours whose piece has the highest score; merges stand in that order.
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges if pieces else ()):
        rank.setdefault("".join(pair.split(" ", 1)), number)
    unknown = model.get("unk_token")
    tokens = {}
    for text, number in model["vocab"].items():
        kind = gguf.TokenType.NORMAL
        if pieces:
            kind = gguf.TokenType.BYTE if is_byte(text) else gguf.TokenType.UNKNOWN if text == unknown else kind
        tokens[number] = text, kind, -float(rank.get(text, len(merges)))
    for added in rules["added_tokens"]:
        if tokens.get(added["id"], ("", None))[1] is not gguf.TokenType.UNKNOWN:
            kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
            tokens[added["id"]] = added["content"], kind, 0.0
    gap = [(f"[PAD{i}]", gguf.TokenType.UNUSED, -1e4) for i in range(max(tokens) + 1)]
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    roles = {role: number for role, number in roles.items() if number is not None}
    roles |= dict(zip(("eot", "eom"), sorted(set(chat.eos_ids) - {roles.get("eos")}), strict=False))  # more ends
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):
        template = template.get("default", "")
    ids = tokenizer("a").input_ids
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        split="default" if pieces else split_of(rules["pre_tokenizer"], folder),
        tokens=[tokens.get(i, gap[i]) for i in range(len(gap))],
        merges=merges,
        space_first="Prepend" in json.dumps([rules["normalizer"], rules["pre_tokenizer"]])
        or '"prepend_scheme": "first"' in json.dumps(rules["pre_tokenizer"]),
        roles=roles,
        begins="bos" in roles and bool(ids) and ids[0] == roles["bos"],
        template=template,
    )


def is_byte(text: str) -> bool:
    """SentencePiece's <0x0A>"""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def split_of(rules: dict[str, Any] | None, folder: Path) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text, of its pre_tokenizer in tokenizer.json."""
    steps = (rules or {}).get("pretokenizers") or [rules or {}]
    kinds = [step.get("type") for step in steps]
    regex = steps[-1].get("use_regex", True) and not steps[-1].get("add_prefix_space")
    if kinds == ["ByteLevel"] and regex:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and regex:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(steps[0]["pattern"].get("Regex", ""))):
        return name
    raise UserError(f"--gguf: {folder} splits text by rules that llama.cpp has no known name for", INSTEAD)
