"""A model by its name: hub id, local folder, .gguf file, or `smollm2` (the demo's), ready to sample from or to train.

Every mistake a user can make here ends in a UserError of one line. Weights are safetensors only (nothing is unpickled),
a repository's own code runs only with --trust-remote-code, and a file that lacks weights is refused: transformers would
fill the gap with random numbers. Of the model's generation config only the EOS ids are kept: its temperatures and
penalties are not ours.
"""

from __future__ import annotations  # transformers loads its classes when they are named: not for a type hint

import importlib.util
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

import kernels
from lengthen import cli
from lengthen.jobs import read_sidecar
from lengthen.models import lora
from lengthen.models.chat import Chat
from lengthen.models.errors import explained, first_line
from lengthen.models.gguf import converted, demo_file, origin_notes
from lengthen.records import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NF4_BELOW = 40e9  # bytes of GPU memory: smaller cards get 4-bit weights by default
NF4_BLOCK = 64  # weights that share a scale

# Where Hugging Face's package of the same name came first on the path, ours is searched too (see kernels/__init__.py).
OUR_KERNELS = str(Path(__file__).parents[2] / "kernels")
if OUR_KERNELS not in map(os.path.abspath, kernels.__path__):
    kernels.__path__.insert(0, OUR_KERNELS)


@dataclass
class LoadedModel:
    """A model in eval mode with all its parameters frozen, and what was decided on the way."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    chat: Chat
    device: torch.device
    dtype: torch.dtype  # of the weights, and of the arithmetic over NF4 weights
    quantize: str  # "none" or "nf4"
    context: int  # tokens, prompt and answer together
    name: str  # as the user gave it
    notes: list[str] = field(default_factory=list)  # lines to echo once: what was chosen, and why


def load_model(
    name: str,
    *,
    adapter: str = "",
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "auto",
    trust_remote_code: bool = False,
    train: bool = False,
) -> LoadedModel:
    """Load it and, unless `train`, apply the adapter: merged into the weights, or as LoRA layers over NF4.

    Raises UserError for anything that is wrong with the name, the files, the machine or the adapter.
    """
    target, device_why = choose_device(device)
    config, source = load_config(name, trust_remote_code), _resolve(name)
    quantize, quantize_why = choose_quantize(quantize, target, memory_of(target), config, name)
    weight_dtype, dtype_why = choose_dtype(dtype, target)
    chat = load_chat(name, trust_remote_code)
    tokenizer = chat.tokenizer
    with explained(name, own_code=trust_remote_code):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=weight_dtype,
            quantization_config=_nf4(weight_dtype) if quantize == "nf4" and not _prequantised(config) else None,
            device_map={"": target} if target.type == "cuda" else None,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, loading = loaded  # loading: which tensors were missing, or not used
    _check_weights(name, model, chat, loading, weight_dtype)
    if type(model).__module__.startswith("transformers_modules"):  # the repository's code may only load
        with explained(name, own_code=True), torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]], device=target), use_cache=False)
    if quantize == "nf4" and target.type == "cpu":
        check_rows(name, model)
        for module in model.modules() if train else ():
            # An evaluation would lay 4-bit weights out for AVX512-BF16, which bitsandbytes 0.50 gives no gradient.
            if type(module).__name__ == "Linear4bit":
                module.support_avx512bf16_for_cpu = False
    model = model.eval().requires_grad_(False)
    _drop_generation_config(model, chat.eos_ids)
    context, context_why = context_length(config, tokenizer)
    text_config = config.get_text_config()
    size = f"{text_config.model_type}, {model.num_parameters() / 1e9:.3g}B parameters"
    notes = [
        f"model: {name} ({size}), context {context:,} tokens{context_why}",
        *origin_notes(source),
        *chat.notes,
        f"device: {device_why}",
        f"dtype: {str(weight_dtype).removeprefix('torch.')} ({dtype_why})",
        f"quantize: {quantize} ({quantize_why})",
        f"attention: {model.config._attn_implementation} (transformers' choice for it; the sampler sets its own)",
    ]
    if unused := sorted(loading["unexpected_keys"]):
        notes.append(f"warning: {len(unused)} tensors of the files are not used by this model, {unused[0]} for one")
    if adapter and not train:
        notes += _apply(adapter, model, quantize)
    return LoadedModel(model, tokenizer, chat, target, weight_dtype, quantize, context, name, notes)


def load_config(name: str, trust_remote_code: bool = False) -> transformers.PretrainedConfig:
    """The sizes of the model, without its weights."""
    _quiet()
    source = _resolve(name)
    with explained(name, own_code=trust_remote_code):
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer alone."""
    _quiet()
    source = _resolve(name)
    with explained(name, "tokenizer", own_code=trust_remote_code):
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_chat(name: str, trust_remote_code: bool = False) -> Chat:
    """The tokenizer and its template, with every EOS that the model's files name; without its weights."""
    tokenizer, source = load_tokenizer(name, trust_remote_code), _resolve(name)
    with explained(name):  # a ValueError: without its file the model would have other ends
        try:
            generation = transformers.GenerationConfig.from_pretrained(source)
        except OSError:  # there is none
            generation = transformers.GenerationConfig.from_model_config(load_config(name, trust_remote_code))
    eos = generation.eos_token_id
    return Chat(tokenizer, [eos] if isinstance(eos, int) else eos or ())


