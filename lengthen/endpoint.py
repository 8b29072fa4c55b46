"""Requests to OpenAI-compatible servers, through the `openai` package: many at a time, each until it has a reply.

    servers = Servers(["http://a:8000/v1", "http://b:8000/v1"], key=key_from("LENGTHEN_ENDPOINT_KEY"), at_once=256)
    servers.add("my key", ask, expected=1000)
    for key, result in servers.run():  # as they come; more may be added meanwhile
        ...

`ask` is a coroutine function: it is given a `Call`, makes its request with `call.client` (an AsyncOpenAI), and what it
returns is the result. For each part of a stream that comes it says `call.hear()`.

1. Longest expected first, each to the least busy server, `at_once` in flight per server.
2. After a broken stream, a refused connection, 408, 409, 425, 429, 5xx or silence the same request is sent again, to
   another server where there is one. Silence counts, never the total time; a request that waits in the queue of a
   server which sends parts of others is not silent.
3. A server that fails rests: as long as Retry-After says, else longer each time. It comes back when /health
   answers, and has one request at a time until one succeeds. One that was gone is greeted again.
4. A request that has failed `tries` times comes back as Unanswered, and so does one that a server refuses (HTTP 400,
   say). If none has answered anything for `down_after` seconds, `run` raises AllDown.
5. A wrong key or address, a redirect: UserError. The key is in one header of the requests to these addresses and
   nowhere else: redirects are not followed, and if a server writes the key back it is blanked out.
"""

import asyncio
import email.utils
import heapq
import itertools
import os
import queue
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lengthen.records import UserError

FIRST_REST, LONGEST_REST = 1.0, 30.0  # seconds, plus or minus half
CONNECT = 60.0  # seconds; a thousand connections at a time take a while, and a refused one says so at once
AGAIN = (408, 409, 425, 429)  # and 5xx

Ask = Callable[["Call"], Awaitable[Any]]


class Unanswered(Exception):
    """One request that got no reply. `status`: HTTP's, 0 = none; `words`: what the server said, without our key."""

    def __init__(self, why: str, status: int = 0, words: str = ""):
        super().__init__(why)
        self.status, self.words = status, words


class Failure(Exception):
    """A try that failed, and that another may mend. `after`: seconds that the server asks for, None = it does not.

    An `ask` raises it, too, for a reply that it cannot use. `counts`: as a try of the request.
    """

    def __init__(self, why: str, after: float | None = None, counts: bool = True):
        super().__init__(why)
        self.after, self.counts = after, counts


class AllDown(UserError):
    """No server has answered anything for a long time."""


@dataclass(eq=False)
class Server:
    url: str
    client: Any  # AsyncOpenAI
    heard: float  # when it last sent something (time.monotonic)
    calls: set["Call"] = field(default_factory=set)
    failures: int = 0  # in a row
    resting: bool = False
    gone: bool = False  # /health failed: it may be another process when it is back
    why: str = ""  # the last failure
    facts: dict[str, Any] = field(default_factory=dict)  # what its greeting found out; emptied when it is gone

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")


@dataclass(eq=False)
class Call:
    """One try of one request."""

    server: Server
    began: float = field(default_factory=lambda: time.monotonic())  # the clock of now, which tests may set
    heard: float = 0.0  # 0 = nothing yet
    silent: bool = False
    task: "asyncio.Task[Any] | None" = None

    @property
    def client(self) -> Any:
        return self.server.client

    def hear(self) -> None:
        self.heard = self.server.heard = time.monotonic()


@dataclass(eq=False)
class _Item:
    """A request until it is done."""

    ask: Ask
    rank: float
    done: Callable[[Any], None]
    tries: int = 0
    failed_at: set[Server] = field(default_factory=set)


