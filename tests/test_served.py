"""pytest tests/test_served.py: sampling through servers (lengthen/endpoint.py, sampling/served.py), by a stub."""

import asyncio
import json
import threading
import time
from collections import Counter

import pytest
from stub_server import Stub
from tiny import tiny_tokenizer

import evaluate
import extend
import generate
import run
from lengthen import endpoint
from lengthen.endpoint import AllDown, Failure, Servers, Unanswered, check_address, key_from, retry_after
from lengthen.records import UserError
from lengthen.sampling.request import Request, Sampling
from lengthen.sampling.served import Served

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, max_new_tokens=28)
TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


@pytest.fixture(autouse=True)
def short_rests(monkeypatch):
    """Rests of seconds are milliseconds here; nothing is asserted about time."""
    monkeypatch.setattr(endpoint, "FIRST_REST", 0.01)
    monkeypatch.setattr(endpoint, "LONGEST_REST", 0.05)


def served(*stubs: Stub, **options) -> Served:
    adapter, paths, rows = (options.pop(name, "") for name in ("adapter", "paths", "max_rows"))
    made = Served(
        [stub.url for stub in stubs],
        TOKENIZER,
        eos_ids={EOS},
        context=2048,
        adapter=adapter,
        paths=paths or (),
        max_rows=rows or 0,
        key=options.pop("key", ""),
    )
    for name, value in options.items():  # silence, down_after, tries
        setattr(made.servers, name, value)
    return made


def requests(count: int, sampling: Sampling = GREEDY) -> list[Request]:
    """Prompts that differ, so that a text shows whose it is."""
    return [Request(i, ids(f"{i} river garden winter"), 1000 + i, sampling) for i in range(count)]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def write_all(engine: Served, asked: list[Request]) -> dict:
    for request in asked:
        engine.add(request)
    samples = {}
    for sample in engine.run():
        assert sample.request.key not in samples, "a text came twice"
        samples[sample.request.key] = sample
    return samples


def check_texts(samples: dict, count: int) -> None:
    """As the stub's model writes: the prompt again and again, until --max-new-tokens."""
    assert sorted(samples) == list(range(count))
    for i, sample in samples.items():
        prompt = sample.request.prompt_ids
        assert sample.finish == "length" and sample.token_ids == (prompt * 28)[:28], i


# ---------------------------------------------------------------------------------------------------------
# How a text ends


@pytest.mark.parametrize(
    ("written", "sampling", "finish", "text"),
    [
        ([*ids(" a river"), EOS, 9], {}, "eos", " a river"),
        (ids(" a river\n\nmore of it"), {"stop": ("\n\n",)}, "stop", " a river"),
        (ids(" a river and a valley"), {"max_new_tokens": 2}, "length", TOKENIZER.decode(ids(" a river and")[:2])),
        (ids(" so") * 64, {"max_new_tokens": 64}, "repetition", " so" * 8),
    ],
)
def test_a_text_ends_as_in_our_own_sampler(written, sampling, finish, text):
    sampling = Sampling(**{**vars(GREEDY), **sampling})
    with Stub(write=lambda body: written) as stub:
        engine = served(stub)
        [sample] = write_all(engine, [Request("a", ids("the"), 1, sampling)]).values()
        engine.close()
    assert (sample.finish, sample.text) == (finish, text)
    assert sample.token_ids == written[: len(sample.token_ids)] and (finish != "eos" or sample.token_ids[-1] == EOS)


def test_an_end_that_only_the_server_knows_is_an_end():
    """Its generation config may name an EOS more than ours does."""
    with Stub(write=lambda body: (body["stop_token_ids"].append(7), ids(" a") + [7])[1]) as stub:
        engine = served(stub)
        [sample] = write_all(engine, [Request("a", ids("the"), 1, GREEDY)]).values()
        engine.close()
    assert sample.finish == "eos" and sample.token_ids[-1] == EOS


