"""Every GPU branch of sampling and training on a fake CUDA device: shapes, dtypes, devices, launches, host reads.

pytest tests/test_fake_cuda.py
"""

from itertools import product

import bitsandbytes
import pytest
import torch
from fake_cuda import FakeCuda, Stream
from test_sampler import make_prompts, make_sampler
from tiny import tiny_config, tiny_model
from trainees import some_pairs

import train
from kernels.layer_passes import rms_norm, rms_norm_backward_, rotate_, swiglu, swiglu_backward_
from kernels.linear_cross_entropy import linear_cross_entropy
from lengthen.models import lora
from lengthen.models.exact import dense_weight
from lengthen.models.loading import choose_device
from lengthen.sampling.graphs import BROKEN, DecodeGraphs, Shape, host_reads_forbidden
from lengthen.sampling.request import Request, Sampling
from lengthen.training import lean_layer as lean
from lengthen.training.budget import Budget
from lengthen.training.learner import Learner, adamw
from lengthen.training.packed import checkpointed, examine
from lengthen.training.policy import Memory, set_checkpointing
from lengthen.training.settings import CHECKPOINTS, MemoryFlags, Recompute
from lengthen.training.shapes import meta_model, shape_of


@pytest.fixture
def gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    with FakeCuda() as device:
        yield device


# ---- the device itself -----------------------------------------------------------------------------------------------


def test_operands_on_two_devices_are_an_error(gpu):
    x = torch.ones(4, 8, device="cuda")
    with pytest.raises(RuntimeError, match="devices"):
        x + torch.ones(4, 8)
    with pytest.raises(RuntimeError, match="devices"):
        torch.cat([x, torch.ones(4, 8)])
    assert (x + torch.tensor(1.0)).device == torch.device("cuda", 0)  # a number may come from the host
    assert gpu.kernels == {"ones": 1, "add": 1}


def test_wrong_shapes_and_dtypes_are_an_error(gpu):
    x = torch.ones(4, 8, device="cuda")
    with pytest.raises(RuntimeError):
        x @ x
    with pytest.raises(RuntimeError, match="dtype"):
        x @ x.t().half()


def test_the_host_is_real_and_reads_of_the_device_are_counted(gpu):
    assert torch.tensor([1, 2, 3]).sum().item() == 6 and not gpu.reads
    x = torch.tensor([1, 2, 3], device="cuda")
    assert gpu.uploads == 1
    assert x.tolist() == [1, 2, 3] and gpu.reads == 1
    assert x.cpu().device.type == "cpu" and gpu.reads == 2
    assert bool((x > 0).all()) and gpu.reads == 3
    x += 1
    assert x.tolist() == [10, 11, 12]  # made up


def test_what_a_kernel_does_not_take_is_an_error(gpu):
    from kernels import attention_triton, layer_passes_triton

    x, w = torch.ones(4, 64, device="cuda"), torch.ones(64, device="cuda")
    kernel = layer_passes_triton._rms_norm_kernel
    good = (x, w, x.clone(), 4, 64, 1e-6)
    meta = {"EMULATE": False, "BLOCK_M": 4, "BLOCK_N": 64, "num_warps": 4}
    kernel[(1,)](*good, **meta)
    assert gpu.kernels["rms_norm_kernel"] == 1
    for args, more, why in (
        (good[:-1], {}, "without"),
        ((torch.ones(4, 64), *good[1:]), {}, "no tensor on the GPU"),
        ((*good[:3], x, *good[4:]), {}, "not a number"),
        (good, {"BLOCK": 4}, "has no"),
        (good, {"num_warps": 3}, "warps"),
    ):
        with pytest.raises(AssertionError, match=why):
            kernel[(1,)](*args, **{**meta, **more})
    with pytest.raises(AssertionError, match="grid"):
        kernel[(1, 1 << 16)](*good, **meta)
    k = torch.ones(3, 2, 64, device="cuda", dtype=torch.bfloat16)
    sizes = {"HQ": 0, "HKV": 2, "D": 64, "DV": 64, "S": 16, "BH": 4, "BD": 32, "BDV": 32}
    flags = dict.fromkeys(("TURN", "NORM", "FP8", "EMULATE"), False)
    with pytest.raises(AssertionError, match="slots_ptr is torch.int64, not torch.int32"):
        slots = torch.zeros(3, dtype=torch.int64, device="cuda")
        unread, strides = (w, w, k, k, k, k), (128, 64) * 3
        attention_triton._place_kernel[(3, 2)](k, k, k, slots, k, k, *unread, *strides, 0.0, **sizes, **flags)


