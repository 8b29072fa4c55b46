"""Any OpenAI-compatible server as a judge: chat completions over HTTP, a few at a time, with the standard library only.

    endpoint = Endpoint("http://127.0.0.1:8000/v1", model="", key=key_from_environment())
    endpoint.add(JudgeRequest(...))
    for reply in endpoint.run():  # as they come; more requests may be added meanwhile, as with the sampler
        ...

1. A time-out, a refused connection, HTTP 429 or 5xx and a body that is not a chat completion are tried again, with
   growing waits or as Retry-After says. A request that still has no reply comes back as `missing`, to be sent again
   another day. After DOWN_AFTER such requests in a row the server is taken to be down, and the others are not sent.
2. A wrong key, address or model affects every request: UserError.
3. A prompt too long for the server (only the server knows its context) is sent again with the middle of its texts cut.
4. A field that the server names in a refusal (some models accept no temperature) is left out from then on.
5. The key is in one header of the requests to this address and nowhere else: redirects are not followed, and if the
   server writes it back it is blanked out.
"""

import email.utils
import http.client
import json
import os
import queue
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from lengthen.evaluation.questions import JudgeReply, JudgeRequest
from lengthen.records import UserError

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between the tries of one request, plus or minus half
LONGEST_WAIT = 120.0  # seconds; a longer Retry-After is not waited for
DOWN_AFTER = 5  # requests in a row without a reply
LARGEST_BODY = 2**21  # bytes; a chat completion has a few thousand
SHORTEST = 200  # characters; texts are not cut below this length
OPTIONAL = ("temperature", "seed", "max_tokens")  # fields of a request that a server may refuse
TOO_LONG = re.compile(r"context|too (long|large|many)|exceed|maximum.{0,20}(length|tokens)", re.IGNORECASE)
KEY_NAMES = ("LENGTHEN_JUDGE_KEY", "OPENAI_API_KEY")
# Servers turn control tokens into the real ones wherever they stand: a space makes text of them.
CONTROL = re.compile(r"(?<=<)(?=\||/?s>|(?:start|end)_of_turn>)|(?<=\[)(?=/?INST\])")


class Unanswered(Exception):
    """One request failed; `after`: seconds to wait before the next try, None = as usual, -1 = do not try again."""

    def __init__(self, why: str, after: float | None = None):
        super().__init__(why)
        self.after = after


class TooLong(Exception):
    """The prompt does not fit."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key on to wherever a redirect points."""

    def redirect_request(self, *_: object) -> None:
        return None


def key_from_environment() -> str:
    """The key, "" = none. A header refuses some characters with a message that quotes them: checked here, unquoted."""
    for name in KEY_NAMES:
        if key := os.environ.get(name, "").strip():
            if not re.fullmatch(r"[!-~]+", key):
                raise UserError(f"{name} holds a space or a character that keys do not have", f"export {name}=…")
            return key
    return ""


def read_address(name: str) -> tuple[str, str]:
    """'http://host:port/v1=NAME' -> (address, NAME); NAME is "" where none is given."""
    match = re.fullmatch(
        r"(https?://(?:[\w.-]+|\[[0-9a-fA-F:.]+\])(?::(\d{1,5}))?(?:/[\w.~/-]*)?)(?:=(.+))?", name, re.A
    )
    if not match or int(match[2] or 0) > 65535:
        hint = "http://127.0.0.1:8000/v1, or with a model's name http://127.0.0.1:8000/v1=NAME"
        if "@" in name or "?" in name:  # perhaps with a key in it: not to be shown
            raise UserError("an address of --judge holds '@' or '?'", f"{hint}; keys come from {KEY_NAMES[0]}")
        raise UserError(f"cannot read the address {name!r}", hint)
    return match[1].rstrip("/"), match[3] or ""