def test_everything_that_shapes_a_text_is_in_the_request():
    sampling = Sampling(0.7, 0.8, 20, 1.1, 32, 0, ("\n\n",))
    with Stub() as stub:
        engine = served(stub)
        write_all(engine, [Request("a", ids("the river"), 2**64 - 5, sampling)])
        engine.close()
        [body] = stub.requests
    wanted = {"prompt": ids("the river"), "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0, "max_tokens": 32}
    wanted |= {"repetition_penalty": 1.1, "stop_token_ids": [EOS], "min_tokens": 0, "return_token_ids": True}
    assert {name: body[name] for name in wanted} == wanted
    assert body["seed"] == 2**63 - 5 and body["stream"] is True and "stop" not in body and "vllm_xargs" not in body


def test_a_prompt_that_does_not_fit_is_that_record_s_error():
    full = lambda number, body: (400, {}) if len(body["prompt"]) == 5 else None  # noqa: E731
    with Stub(fault=full) as stub:
        stub._reply = lambda writer, status, value, headers=None, reply=stub._reply: reply(
            writer, status, {"error": {"message": "maximum context length is 4"}} if status == 400 else value, headers
        )
        engine = served(stub)
        asked = [Request("long", [5] * 3000, 1, GREEDY), Request("none", [], 1, GREEDY)]
        asked += [Request("theirs", [5] * 5, 1, GREEDY), Request("fits", [5] * 4, 1, GREEDY)]
        samples = write_all(engine, asked)
        engine.close()
    assert {key: sample.finish for key, sample in samples.items()} == {
        **dict.fromkeys(("long", "none", "theirs"), "error"),
        "fits": "repetition",
    }
    assert "the context 2048" in samples["long"].error and "context length" in samples["theirs"].error


# ---------------------------------------------------------------------------------------------------------
# The greeting


def test_a_server_that_does_as_it_is_told_passes_every_probe():
    sampling = Sampling(repetition_penalty=1.1, max_new_tokens=8)
    with Stub() as one, Stub() as two:
        engine = served(one, two)
        asked = [Request(0, ids("a river"), 1, sampling), Request(1, ids("a river"), 1, sampling, penalty_from=1)]
        assert len(write_all(engine, asked)) == 2
        passed = [server.facts["passed"] for server in engine.servers.servers]
        engine.close()
    assert passed[0] == passed[1] == {"model", "tokenizer", "ids", "weights", "seeds", "penalty", "scope"}


@pytest.mark.parametrize(
    ("lacks", "words", "hint"),
    [
        ("tokenizer", "has another tokenizer than --model", "the same model"),
        ("ids", "gives no token ids back", "return_token_ids"),
        ("seeds", "ignores seeds", "--enable-deterministic-inference"),
        ("penalty", "in its repetition penalty", "--repetition-penalty 1"),
        ("scope", "--penalty-scope output", "penalty_scope:PenaltyScope"),
        ("weights", "hold different weights", "the same model on every server"),
    ],
)
def test_what_a_server_ignores_is_refused_by_name(lacks, words, hint):
    with Stub() as good, Stub(lacks=lacks) as bad, pytest.raises(UserError, match=words) as caught:
        engine = served(good, bad)
        try:
            request = Request(0, ids("a river"), 1, Sampling(max_new_tokens=8), penalty_from=int(lacks == "scope"))
            write_all(engine, [request])
        finally:
            engine.close()
    assert hint in caught.value.hint and bad.url in caught.value.message
    assert not good.requests and not bad.requests, "a text was drawn before the probes"


def test_what_no_stage_needs_is_not_asked_for():
    """Greedy without a penalty: neither seeds nor a penalty's scope are probed."""
    with Stub(lacks="seeds") as stub:
        engine = served(stub)
        check_texts(write_all(engine, requests(3)), 3)
        engine.close()


def test_a_ban_of_eos_that_is_ignored_is_noticed():
    sampling = Sampling(**{**vars(GREEDY), "min_new_tokens": 5})
    with Stub(write=lambda body: [*ids(" a"), EOS]) as stub, pytest.raises(UserError, match="ignores min_tokens"):
        engine = served(stub)
        try:
            write_all(engine, [Request("a", ids("the"), 1, sampling)])
        finally:
            engine.close()


# ---------------------------------------------------------------------------------------------------------
# Adapters


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "run" / "generator"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    return folder


def test_an_adapter_is_loaded_by_the_hash_of_its_files_and_again_after_a_restart(adapter, tmp_path):
    def forgets(number, body):
        if number == 3:
            stub.known_adapters.clear()

    with Stub(fault=forgets) as stub:
        engine = served(stub, adapter=str(adapter), paths=[(str(tmp_path), "/mnt/runs/")], max_rows=1)
        check_texts(write_all(engine, requests(6)), 6)
        [(name, path)] = stub.known_adapters.items()
        with engine.base() as base:
            base.logprobs([([5, 6], [7])])
        engine.close()
    assert path == "/mnt/runs/run/generator" and name.startswith("lengthen-") and name == engine.lora
    assert {body["model"] for body in stub.requests} == {name} and stub.paths["/v1/load_lora_adapter"] == 2
    (adapter / "adapter_config.json").write_text('{"r": 4}')
    with Stub() as stub:
        engine = served(stub, adapter=str(adapter))
        engine.close()
    assert engine.lora != name, "another adapter under the name of the first"


@pytest.mark.parametrize(("status", "hint"), [(404, "--enable-lora"), (500, "--max-lora-rank")])
def test_a_server_without_adapters_is_refused_with_the_way_round(adapter, status, hint):
    with Stub(loads=status) as stub, pytest.raises(UserError, match="does not load the adapter") as caught:
        served(stub, adapter=str(adapter))
    assert hint in caught.value.hint and "--merge-to" in caught.value.hint


# ---------------------------------------------------------------------------------------------------------
# Faults


def now_and_then(fault):
    """Every third request of a server fails."""
    return lambda number, body: fault if number % 3 == 1 else None


@pytest.mark.parametrize(
    "fault",
    [429, (429, {"Retry-After": "0.02"}), 500, 503, "cut", "silence"],
    ids=["429", "after", "500", "503", *"cs"],
)
def test_the_same_request_is_sent_again_after(fault):
    with Stub(fault=now_and_then(fault)) as one, Stub() as two:
        engine = served(one, two, silence=0.3, max_rows=4)
        check_texts(write_all(engine, requests(40)), 40)
        engine.close()
        bodies = [json.dumps(body, sort_keys=True) for body in (*one.requests, *two.requests)]
    again = Counter(bodies)
    assert engine.servers.again == len(bodies) - 40 > 0 and len(again) == 40, "the same body, seed included"


def test_one_server_alone_gets_its_failed_request_again():
    with Stub(fault=now_and_then("cut")) as stub:
        engine = served(stub, max_rows=4)
        check_texts(write_all(engine, requests(12)), 12)
        engine.close()


def test_a_request_is_sent_elsewhere_not_back_to_the_server_it_failed_at():
    with Stub(fault=lambda number, body: 500) as broken, Stub() as good:
        engine = served(broken, good, max_rows=2)
        check_texts(write_all(engine, requests(20)), 20)
        engine.close()
    prompts = [tuple(body["prompt"]) for body in broken.requests]
    assert prompts and len(set(prompts)) == len(prompts)


def test_a_server_that_waits_its_turn_is_not_silent():
    """A text in the server's queue has sent nothing yet, while parts of others come all the time."""
    first = threading.Event()

    def slow(body):
        return ids(" river winter garden") * 7 + ids(" stone weather coast") * 7 if body["seed"] == 1000 else [4, EOS]

    async def held(self, writer, body, stream=Stub._stream):
        if body["seed"] == 1001:
            while self.running:  # in the queue, behind the other one
                first.set()
                await asyncio.sleep(0.01)
        await stream(self, writer, body)

    class Queueing(Stub):
        _stream = held

    with Queueing(write=slow, delay=0.4) as stub:
        engine = served(stub, silence=0.8)
        samples = write_all(engine, requests(2, Sampling(**{**vars(GREEDY), "max_new_tokens": 42})))
        engine.close()
    assert len(samples) == 2 and engine.servers.again == 0 and first.is_set()


def test_a_server_lost_and_back_is_greeted_again_and_works_again():
    lost = Stub(delay=0.002).__enter__()
    port = lost.port

    def die_and_come_back():
        while len(lost.requests) < 8:
            time.sleep(0.005)
        lost.__exit__()
        time.sleep(0.2)
        back.append(Stub(port=port, delay=0.002).__enter__())

    back: list[Stub] = []
    thread = threading.Thread(target=die_and_come_back)
    with Stub(delay=0.01) as other:
        engine = served(lost, other, max_rows=4)
        thread.start()
        check_texts(write_all(engine, requests(200)), 200)
        engine.close()
    thread.join()
    assert back[0].requests and back[0].paths["/tokenize"] == 1
    back[0].__exit__()


def lost_while_writing() -> tuple[Served, int]:
    """An engine whose only server is gone with a request, and the port to come back on."""
    lost = Stub(fault=lambda number, body: "silence").__enter__()
    engine = served(lost)
    engine.add(requests(1)[0])
    while not lost.requests:
        time.sleep(0.005)
    lost.__exit__()
    return engine, lost.port


def test_a_server_that_comes_back_as_another_is_refused():
    engine, port = lost_while_writing()
    with Stub(port=port, lacks="weights"), pytest.raises(UserError, match="different weights"):
        list(engine.run())
    engine.close()


@pytest.mark.parametrize("reply", [(400, {"error": {"message": "not here"}}), (200, ["no", "object"])])
def test_a_server_that_refuses_the_greeting_is_one_line(reply):
    """At the start, and when it comes back."""
    with Stub() as stub:
        stub._answer = lambda path, body: reply
        with pytest.raises(UserError, match="does not answer what every server is asked first"):
            served(stub)
    engine, port = lost_while_writing()
    back = Stub(port=port)
    back._answer = lambda path, body: reply
    with back, pytest.raises(UserError, match="asked first"):
        list(engine.run())
    engine.close()


def test_all_down_for_a_set_time_ends_it():
    stub = Stub(fault=lambda number, body: "silence").__enter__()
    engine = served(stub, down_after=0.3)
    engine.add(requests(1)[0])
    stub.__exit__()
    with pytest.raises(AllDown, match="no server has answered for"):
        list(engine.run())
    engine.close()


def test_a_request_that_no_server_answers_is_left_for_another_run_and_the_others_go_on():
    with Stub(fault=lambda number, body: 500 if body["seed"] == 1003 else None) as stub:
        engine = served(stub, tries=3)
        for request in requests(8):
            engine.add(request)
        done = []
        with pytest.raises(UserError, match="1 texts are missing: .* HTTP 500"):
            done += [sample.request.key for sample in engine.run()]
        # what was handed out before the end is in the stage's files
        assert sum(body["seed"] == 1003 for body in stub.requests) == 3 and stub.finished == 7
        engine.close()


def test_what_follows_is_asked_for_first_and_then_the_longest_expected():
    with Stub() as stub:
        engine = served(stub, max_rows=1)
        asked = requests(6)
        for request, expected in zip(asked, (0, 30, 10, 50, 20, 40), strict=True):
            request.expected_tokens, request.follows = expected, expected == 10
        write_all(engine, asked)
        engine.close()
    order = [body["seed"] - 1000 for body in stub.requests]
    assert order[1:] == [i for i in (2, 3, 5, 1, 4, 0) if i != order[0]], "the first may start before the others come"


def test_two_servers_of_different_speed_share_the_work_by_their_rates():
    """One writes four texts while the other writes one: held by counting, so that a busy machine changes nothing."""

    with Stub() as fast, Stub() as slow:
        pace(fast, 4, slow)
        pace(slow, 1, fast)
        engine = served(fast, slow, max_rows=4)
        check_texts(write_all(engine, requests(300)), 300)
        engine.close()
    share = fast.finished / (fast.finished + slow.finished)
    assert 0.8 * 0.8 <= share <= 0.8 * 1.2, share


def pace(stub: Stub, rate: int, other: Stub) -> None:
    """A text of `stub` begins when it is at most a round of `rate` texts ahead of the other, or when all have come."""
    inner, stub.rate, stub.arrived = stub._stream, rate, 0

    async def paced(writer, body):
        stub.arrived += 1
        while stub.finished / rate > other.finished / other.rate + 1 and stub.arrived + other.arrived < 300:
            await asyncio.sleep(0.001)
        await inner(writer, body)

    stub._stream = paced


def hold(stub: Stub, texts: int) -> None:
    """No text begins before so many are in flight there at a time; after that they are written as they come."""
    inner, stub.held = stub._stream, 0

    async def held(writer, body):
        if stub.held < texts:
            stub.held += 1
            while stub.held < texts:
                await asyncio.sleep(0.05)
        await inner(writer, body)

    stub._stream = held


@pytest.mark.soak
def test_thousands_in_flight_with_flat_memory():
    import resource

    with Stub() as one, Stub() as two:
        for stub in (one, two):
            hold(stub, 1000)
        engine = served(one, two, max_rows=1000)
        asked = iter(requests(6_000))
        for _ in range(2500):
            engine.add(next(asked))
        done, peaks = 0, []
        for sample in engine.run():
            assert sample.finish == "length"
            done += 1
            if request := next(asked, None):
                engine.add(request)
            if done in (3000, 5500):
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KB
        engine.close()
    assert done == 6_000 and one.held == two.held == 1000
    assert peaks[1] - peaks[0] < 40_000


# ---------------------------------------------------------------------------------------------------------
# Log-probabilities


def test_logprobs_of_single_tokens_share_a_request_and_texts_are_scored_whole():
    prompt = ids("the river")
    with Stub() as stub:
        engine = served(stub)
        before = stub.paths["/v1/completions"]
        values = engine.logprobs([(prompt, [3]), (prompt, [4]), (prompt, [5, 6]), (prompt, [])])
        assert stub.paths["/v1/completions"] - before == 2
        with pytest.raises(UserError, match="do not fit the context"):
            engine.logprobs([(prompt, [1] * 3000)])
        engine.close()
    assert [value.tolist() for value in values] == [
        [-1 - 3 / 1024],
        [-1 - 4 / 1024],
        [-1 - 5 / 1024, -1 - 6 / 1024],
        [],
    ]


# ---------------------------------------------------------------------------------------------------------
# The key and the address


def test_the_key_is_in_one_header_and_in_no_message(monkeypatch):
    key = "sk-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", "another-key")
    monkeypatch.setenv("OPENAI_ORG_ID", "an-organisation")
    for given in (key, ""):
        with Stub(fault=lambda number, body: 401) as stub, pytest.raises(UserError) as caught:
            engine = served(stub, key=given)
            try:
                write_all(engine, requests(1))
            finally:
                engine.close()
        assert key not in caught.value.message and "HTTP 401" in caught.value.message
        sent = {value for headers in stub.headers for name, value in headers.items() if "auth" in name}
        assert sent == ({f"Bearer {key}"} if given else set())
        assert not any("organ" in name or "another-key" in v for h in stub.headers for name, v in h.items())


