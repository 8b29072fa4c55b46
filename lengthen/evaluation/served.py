"""Any OpenAI-compatible server as a judge, through lengthen.endpoint, which tries again and waits.

    judge = ServedJudge("http://127.0.0.1:8000/v1=NAME")
    judge.add(JudgeRequest(...))
    for reply in judge.run():  # as they come; more requests may be added meanwhile, as with the sampler
        ...

1. A request without a reply after all tries, and all that wait when the server is down, come back as `missing`, to be
   sent again another day. What affects every request (the key, the address, the model) is a UserError.
2. A prompt too long for the server (only the server knows its context) is sent again with the middle of its texts cut.
3. A field that the server refuses (some models accept no temperature, some servers no response_format) is left out from
   then on.
"""

import json
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lengthen.endpoint import AllDown, Call, Failure, Servers, Unanswered, check_address, key_from, retry_after
from lengthen.evaluation.questions import SHORTEST, JudgeReply, JudgeRequest, schema
from lengthen.records import UserError

DOWN_AFTER = 120.0  # seconds, beside --judge-timeout: limits per minute are waited out, those per day are not
LARGEST_REPLY = 2**21  # bytes; a chat completion has a few thousand
LIMITS = {"max_tokens", "max_completion_tokens"}  # two names of one field
TOO_LONG = re.compile(r"context|too (long|large|many)|exceed|maximum.{0,20}(length|tokens)", re.IGNORECASE)
KEY_NAMES = ("LENGTHEN_JUDGE_KEY", "OPENAI_API_KEY")
# Of the names of models that do not chat
NO_CHAT = re.compile(r"embed|rerank|(?:^|[-_/.])(?:bge|e5|gte|minilm|whisper|tts)(?:[-_/.:]|$)", re.IGNORECASE)
# Servers turn control tokens into the real ones wherever they stand: a space makes text of them.
CONTROL = re.compile(r"(?<=<)(?=\||/?s>|(?:start|end)_of_turn>)|(?<=\[)(?=/?INST\])")


class TooLong(Exception):
    """The prompt does not fit."""


def read_address(name: str) -> tuple[str, str]:
    """'http://host:port/v1=NAME' -> (address, NAME); NAME is "" where none is given."""
    url, equals, model = name.partition("=")
    with suppress(UserError):
        if model or not equals:
            return check_address("--judge", url, KEY_NAMES[0]), model
    return check_address("--judge", name, KEY_NAMES[0]), ""  # says what is wrong, unless a key may be in it


