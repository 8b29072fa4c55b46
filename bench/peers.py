"""The engines that bench/sampler.py compares, each in a process of its own, as its own users would run it.

    python bench/peers.py ENGINE SETUP.json     # used by bench/sampler.py; answers JSON lines (harness.serve)

SETUP.json: {"model": as in --model, "folder": fp32 weights and tokenizer, "gguf": the file or "", "openvino": folder
for converted weights, "eos": [ids]}. A request: prompts (token ids), limit (new tokens of each), seed, rows (texts at
once, 0 = the engine's own choice), exact (true = EOS does not count, every text gets `limit` tokens). The answer:
tokens (useful ones: up to EOS, EOS included), seconds, eos (share of texts that ended by themselves).
All draw with T 0.7, top-p 0.8, top-k 20 and a repetition penalty of 1.1 over prompt and output. Threads: the engine's
default, or OMP_NUM_THREADS where it is set.

    ours           lengthen.sampling.engine, fp32, as the stages use it
    ours-bf16      the same with --dtype bfloat16
    generate       transformers' generate, fp32: prompts sorted by length and padded on the left, batch by batch
    llama.cpp      llama-cpp-python on the GGUF file, in its 4 bits: batch calls, a finished text's place taken at once
    openvino       OpenVINO GenAI's ContinuousBatchingPipeline, weights and arithmetic in fp32
    openvino-int8  the same with weights in int8 and all else at its defaults (bf16 arithmetic where the CPU has AMX)

This file must not import lengthen but for our own engine: the import sets how OpenMP's threads wait.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

from harness import serve  # noqa: E402

RECIPE = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
NEEDS = {  # engine: (module, how it is had)
    "llama.cpp": ("llama_cpp", "pip install llama-cpp-python==0.3.36 (it compiles llama.cpp)"),
    "openvino": ("openvino_genai", "pip install openvino-genai optimum-intel, best in an environment of its own"),
}
NEEDS["openvino-int8"] = NEEDS["openvino"]

Answer = dict[str, Any]
Prompts = list[list[int]]


def threads() -> int:
    """As asked for, 0 = not asked for."""
    return int(os.environ.get("OMP_NUM_THREADS", 0))


class Ours:
    def __init__(self, setup: dict[str, Any], dtype: str = "auto"):
        sys.path.insert(0, str(ROOT))  # only here: others would take our kernels/ for Hugging Face's package
        import lengthen  # noqa: F401  before torch

        # isort: split
        from lengthen.models.loading import load_model

        self.loaded = load_model(setup["model"], device="cpu", dtype=dtype)

    def __call__(self, prompts: Prompts, limit: int, seed: int, rows: int, exact: bool) -> Answer:
        from lengthen.sampling.engine import Sampler
        from lengthen.sampling.request import Request, Sampling

        loaded, settings = self.loaded, Sampling(max_new_tokens=limit, min_new_tokens=limit if exact else 0, **RECIPE)
        # A new one each time: its prefix cache would know the prompts of the last run.
        context = {"eos_ids": loaded.chat.eos_ids, "context": loaded.context, "max_rows": rows}
        with Sampler(loaded.model, loaded.tokenizer, **context) as sampler:
            began = time.perf_counter()
            for i, prompt in enumerate(prompts):
                sampler.add(Request(i, prompt, seed * 1_000_003 + i, settings))
            samples = list(sampler.run())
            seconds = time.perf_counter() - began
        ended = sum(sample.finish == "eos" for sample in samples) / len(samples)
        return {"tokens": sum(s.num_tokens for s in samples), "seconds": seconds, "eos": ended}


class Generate:
    def __init__(self, setup: dict[str, Any]):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(setup["folder"], dtype=torch.float32)
        self.pad, self.eos = AutoTokenizer.from_pretrained(setup["folder"]).pad_token_id or 0, setup["eos"]

    def __call__(self, prompts: Prompts, limit: int, seed: int, rows: int, exact: bool) -> Answer:
        import torch

        torch.manual_seed(seed)
        ordered, rows, written = sorted(prompts, key=len), rows or len(prompts), []
        began = time.perf_counter()
        for first in range(0, len(ordered), rows):
            some = ordered[first : first + rows]
            width = max(map(len, some))
            ids = torch.tensor([[self.pad] * (width - len(p)) + p for p in some])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
            settings = {"max_new_tokens": limit, "min_new_tokens": limit if exact else 0, **RECIPE}
            ends = {"eos_token_id": self.eos, "pad_token_id": self.pad}
            out = self.model.generate(ids, attention_mask=mask, do_sample=True, **settings, **ends)
            written += out[:, width:].tolist()
        return counted(written, self.eos, time.perf_counter() - began)


class LlamaCpp:
    """Its parallel decoding: the newest token of every running text and the prompts of new ones, in one batch."""

    def __init__(self, setup: dict[str, Any]):
        import llama_cpp as llama

        self.llama, self.eos = llama, setup["eos"]
        self.silent = llama.llama_log_callback(lambda level, text, data: None)  # kept: C goes on calling it
        llama.llama_log_set(self.silent, None)
        defaults = llama.llama_model_default_params()
        self.model = llama.llama_model_load_from_file(setup["gguf"].encode(), defaults)
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def __call__(self, prompts: Prompts, limit: int, seed: int, rows: int, exact: bool) -> Answer:
        llama, room, rows = self.llama, max(map(len, prompts)) + limit, rows or len(prompts)
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = rows * room, rows, 2048, 512
        params.n_threads = params.n_threads_batch = threads() or os.cpu_count()  # as its command line tools do
        self.context = llama.llama_init_from_model(self.model, params)
        self.memory, self.batch = llama.llama_get_memory(self.context), llama.llama_batch_init(2048, 0, 1)
        began = time.perf_counter()
        written = self.write(prompts, limit, seed, rows, exact)
        seconds = time.perf_counter() - began
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)
        return counted(written, [] if exact else self.eos, seconds)

    def write(self, prompts: Prompts, limit: int, seed: int, rows: int, exact: bool) -> list[list[int]]:
        llama, batch, waiting = self.llama, self.batch, list(range(len(prompts)))[::-1]
        running: dict[int, tuple] = {}
        finished = []
        while waiting or running:
            batch.n_tokens, draws = 0, []
            for place, (prompt, _, text) in running.items():
                draws.append((place, self.put(text[-1], len(prompt) + len(text) - 1, place, True)))
            for place in set(range(rows)) - running.keys():
                if not waiting or batch.n_tokens + len(prompts[waiting[-1]]) > 2048:
                    break
                number = waiting.pop()
                prompt = prompts[number]
                for position, token in enumerate(prompt):
                    at = self.put(token, position, place, position + 1 == len(prompt))
                running[place] = (prompt, self.sampler(prompt, seed * 1_000_003 + number, limit, exact), [])
                draws.append((place, at))
            assert llama.llama_decode(self.context, batch) == 0
            for place, at in draws:
                _, sampler, text = running[place]
                text.append(llama.llama_sampler_sample(sampler, self.context, at))  # it accepts the token, too
                if len(text) == limit or (not exact and text[-1] in self.eos):
                    finished.append(text)
                    llama.llama_memory_seq_rm(self.memory, place, -1, -1)
                    llama.llama_sampler_free(sampler)
                    del running[place]
        return finished

    def put(self, token: int, position: int, place: int, draw: bool) -> int:
        """One token into the batch; its index there."""
        batch, at = self.batch, self.batch.n_tokens
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, position, 1, draw
        batch.seq_id[at][0] = place
        batch.n_tokens += 1
        return at

    def sampler(self, prompt: list[int], seed: int, limit: int, exact: bool) -> Any:
        """The recipe's steps in our order, with what the prompt says already counted."""
        llama = self.llama
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for step in (
            llama.llama_sampler_init_penalties(
                self.vocabulary, len(prompt) + limit, RECIPE["repetition_penalty"], 0.0, 0.0
            ),
            llama.llama_sampler_init_temp(RECIPE["temperature"]),
            llama.llama_sampler_init_top_k(RECIPE["top_k"]),
            llama.llama_sampler_init_top_p(RECIPE["top_p"], 1),
            llama.llama_sampler_init_dist(seed & 0xFFFFFFFF),
        ):
            llama.llama_sampler_chain_add(chain, step)
        for token in prompt:
            llama.llama_sampler_accept(chain, token)
        return chain