def test_a_redirect_is_not_followed():
    with Stub() as other, Stub(fault=lambda number, body: (307, {"Location": other.url + "/completions"})) as stub:
        engine = served(stub, key="sk-0123456789")
        with pytest.raises(UserError, match="HTTP 307") as caught:
            write_all(engine, requests(1))
        engine.close()
    assert not other.paths and other.url in caught.value.hint


def test_the_key_comes_from_the_environment_and_a_bad_one_is_not_shown(monkeypatch):
    monkeypatch.setenv("FIRST", "")
    monkeypatch.setenv("SECOND", " sk-1 ")
    assert key_from("FIRST", "SECOND") == "sk-1" and key_from("NONE_OF_IT") == ""
    monkeypatch.setenv("FIRST", "sk 1")
    with pytest.raises(UserError, match="^FIRST holds a space") as caught:
        key_from("FIRST")
    assert "sk 1" not in caught.value.message + caught.value.hint


def test_addresses():
    assert check_address("--endpoint", "http://[::1]:8000/v1/", "K") == "http://[::1]:8000/v1"
    for wrong in ("localhost:8000", "ftp://a/v1", "http://a:99999/v1", "http://a/v1 b"):
        with pytest.raises(UserError, match="cannot read the address"):
            check_address("--endpoint", wrong, "K")
    with pytest.raises(UserError, match="holds '@' or '\\?'") as caught:
        check_address("--endpoint", "http://me:secret@a/v1", "K")
    assert "secret" not in caught.value.message + caught.value.hint


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("2.5") == 2.5 and retry_after(None) is None and retry_after("soon") is None
    assert retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0.0