def _quiet() -> None:
    """No progress bars of loading and no advice; what matters of it we check and say ourselves."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    if cli.console.is_terminal:
        huggingface_hub.utils.enable_progress_bars()  # of downloads: they take minutes


# ---------------------------------------------------------------------------------------------------------
# Name -> folder or hub id


def _resolve(name: str) -> str:
    """What from_pretrained takes: a folder that exists, or a hub id."""
    if name == "smollm2":
        return str(converted(demo_file()))
    path = Path(name or "?").expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"there is no file {name}", "--model takes a .gguf file, a folder, a hub id, or smollm2")
        return str(converted(path))
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.exists():
        raise UserError(
            f"{name} is a file, but not a .gguf", "--model takes a .gguf file, a folder, a hub id, or smollm2"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UserError(
            f"{name} is neither a folder nor a hub id",
            "--model takes a folder, a .gguf file, a hub id such as Qwen/Qwen2.5-7B-Instruct, or smollm2",
        )
    return name


def folder_of(name: str) -> Path:
    """Where the files of a model are; those of a hub id are its snapshot, completed by the small ones."""
    source = _resolve(name)
    if Path(source).is_dir():
        return Path(source)
    with explained(name):
        patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.py"]
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))


def stored_dtype(folder: Path) -> str:
    """The name in DTYPES that most bytes of a folder's safetensors files have."""
    sizes: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for tensor in (t for name, t in header.items() if name != "__metadata__"):
            sizes[tensor["dtype"]] += tensor["data_offsets"][1] - tensor["data_offsets"][0]
    names = {"F32": "float32", "F16": "float16"}
    return names.get(sizes.most_common(1)[0][0] if sizes else "", "bfloat16")


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        # With PEFT installed transformers would apply it silently.
        raise UserError(f"{folder} is an adapter", f"--model its base model, --adapter {folder}")
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        with explained(str(folder)):
            files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if missing := [file for file in files if not (folder / file).exists()]:
            raise UserError(
                f"{folder} lacks {len(missing)} of its {len(files)} weight files, {missing[0]} for one",
                "copy or download it again",
            )
    if not (folder / "config.json").exists():
        found = sorted(folder.glob("*.gguf"))
        hint = f"--model {found[0]}" if found else "a model's folder is what save_pretrained or a download wrote"
        raise UserError(f"{folder} holds no model: config.json is missing", hint)


# ---------------------------------------------------------------------------------------------------------
# Device, dtype, quantisation: the choice and why. train.py --plan asks the same functions.