class OpenVino:
    def __init__(self, setup: dict[str, Any], weights: str = "fp32"):
        import openvino_genai as genai

        folder = Path(setup["openvino"]) / weights
        if not folder.exists():
            tool, task = Path(sys.executable).parent / "optimum-cli", "text-generation-with-past"
            export = [tool, "export", "openvino", "--model", setup["folder"], "--task", task]
            export += ["--weight-format", weights, folder]
            done = subprocess.run(export, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads()} if threads() else {}
        if weights == "fp32":
            properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB, as much as we would take
        self.pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self.genai, self.eos = genai, setup["eos"]

    def __call__(self, prompts: Prompts, limit: int, seed: int, rows: int, exact: bool) -> Answer:
        import numpy
        import openvino

        settings = []
        for i in range(len(prompts)):
            one = self.genai.GenerationConfig(max_new_tokens=limit, do_sample=True, ignore_eos=exact, **RECIPE)
            one.stop_token_ids, one.rng_seed = set(self.eos), (seed * 1_000_003 + i) % 2**32
            settings.append(one)
        inputs = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt in prompts]
        written, rows = [], rows or len(prompts)
        began = time.perf_counter()
        for first in range(0, len(prompts), rows):
            where = slice(first, first + rows)
            results = self.pipeline.generate(inputs[where], settings[where])
            written += [list(result.m_generation_ids[0]) for result in results]
        return counted(written, [] if exact else self.eos, time.perf_counter() - began)


def counted(written: Sequence[Sequence[int]], eos: Sequence[int], seconds: float) -> Answer:
    """Tokens up to the first EOS of each text, EOS included."""
    ends = [next((i + 1 for i, token in enumerate(text) if token in eos), 0) for text in written]
    tokens = sum(end or len(text) for end, text in zip(ends, written, strict=True))
    return {"tokens": tokens, "seconds": seconds, "eos": sum(map(bool, ends)) / len(written)}


ENGINES = {
    "ours": Ours,
    "ours-bf16": lambda setup: Ours(setup, "bfloat16"),
    "generate": Generate,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
    "openvino-int8": lambda setup: OpenVino(setup, "int8"),
}


def main() -> None:
    name, setup = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8"))
    serve(lambda: ENGINES[name](setup))


if __name__ == "__main__":
    main()