def test_a_capture_takes_no_read_and_breaks_as_cudas_does(gpu):
    x, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x + 1
    before = gpu.kernels["add"]
    graph.replay()
    assert gpu.kernels["add"] == before + 1 and gpu.graphs == [graph]
    with pytest.raises(RuntimeError, match="previous error"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
    assert torch.cuda.current_stream() is not torch.cuda.default_stream()
    with pytest.raises(RuntimeError, match="captures_underway"):
        torch.cuda.empty_cache()


# ---- sampling --------------------------------------------------------------------------------------------------------


def gpu_model(family: str, **changes):
    return tiny_model(family, **changes).to("cuda", torch.bfloat16)


def gpu_sampler(family: str, sizes=None, **changes):
    settings = {"page_tokens": 16, "eos_ids": {2}, **changes}
    return make_sampler(gpu_model(family, **(sizes or {})), **settings)


def write(sampler, requests) -> dict:
    for request in requests:
        sampler.add(request)
    return {sample.request.key: sample for sample in sampler.run()}


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("family", "kv_dtype"), [("llama", None), ("qwen3", FP8), ("gemma2", None), ("gemma2", FP8), ("gemma3", None)]
)
def test_texts_are_written_by_captured_steps(gpu, family, kv_dtype):
    """Eight ragged prompts through four rows, in chunks: prefill, mixed steps, bursts of captured steps."""
    sampler = gpu_sampler(family, kv_dtype=kv_dtype)
    requests = [Request(i, p, i, Sampling(max_new_tokens=20)) for i, p in enumerate(make_prompts(8))]
    samples = write(sampler, requests)
    assert [samples[i].finish for i in range(8)] == ["length"] * 8
    assert not sampler.graphs.eager and gpu.replays, sampler.notes
    assert gpu.kernels["place_kernel"] and gpu.kernels["decode_kernel"]
    softcap = family == "gemma2"  # which only flash-attn serves
    assert bool(gpu.kernels["_flash_attention_forward"]) != softcap


@pytest.mark.parametrize("family", ["qwen3"])
def test_texts_are_written_step_by_step_with_drafts(gpu, family, monkeypatch):
    """Texts that repeat themselves: tokens that were looked up are verified, several in a pass."""
    monkeypatch.setattr(DecodeGraphs, "serves", lambda self, rows: False)
    sampler = gpu_sampler(family)
    samples = write(sampler, [Request(0, make_prompts(1)[0], 0, Sampling(max_new_tokens=150))])
    assert samples[0].finish == "length" and sampler.stats["accepted_tokens"] > 20


def test_prompts_share_pages_and_are_copied_on_the_device(gpu):
    prompt = (make_prompts(1, 90)[0] * 90)[:88]
    sampler = gpu_sampler("qwen3", max_rows=8, prefill_tokens=64)
    requests = [Request(i, prompt, i, Sampling(max_new_tokens=6)) for i in range(6)]
    write(sampler, requests[:1])
    write(sampler, requests[1:])
    assert sampler.stats["shared_tokens"] == 5 * 87


def test_greedy_rows_and_rows_without_top_k(gpu):
    sampler = gpu_sampler("llama")
    for i, options in enumerate(({"temperature": 0}, {"top_k": 0}, {"repetition_penalty": 1.0}, {"min_new_tokens": 5})):
        assert write(sampler, [Request(i, [5, 6, 7], 0, Sampling(max_new_tokens=12, **options))])[i].finish == "length"


def test_log_probabilities_of_given_texts(gpu):
    values = gpu_sampler("qwen2").logprobs([([5, 6, 7], [8, 9]), ([5, 6, 7], [8, 10])])
    assert [x.shape for x in values] == [(2,), (2,)]