def choose_device(name: str) -> tuple[torch.device, str]:
    """--device -> (the device, which is the current one of CUDA from here on; a line on it)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        why = "the first CUDA device" if name == "cuda" else "no CUDA device found"
    else:
        why = "as asked for"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            why += f", {torch.cuda.get_device_name(device)}, {memory_of(device) / 1e9:.0f} GB"
            torch.cuda.set_device(device)  # where Triton launches and CUDA graphs are captured, whatever tensors say
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises for a device it lacks
        raise UserError(f"--device {name}: {first_line(error)}", "--device cpu, or auto") from None
    return device, f"{device} ({why})"


def memory_of(device: torch.device) -> float:
    """Bytes of a GPU's memory; 0 for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def choose_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """--dtype on such a device -> (dtype of the weights, why)."""
    if dtype != "auto":
        return DTYPES[dtype], "as asked for"
    if device.type == "cpu":
        return torch.float32, "the default on a CPU" + "; --dtype bfloat16 is faster on this one" * multiplies_bf16()
    return torch.bfloat16, "the default on cuda"


def multiplies_bf16() -> bool:
    """Whether this computer's CPU has products in bf16, which are faster than those in fp32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def choose_quantize(
    quantize: str, device: torch.device, memory: float, config: transformers.PretrainedConfig, name: str
) -> tuple[str, str]:
    """--quantize on a device with so many bytes -> ("none" or "nf4", why). UserError for what cannot be loaded."""
    if _prequantised(config):
        method = dict(config.quantization_config)
        if not (method.get("load_in_4bit") and method.get("bnb_4bit_quant_type") == "nf4") or quantize == "none":
            raise UserError(
                f"{name} is quantised already ({method.get('quant_method')})",
                "take the unquantised model, and --quantize nf4 for 4-bit weights",
            )
        chosen, why = "nf4", "as its files are"
    elif quantize != "auto":
        assert quantize in ("none", "nf4"), quantize
        slow = quantize == "nf4" and device.type == "cpu"
        chosen, why = quantize, "as asked for" + (", slow on a CPU" if slow else "")
    elif device.type == "cpu":
        chosen, why = "none", "the default on cpu"
    elif memory < NF4_BELOW:
        chosen, why = "nf4", f"the GPU has less than {NF4_BELOW / 1e9:.0f} GB"
    else:
        chosen, why = "none", "memory allows"
    if chosen == "nf4":
        for package in ("bitsandbytes", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"nf4 weights need {package}", f"pip install {package}, or --quantize none")
    return chosen, why


def _prequantised(config: transformers.PretrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _nf4(dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    """QLoRA's storage: 4-bit NormalFloat, the scales quantised once more (0.4 bits a weight less)."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


# ---------------------------------------------------------------------------------------------------------
# After loading


def _check_weights(name: str, model: Any, chat: Chat, loading: dict[str, Any], dtype: torch.dtype) -> None:
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{name}: the files hold no {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            "is the download complete, and config.json of this model?",
        )
    rows = model.get_input_embeddings().weight.shape[0]
    # An image token above them does no harm (Gemma 3 1B has one): it is never drawn, and no text becomes it.
    special = {i for i, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    written = chat.encode([{"role": "user", "content": "a"}])
    largest = max({*chat.tokenizer.get_vocab().values()} - special | set(written))
    if largest >= rows:
        raise UserError(
            f"{name}: the tokenizer has ids up to {largest}, the model only {rows} embeddings",
            "the tokenizer's files are of another model: copy both from the same place",
        )
    if damaged := _not_finite(model):
        why = ("holds NaN or infinity", "copy or download it again")
        if dtype == torch.float16:
            why = ("holds numbers that are too large for float16", "--dtype bfloat16, or float32")
        raise UserError(f"{name}: {damaged} {why[0]}", why[1])


def _not_finite(model: torch.nn.Module) -> str:
    """The name of a parameter that holds NaN or infinity, "" = none. Packed 4-bit weights are not looked at."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.dtype in DTYPES.values() and p.numel()]
    # Both pass on a NaN, and neither adds up to an infinity. One read of the device for all.
    extremes = torch.stack([torch.stack(p.aminmax()).float() for _, p in parameters])  # [n, 2]
    return next(
        (name for (name, _), ok in zip(parameters, extremes.isfinite().all(1).tolist(), strict=True) if not ok), ""
    )


def check_rows(name: str, model: Any) -> None:
    """UserError for a model, in 4 bits or not yet loaded (meta device), that bitsandbytes misreads on a CPU.

    0.50 quantises a matrix there in flat blocks, and reads it as if each row began a block.
    """
    for layer, module in lora.decoder_linears(model).items():
        weight: Any = module.weight
        block = weight.quant_state.blocksize if hasattr(weight, "quant_state") else NF4_BLOCK if weight.is_meta else 1
        if module.in_features % block:
            raise UserError(
                f"{name}: bitsandbytes misreads {layer} on a CPU, whose rows of {module.in_features} weights are no"
                f" multiple of {block}",
                "--quantize none on a CPU, or a GPU",
            )


class HostEmbedding(torch.nn.Module):
    """An embedding whose matrix stays in host memory; its rows, [..., H], come to the device of the ids."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = weight  # no parameter and no buffer: it neither moves with the model nor stands for its device

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids.to(self.weight.device), self.weight).to(ids.device)


