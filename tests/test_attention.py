"""kernels/attention.py against float64 SDPA over gathered keys: the torch reference, and Triton's interpreter or a GPU.

    pytest tests/test_attention.py

Every buffer has guards: pages that no text owns and slots past a text's end hold nan, and what must not be written
is compared bit by bit. Tolerances as in test_linear_cross_entropy.py: as wrong as torch in the same dtype, plus little.
"""

import pytest
import torch
import torch.nn.functional as F

import kernels.attention as attention
from kernels import HAS_NUMBA
from kernels.attention import Pages, Turn, paged_attention, place, quantise, store_pages

try:
    import kernels.attention_triton as fast
except ModuleNotFoundError:  # no triton on this platform: the torch path is the whole module
    fast = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(fast is None, reason="triton is not installed")
needs_numba = pytest.mark.skipif(not HAS_NUMBA or DEVICE == "cuda", reason="numba is for a CPU, and not installed")
numba, triton = pytest.param("numba", marks=needs_numba), pytest.param("triton", marks=needs_triton)
paths = ["torch", numba, triton]


def split_by(*splits: int) -> list:
    """-> (path, splits) to run: only Triton's kernel has splits, and is to be tried with each of these."""
    return [
        ("torch", 1),
        pytest.param("numba", 1, marks=needs_numba),
        *(pytest.param("triton", n, marks=needs_triton) for n in splits),
    ]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_path = [("torch", dtype) for dtype in DTYPES]