# ---------------------------------------------------------------------------------------------------------
# Stages


def drafts(folder, count: int) -> str:
    path = folder / "drafts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Write about river {i}."}) + "\n" for i in range(count)))
    return str(path)


def prose_of(body: dict) -> list[int]:
    from scripted import prose

    return [*ids(prose(body["seed"], 60)), EOS]


def test_a_stage_through_a_server_writes_records_and_its_sidecar_says_which(tmp_path, writer, capsys, monkeypatch):
    """The same command continues it; another kind of server does not, nor the model of this process."""
    monkeypatch.setenv("LENGTHEN_ENDPOINT_KEY", "sk-0123456789")
    out = tmp_path / "run" / "iter_1" / "responses.jsonl"
    command = ["responses", "--model", str(writer), "--input", drafts(tmp_path, 6), "--output", str(out)]
    command += ["--no-length-bias", "--temperature", "0.7", "--samples", "1", "--max-attempts", "2"]
    with Stub(write=prose_of) as stub:
        generate.main([*command, "--endpoint", stub.url])
        generate.main([*command, "--endpoint", "http://127.0.0.1:9/v1"])  # finished: nobody is asked
    meta = json.loads(out.with_name("responses.meta.json").read_text())
    assert meta["settings"]["engine"] == "stub" and len(out.read_text().splitlines()) == 6
    assert any(stub.url in line and "stub 0.0" in line for line in meta["info"]["endpoint"])
    files = "".join(path.read_text() for path in out.parent.iterdir() if path.is_file())
    assert "sk-0123456789" not in files + "".join(capsys.readouterr())
    with pytest.raises(UserError, match="was made with engine = 'stub'"):
        generate.main(command)