def embeddings_to_host(model: transformers.PreTrainedModel) -> None:
    """Frees what the input embedding takes on the device: V x H, 1 GB for an 8B model. UserError where it is needed.

    A model without data (torch's meta device) is changed alike, for the plan.
    """
    old, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(old) is not torch.nn.Embedding or (head is not None and head.weight is old.weight):
        why = "it is the head, too" if type(old) is torch.nn.Embedding else f"it is a {type(old).__name__}"
        raise UserError(f"--embeddings host cannot move the embedding of this model: {why}", "leave it out")
    weight = old.weight.detach()
    model.set_input_embeddings(HostEmbedding(weight if weight.is_meta else weight.cpu()))


def _drop_generation_config(model: transformers.PreTrainedModel, eos_ids: set[int]) -> None:
    """Nothing but EOS stays in it: its sampling defaults must not leak in. UserError where the head has no EOS."""
    ends = sorted(i for i in eos_ids if i < model.config.get_text_config().vocab_size)
    if not ends:
        raise UserError(
            f"{model.name_or_path}: every EOS id ({', '.join(map(str, sorted(eos_ids)))}) is above its vocabulary of"
            f" {model.config.get_text_config().vocab_size}: no text would end",
            "the tokenizer or generation_config.json is of another model: copy them from the same place",
        )
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends)


def context_length(
    config: transformers.PretrainedConfig, tokenizer: transformers.PreTrainedTokenizerBase
) -> tuple[int, str]:
    """(tokens that a model takes, a remark). YaRN is stated beside the old limit, other RoPE scalings are in it."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "max_sequence_length", "seq_length", "max_seq_len")
    limit = next((getattr(text, n) for n in names if isinstance(getattr(text, n, None), int)), 0)
    said = tokenizer.model_max_length if tokenizer.model_max_length < 1 << 30 else 0  # transformers: 1e30 = not known
    if not limit:
        limit = said or 4096
        return limit, " (what the tokenizer says)" if said else " (a guess: the model names no limit)"
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings"):
        limit = max(limit, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return limit, f" (the tokenizer says {said:,}, which is not the model's limit)" if 0 < said < limit else ""


def _apply(adapter: str, model: transformers.PreTrainedModel, quantize: str) -> list[str]:
    trained_on = read_sidecar(adapter).get("quantize", quantize)
    if quantize == "nf4":
        lora.attach_adapter(model, adapter)
        notes = [f"adapter: {adapter}, as LoRA layers over the nf4 weights"]
    else:
        lora.merge_adapter(model, adapter)
        notes = [f"adapter: {adapter}, merged into the weights"]
    if trained_on != quantize:
        notes.append(f"warning: {adapter} was trained with --quantize {trained_on}, and is used with {quantize}")
    return notes