every_path += [pytest.param("numba", dtype, marks=needs_numba) for dtype in DTYPES[:2]]
every_path += [pytest.param("triton", dtype, marks=needs_triton) for dtype in DTYPES]
EPS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def make_case(lengths, Q=1, Hkv=2, G=2, D=64, Dv=0, S=16, dtype=torch.float32, seed=0):
    """Texts of these lengths in shuffled pages -> (q, pages, table, lengths); everything that is no key is nan."""
    g = torch.Generator().manual_seed(seed)
    Dv = Dv or D
    counts = [-(-n // S) for n in lengths]
    P, W = sum(counts) + 3, max(counts) + 2
    order = (torch.randperm(P - 1, generator=g) + 1).tolist()  # page 0 belongs to nobody
    table = torch.full((len(lengths), W), -1, dtype=torch.int32)
    keys, values = torch.full((P, Hkv, S, D), torch.nan), torch.full((P, Hkv, S, Dv), torch.nan)
    for b, n in enumerate(lengths):
        mine = [order.pop() for _ in range(counts[b])]
        table[b, : counts[b]] = torch.tensor(mine, dtype=torch.int32)
        for i in range(n):
            keys[mine[i // S], :, i % S] = torch.randn(Hkv, D, generator=g)
            values[mine[i // S], :, i % S] = torch.randn(Hkv, Dv, generator=g)
    q = 2 * torch.randn(len(lengths), Q, Hkv * G, D, generator=g)  # scores of deviation 2: some keys count, most do not
    pages = Pages(keys.to(DEVICE, dtype), values.to(DEVICE, dtype))
    return q.to(DEVICE, dtype), pages, table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def plain(x, scales):
    return x if scales is None else x.float() * scales[..., None]


def truth(q, pages, table, lengths, scale, window=0, softcap=None, sinks=None, dtype=torch.float64):
    """torch's SDPA, one text at a time, over its gathered keys. A sink is a key whose score is given and value zero;
    capped scores go in as a mask."""
    (B, Q, Hq, _), Dv = q.shape, pages.values.shape[3]
    out = torch.zeros(B, Q, Hq, Dv, dtype=dtype, device=q.device)
    keys, values = plain(pages.keys, pages.key_scales), plain(pages.values, pages.value_scales)
    G = Hq // keys.shape[1]
    for b, n in enumerate(lengths.tolist()):
        here = table[b, : -(-n // keys.shape[2])].long()
        k = keys[here].to(dtype).transpose(0, 1).flatten(1, 2)[:, :n].repeat_interleave(G, 0)
        v = values[here].to(dtype).transpose(0, 1).flatten(1, 2)[:, :n].repeat_interleave(G, 0)
        for j in range(Q):
            last = n - Q + j
            if last < 0:
                continue
            first = max(0, last - window + 1) if window else 0
            some_q, some_k, some_v = q[b, j].to(dtype)[:, None], k[:, first : last + 1], v[:, first : last + 1]
            bias = torch.zeros(Hq, 1, last + 1 - first, dtype=dtype, device=q.device)
            if softcap:
                bias = softcap * torch.tanh(some_q @ some_k.transpose(1, 2) * scale / softcap)
                some_q = torch.zeros_like(some_q)
            if sinks is not None:
                bias = torch.cat([bias, sinks.to(dtype).view(Hq, 1, 1)], 2)
                some_k, some_v = F.pad(some_k, (0, 0, 0, 1)), F.pad(some_v, (0, 0, 0, 1))
            one = F.scaled_dot_product_attention(some_q[None], some_k[None], some_v[None], bias[None], scale=scale)
            out[b, j] = one[0, :, 0]
    return out


def check(case, path, splits=0, **options):
    q = case[0]
    options = {"scale": q.shape[-1] ** -0.5, **options}
    got = paged_attention(*case, **options, splits=splits, path=path)
    assert got.dtype == q.dtype and got.isfinite().all()
    want = truth(*case, **options)
    error = (got.double() - want).abs().max().item()
    same_dtype = (truth(*case, **options, dtype=q.dtype).double() - want).abs().max().item()
    assert error <= same_dtype + EPS[q.dtype], (error, same_dtype)
    return got


# ---- what is computed ------------------------------------------------------------------------------------------------


# The interpreter runs one program at a time: few and short texts, and one key head where more would prove nothing.


@pytest.mark.parametrize(("path", "splits"), split_by(0, 1, 3))
def test_ragged_lengths_and_page_edges(path, splits):
    """Lengths 0 and 1, a page more or less one, and one much longer than the others. Splits: chosen by it (0), one
    program per text, and several, of which short texts use one."""
    got = check(make_case([0, 1, 15, 16, 17, 60, 0], Hkv=1), path, splits)
    assert not got[0].any() and not got[6].any()  # a padding row gives zeros


@pytest.mark.parametrize(
    ("path", "splits", "window"),
    # windows over several splits are crossed in test_softcap_window_and_sinks
    [("torch", 1, 0), ("torch", 1, 7)]
    + [pytest.param("numba", 1, window, marks=needs_numba) for window in (0, 7)]
    + [pytest.param("triton", *x, marks=needs_triton) for x in ((3, 0), (1, 7))],
)
def test_drafts_are_causal_among_themselves(path, splits, window):
    """Q = 5, also for texts shorter than 5 tokens: the queries in front of their start give zeros."""
    got = check(make_case([40, 5, 3, 0, 17], Q=5, Hkv=1), path, splits, window=window)
    assert not got[2, :2].any() and got[2, 2:].any() and not got[3].any()


def test_verification_is_decoding_token_by_token():
    q, pages, table, lengths = make_case([40, 9], Q=8)
    together = paged_attention(q, pages, table, lengths, scale=0.1)
    for j in range(8):
        one = paged_attention(q[:, j : j + 1], pages, table, lengths - 7 + j, scale=0.1)
        torch.testing.assert_close(together[:, j : j + 1], one, rtol=1e-6, atol=1e-6)


# G = 1: no grouping; 3: SmolLM2; 4: Llama-3; 7: Qwen2.5-7B, no power of two; 8: Llama-70B. With Q = 8, 64 rows of a
# tile are full at G = 8, and G = 9 needs a second tile.
@pytest.mark.parametrize("G, Q", [(1, 1), (3, 1), (4, 3), (7, 1), (7, 8), (8, 1), (9, 8)])
@pytest.mark.parametrize("path", [numba, triton])
def test_groups_of_query_heads(path, G, Q):
    check(make_case([20, 35] if Q == 1 else [20], Q=Q, G=G, D=16, Hkv=2 if Q == 1 else 1), path, 2)


@pytest.mark.parametrize("D, Dv", [(64, 64), (128, 128), (256, 256), (96, 96), (80, 80), (192, 128), (16, 32)])
@pytest.mark.parametrize("path", [numba, triton])
def test_head_sizes(path, D, Dv):
    """Also those that are padded to a power of two (Phi-3's 96, 80), and values of another size than keys (MLA)."""
    check(make_case([20, 33], D=D, Dv=Dv), path, 2)


@pytest.mark.parametrize(
    "options", [{"softcap": 5.0}, {"window": 7, "softcap": 2.0}, {"sinks": True}, {"sinks": True, "window": 20}]
)
@pytest.mark.parametrize(("path", "splits"), split_by(1, 4))
def test_softcap_window_and_sinks(path, splits, options):
    """Sinks of both signs, one of them far above all scores: it takes nearly all the weight."""
    if "sinks" in options:
        options = {**options, "sinks": torch.tensor([-3.0, 0.0, 2.0, 30.0], device=DEVICE)}
    check(make_case([50, 1, 0, 18], Q=2, G=4, Hkv=1), path, splits, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 3])
@needs_triton
def test_sixteen_bits(dtype, splits):
    check(make_case([40, 7, 0], Q=2, G=3, dtype=dtype), "triton", splits)


@needs_numba
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bf16_on_a_cpu_by_any_number_of_threads(threads):
    """Enough pages that they are shared out; a thread's texts are not another's."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(make_case([400, 7, 0, 90, 1], Q=2, G=3, dtype=torch.bfloat16), "numba")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", [numba, triton])
def test_scores_far_apart_neither_overflow_nor_vanish(path):
    """Scores of +-400, the largest in another split than the rest: 2^(m_i - m) is 0 for all others."""
    q, pages, table, lengths = make_case([64])
    pages.keys[table[0, 2].long(), :, 3] *= 40
    got = check((q, pages, table, lengths), path, 4, scale=1.0)
    assert got.any()


@pytest.mark.skipif(DEVICE == "cuda", reason="packed queries are for a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["torch", numba])
def test_packed_queries_are_those_of_each_text(path, dtype):
    """Every text with its own number of drafts: the same numbers as a call for each, bit by bit."""
    q, pages, table, lengths = make_case([40, 300, 7, 20], Q=8, G=3, dtype=dtype)
    counts = torch.tensor([1, 5, 7, 8], dtype=torch.int32)
    packed = torch.cat([q[b, -n:] for b, n in enumerate(counts.tolist())])
    options = {"scale": 0.125, "window": 30, "path": path}
    got = paged_attention(packed, pages, table, lengths, counts=counts, **options).split(counts.tolist())
    for b, n in enumerate(counts.tolist()):
        alone = paged_attention(q[b : b + 1, -n:], pages, table[b : b + 1], lengths[b : b + 1], **options)
        assert torch.equal(got[b], alone[0])
    with pytest.raises(ValueError, match="for 20 queries"):
        paged_attention(packed, pages, table, lengths, counts=counts - torch.tensor([0, 1, 0, 0]).int(), **options)


@pytest.mark.parametrize("path", ["torch", numba])
def test_a_nan_arrives(path):
    """In a key or a value that is seen: what is not a number must not become one."""
    for pool in (0, 1):
        case = make_case([20, 20])
        case[1][pool][case[2][0, 1].long(), :, 2, 5] = torch.nan
        got = paged_attention(*case, scale=0.1, path=path)
        assert got[0].isnan().any() and got[1].isfinite().all()


@pytest.mark.parametrize("path", paths)
def test_views_with_long_strides(path):
    """q as the middle of a packed projection, the table as columns of a wider one: what the models hand over."""
    q, pages, table, lengths = make_case([20, 33], Q=2)
    wide = torch.full((2, 2, 12, 64), torch.nan, device=DEVICE)
    wide[:, :, 3:7] = q
    tables = torch.full((2, table.shape[1] + 4), -7, dtype=torch.int32, device=DEVICE)
    tables[:, : table.shape[1]] = table
    got = paged_attention(wide[:, :, 3:7], pages, tables[:, : table.shape[1]], lengths, scale=0.1, path=path)
    assert torch.equal(got, paged_attention(q, pages, table, lengths, scale=0.1, path=path))


@needs_triton
def test_splits_follow_the_lengths_on_the_device(monkeypatch):
    """One long text beside short ones: it gets the programs, and a grid sized for short texts drops no key of it."""
    used = []
    own = torch.empty
    monkeypatch.setattr(fast, "multiprocessors", lambda device: 1)
    q, pages, table, lengths = make_case([150, 1, 2, 0])
    want = truth(q, pages, table, lengths, 0.125)

    # 8 workers over 2 key heads: 4 for 12 blocks in all, so 3 each; the long text has 10 blocks, 4 parts of the 12
    def kept(*shape, **kind):
        used.append(own(*shape, **kind).fill_(torch.nan) if kind["dtype"] == torch.float32 else own(*shape, **kind))
        return used[-1]

    monkeypatch.setattr(torch, "empty", kept)
    got = paged_attention(q, pages, table, lengths, scale=0.125, splits=12, path="triton")
    assert (got.double() - want).abs().max() < 2e-6
    stat = next(x for x in used if x.ndim == 3 and len(x) == 2)
    written = stat[0].isfinite().sum(0).tolist()  # parts per row of the output: 4 heads of each text
    assert written == [4] * 4 + [1] * 8 + [0] * 4


# ---- the store -------------------------------------------------------------------------------------------------------


def make_store(T, dtype, Hkv=3, D=40, Dv=64, P=4, S=16, fp8=False):
    g = torch.Generator().manual_seed(1)
    k, v = torch.randn(T, Hkv, D, generator=g), torch.randn(T, Hkv, Dv, generator=g)
    slots = torch.randperm(P * S, generator=g)[:T].int()
    slots[::5] = -1
    pools = [torch.full((P, Hkv, S, d), 7.0).to(DEVICE, torch.float8_e4m3fn if fp8 else dtype) for d in (D, Dv)]
    scales = [torch.full((P, Hkv, S), 7.0, device=DEVICE) if fp8 else None for _ in pools]
    return k.to(DEVICE, dtype), v.to(DEVICE, dtype), Pages(*pools, *scales), slots.to(DEVICE)


@pytest.mark.parametrize("path, dtype", every_path)
def test_store_writes_its_slots_and_nothing_else(path, dtype):
    k, v, pages, slots = make_store(23, dtype)
    store_pages(k, v, pages, slots, path=path)
    for new, pool in ((k, pages.keys), (v, pages.values)):
        flat = pool.transpose(1, 2).flatten(0, 1)  # [P * S, Hkv, D]
        want = torch.full_like(flat, 7.0)
        for t, slot in enumerate(slots.tolist()):
            if slot >= 0:
                want[slot] = new[t]
        assert torch.equal(flat, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_triton
def test_fp8_store_rounds_as_torch_does(dtype):
    """Byte for byte: small numbers (e4m3's subnormals), zeros of both signs, and a row of zeros only."""
    results = []
    for path in ("torch", "triton"):
        k, v, pages, slots = make_store(23, dtype, fp8=True)
        k[1] *= torch.logspace(-6, 0, 40, device=DEVICE).to(dtype)
        k[2, :, :5], k[2, :, 5:9], k[3] = 0.0, -0.0, 0.0
        store_pages(k, v, pages, slots, path=path)
        results.append([x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in pages])
    for want, got in zip(*results, strict=True):
        assert torch.equal(want, got)


def make_turn(dtype, norms: bool, T=6, Hq=6, Hkv=2, D=24, fp8=False):
    """q, k and v as parts of one matrix [T, 2 + (Hq + 2 Hkv) D], whose other numbers are nan; pages of 16 full of 7."""
    g = torch.Generator().manual_seed(1)
    joint = torch.full((T, 2 + (Hq + 2 * Hkv) * D), torch.nan)
    joint[:, 2:] = torch.randn(T, joint.shape[1] - 2, generator=g)
    joint = joint.to(DEVICE, dtype)
    q, k, v = (x.unflatten(1, (-1, D)) for x in joint[:, 2:].split([Hq * D, Hkv * D, Hkv * D], 1))
    angles = 6 * torch.randn(T, D // 2, generator=g).repeat(1, 2)
    weights = tuple((torch.rand(2, D, generator=g) + 0.5).to(DEVICE, dtype)) if norms else None
    turn = Turn(angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype), weights, 1e-6)
    pages = Pages(*(torch.full((3, Hkv, 16, D), 7.0, device=DEVICE).to(dtype) for _ in range(2)))
    if fp8:
        numbers, scales = zip(*(quantise(pool) for pool in pages[:2]), strict=True)
        pages = Pages(*numbers, *scales)
    slots = torch.tensor([33, -1, 2, 47, 16, 5], dtype=torch.int32, device=DEVICE)
    return joint, (q, k, v), pages, slots, turn


def turned64(x, norm, turn):
    """transformers' formulas in float64."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = x.double()
    if norm is not None:
        x = norm.double() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + turn.eps)
    heads = x.transpose(0, 1)[None]
    return apply_rotary_pos_emb(heads, heads, turn.cos.double()[None], turn.sin.double()[None])[0][0].transpose(0, 1)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("path, dtype", every_path)
def test_placing_turns_queries_and_keys_and_stores(path, dtype, norms):
    joint, (q, k, v), pages, slots, turn = make_turn(dtype, norms)
    want = [turned64(x, norm, turn) for x, norm in zip((q, k), turn.norms or (None, None), strict=True)]
    values = v.clone()
    place(q, k, v, pages, slots, turn, path=path)
    bound = EPS[dtype] * (1 if path == "triton" else 2)  # the others round after the norm, too
    for got, one in zip((q, k), want, strict=True):
        assert ((got.double() - one).abs() <= bound * (1 + one.abs())).all()
    assert torch.equal(v, values) and joint[:, :2].isnan().all()
    for new, pool in ((k, pages.keys), (values, pages.values)):
        flat = pool.transpose(1, 2).flatten(0, 1)
        for slot in range(len(flat)):
            if slot in slots.tolist():
                assert torch.equal(flat[slot], new[slots.tolist().index(slot)])
            else:
                assert (flat[slot] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_triton
def test_placing_in_fp8_stores_what_was_placed(dtype):
    """Byte for byte what storing the turned keys gives."""
    _, (q, k, v), pages, slots, turn = make_turn(dtype, True, fp8=True)
    place(q, k, v, pages, slots, turn, path="triton")
    _, _, again, _, _ = make_turn(dtype, True, fp8=True)
    store_pages(k, v, again, slots, path="torch")
    for got, want in zip(pages, again, strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_placing_names_bad_arguments():
    _, (q, k, v), pages, slots, turn = make_turn(torch.float32, True)
    for changed, message in (
        ((q[:, :, :12], k, v, pages, slots, turn), "q is"),
        ((q.half(), k, v, pages, slots, turn), "q is torch.float16"),
        ((q, k, v, pages, slots, turn._replace(cos=turn.cos[:3])), "cos and sin must be"),
        ((q, k, v, pages, slots, turn._replace(norms=(turn.cos[0, :3], turn.cos[0]))), "norms must be"),
    ):
        with pytest.raises(ValueError, match=message):
            place(*changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", ["torch", triton])
def test_fp8_pages(path, dtype):
    """The same numbers as an oracle that is given the quantised pages; and those are near the ones they stand for.
    Values of magnitude 200: fp16 would lose small weights times small scales."""
    q, pages, table, lengths = make_case([40, 17, 0], Q=2, Hkv=1, dtype=dtype)
    pages.values.mul_(200)
    parts = [quantise(x.float()) for x in (pages.keys, pages.values)]
    fp8 = Pages(parts[0][0], parts[1][0], parts[0][1], parts[1][1])
    for splits in (1, 3) if path == "triton" else (1,):
        got = paged_attention(q, fp8, table, lengths, scale=0.125, splits=splits, path=path)
        want = truth(q, fp8, table, lengths, 0.125)
        assert (got.double() - want).abs().max() <= 200 * 2 * EPS[torch.bfloat16 if dtype == torch.float16 else dtype]
    exact = truth(q, pages, table, lengths, 0.125)
    assert (got.double() - exact).norm() < 0.08 * exact.norm()


def test_every_e4m3_number_survives():
    """256 bytes through the quantiser and back: those with the largest magnitude 448 keep their bits."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    numbers, scale = quantise(every[None])
    assert scale.item() == 1 and torch.equal(numbers.float()[0], every)


@needs_triton
def test_the_kernel_reads_every_e4m3_number():
    """A key per number, and one query that reads its first place: the weights tell the numbers apart."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = every[every.float().isfinite()][:240].to(DEVICE)
    keys = torch.zeros(15, 1, 16, 16, device=DEVICE).to(torch.float8_e4m3fn)
    keys.view(torch.uint8)[:, 0, :, 0] = every.view(torch.uint8).view(15, 16)
    pages = Pages(keys, keys.clone(), *(torch.ones(15, 1, 16, device=DEVICE) for _ in range(2)))
    q = torch.zeros(1, 1, 1, 16, device=DEVICE)
    q[..., 0] = 0.01
    case = (
        q,
        pages,
        torch.arange(15, dtype=torch.int32, device=DEVICE)[None],
        torch.tensor([240], dtype=torch.int32, device=DEVICE),
    )
    got = paged_attention(*case, scale=1.0, path="triton")
    assert (got.double() - truth(*case, 1.0)).abs().max() < 1e-4


def test_store_then_attend_is_attention():
    """The two together, from empty pages, against SDPA on what was put in."""
    g = torch.Generator().manual_seed(2)
    k, v, q = (torch.randn(30, h, 32, generator=g).to(DEVICE) for h in (2, 2, 6))
    pages = Pages(*(torch.full((3, 2, 16, 32), torch.nan, device=DEVICE) for _ in range(2)))
    table = torch.tensor([[2, 0]], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([(2 if i < 16 else 0) * 16 + i % 16 for i in range(30)], dtype=torch.int32, device=DEVICE)
    store_pages(k, v, pages, slots)
    got = paged_attention(q[None, -4:], pages, table, torch.tensor([30], dtype=torch.int32, device=DEVICE), scale=0.2)
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads, is_causal=True, scale=0.2, enable_gqa=True)[0].transpose(0, 1)[-4:]
    torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-5)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": torch.zeros(1, dtype=torch.int64)}, "lengths must be int32"),
        ({"table": torch.zeros(2, 3, dtype=torch.int32)}, "table must be int32"),
        ({"q": torch.zeros(1, 9, 4, 64)}, "1 to 8 queries"),
        ({"q": torch.zeros(1, 1, 3, 64)}, "do not divide"),
        ({"q": torch.zeros(1, 1, 4, 64, dtype=torch.float64)}, "fp16, bf16 or fp32"),
        ({"q": torch.zeros(1, 1, 4, 64, dtype=torch.bfloat16)}, "pages of torch.float32"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[4\]"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"path": "cuda"}, "path must be"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q, pages, table, lengths = (x.cpu() if isinstance(x, torch.Tensor) else x for x in make_case([20]))
    pages = Pages(pages.keys.cpu(), pages.values.cpu())
    arguments = {"q": q, "pages": pages, "table": table, "lengths": lengths, "scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments)


def test_a_cpu_without_the_interpreter_runs_the_reference(monkeypatch):
    """Of fp16, which Numba has no kernels for."""
    case = tuple(
        x.cpu() if isinstance(x, torch.Tensor) else Pages(x.keys.cpu(), x.values.cpu())
        for x in make_case([20], dtype=torch.float16)
    )
    monkeypatch.setattr(attention, "paged_attention_reference", lambda *_, **__: "the reference")
    assert paged_attention(*case, scale=1.0) == "the reference"


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("G, D, Q", [(7, 128, 1), (7, 128, 8), (4, 64, 1), (1, 128, 4), (2, 256, 1), (16, 96, 5)])
def test_gpu_kernels_agree_with_the_reference_at_real_sizes(dtype, G, D, Q):
    """Page 256, lengths to 5,000, all options at once, and fp8 pages of the same case."""
    case = make_case([0, 1, 255, 256, 257, 1000, 5000], Q=Q, G=G, D=D, S=256, dtype=dtype)
    sinks = torch.linspace(-2, 4, 2 * G, device="cuda")
    for options in (
        {},
        {"window": 300},
        {"softcap": 20.0},
        {"sinks": sinks},
        {"window": 64, "softcap": 5.0, "sinks": sinks},
    ):
        for splits in (0, 1, 3):
            options = {"scale": D**-0.5, **options}
            got = paged_attention(*case, **options, splits=splits)
            want = paged_attention(*case, **options, path="torch")
            torch.testing.assert_close(got, want, rtol=0, atol={torch.float32: 1e-5}.get(dtype, 2e-2))
    parts = [quantise(x) for x in case[1][:2]]
    case = (case[0], Pages(parts[0][0], parts[1][0], parts[0][1], parts[1][1]), *case[2:])
    got, want = (paged_attention(*case, scale=D**-0.5, path=path) for path in ("triton", "torch"))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-2)


@pytest.mark.needs_cuda
def test_gpu_a_graph_captured_with_short_texts_serves_long_ones():
    q, pages, table, lengths = make_case([3000, 700], G=7, D=128, S=256, dtype=torch.bfloat16)
    now = torch.tensor([3, 2], dtype=torch.int32, device="cuda")
    paged_attention(q, pages, table, now, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(q, pages, table, now, scale=0.1)
    now.copy_(lengths)
    graph.replay()
    torch.testing.assert_close(
        out, paged_attention(q, pages, table, lengths, scale=0.1, path="torch"), rtol=0, atol=2e-2
    )