def test_a_stage_killed_with_its_server_goes_on_where_it_was(tmp_path, writer, monkeypatch):
    monkeypatch.setattr(Servers.__init__, "__kwdefaults__", {**Servers.__init__.__kwdefaults__, "down_after": 0.3})
    out = tmp_path / "run" / "iter_1" / "responses.jsonl"
    command = ["responses", "--model", str(writer), "--input", drafts(tmp_path, 12), "--output", str(out)]
    command += ["--no-length-bias", "--samples", "1", "--max-rows", "2"]
    stub = Stub(write=prose_of, delay=0.01).__enter__()

    def kill() -> None:
        while stub.finished < 5:
            time.sleep(0.005)
        stub.__exit__()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(AllDown) as caught:
        generate.main([*command, "--endpoint", stub.url])
    thread.join()
    assert "same command" in caught.value.hint
    before = out.read_text().splitlines()
    assert len(before) >= 3
    with Stub(lacks="weights") as other, pytest.raises(UserError, match="begun with other weights than http"):
        generate.main([*command, "--endpoint", other.url])
    assert out.read_text().splitlines() == before
    with Stub(write=prose_of) as again:
        generate.main([*command, "--endpoint", again.url])
        assert len(again.requests) <= 12 - len(before), "a text was drawn twice"
    after = out.read_text().splitlines()
    assert set(before) <= set(after)  # in other places: the finished file is in the order of its tasks
    assert [json.loads(line)["prompt"] for line in after] == [f"Write about river {i}." for i in range(12)]