def kernels_a_layer(gpu, family: str, shape: Shape = Shape(4, 1, "ranked"), change=lambda model: None) -> int:  # noqa: B008
    """Launches that one more layer adds to a captured step."""
    found = []
    for layers in (1, 2):
        model = gpu_model(family, num_hidden_layers=layers)
        change(model)
        sampler = make_sampler(model, page_tokens=16)
        sampler.graphs._capture(shape)
        assert not sampler.graphs.eager, sampler.graphs.eager
        found.append(gpu.graphs[-1].kernels.total())
    return found[1] - found[0]


@pytest.mark.parametrize(("family", "queries"), [("llama", 1), ("qwen2", 1), ("qwen3", 4), ("mistral", 1)])
def test_a_layer_is_ten_kernels_of_a_decode_step(gpu, family, queries):
    """Two norms, four products, SwiGLU, the placing, attention and the joining of its splits. transformers' own: 45
    to 60."""
    assert 9 <= kernels_a_layer(gpu, family, Shape(4, queries, "ranked")) <= 10


def test_a_layer_is_eleven_kernels_of_an_eager_pass(gpu):
    """Beside prompts, too: FlashAttention over their tokens, and one more to put both results side by side."""
    found = []
    for layers in (1, 2):
        sampler = gpu_sampler("qwen3", {"num_hidden_layers": layers})
        table = [sampler.cache.take() for _ in range(4)]
        batch = sampler.cache.batch([(table[:1], 3, 1)], [(table[1:], 0, 40)])
        ids = torch.zeros(41, dtype=torch.long, device="cuda")
        before = gpu.kernels.total()
        with torch.no_grad():
            sampler.hook.forward(batch, ids, ids, ids[:1])
        found.append(gpu.kernels.total() - before)
    assert found[1] - found[0] <= 13


def test_lora_adds_a_product_for_each_layer_and_group(gpu):
    """What a layer is over 4-bit weights is those, with a product of its own for each linear layer."""

    def adapt(model) -> None:
        lora.attach(model, 4, 8)

    assert kernels_a_layer(gpu, "qwen2", change=adapt) == kernels_a_layer(gpu, "qwen2") + 7 + 4


@pytest.mark.parametrize(("draws", "most"), [("all", 0), ("ranked", 50), ("wide", 65)])
def test_kernels_of_the_end_of_a_step(gpu, draws, most):
    """Beyond that of greedy rows; penalties, noise and the winner of all are one kernel, and nothing sorts."""
    counts = {}
    for kind in ("all", draws):
        sampler = gpu_sampler("qwen3", {"vocab_size": 4096})
        sampler.graphs._capture(Shape(4, 1, kind))
        counts[kind] = gpu.graphs[-1].kernels
    assert counts[draws]["tail_kernel"] == (2 if draws == "wide" else 1)
    assert counts[draws]["lowest_kernel"] == (draws == "wide") and not counts[draws]["sort"]
    assert counts[draws].total() - counts["all"].total() <= most


def test_every_shape_is_captured(gpu):
    """Verification of drafts at each number of tokens, in each way to draw."""
    sampler = gpu_sampler("qwen3", {"vocab_size": 4096})
    for shape in product((2,), (1, 2, 4, 8), ("all", "ranked", "wide")):
        sampler.graphs._capture(Shape(*shape))
    assert len(gpu.graphs) == 12 and not sampler.graphs.eager


@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_capture_that_fails_leaves_torch_whole(gpu, monkeypatch, where):
    """A host read: found before the capture begins, or in the capture alone. The texts are written all the same, and
    not before what the attempt launched: its steps go on writing to the same buffers."""
    own, waits, kept = DecodeGraphs._step, [], len(BROKEN)
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: waits.append((self, other)))

    def reads(self, shape):
        own(self, shape)
        if gpu.capturing or (where == "before" and gpu.sync_mode):
            self.step.item()

    monkeypatch.setattr(DecodeGraphs, "_step", reads)
    sampler = gpu_sampler("qwen3")
    stream, device = torch.cuda.current_stream(), torch.cuda.current_device()
    samples = write(sampler, [Request(i, [5, 6, 7], i, Sampling(max_new_tokens=12)) for i in range(3)])
    assert [samples[i].finish for i in range(3)] == ["length"] * 3
    why = "called a synchronizing" if where == "before" else "operation not permitted when stream is capturing"
    assert why in sampler.graphs.eager and len([note for note in sampler.notes if why in note]) == 1
    assert torch.cuda.current_stream() is stream and torch.cuda.current_device() == device
    assert torch.cuda.get_sync_debug_mode() == 0 and not gpu.broken_pool and not gpu.graphs
    assert len(BROKEN) - kept == (where == "inside")
    assert waits == [(sampler.graphs.stream, stream), (stream, sampler.graphs.stream)]
    torch.cuda.empty_cache()