class ServedJudge:
    """One server and one of its models; see the module's docstring. UserError, AllDown as lengthen.endpoint."""

    def __init__(self, name: str, *, connections: int = 4, silence: float = 300.0, reply_tokens: int = 2048):
        self.url, self.model = read_address(name)
        self.named, self.connections, self.reply_tokens = bool(self.model), connections, reply_tokens
        self.asked: dict[Hashable, JudgeRequest] = {}  # without a reply yet
        self.left_out = {"max_completion_tokens"}  # fields that this server refuses
        self.takes_schema = False  # it has been seen to
        key = key_from(*KEY_NAMES)
        self.with_key = bool(key)
        self.servers = Servers(
            [self.url],
            key=key,
            key_name=KEY_NAMES[0],
            at_once=connections,
            silence=silence,
            down_after=DOWN_AFTER + silence,
            greet=self._greet,
        )
        try:
            self.servers.meet()
        except BaseException:
            self.servers.close()
            raise

    def add(self, request: JudgeRequest) -> None:
        self.asked[request.key] = request
        self.servers.add(request.key, lambda call: self._ask(call, request))

    def run(self) -> Iterator[JudgeReply]:
        """Yields replies as they come, until none is outstanding. UserError if no request can succeed."""
        try:
            for key, reply in self.servers.run():
                request = self.asked.pop(key)
                yield JudgeReply(request, missing=str(reply)) if isinstance(reply, Unanswered) else reply
        except AllDown as error:
            while self.asked:
                yield JudgeReply(self.asked.popitem()[1], missing=error.message)

    def progress(self) -> str:
        return f"{self.connections} connections"

    def close(self) -> None:
        self.servers.close()

    # -- in the thread of lengthen.endpoint

    async def _greet(self, call: Call) -> None:
        """Which model answers there: the one that is named, else the only one that can chat."""
        import openai

        try:
            page = await call.client.models.list()
            listed = [m for m in page.data if isinstance(m.id, str) and m.id]
        except openai.APIStatusError as error:
            if self.named or error.status_code == 404:  # the questions will tell
                listed = []
            else:
                raise
        except (AttributeError, TypeError):
            listed = []
        if self.named:
            return
        names = [self.servers.clean(m.id) for m in listed if not NO_CHAT.search(f"{m.id} {getattr(m, 'type', '')}")]
        if len(names) != 1:
            shown = ", ".join(names[:8]) + " …" * (len(names) > 8)
            what = f"serves {len(names)} models: {shown}" if names else "lists no model that chats (/models)"
            raise UserError(f"{self.url} {what}", f"name one: --judge {self.url}={names[0] if names else 'NAME'}")
        if self.model not in ("", names[0]):
            raise UserError(
                f"{self.url} was {self.model} and is {names[0]} now",
                f"--judge {self.url}={names[0]} judges everything again",
            )
        self.model = names[0]

    async def _ask(self, call: Call, request: JudgeRequest) -> JudgeReply:
        limit = request.question.longest()
        while limit >= SHORTEST or limit == request.question.longest():
            prompt, cut = request.question.prompt(limit)
            try:
                text, ended = await self._complete(call, request, prompt)
                return JudgeReply(request, self.servers.clean(text), cut, ended=ended)
            except TooLong:
                limit //= 2
        return JudgeReply(request, cut=cut, error="the prompt does not fit the judge's context, even cut")

    async def _complete(self, call: Call, request: JudgeRequest, prompt: str) -> tuple[str, bool]:
        """A reply's words, and whether they came to their end; without the fields that the server refuses."""
        import openai

        content = CONTROL.sub(" ", prompt.encode("utf-8", "replace").decode())
        form = {"name": "verdict", "strict": True, "schema": schema(request.question.template)}
        fields = {
            "temperature": request.temperature,
            "seed": request.seed & 0x7FFFFFFF,  # llama.cpp takes 32 bits
            **dict.fromkeys(LIMITS, self.reply_tokens),
            "response_format": {"type": "json_schema", "json_schema": form},
        }
        left_out = set(self.left_out)
        while True:
            sent: Any = {name: value for name, value in fields.items() if name not in left_out}
            try:
                reply = await self._read(call, [{"role": "user", "content": content}], sent)
            except openai.RateLimitError as error:
                seconds = retry_after(error.response.headers.get("Retry-After")) or 0
                if error.code == "insufficient_quota" or seconds > self.servers.down_after:
                    raise AllDown(f"HTTP 429: {self.servers.words(error)}") from None
                raise
            except openai.APIStatusError as error:
                if error.status_code not in (400, 413, 422):
                    raise
                words = f"{error.message} {error.body}"
                refused = {name for name in sent if name in words}
                if "completion" in words:  # "… you requested 2600 tokens (552 …, 2048 in the completion)"
                    refused |= LIMITS & sent.keys()
                if "max_completion_tokens" in words and "max_tokens" in sent:
                    left_out.discard("max_completion_tokens")
                long = error.status_code == 413 or TOO_LONG.search(words)
                if not refused and not long and not self.takes_schema:
                    refused = {"response_format"} & sent.keys()  # not by its name, but perhaps by its shape
                if not refused:
                    raise (TooLong() if long else error) from None
                left_out |= refused
                continue
            self.left_out = left_out
            self.takes_schema |= "response_format" in sent
            return reply

    async def _read(self, call: Call, messages: list[dict], fields: Any) -> tuple[str, bool]:
        """(the assistant's words, whether they are complete). A refusal has none; a thought alone is not complete."""
        import httpx2

        create = call.client.chat.completions.with_streaming_response.create
        text, thought, finish, raw = "", None, "", b""
        async with create(model=self.model, messages=messages, stream=True, **fields) as response:
            if "event-stream" in response.headers.get("Content-Type", ""):
                async for chunk in await response.parse():
                    call.hear()
                    for choice in chunk.choices or ():
                        text += choice.delta.content or ""
                        thought = thought or thought_of(choice.delta.to_dict())
                        finish = choice.finish_reason or finish
                    if len(text) > LARGEST_REPLY:
                        raise Failure("a reply of more than 2 MB")
                if not finish:
                    raise Failure("a reply that broke off")
            else:  # a server that does not stream: the time-out is for the whole
                with translated(httpx2.HTTPError):
                    async for part in response.iter_bytes():
                        raw += part
                        if len(raw) > LARGEST_REPLY:
                            raise Failure("a reply of more than 2 MB")
                with translated(ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    choice = json.loads(raw)["choices"][0]
                    said, finish = choice["message"].get("content"), choice.get("finish_reason")
                    text, thought = said if isinstance(said, str) else "", thought_of(choice["message"])
        return text, finish != "length" and bool(text.strip() or not thought)


def thought_of(message: dict) -> Any:
    """What a server's parser of thoughts has taken out of the reply."""
    return message.get("reasoning_content") or message.get("reasoning")


@contextmanager
def translated(*errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise Failure(f"a reply that is not a chat completion ({type(error).__name__})") from None