class Endpoint:
    """One server and one of its models; see the module's docstring."""

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        key: str = "",
        connections: int = 4,
        timeout: float = 300.0,  # seconds
        reply_tokens: int = 2048,
    ):
        self.url, self._key = url, key
        self.connections, self.timeout, self.reply_tokens = connections, timeout, reply_tokens
        loopback = re.match(r"127\.|localhost$|::1$", urllib.parse.urlsplit(url).hostname or "")
        proxies = [urllib.request.ProxyHandler({})] if loopback else []  # no proxy reaches our own loopback
        self._opener = urllib.request.build_opener(NoRedirect, *proxies)
        self._waiting: queue.SimpleQueue[JudgeRequest | None] = queue.SimpleQueue()  # None: a thread ends
        self._replies: queue.SimpleQueue[JudgeReply | Exception] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._pending = 0
        self.left_out: set[str] = set()  # of OPTIONAL, what this server refuses
        self.model = model
        self.model = model or self._first_model()

    # -- questions in, replies out

    def add(self, request: JudgeRequest) -> None:
        self._pending += 1
        self._waiting.put(request)

    def progress(self) -> str:
        return f"{self.connections} connections"

    def run(self) -> Iterator[JudgeReply]:
        """Yields replies as they come, until none is outstanding. UserError if no request can succeed."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.connections)]
        for thread in threads:
            thread.start()
        in_a_row = 0
        try:
            while self._pending:
                reply = self._replies.get()
                self._pending -= 1
                if isinstance(reply, Exception):
                    raise reply
                in_a_row = in_a_row + 1 if reply.missing else 0
                if in_a_row >= DOWN_AFTER:
                    self._stopped.set()
                yield reply
        finally:
            self._stopped.set()
            for _ in threads:
                self._waiting.put(None)

    def close(self) -> None:
        self._stopped.set()

    def _work(self) -> None:
        """A thread (a daemon: Ctrl-C does not wait for its time-out): one question at a time."""
        while request := self._waiting.get():
            try:
                self._replies.put(self._ask(request))
            except Exception as error:  # raised again where the replies are read
                self._stopped.set()
                self._replies.put(error)

    def _ask(self, request: JudgeRequest) -> JudgeReply:
        if self._stopped.is_set():
            return JudgeReply(request, missing="not asked: too many requests in a row had failed")
        limit = request.question.longest()
        while True:
            prompt, cut = request.question.prompt(limit)
            try:
                return JudgeReply(request, self._complete(prompt, request.seed, request.temperature), cut)
            except TooLong:
                limit //= 2
                if limit < SHORTEST:
                    return JudgeReply(request, cut=cut, error="the prompt does not fit the judge's context, even cut")
            except Unanswered as error:
                return JudgeReply(request, cut=cut, missing=str(error))

    # -- HTTP

    def _first_model(self) -> str:
        try:
            body = self._request("/models")
            name = body["data"][0]["id"]
            if not isinstance(name, str) or not name:
                raise ValueError
        except (LookupError, TypeError, ValueError, TooLong):
            raise UserError(f"{self.url}/models lists no model", f"--judge {self.url}=NAME") from None
        return self._clean(name)

    def _complete(self, prompt: str, seed: int, temperature: float) -> str:
        """The assistant's words. A reply without any (a refusal, only thoughts) is "", and no verdict."""
        content = CONTROL.sub(" ", prompt.encode("utf-8", "replace").decode())
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": temperature,
            "seed": seed & 0x7FFFFFFF,  # llama.cpp takes 32 bits
            "max_tokens": self.reply_tokens,
        }
        body = self._request("/chat/completions", request)
        text = body["choices"][0]["message"].get("content")
        return self._clean(text) if isinstance(text, str) else ""

    def _request(self, path: str, request: dict | None = None) -> dict:
        """The JSON that comes back, after as many tries as it takes; Unanswered when they are used up."""
        for wait in (*WAITS, None):
            try:
                return self._once(path, request)
            except Unanswered as error:
                pause = error.after if error.after is not None else (wait or 0) * random.uniform(0.5, 1.5)
                if wait is None or not 0 <= pause <= LONGEST_WAIT or self._stopped.wait(pause):
                    raise
        raise AssertionError("the last try returns or raises")

    def _once(self, path: str, request: dict | None) -> dict:
        headers = {"Content-Type": "application/json", "User-Agent": "self-lengthen"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        sent = None if request is None else {k: v for k, v in request.items() if k not in self.left_out}
        data = None if sent is None else json.dumps(sent).encode()
        try:
            asked = urllib.request.Request(self.url + path, data=data, headers=headers)
            with self._opener.open(asked, timeout=self.timeout) as response:
                raw = self._read(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, sent or {}) from None
        except (OSError, http.client.HTTPException) as error:
            raise Unanswered(self._why(error)) from None
        try:
            body = json.loads(raw)
            if request is not None:
                body["choices"][0]["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Unanswered(
                "a reply that is not a chat completion" if request else "a reply that is not JSON"
            ) from None
        return body

    def _read(self, response: Any) -> bytes:
        """The body of an http.client.HTTPResponse, the whole within the time-out: one byte a minute would satisfy the
        socket's."""
        chunks, size, end = [], 0, time.monotonic() + self.timeout
        while chunk := response.read1(65536):
            chunks.append(chunk)
            size += len(chunk)
            if size > LARGEST_BODY:
                raise Unanswered("a reply of more than 2 MB")
            if time.monotonic() > end:
                raise TimeoutError
        return b"".join(chunks)

    def _refusal(self, error: urllib.error.HTTPError, sent: dict) -> Exception:
        """What an HTTP error means for this request, or for all of them."""
        code = error.code
        if code in (401, 403):  # its words may quote a part of the key
            what = "refuses the key" if self._key else "asks for a key"
            return UserError(f"{self.url} {what} (HTTP {code})", f"export {KEY_NAMES[0]}=…, and the same command again")
        try:
            words = self._read(error.fp).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, Unanswered, AttributeError):
            words = ""
        short = self._clean(" ".join(words.split())[:300])
        if 300 <= code < 400 or code in (404, 405):
            where = self._clean(error.headers.get("Location") or "")
            hint = f"it points to {where}" if where else "check the address (it often ends in /v1) and the model's name"
            return UserError(f"{self.url} has no such page (HTTP {code}) for model {self.model!r}: {short}", hint)
        if code in (400, 413, 422):
            named = {name for name in OPTIONAL if name in sent and name in words}
            if (
                "completion" in words and "max_tokens" in sent
            ):  # "… you requested 2600 tokens (552 …, 2048 in the completion)"
                named.add("max_tokens")
            if named:
                self.left_out |= named
                return Unanswered(f"HTTP {code}: {short}", after=0)
            if code == 413 or TOO_LONG.search(words):
                return TooLong()
            return Unanswered(f"HTTP {code}: {short}", after=-1)
        if code in (408, 409, 425, 429) or code >= 500:
            return Unanswered(f"HTTP {code}", after=retry_after(error.headers.get("Retry-After")))
        return Unanswered(f"HTTP {code}: {short}", after=-1)

    def _why(self, error: Exception) -> str:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError | socket.timeout):
            return "timed out"
        if isinstance(reason, ConnectionRefusedError):
            return "connection refused"
        return self._clean(" ".join(f"{type(reason).__name__} {reason}".split())[:200])

    def _clean(self, text: str) -> str:
        """The server's words without our key, should it write it back."""
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (a number, or a date); None if it is missing or unreadable."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