def test_extend_asks_for_its_penalty_s_scope(tmp_path, writer):
    path = tmp_path / "drafts.jsonl"
    path.write_text(json.dumps({"prompt": "Write about rivers.", "response": "A river.\n\nA garden."}) + "\n")
    command = ["--model", str(writer), "--input", str(path), "--rounds", "1", "--samples", "1", "--max-attempts", "1"]
    command += ["--min-yield", "0", "--output", str(tmp_path / "run" / "iter_1" / "extended.jsonl")]
    with Stub(write=prose_of) as stub:
        extend.main([*command, "--endpoint", stub.url])
    body = stub.requests[0]
    assert body["repetition_penalty"] == 1.0 and body["vllm_xargs"] == {
        "penalty": 1.1,
        "penalty_from": len(body["prompt"]),  # the first stage has no prefix: nothing of the prompt counts
    }


def responses(tmp_path, writer):
    """The words of a command that reads one draft."""
    files = ["--input", drafts(tmp_path, 1), "--output", str(tmp_path / "o.jsonl")]
    return ["responses", "--model", str(writer), *files, "--endpoint", "http://127.0.0.1:9/v1"]


@pytest.mark.parametrize(
    "flag", [("--dtype", "float32"), ("--quantize", "nf4"), ("--kv-cache", "fp8"), ("--device", "cpu")]
)
def test_what_the_server_decides_is_refused_beside_endpoint(tmp_path, writer, flag):
    with pytest.raises(UserError, match="the server decides that"):
        generate.main([*responses(tmp_path, writer), *flag])