def test_the_host_waits_for_nothing_when_it_launches_prompts_beside_a_burst(gpu):
    sampler = gpu_sampler("qwen3", max_rows=2, prefill_tokens=40)
    own, beside = sampler._forward, []

    def forward(step, keep):
        if not sampler.graphs.in_flight:
            return own(step, keep)
        beside.append(len(step.prefill))
        with host_reads_forbidden():
            return own(step, keep)

    sampler._forward = forward
    requests = [Request(i, p, i, Sampling(max_new_tokens=9 + 5 * i)) for i, p in enumerate(make_prompts(6))]
    assert len(write(sampler, requests)) == 6 and sum(beside) >= 2


# ---- training --------------------------------------------------------------------------------------------------------


def gpu_learner(family: str, dropout: float = 0.0, **changes):
    """-> (model with LoRA in training mode, what training may use of it)."""
    model = gpu_model(family, **changes)
    lora.attach(model, 4, 8, dropout)
    abilities = examine(model)
    assert abilities.packs and abilities.head is not None, abilities.notes
    return model.train(), abilities


def gradients(model, abilities) -> None:
    """Forward and backward of a packed row; every LoRA matrix gets a gradient of its own shape, fp32."""
    loss, hits = train.row_loss(model, abilities, some_pairs(40, 2, 9, 61))
    assert loss.device == hits.device == torch.device("cuda", 0) and loss.dtype == torch.float32
    loss.backward()
    for p in lora.lora_parameters(model):
        assert p.grad.shape == p.shape and p.grad.dtype == torch.float32 and p.grad.device == p.device
        p.grad = None


def test_lean_layers_in_every_way(gpu):
    """Every level, offloaded or not, whole or in tiles."""
    model, abilities = gpu_learner("qwen3")
    installed = lean.install(model)
    assert not installed.why
    for level, offload, tile_rows in product(CHECKPOINTS, (False, True), (0, 64)):
        installed.set(Recompute(level, -1, offload, tile_rows))
        gradients(model, abilities)
    assert installed.host.num_slabs and installed.host.pinned
    assert gpu.kernels["rms_norm_backward_kernel"] and gpu.kernels["_flash_attention_backward"]


