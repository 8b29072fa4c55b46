"""pytest tests/test_hub.py: the cards of adapters, merged models and runs.

The oracle is huggingface_hub's own reader of cards: what it takes from the head is what the hub shows.
"""

import json
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard

from lengthen.models import hub

SETTINGS = {
    **{"role": "generator", "language": "en", "seed": 0, "adapter": "", "rank": 8, "alpha": 16, "dropout": 0.0},
    **{
        "targets": "all-linear",
        "epochs": 2,
        "learning_rate": 2e-4,
        "inputs": {"iter_1/extended.jsonl": "a386cfb0452cef09"},
    },
}
SUMMARY = {
    "pairs": 1234,
    "left_out": 5,
    "tokens": 20_000,
    "target_tokens": 15_000,
    "first_loss": 1.5,
    "last_loss": 1.25,
}


def made_run(folder: Path, base: str) -> Path:
    """A run's folder as far as cards read it."""
    run = folder / "runs" / "mine"
    adapter = run / "iter_1" / "generator"
    adapter.mkdir(parents=True)
    meta = {"status": "done", "role": "generator", "base": base, "quantize": "none"}
    (adapter / "meta.json").write_text(json.dumps({**meta, "settings": SETTINGS, "summary": SUMMARY}))
    (adapter / "adapter_config.json").write_text("{}")
    for name, words in (("instructions", 30), ("responses", 250), ("extended", 420)):
        (run / "iter_1" / f"{name}.jsonl").write_text('{"id": "1"}\n')
        drawn = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1, "seed": 3, "language": "en"}
        sidecar = {"accepted": 7, "rejected": {"ending": 2, "gain": 1}, "words": {"median": words, "max": 2 * words}}
        sidecar |= {"settings": drawn, "info": {"model": base}}
        (run / "iter_1" / f"{name}.meta.json").write_text(json.dumps(sidecar))
    for name, adapter_of, median in (("base", "", 300), ("iter_1", "runs/mine/iter_1/generator", 412)):
        (run / "eval" / name).mkdir(parents=True)
        scores = {"words_median": median, "eos_share": 0.75, "loop_rate": 0.0, "length_score": None, "answers": 8}
        scores |= {"rows": 8, "source": str(folder / "queries.jsonl"), "adapter": adapter_of}
        scores["intervals"] = {"words_median": [median - 50, median + 50]}
        (run / "eval" / name / "scores.json").write_text(json.dumps(scores))
    return run


def test_the_hub_reads_the_card_of_an_adapter(tmp_path):
    run = made_run(tmp_path, "Qwen/Qwen2.5-7B-Instruct")
    hub.write_cards(run)
    card = ModelCard.load(run / "iter_1" / "generator" / "README.md")
    head = card.data.to_dict()
    assert head["base_model"] == "Qwen/Qwen2.5-7B-Instruct" and head["base_model_relation"] == "adapter"
    assert head["library_name"] == "peft" and head["language"] == ["en"] and "lora" in head["tags"]
    # Its licence is not known here, so it is said whose it is; the hub wants a name and a link beside "other".
    assert head["license"] == "other" and head["license_link"] == "https://huggingface.co/Qwen/Qwen2.5-7B-Instruct"
    for part in ("1,234 (5 left out)", "a386cfb0452cef09", "| learning rate | 0.0002 |", "1.500, 1.250"):
        assert part in card.text, part
    # scores, with the base model's beside them
    assert "| median words of answers that ended by themselves | 300 [250, 350] | 412 [362, 462] |" in card.text
    assert "| share of answers that ended by themselves | 75% | 75% |" in card.text and "| - | - |" in card.text
    assert card.text.strip().startswith("# mine/iter_1/generator\n")
    assert 'PeftModel.from_pretrained(model, "THIS/REPOSITORY")' in card.text
    assert str(tmp_path) not in card.content


def test_the_hub_reads_the_card_of_a_run(tmp_path):
    run = made_run(tmp_path, "smollm2")
    hub.write_cards(run)
    card = DatasetCard.load(run / "README.md")
    head = card.data.to_dict()
    assert head["license"] == "apache-2.0" and head["task_categories"] == ["text-generation"]
    files = {config["config_name"]: config["data_files"] for config in head["configs"]}
    assert files == {name: hub.FILES[name][0] for name in ("instructions", "responses", "extended")}
    for pattern in files.values():  # the hub's viewer finds them
        assert list(run.glob(pattern))
    assert "| iter_1/extended.jsonl | 7 | 3 | 420 | 840 |" in card.text
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in card.text and "| temperature | 0.7 |" in card.text
    assert str(tmp_path) not in card.content


def test_a_local_base_is_named_without_its_path_and_gives_its_licence(tmp_path):
    base = tmp_path / "models" / "own-model"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\nlicense_link: https://example.org/l\n---\n# Own\n")
    run = made_run(tmp_path, str(base))
    text = hub.model_card(run / "iter_1" / "generator", merged=True)
    (tmp_path / "README.md").write_text(text)
    head = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert head["license"] == "mit" and head["license_link"] == "https://example.org/l"
    assert "base_model" not in head and head["library_name"] == "transformers"
    assert "own-model" in text and str(tmp_path) not in text and "PeftModel" not in text
    elsewhere = (run / "iter_1" / "generator").rename(tmp_path / "my-adapter")
    assert "# my-adapter\n" in hub.model_card(elsewhere) and tmp_path.name not in hub.model_card(elsewhere)
    (base / "README.md").write_text("---\n[ no: yaml\n---\n")  # a broken card is none
    assert hub.licence_of(str(base)) == {"license": "other", "license_name": "that-of-the-base-model"}


@pytest.mark.parametrize("missing", ["eval", "adapter"])
def test_what_is_not_there_is_said(missing, tmp_path):
    run = made_run(tmp_path, "smollm2")
    adapter = run / "iter_1" / "generator"
    if missing == "eval":
        for file in run.glob("eval/iter_1/*"):
            file.unlink()
        assert "Not evaluated." in hub.model_card(adapter)
    else:  # an adapter that somebody else trained has no sidecar: its own card stays
        (adapter / "meta.json").unlink()
        assert hub.model_card(adapter) == ""
        hub.write_cards(run)
        assert not (adapter / "README.md").exists() and (run / "README.md").exists()


@pytest.mark.parametrize("text", ['{"answers": 8', "[]", '{"adapter": "x/iter_1/generator"}'])
def test_damaged_scores_cost_no_card(text, tmp_path):
    run = made_run(tmp_path, "Qwen/Qwen2.5-7B-Instruct")
    (run / "eval" / "iter_1" / "scores.json").write_text(text)
    hub.write_cards(run)
    assert "Not evaluated." in (run / "iter_1" / "generator" / "README.md").read_text()


def test_a_local_folder_of_two_names_is_no_page_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert "license_link" not in hub.licence_of("models/mine")
    assert hub.shown_name("models/mine") == "mine"


def test_an_input_is_named_without_the_folder_of_somebodys_name():
    named = ["iter_2/extended.jsonl", "final/constrained.jsonl", "bob/extended.jsonl", "extended.jsonl"]
    assert [hub.shown_input(name) for name in named] == [*named[:2], "extended.jsonl", "extended.jsonl"]
