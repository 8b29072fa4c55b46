"""pytest tests/test_export.py: what we hand on is read by transformers 4, vLLM, mlx-lm and llama.cpp's converter.

The oracles: PEFT's own merge, and the rules of transformers 4.57 that these files are read by (tried by hand with it).
"""

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import CHAT_TEMPLATE, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from lengthen.cli import ModelFlags
from lengthen.jobs import Lock
from lengthen.models import lora
from lengthen.models.export import for_older_readers, merge_to
from lengthen.models.loading import load_model, stored_dtype
from lengthen.records import UserError
from lengthen.training.learner import write_merged


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def base(request, tmp_path) -> Path:
    """A model's folder as transformers 4 wrote it, with files of its own."""
    folder = save_tiny(tmp_path / "base", "qwen2", initializer_range=0.1)
    AutoModelForCausalLM.from_pretrained(folder, dtype=request.param).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "4.46.3"}))
    (folder / "chat_template.jinja").unlink()
    tokenizer = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    generation = {"eos_token_id": [2, 0], "temperature": 0.7, "top_p": 0.8, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "merges.txt").write_text("#version: 0.2\n")  # llama.cpp's converter and slow tokenizers read it
    (folder / "LICENSE").write_text("Apache-2.0")
    return folder


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_merged_model_is_its_base_with_other_weights(base, adapter, tmp_path):
    """In its dtype and size, whatever the training ran in; its other files byte for byte."""
    write_merged(ModelFlags(model=str(base), dtype="float32", quantize="nf4"), str(adapter), str(tmp_path / "merged"))
    merged = tmp_path / "merged"
    names = {file.name for file in base.iterdir()}
    assert {file.name for file in merged.iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name

    ours, theirs = load_file(merged / "model.safetensors"), load_file(base / "model.safetensors")
    oracle = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    want = oracle.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        torch.testing.assert_close(tensor, want[name].to(tensor.dtype), rtol=2**-8, atol=1e-5)
    assert stored_dtype(merged) == stored_dtype(base)


def test_what_transformers_5_wrote_is_read_by_transformers_4(tmp_path):
    """Its rope_parameters would be a theta of 10,000 there, its tokenizer class unknown, a list of tokens an error."""
    folder = save_tiny(
        tmp_path / "m", "llama", vocab_size=960, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)  # tiny_tokenizer is every test's
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # adds what is local to a load
    for_older_readers(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 5e5 and config["rope_scaling"] is None and config["torch_dtype"] == "float32"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|tool|>"] and "extra_special_tokens" not in settings
    assert not {"is_local", "local_files_only", "backend"} & settings.keys()
    # Here they are read as before, and there is nothing more to say.
    again = AutoTokenizer.from_pretrained(folder)
    assert again("<|im_start|>a river<|tool|>").input_ids == tokenizer("<|im_start|>a river<|tool|>").input_ids
    assert load_model(str(folder)).model.config.rope_parameters["rope_theta"] == 5e5
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for_older_readers(folder)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_rope_scalings_are_said_in_the_older_words_too(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e6}
    gemma = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}}
    gemma["sliding_attention"] = {"rope_theta": 1e4, "rope_type": "default"}
    for rope, want in ((yarn, {k: v for k, v in yarn.items() if k != "rope_theta"}), (gemma, {"rope_type": "linear"})):
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {"rope_parameters": rope}}))
        for_older_readers(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())["text_config"]
        assert config["rope_theta"] == 1e6 and want.items() <= config["rope_scaling"].items()
    assert config["rope_local_base_freq"] == 1e4


def test_merging_does_not_replace_a_folder_that_is_no_model(base, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter_1.md").write_text("years of work")
    model = load_model(str(base)).model
    with pytest.raises(UserError, match="holds other files") as error:
        merge_to(model, base, folder)
    assert "--merge-to" in error.value.hint and [f.name for f in folder.iterdir()] == ["chapter_1.md"]
    assert not list(tmp_path.glob(".*"))  # no temporary folder stays
    merge_to(model, base, tmp_path / "merged")
    (tmp_path / "merged" / "left_over.txt").write_text("of an earlier export")
    merge_to(model, base, tmp_path / "merged")
    assert not (tmp_path / "merged" / "left_over.txt").exists()


def test_an_adapter_of_a_half_precision_base_merges_without_lora_layers(base):
    model = load_model(str(base)).model
    lora.attach(model, 4, 8)
    with pytest.raises(AssertionError, match="merge_adapter first"):
        merge_to(model, base, base.parent / "merged")


@pytest.mark.parametrize("fails", [1, 2])
def test_the_model_that_was_there_outlives_a_rename_that_fails(base, tmp_path, monkeypatch, fails):
    """It was moved away first, and a failure, or a kill, between the two renames left nothing under its name."""
    model, merged = load_model(str(base)).model, tmp_path / "merged"
    merge_to(model, base, merged)
    before = (merged / "model.safetensors").read_bytes()
    (merged / "of_the_first.txt").write_text("")
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == fails:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="No space left"):
        merge_to(model, base, merged)
    assert (merged / "model.safetensors").read_bytes() == before and (merged / "of_the_first.txt").exists()
    assert not list(tmp_path.glob(".*"))
    merge_to(model, base, merged)
    assert not (merged / "of_the_first.txt").exists()


def test_what_a_killed_merge_has_left_is_taken_up(base, tmp_path):
    model, merged = load_model(str(base)).model, tmp_path / "merged"
    merge_to(model, base, merged)
    merged.rename(tmp_path / ".merged.old")  # killed between the two renames
    (tmp_path / ".merged.tmp").mkdir()
    (tmp_path / ".merged.tmp" / "half.safetensors").write_text("half")
    merge_to(model, base, merged)
    assert (merged / "model.safetensors").exists() and not (merged / "half.safetensors").exists()
    assert not list(tmp_path.glob(".*"))


def test_two_merges_into_one_folder_are_refused(base, tmp_path):
    model, lock = load_model(str(base)).model, Lock(tmp_path / "merged")
    with pytest.raises(UserError, match="written by another process") as error:
        merge_to(model, base, tmp_path / "merged")
    assert error.value.hint == "wait for it, or --merge-to another folder"
    lock.release()


def test_a_card_takes_the_place_of_the_bases(base, tmp_path):
    (base / "README.md").write_text("# The base")
    model = load_model(str(base)).model
    merge_to(model, base, tmp_path / "merged", "# The merged one")
    assert (tmp_path / "merged" / "README.md").read_text() == "# The merged one"
    merge_to(model, base, tmp_path / "merged")
    assert (tmp_path / "merged" / "README.md").read_text() == "# The base"
