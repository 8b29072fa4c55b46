"""The sampler's surface over servers that hold the model (vLLM): requests in, samples out, log-probabilities.

Prompts go as token ids, and ids come back: the text is decoded here, and where it ends is decided here, by the same
code as in our own sampler (stopping.py). A server's detokenizer, stop strings and loop detection have no part in it.

Servers accept fields that they do not know in silence. So each is greeted by probes of what it does (`PROBES`) before
it gets its first request, and what a stage needs and a server lacks is refused by name.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lengthen.endpoint import Call, Failure, Servers, Unanswered
from lengthen.records import UserError, fingerprint
from lengthen.sampling.request import Pairs, Request, Sample, check_fits
from lengthen.sampling.scheduler import Row
from lengthen.sampling.stopping import Stopping

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 16  # tokens in one part of a stream
TEXT = "Two  ships,\n\n\tone harbour - and 12.5 knots. 两艘船。"  # no control token, every kind of white space
PATTERN = "one two three four one two three four one two three"  # what comes next has come before
HUGE = 1e6  # a penalty that no counted token survives
NATS = 0.1  # mean log-probabilities of the same weights differ by less, whatever the dtype and the card
PROCESSOR = "VLLM_USE_V2_MODEL_RUNNER=0 and --logits-processors lengthen.sampling.penalty_scope:PenaltyScope"
SERVER = "vllm serve MODEL --generation-config vllm (docs/more_than_one_gpu.md)"


def same_weights(mean: float, expected: float) -> bool:
    """Whether two mean log-probabilities of PATTERN can be those of the same weights."""
    return abs(mean - expected) < NATS


class Served:
    """`servers` are greeted by this object. `eos_ids`, `context`: as for the Sampler; the context is the servers' where
    theirs is shorter. `adapter`: a folder, "" = none; `paths`: (ours, the servers') beginnings of its path.
    """

    def __init__(
        self,
        urls: Sequence[str],
        tokenizer: Any,
        *,
        eos_ids: set[int],
        context: int,
        key: str = "",
        max_rows: int = 0,
        adapter: str = "",
        paths: Sequence[tuple[str, str]] = (),
    ):
        self.tokenizer, self.eos_ids, self.context, self.kind = tokenizer, set(eos_ids), 0, ""
        self.stopping = Stopping(tokenizer, self.eos_ids)
        self.adapter, self.paths = adapter, paths
        # Never one name for two adapters. `lora` is empty while the base model is asked.
        self.lora = self.name = f"lengthen-{fingerprint(adapter)}" if adapter else ""
        self.needs = {"model", "tokenizer", "ids", *(["adapter"] if adapter else []), "weights"}
        self.stats: dict[str, float] = {"samples": 0, "decode_tokens": 0}
        self.rejected: list[Sample] = []  # those that no server need be asked about
        self.unanswered: list[Unanswered] = []
        self.likely: dict[str, tuple[str, float]] = {}  # model -> (URL, mean log-probability of PATTERN there)
        self.began = time.monotonic()
        self.servers = Servers(urls, key=key, at_once=max_rows or 256, greet=self.greet)
        try:
            self.notes = self.servers.meet()
        except BaseException:
            self.servers.close()
            raise
        met = [server for server in self.servers.servers if not server.resting]
        self.context = min(context, *(server.facts["context"] or context for server in met))
        self.notes += [
            f"endpoint: {server.url}, {server.facts['about']}, context {self.context:,}, up to"
            f" {self.servers.at_once} texts at a time"
            for server in met
        ]

    def close(self) -> None:
        self.servers.close()

    @contextlib.contextmanager
    def base(self) -> Iterator["Served"]:
        """The same without the adapter."""
        self.lora = ""
        try:
            yield self
        finally:
            self.lora = self.name

    # -- requests in, samples out

    def add(self, request: Request) -> None:
        """Queues a request; also while `run` is being read. One that cannot be run comes back with finish "error"."""
        sampling = request.sampling
        if why := request.misfit(self.context):
            self.rejected.append(Sample(request, "", [], "error", why))
            return
        needs = {"seeds"} if sampling.temperature else set()
        if sampling.repetition_penalty != 1:
            needs.add("scope" if request.penalty_from else "penalty")
        if needs - self.needs:
            self.needs |= needs
            self.servers.meet()
        expected = math.inf if request.follows else request.expected_tokens
        self.servers.add(request, lambda call: self._complete(call, request), expected)

    def run(self) -> Iterator[Sample]:
        """Yields each sample as it finishes. UserError at the end if requests are left that no server has answered."""
        while self.rejected or self.servers.pending:
            while self.rejected:
                yield self.rejected.pop()
            for request, result in self.servers.run():
                if isinstance(result, Sample):
                    self.stats["samples"] += 1
                    yield result
                elif result.status == 400 and "context" in result.words:  # the server knows how much room it has
                    yield Sample(request, "", [], "error", str(result))
                else:
                    self.unanswered.append(result)
                if self.rejected:
                    break
        if self.unanswered:
            why = f"{len(self.unanswered)} texts are missing: {self.unanswered[0]}"
            raise UserError(why, "see the server's log; the same command asks for them again")

    def progress(self) -> str:
        servers = self.servers.servers
        rate = self.stats["decode_tokens"] / max(1e-9, time.monotonic() - self.began)
        up, running = sum(not server.resting for server in servers), sum(len(server.calls) for server in servers)
        again = f", {self.servers.again} asked again" if self.servers.again else ""
        return f"{rate:.0f} tok/s, {running} texts on {up} of {len(servers)} servers{again}"

    async def _complete(self, call: Call, request: Request) -> Sample:
        sampling, row = request.sampling, Row.of(request, 0, self.context, self.stopping.special)
        own = bool(request.penalty_from) and sampling.repetition_penalty != 1  # a scope that only our processor has
        scope = {"penalty": sampling.repetition_penalty, "penalty_from": request.penalty_from}
        body = {
            "max_tokens": row.limit - row.prompt_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed & 0x7FFFFFFFFFFFFFFF,
            "stream": True,
            "extra_body": {
                # All of it is said: where a field is missing, a server may take what the model's files recommend.
                **{"top_k": sampling.top_k, "min_p": 0, "min_tokens": sampling.min_new_tokens},
                "repetition_penalty": 1.0 if own else sampling.repetition_penalty,
                "stop_token_ids": sorted(self.eos_ids | row.stop_ids),
                **({"vllm_xargs": scope} if own else {}),
                **{"return_token_ids": True, "stream_interval": 4 if row.stop_texts else CHUNK},
            },
        }
        finish, text = await self._stream(call, row, body)
        if finish == "eos" and row.written <= sampling.min_new_tokens:
            raise UserError(f"{call.server.url} ignores min_tokens: a text of {row.written} tokens", SERVER)
        return Sample(request, text, row.output, finish)

    async def _create(self, call: Call, prompt: list[int], **body: Any) -> Any:
        import openai

        try:
            return await call.client.completions.create(model=self._model(call), prompt=prompt, **body)
        except openai.NotFoundError:
            if not self.lora:
                raise
            call.server.gone = True  # it was restarted: it has forgotten the adapter, and may be another
            raise Failure("the adapter is not there") from None

    async def _stream(self, call: Call, row: Row, body: dict[str, Any]) -> tuple[str, str]:
        """(finish, text) of a row, which gets its tokens."""
        said, stream = "", await self._create(call, row.ids[:], **body)
        async with stream:
            async for part in stream:
                call.hear()
                for choice in part.choices:
                    for token in choice.token_ids or ():
                        row.ids.append(token)
                        self.stats["decode_tokens"] += 1
                        if end := self.stopping.end_of(row):  # leaving the stream ends the text on the server, too
                            return end
                    said = choice.finish_reason or said
        if said == "stop":  # by a token that its model's files call an end, and ours do not
            row.ids.append(min(self.eos_ids))
            return "eos", self.stopping.text(row, row.output[:-1])
        raise Failure(f"the stream ended in the middle of a text ({said or 'no reason given'})")

    def _model(self, call: Call) -> str:
        return self.lora or call.server.facts["model"]

    # -- log-probabilities

    def logprobs(self, pairs: Pairs) -> "list[Tensor]":
        """As the Sampler's: one fp32 tensor [len(continuation)] of nats per pair, without penalty or temperature."""
        import torch

        check_fits(pairs, self.context)
        # Single tokens after the same prompt (a judge's yes and no) are one request, which scores nothing else.
        single: dict[tuple[int, ...], list[int]] = {}
        for prompt, continuation in pairs:
            if len(continuation) == 1:
                single.setdefault(tuple(prompt), []).append(continuation[0])
        words = self._ask([lambda call, p=p, t=t: self._next(call, list(p), t) for p, t in single.items()])
        known = {(p, token): value for p, values in zip(single, words, strict=True) for token, value in values.items()}
        whole = [(p, c) for p, c in pairs if len(c) > 1]
        scored = iter(self._ask([lambda call, p=p, c=c: self._score(call, p, c) for p, c in whole]))
        values = ([known[tuple(p), c[0]]] if len(c) == 1 else next(scored) if c else [] for p, c in pairs)
        return [torch.tensor(some, dtype=torch.float32) for some in values]

    def _ask(self, asks: list[Any]) -> list[Any]:
        try:
            return self.servers.ask(asks)
        except Unanswered as error:
            raise UserError(str(error), "see the server's log; the same command asks again") from None

    async def _next(self, call: Call, prompt: list[int], tokens: list[int]) -> dict[int, float]:
        """Log-probabilities of some tokens as the next one."""
        extra: dict[str, Any] = {
            "logprobs": 1,
            "logprob_token_ids": sorted(set(tokens)),
            "return_tokens_as_token_ids": True,
        }
        choice = await self._once(call, prompt, max_tokens=1, **extra)
        try:
            found = {int(name.removeprefix("token_id:")): v for name, v in choice.logprobs.top_logprobs[0].items()}
            return {token: found[token] for token in tokens}
        except (AttributeError, LookupError, TypeError, ValueError):
            raise UserError(f"{call.server.url} gives no log-probabilities of given tokens", SERVER) from None

    async def _score(self, call: Call, prompt: list[int], continuation: list[int]) -> list[float]:
        """Log-probabilities of a given text's tokens, by a pass over all of it."""
        choice = await self._once(call, prompt + continuation, max_tokens=1, prompt_logprobs=0)
        try:
            given = choice.prompt_logprobs[len(prompt) :]
            return [some[str(token)]["logprob"] for some, token in zip(given, continuation, strict=True)]
        except (AttributeError, LookupError, TypeError, ValueError):
            raise UserError(f"{call.server.url} gives no log-probabilities of a given text", SERVER) from None

    async def _once(
        self, call: Call, prompt: list[int], max_tokens: int, temperature: float = 0, seed: int = 0, **extra: Any
    ) -> Any:
        """The only choice of a request that is not streamed; greedy, unless `extra` says otherwise."""
        extra = {"top_k": 0, "min_p": 0, "repetition_penalty": 1.0, "return_token_ids": True, **extra}
        settings: Any = {"max_tokens": max_tokens, "temperature": temperature, "top_p": 1, "seed": seed}
        reply = await self._create(call, prompt, extra_body=extra, **settings)
        if not getattr(reply, "choices", None):
            raise Failure("a reply that is not a completion")
        return reply.choices[0]

    # -- the greeting

    async def greet(self, call: Call) -> None:
        """Every probe of what is needed that this server has not passed; UserError where one fails."""
        passed = call.server.facts.setdefault("passed", set())
        for name in ("model", "tokenizer", "adapter", "ids", "weights", "seeds", "penalty", "scope"):
            if name in self.needs and name not in passed:
                await getattr(self, f"_probe_{name}")(call)
                passed.add(name)

    async def _probe_model(self, call: Call) -> None:
        import openai

        listed = (await call.client.get("/models", cast_to=object)).get("data") or [{}]
        first = next((entry for entry in listed if not entry.get("parent")), listed[0])
        if not first.get("id"):
            raise UserError(f"{call.server.url}/models lists no model", SERVER)
        try:
            version = (await call.client.get(f"{call.server.root}/version", cast_to=object)).get("version", "")
        except (openai.APIError, AttributeError):  # no such page, or no object
            version = ""  # for people only
        kind, context = str(first.get("owned_by") or "unknown"), int(first.get("max_model_len") or 0)
        self.kind = self.kind or kind  # of the first that answers
        if kind != self.kind or 0 < context < self.context:
            here, others = (kind, self.kind) if kind != self.kind else (f"{context} tokens", f"{self.context} tokens")
            raise UserError(f"{call.server.url} is another engine than the others: {here}, not {others}", SERVER)
        call.server.facts.update(
            model=first["id"], kind=kind, context=context, about=f"{kind} {version}, model {first['id']}"
        )

    async def _probe_tokenizer(self, call: Call) -> None:
        body = {"model": call.server.facts["model"], "prompt": TEXT, "add_special_tokens": False}
        reply = await call.client.post(f"{call.server.root}/tokenize", cast_to=object, body=body)
        if reply.get("tokens") != self._ids(TEXT):
            raise UserError(f"{call.server.url} has another tokenizer than --model", "start it with the same model")

    async def _probe_ids(self, call: Call) -> None:
        choice = await self._once(call, self._ids(PATTERN), max_tokens=4)
        if not getattr(choice, "token_ids", None):
            raise UserError(f"{call.server.url} gives no token ids back", f"vLLM's return_token_ids: {SERVER}")

    async def _probe_weights(self, call: Call) -> None:
        ids = self._ids(PATTERN)
        values = await self._score(call, ids[:1], ids[1:])
        model = self._model(call) if self.lora else ""
        mean = sum(values) / len(values)
        other, expected = self.likely.setdefault(model, (call.server.url, mean))
        if not same_weights(mean, expected):
            raise UserError(f"{call.server.url} and {other} hold different weights", "the same model on every server")

    async def _probe_seeds(self, call: Call) -> None:
        drawn = [await self._drawn(call, temperature=2.0, seed=seed) for seed in (1, 1, 2, 3)]
        if drawn[0] != drawn[1] or drawn[0] == drawn[2] == drawn[3]:
            hint = "--temperature 0 needs none; SGLang: --enable-deterministic-inference"
            raise UserError(f"{call.server.url} ignores seeds", hint)

    async def _probe_penalty(self, call: Call) -> None:
        prompt, drawn = self._ids(PATTERN), await self._drawn(call, repetition_penalty=HUGE)
        if len(set(drawn)) < len(drawn) or set(drawn) & set(prompt):
            what = "does not count prompt and output in its repetition penalty"
            raise UserError(f"{call.server.url} {what}", "a vLLM server, or --repetition-penalty 1")

    async def _probe_scope(self, call: Call) -> None:
        prompt, plain = self._ids(PATTERN), await self._drawn(call)
        after = await self._drawn(call, vllm_xargs={"penalty": HUGE, "penalty_from": len(prompt)})
        whole = await self._drawn(call, vllm_xargs={"penalty": HUGE, "penalty_from": 0})
        if after[0] != plain[0] or len(set(after)) < len(after) or set(whole) & set(prompt):
            what = "has no repetition penalty that leaves the draft out (--penalty-scope output)"
            raise UserError(f"{call.server.url} {what}", f"start vLLM with {PROCESSOR}, or --penalty-scope all")

    async def _drawn(self, call: Call, **how: Any) -> list[int]:
        """Eight tokens after PATTERN."""
        choice = await self._once(call, self._ids(PATTERN), max_tokens=8, ignore_eos=True, **how)
        return choice.token_ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    async def _probe_adapter(self, call: Call) -> None:
        """The adapter, under the name of its hash."""
        import openai

        path = os.path.abspath(self.adapter)
        for ours, theirs in self.paths:
            if path == ours or path.startswith(ours.rstrip("/") + "/"):
                path = theirs.rstrip("/") + path[len(ours.rstrip("/")) :]
                break
        try:
            body = {"lora_name": self.name, "lora_path": path}
            await call.client.post("/load_lora_adapter", cast_to=object, body=body)
        except openai.APIStatusError as error:
            words = self.servers.clean(" ".join(str(error.message).split())[:200])
            if error.status_code == 400 and "already" in words:
                return
            merge = "or serve what train.py --merge-to writes"
            if "lora_path" in words or path in words:
                hint = "--endpoint-path LOCAL=REMOTE, where the server sees that folder elsewhere"
            elif error.status_code in (404, 405):
                hint = f"start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, {merge}"
            else:
                hint = f"start it with --max-lora-rank as large as train.py --rank, {merge}"
            raise UserError(f"{call.server.url} does not load the adapter {path}: {words}", hint) from None