class Linear4bit(torch.nn.Linear):
    """bitsandbytes' by its name and its weight: its own class of parameters cannot hold a tensor without data."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        packed, state = bitsandbytes.functional.quantize_4bit(linear.weight.data, quant_type="nf4")
        self.weight, self.bias = torch.nn.Parameter(packed, requires_grad=False), linear.bias
        self.weight.quant_state = state

    def forward(self, x):
        return torch.nn.functional.linear(x, dense_weight(self), self.bias)


def test_lean_layers_over_4_bit_weights(gpu):
    model = gpu_model("qwen2").requires_grad_(False)
    for name, linear in lora.decoder_linears(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Linear4bit(linear))
    lora.attach(model, 4, 8)
    abilities = examine(model)
    installed = lean.install(model.train())
    assert not installed.why
    installed.set(Recompute("attention", tile_rows=64))
    gradients(model, abilities)
    assert gpu.kernels["dequantize_4bit"]


def test_lean_layers_with_dropout(gpu):
    model, abilities = gpu_learner("mistral", dropout=0.1)
    assert not lean.install(model, Recompute("attention", tile_rows=64)).why
    gradients(model, abilities)


@pytest.mark.parametrize(
    ("family", "head_dim", "dtype"),
    [
        ("qwen2", 16, torch.bfloat16),
        ("qwen2", 16, torch.float32),
        ("llama", 16, torch.float16),
        ("qwen3", 20, torch.bfloat16),
        ("mistral", 264, torch.bfloat16),
        ("gemma2", 16, torch.bfloat16),
    ],
)
def test_the_plan_promises_what_loading_gives(family, head_dim, dtype):
    """Also for heads that FlashAttention does not take."""
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    sizes = {"head_dim": head_dim}
    # The plan needs no device. After a model on "meta" beside a fake one, which borrows meta's guard, transformers
    # loads models without their buffers for as long as the process lives.
    planned = not lean.stands_against(meta_model(tiny_config(family, **sizes), dtype), torch.device("cuda"), dtype)
    with FakeCuda():
        model = tiny_model(family, **sizes).to("cuda", dtype)
        lora.attach(model, 4, 8)
        examine(model)
        found = bool(lean.install(model).layers)
    served = family != "gemma2" and head_dim == 16 and dtype != torch.float32
    assert found == planned == served


def test_lean_layers_are_refused_by_a_card_before_ampere():
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    with FakeCuda(capability=(7, 5)):
        model, _ = gpu_learner("qwen2")
        assert "Ampere" in lean.install(model).why


@pytest.mark.parametrize(("family", "level"), [("llama", "full"), ("gemma2", "none")])
def test_the_models_own_layers(gpu, family, level):
    model, abilities = gpu_learner(family, num_hidden_layers=1)
    set_checkpointing(checkpointed(model), Recompute(level))
    gradients(model, abilities)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_the_loss_on_each_generation(capability):
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    with FakeCuda(capability=capability) as gpu:
        hidden = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16)
        targets = torch.randint(0, 1000, (300,), device="cuda")
        for options in ({}, {"softcap": 30.0}, {"bias": weight[:, 0].contiguous()}, {"return_stats": True}):
            loss = linear_cross_entropy(hidden, weight, targets, **options)
            (loss[0] if options.get("return_stats") else loss).backward()
        assert gpu.kernels["finish_kernel"] == 4
        assert gpu.kernels["exp_kernel" if capability > (9, 0) else "gemm_exp_kernel"] == 4


# ---- a device that is not the current one ----------------------------------------------------------------------------


def test_every_launcher_sets_its_tensors_device():
    """On cuda:1 while cuda:0 is the current device: Triton would launch on cuda:0."""
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    with FakeCuda(devices=2) as gpu:
        x, cos = torch.ones(6, 4, 64, device="cuda:1"), torch.ones(6, 64, device="cuda:1")
        w = torch.ones(64, device="cuda:1")
        rms_norm(x, w, 1e-6)
        rms_norm_backward_(x.clone(), x, w, 1e-6)
        rms_norm_backward_(x.clone(), x, w, 1e-6, x.clone())
        swiglu(x[0], x[0])
        swiglu_backward_(x.clone(), x.clone(), x.clone())
        rotate_(x, cos, cos)
        hidden = torch.ones(300, 64, device="cuda:1", dtype=torch.bfloat16)
        targets = torch.zeros(300, dtype=torch.long, device="cuda:1")
        linear_cross_entropy(hidden, hidden, targets)
        assert gpu.device == 0 and gpu.kernels["finish_kernel"] == gpu.kernels["rotate_kernel"] == 1


def test_a_model_on_the_second_device_is_captured_there():
    """--device cuda:1: loading makes it the current device, for CUDA graphs are captured on that."""
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    with FakeCuda(devices=2) as gpu:
        device, why = choose_device("cuda:1")
        assert device == torch.device("cuda:1") and "H200" in why
        sampler = make_sampler(tiny_model("qwen3").to(device, torch.bfloat16), page_tokens=16)
        write(sampler, [Request(0, [5, 6, 7], 0, Sampling(max_new_tokens=12))])
        assert gpu.replays and {graph.device for graph in gpu.graphs} == {1}


def test_a_training_step(gpu):
    """From pairs to AdamW: rows of several pairs, accumulated."""
    model, abilities = gpu_learner("qwen3")
    installed = lean.install(model)
    budget = Budget(shape_of(model, rank=4, dtype=torch.bfloat16), None)
    memory = Memory(budget, MemoryFlags(), 1e12, 1000, installed.set)
    learner = Learner(model, abilities, memory, adamw(lora.lora_parameters(model), 1e-3, 32))
    step = train.train_step(learner, some_pairs(40, 9, 61), per_row=2)
    assert step.loss == 2.0 and not step.skipped  # of two rows, each made up
    assert gpu.kernels["_fused_adamw_"] == 1
