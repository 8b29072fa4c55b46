"""A server that speaks as much of vLLM's HTTP as we use, with any fault: `with Stub(fault=...) as stub: stub.url`.

Its "model" continues a prompt by repeating it, unless `write(body)` says which ids come. It is held to by the probes of
lengthen/sampling/served.py; `lacks` names those that it fails.
"""

import asyncio
import contextlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from tiny import tiny_tokenizer

REASONS = {200: "OK", 307: "Temporary Redirect", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found"}


class Stub:
    """`fault(number, body)` of a streamed request: None, an HTTP status, (status, headers), "cut" or "silence".

    number: counts them from 0. delay: seconds before each part of a stream. known_adapters: what load_lora_adapter
    has loaded; empty it to play a restart.
    """

    def __init__(
        self,
        *,
        write: Callable[[dict], list[int]] | None = None,
        fault: Callable[[int, dict], Any] = lambda number, body: None,
        lacks: str = "",
        delay: float = 0.0,
        port: int = 0,
        context: int = 4096,
        loads: int = 200,
        kind: str = "stub",
    ):
        self.write, self.fault, self.lacks, self.delay, self.port = write, fault, lacks, delay, port
        self.context, self.loads, self.kind = context, loads, kind
        self.tokenizer = tiny_tokenizer()
        self.known_adapters: dict[str, str] = {}
        self.requests: list[dict] = []  # bodies of the streamed ones
        self.headers: list[dict[str, str]] = []
        self.paths: Counter[str] = Counter()
        self.finished = self.running = 0
        self.connections: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> "Stub":
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def begin() -> None:
            self.server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=4096)
            self.port = self.server.sockets[0].getsockname()[1]
            ready.set()

        def work() -> None:
            self.loop.create_task(begin())
            self.loop.run_forever()

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        """Gone, with all its connections, as after SIGKILL."""

        async def end() -> None:
            self.server.close()
            for writer in list(self.connections):
                writer.transport.abort()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    # -- HTTP

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines if line)}
                self.headers.append(headers)
                body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
                path = first.split(" ")[1]
                self.paths[path] += 1
                if path == "/v1/completions" and body.get("stream"):
                    await self._stream(writer, body)
                else:
                    self._reply(writer, *self._answer(path, body))
                await writer.drain()
        self.connections.discard(writer)
        writer.close()

    def _reply(self, writer: Any, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        more = "".join(f"{k}: {v}\r\n" for k, v in (headers or {}).items())
        head = f"HTTP/1.1 {status} {REASONS.get(status, 'Other')}\r\nContent-Type: application/json\r\n{more}"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    async def _stream(self, writer: asyncio.StreamWriter, body: dict) -> None:
        number = len(self.requests)
        self.requests.append(body)
        fault = self.fault(number, body)
        if isinstance(fault, int):
            fault = (fault, {})
        if isinstance(fault, tuple):
            return self._reply(writer, fault[0], {"error": {"message": "a fault"}}, fault[1])
        if body["model"] not in ("base", *self.known_adapters):
            return self._reply(writer, 404, {"error": {"message": f"the model {body['model']} does not exist"}})
        self.running += 1
        try:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            ids, finish = self._generate(body)
            step = body.get("stream_interval", 1)
            for start in range(0, max(1, len(ids)), step):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if fault == "silence" and start:
                    await asyncio.sleep(3600)
                if fault == "cut" and start:
                    return writer.transport.abort()
                last = start + step >= len(ids)
                choice = {"index": 0, "text": "", "finish_reason": finish if last else None}
                choice |= {} if self.lacks == "ids" else {"token_ids": ids[start : start + step]}
                self._event(writer, json.dumps({"choices": [choice]}))
                await writer.drain()
            self._event(writer, "[DONE]")
            writer.write(b"0\r\n\r\n")
            self.finished += 1
        finally:
            self.running -= 1

    def _event(self, writer: asyncio.StreamWriter, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")

    def _answer(self, path: str, body: dict) -> tuple[int, Any]:
        match path:
            case "/health":
                return 200, {}
            case "/version":
                return 200, {"version": "0.0"}
            case "/v1/models":
                model = {"id": "base", "owned_by": self.kind, "max_model_len": self.context}
                return 200, {"data": [{"id": "other", "parent": "base"}, model]}
            case "/tokenize":
                ids = self.tokenizer.encode(body["prompt"], add_special_tokens=False)
                return 200, {"tokens": ids[::-1] if self.lacks == "tokenizer" else ids}
            case "/v1/load_lora_adapter":
                if self.loads != 200:
                    return self.loads, {"error": {"message": "no adapters here"}}
                if body["lora_name"] in self.known_adapters:
                    return 400, {"error": {"message": f"The lora adapter {body['lora_name']} has already been loaded."}}
                self.known_adapters[body["lora_name"]] = body["lora_path"]
                return 200, "Success"
            case "/v1/completions" if body["model"] not in ("base", *self.known_adapters):
                return 404, {"error": {"message": f"the model {body['model']} does not exist"}}
            case "/v1/completions":
                ids, finish = self._generate(body)
                choice = {"index": 0, "text": "", "finish_reason": finish}
                choice |= {} if self.lacks == "ids" else {"token_ids": ids}
                value = -2.0 if self.lacks == "weights" else -1.0
                if "prompt_logprobs" in body:
                    given = [{str(i): {"logprob": value - i / 1024}} for i in body["prompt"]]
                    choice["prompt_logprobs"] = [None, *given[1:]]
                if words := body.get("logprob_token_ids"):
                    choice["logprobs"] = {"top_logprobs": [{f"token_id:{i}": value - i / 1024 for i in words}]}
                return 200, {"choices": [choice]}
        return 404, {"error": {"message": f"no {path}"}}

    # -- the model

    def _generate(self, body: dict) -> tuple[list[int], str]:
        ids: list[int] = []
        limit = body["max_tokens"]
        source = iter(self.write(body)) if self.write and body.get("stream") else self._repeated(body)
        for token in source:
            ids.append(token)
            if token in body.get("stop_token_ids", []) and not body.get("ignore_eos"):
                return ids, "stop"
            if len(ids) == limit:
                return ids, "length"
        return ids, "length"

    def _repeated(self, body: dict) -> Any:
        prompt = body["prompt"]
        rng = random.Random(0 if self.lacks == "seeds" else body["seed"])
        counted: set[int] = set()
        if self.lacks != "penalty" and body.get("repetition_penalty", 1) != 1:
            counted = set(prompt)
        if own := body.get("vllm_xargs"):
            counted = set(prompt[own["penalty_from"] :]) if self.lacks != "scope" else set()
        punished = body.get("repetition_penalty", 1) != 1 or bool(own and self.lacks != "scope")
        position = 0
        while True:
            if body["temperature"]:
                token = rng.randrange(10, 500)
            else:
                likely = [prompt[(position + i) % len(prompt)] for i in range(len(prompt))] + list(range(100, 400))
                token = next(t for t in likely if t not in counted)
            if punished:
                counted.add(token)
            position += 1
            yield token