class Servers:
    """See the module's docstring. `greet`: asked of a server before its first request, and after it was gone.

    silence, down_after: seconds. Everything runs in one asyncio thread; `add`, `run`, `ask` and `close` are called from
    another one.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str = "",
        at_once: int = 256,
        silence: float = 300.0,
        down_after: float = 600.0,
        tries: int = 5,
        greet: Ask | None = None,
        key_name: str = "LENGTHEN_ENDPOINT_KEY",
    ):
        self._key, self.key_name, self.greet = key, key_name, greet
        self.at_once, self.silence, self.down_after, self.tries = at_once, silence, down_after, tries
        self.waiting: list[tuple[float, int, _Item]] = []
        self.replies: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.pending = self.again = 0  # requests without a reply; tries that failed
        self.over: Exception | None = None  # why nothing is asked any more
        self._order = itertools.count()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)  # Ctrl-C does not wait for it
        self._thread.start()
        self.servers = [Server(url, self._client(url), time.monotonic()) for url in urls]
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._watch()))

    def _client(self, url: str) -> Any:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

        async def own_headers(request: Any) -> None:
            # The environment of OpenAI's own service is none of ours: no organisation or project comes from it.
            for name in ("OpenAI-Organization", "OpenAI-Project", *([] if self._key else ["Authorization"])):
                request.headers.pop(name, None)

        host = urllib.parse.urlsplit(url).hostname or ""
        http = DefaultAsyncHttpxClient(
            follow_redirects=False,
            trust_env=not re.match(r"127\.|localhost$|::1$", host),  # no proxy reaches our own loopback
            timeout=Timeout(None, connect=CONNECT),  # `_watch` knows about the rest
            event_hooks={"request": [own_headers]},
        )
        return AsyncOpenAI(api_key=self._key or "none", base_url=url, max_retries=0, http_client=http)

    # -- from the caller's thread

    def add(self, key: Any, ask: Ask, expected: float = 0) -> None:
        """Queue a request; `expected`: how long its reply may be, the longest are asked first."""
        self.pending += 1
        item = _Item(ask, -expected, lambda result: self.replies.put((key, result)))
        self._loop.call_soon_threadsafe(self._push, item)

    def run(self) -> Iterator[tuple[Any, Any]]:
        """(key, what `ask` returned or Unanswered) as they come, until nothing is pending; UserError for all of them.

        Ctrl-C: what has come is handed out first, then KeyboardInterrupt goes on its way.
        """
        interrupted = False
        while self.pending:
            try:
                key, result = self.replies.get(block=not interrupted)
            except KeyboardInterrupt:
                interrupted = True
                continue
            except queue.Empty:
                raise KeyboardInterrupt from None
            if isinstance(result, Exception) and not isinstance(result, Unanswered):
                raise result
            self.pending -= 1
            yield key, result

    def ask(self, asks: Sequence[Ask]) -> list[Any]:
        """The results of a few requests, before all that wait; raises Unanswered, too."""
        futures: list[Future[Any]] = [Future() for _ in asks]
        for ask, future in zip(asks, futures, strict=True):
            self._loop.call_soon_threadsafe(self._push, _Item(ask, float("-inf"), future.set_result))
        results = [future.result() for future in futures]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def meet(self) -> list[str]:
        """Greet every server now; a line for each that does not answer. UserError if none does, or one is refused."""
        return asyncio.run_coroutine_threadsafe(self._meet(), self._loop).result()

    def close(self) -> None:
        """Requests in flight are given up."""

        async def stop() -> None:
            others = [task for task in self._tasks if not task.done()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            for server in self.servers:
                await server.client.close()

        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # -- in the asyncio thread

    def _spawn(self, coroutine: Any) -> "asyncio.Task[Any]":
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)  # asyncio itself only keeps weak references
        task.add_done_callback(self._tasks.discard)
        return task

    def _push(self, item: _Item) -> None:
        if self.over:
            return item.done(self.over)
        if not item.failed_at and not self.waiting and not any(server.calls for server in self.servers):
            for server in self.servers:  # it was idle: nobody could have been heard
                server.heard = time.monotonic()
        heapq.heappush(self.waiting, (item.rank, next(self._order), item))
        self._dispatch()

    def _dispatch(self) -> None:
        """Send what waits to the servers that have room."""
        held = []
        while self.waiting:
            up = [server for server in self.servers if not server.resting]
            free = [s for s in up if len(s.calls) < (1 if s.failures else self.at_once)]
            if not free:
                break
            entry = heapq.heappop(self.waiting)
            item = entry[-1]
            if any(server not in item.failed_at for server in up):
                free = [server for server in free if server not in item.failed_at]
            if not free:  # it waits for a server that it has not failed at
                held.append(entry)
                continue
            server = min(free, key=lambda server: len(server.calls))
            call = Call(server)
            server.calls.add(call)
            call.task = self._spawn(self._serve(item, call))
        for entry in held:
            heapq.heappush(self.waiting, entry)

    async def _serve(self, item: _Item, call: Call) -> None:
        try:
            result = await self._try(call, item.ask)
            call.server.failures, call.server.heard = 0, time.monotonic()
        except Failure as error:
            self._rest(call.server, error)
            self.again += 1
            item.tries += error.counts
            item.failed_at.add(call.server)
            item.rank = float("-inf")  # before all others: it has waited
            if item.tries < self.tries:
                return self._push(item)
            result = Unanswered(f"{call.server.url}: {error}")
        except UserError as error:  # it ends the run: nothing more is sent
            item.done(error)
            return self._give_up(error)
        except Exception as error:  # handed to whoever asked
            result = error
        item.done(result)
        self._dispatch()

    async def _try(self, call: Call, ask: Ask) -> Any:
        """What `ask` returns; Failure, Unanswered or UserError for what HTTP has against it."""
        import openai

        call.server.calls.add(call)
        call.task = asyncio.current_task()
        try:
            return await ask(call)
        except asyncio.CancelledError:
            if not call.silent:
                raise
            raise Failure(f"silent for {self.silence:.0f} s") from None
        except openai.APIError as error:
            raise self._meaning(error, call.server) from None
        except ValueError as error:  # of the JSON inside a stream
            raise Failure(self.clean(f"a reply that cannot be read: {error}")) from None
        finally:
            call.server.calls.discard(call)

    def _meaning(self, error: Any, server: Server) -> Exception:
        """An exception of the openai package as one of ours."""
        import openai

        words = self.words(error)
        if not isinstance(error, openai.APIStatusError):
            if isinstance(error, openai.APIConnectionError):
                cause = str(error.__cause__ or error)
                refused = "refused" in cause or "connection attempts failed" in cause
                server.gone = True
                # A server that is not there has not seen the request.
                return Failure("connection refused" if refused else self.clean(cause)[:200], counts=not refused)
            code = int(error.code) if str(error.code).isdigit() else 500  # an error in the middle of a stream
            return Failure(words) if code >= 500 or code in AGAIN else Unanswered(words, code, words)
        code = error.status_code
        if code in (401, 403):  # its words may quote a part of the key
            what = "refuses the key" if self._key else "asks for a key"
            return UserError(
                f"{server.url} {what} (HTTP {code})", f"export {self.key_name}=…, and the same command again"
            )
        if 300 <= code < 400 or code in (404, 405):
            where = self.clean(error.response.headers.get("Location") or "")
            hint = f"it points to {where}" if where else "check the address (it often ends in /v1) and the model's name"
            return UserError(f"{server.url} has no such page (HTTP {code}): {words}", hint)
        if code in AGAIN or code >= 500:
            after = retry_after(error.response.headers.get("Retry-After"))
            return Failure(f"HTTP {code}: {words}", after, counts=code != 429)
        return Unanswered(f"HTTP {code}: {words}", code, words)

    def _rest(self, server: Server, error: Failure) -> None:
        server.failures += 1
        server.why = str(error)
        if not server.resting:
            server.resting = True
            pause = min(LONGEST_REST, FIRST_REST * 2 ** min(server.failures - 1, 9)) * random.uniform(0.5, 1.5)
            self._spawn(self._wake(server, error.after if error.after is not None else pause))

    async def _wake(self, server: Server, pause: float) -> None:
        while True:
            await asyncio.sleep(pause)
            try:
                await self._try(Call(server), self._health)
                if server.gone:
                    server.facts.clear()
                await self._greet(server)
                break
            except Failure as error:
                server.gone, server.why = True, str(error)
                pause = error.after or min(LONGEST_REST, max(FIRST_REST, 2 * pause))
            except Exception as error:  # refused: what it is now is not what the others are
                return self._give_up(error)
        server.resting = server.gone = False
        self._dispatch()

    async def _health(self, call: Call) -> None:
        """Failure unless the server answers."""
        import openai

        try:
            await call.client.get(f"{call.server.root}/health", cast_to=object)
        except openai.APIStatusError as error:  # no such page, or not for us: it is there
            if error.status_code in AGAIN or error.status_code >= 500:
                raise

    async def _greet(self, server: Server) -> None:
        try:
            if self.greet:
                await self._try(Call(server), self.greet)
        except (Unanswered, AttributeError, LookupError, TypeError) as error:  # refused, or no answer to the question
            raise UserError(
                f"{server.url} does not answer what every server is asked first: {type(error).__name__}: {error}",
                "is it a server with OpenAI's interface? curl " + server.url + "/models shows what it serves",
            ) from None

    async def _meet(self) -> list[str]:
        async def one(server: Server) -> str:
            try:
                await self._greet(server)
            except Failure as error:
                server.gone = True
                self._rest(server, error)
                return f"{server.url} does not answer yet: {error}"
            return ""

        up = [server for server in self.servers if not server.resting]
        outcomes = await asyncio.gather(*map(one, up), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        if all(server.resting for server in self.servers):
            raise AllDown("; ".join(f"{server.url}: {server.why}" for server in self.servers), "start the server first")
        return [str(outcome) for outcome in outcomes if outcome]

    async def _watch(self) -> None:
        """Once a second or so: who is silent, and whether all are down."""
        while True:
            await asyncio.sleep(min(1.0, self.silence / 4, self.down_after / 4))
            now = time.monotonic()
            for server in self.servers:
                for call in server.calls:
                    # Before its first part a request may wait in the server's own queue, behind others.
                    if now - (call.heard or max(call.began, server.heard)) > self.silence and call.task:
                        call.silent = True
                        call.task.cancel()
            busy = not self.over and (self.waiting or any(server.calls for server in self.servers))
            latest = max(server.heard for server in self.servers)
            if busy and all(server.failures for server in self.servers) and now - latest > self.down_after:
                why = "; ".join(f"{server.url}: {server.why}" for server in self.servers)
                hint = "start it again, then run the same command again: it continues where it was"
                self._give_up(AllDown(f"no server has answered for {self.down_after:.0f} s ({why})", hint))

    def _give_up(self, error: Exception) -> None:
        """Tell everybody who waits."""
        self.over = error
        self.replies.put(("", error))
        for _, _, item in self.waiting:
            item.done(error)
        self.waiting.clear()

    def words(self, error: Any) -> str:
        """What a server says in an exception of the openai package."""
        body = error.body.get("message") if isinstance(error.body, dict) else error.body
        return self.clean(" ".join(str(body or error.message).split())[:300])

    def clean(self, text: str) -> str:
        """A server's words without our key, should it write it back."""
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text


def key_from(*names: str) -> str:
    """The key in the first of these environment variables that is set, "" = none.

    A header refuses some characters with a message that quotes them: checked here, unquoted.
    """
    for name in names:
        if key := os.environ.get(name, "").strip():
            if not re.fullmatch(r"[!-~]+", key):
                raise UserError(f"{name} holds a space or a character that keys do not have", f"export {name}=…")
            return key
    return ""


def check_address(flag: str, url: str, key_name: str) -> str:
    """The address without a slash at its end; UserError where it is none, or might hold a key."""
    match = re.fullmatch(r"https?://(?:[\w.-]+|\[[0-9a-fA-F:.]+\])(?::(\d{1,5}))?(?:/[\w.~/-]*)?", url, re.A)
    if not match or int(match[1] or 0) > 65535:
        hint = "http://127.0.0.1:8000/v1"
        if "@" in url or "?" in url:  # not to be shown
            raise UserError(f"an address of {flag} holds '@' or '?'", f"{hint}; keys come from {key_name}")
        raise UserError(f"cannot read the address {url!r} of {flag}", hint)
    return url.rstrip("/")


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