def test_an_evaluation_through_a_server_probes_with_and_without_the_adapter(tmp_path, writer, adapter):
    out = tmp_path / "eval"
    command = ["answer", "--model", str(writer), "--adapter", str(adapter), "--language", "en", "--limit", "2"]
    asked: list[str] = []
    with Stub(write=prose_of) as stub:
        stub._answer = lambda path, body, answer=stub._answer: (
            asked.append(body["model"]) if "prompt_logprobs" in body else None,
            answer(path, body),
        )[1]
        evaluate.main([*command, "--endpoint", stub.url, "--output", str(out)])
    outputs = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    assert len(outputs) == 2 and all(row["base_tokens"] > 0 and row["perplexity"] > 0 for row in outputs)
    # The short tasks and perplexities are of the evaluated model, the answers' probes of the base model.
    assert asked[0].startswith("lengthen-") and asked[-1] == "base"


def test_run_passes_the_servers_on_and_keeps_the_device_for_training():
    flags = [
        "--model",
        "a/b",
        "--endpoint",
        "http://x/v1",
        "http://y/v1",
        "--quantize",
        "nf4",
        "--endpoint-path",
        "/a=/b",
    ]
    for step in run.plan(run.parse_args(flags)):
        training = step.command[0] == "train.py"
        assert step.settings.get("quantize") == ("nf4" if training else None), step
        assert step.settings.get("endpoint") == (None if training else ["http://x/v1", "http://y/v1"]), step
        assert step.settings.get("endpoint_path") == (None if training else ["/a=/b"]), step


def test_no_server_at_the_address_is_said_at_once(tmp_path, writer):
    with pytest.raises(UserError, match="connection refused") as caught:
        generate.main(responses(tmp_path, writer))
    assert "start the server" in caught.value.hint


def test_ctrl_c_hands_out_what_has_come():
    with Stub() as stub:
        servers = Servers([stub.url])

        async def ask(call):
            return 1

        for i in range(5):
            servers.add(i, ask)
        while servers.replies.qsize() < 5:
            time.sleep(0.01)
        calls = []

        class Interrupted:
            def get(self, block=True, inner=servers.replies):
                calls.append(block)
                if len(calls) == 1:
                    raise KeyboardInterrupt
                return inner.get(block=block)

        servers.replies, got = Interrupted(), []
        servers.pending = 6  # one is still on its way
        with pytest.raises(KeyboardInterrupt):
            for key, _ in servers.run():
                got.append(key)
        servers.close()
    assert got == [0, 1, 2, 3, 4]


def test_a_mistake_in_our_own_code_is_not_tried_again():
    async def wrong(call):
        raise KeyError("a bug")

    with Stub() as stub:
        servers = Servers([stub.url])
        servers.add("a", wrong)
        with pytest.raises(KeyError):
            list(servers.run())
        servers.close()


def test_tries_end():
    async def wrong(call):
        raise Failure("no chat completion")

    with Stub() as stub:
        servers = Servers([stub.url], tries=2)
        servers.add("a", wrong)
        [(key, result)] = servers.run()
        servers.close()
    assert isinstance(result, Unanswered) and "no chat completion" in str(result) and servers.again == 2


def test_scores_that_wait_when_all_are_down_end_as_well():
    """They hung once: what came back to the queue after the end was never answered."""
    stub = Stub().__enter__()
    engine = served(stub, down_after=0.2)
    stub.__exit__()
    with pytest.raises(AllDown):
        engine.logprobs([([5, 6], [7])])
    with pytest.raises(AllDown):
        engine.logprobs([([5, 6], [7])])
    engine.close()


def test_servers_of_two_kinds_or_contexts_are_refused():
    with Stub() as one, Stub(kind="another") as two, pytest.raises(UserError, match="another engine than the others"):
        served(one, two)
    with Stub(context=100) as lost, Stub(context=80) as other:
        engine = served(lost, other)
        engine.close()
        assert engine.context == 80
