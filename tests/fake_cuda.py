"""A CUDA device without a GPU: every shape, dtype, device and launch of what a GPU would compute, and no numbers.

    with FakeCuda() as gpu:
        sampler = make_sampler(tiny_model("qwen3").to("cuda", torch.bfloat16))
        ...
    gpu.kernels  # Counter: how often which kernel was launched, torch's by their operators
    gpu.reads    # of the device by the host, gpu.uploads the other way

Tensors on "cuda" are torch's FakeTensors. Tensors on the host are real, and so is all code that runs there. What fails:

  * operands on different devices, wrong shapes, wrong dtypes: FakeTensorMode runs the operators' own checks
  * a Triton launch that its kernel does not take. Launchers run as they are; only the kernels are replaced, by a check
    of the arguments: all there, pointers on the *current* device, of the dtype that the comment beside the parameter
    states (unless its HAS_ is False, or the tensor is passed twice: a placeholder), numbers where numbers belong, a
    grid that fits
  * in a CUDA graph's capture: a read, an upload, a synchronisation. As in CUDA, that breaks the capture: its end
    raises, the capture's stream stays current, and its memory pool stays under way until somebody ends it
  * under set_sync_debug_mode("error"): a read, or an upload that waits

What the host reads is what it has sent before, where nobody has written there since. Else it is made up: integers are
the next of `tokens`, floats are 1, a condition that is asked for alone holds, one of many does not, and `nonzero` finds
nothing. `answers` has other answers to conditions, by the name of the function that asks. Backward passes walk torch's
graph here, node by node: its engine has no threads for a device that torch was built without.
"""

import contextlib
import ctypes
import functools
import importlib
import inspect
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, META = 1, 14  # c10::DeviceType
KERNELS = Path(__file__).parents[1] / "kernels"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32}
DTYPES |= {"int64": torch.int64, "uint8": torch.uint8}
LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl"}  # of Triton, not of a kernel
# Operators that make no kernel run, beside views: memory is taken, or a tensor looked at.
QUIET = {"_unsafe_view", "detach", "alias", "lift_fresh", "set_", "resize_", "record_stream", "_reshape_alias"}
QUIET |= {"device"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
READS = {"_local_scalar_dense", "nonzero", "equal", "allclose", "is_nonzero"}
ANSWERS = {"draw": False}  # the sampler's draw: neither all rows are greedy nor any
KNOWN = 4096  # numbers; tensors up to this size are remembered when they are sent
TOKENS = range(10, 50)  # what is drawn, over and over: too many to be taken for a text that runs in circles


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """A device guard for CUDA in a torch that was built without: C++ asks for one wherever it indexes a tensor.

    The one of torch's meta device does nothing, which is what is needed.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[CUDA]
    guards[CUDA] = before or guards[META]
    try:
        yield
    finally:
        guards[CUDA] = before


class FakeCuda(TorchDispatchMode):
    """The device, while it is entered. devices: how many of them; capability: their compute capability."""

    def __init__(
        self,
        devices: int = 1,
        capability: tuple[int, int] = (9, 0),
        memory: float = 141e9,
        tokens: Iterable[int] = TOKENS,
    ):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.devices, self.capability, self.memory = devices, capability, memory
        self.tokens = itertools.cycle(tokens)
        self.kernels: Counter[str] = Counter()
        self.graphs: list[Graph] = []  # that were captured
        self.reads = self.uploads = self.replays = 0
        self.answers: dict[str, bool] = dict(ANSWERS)
        self.device = 0  # the current one
        self.streams = [Stream(self, i) for i in range(devices)]  # the current one of each device
        self.defaults = list(self.streams)
        self.capturing: Graph | None = None
        self.broken_pool = False  # a capture that failed has not given its memory pool back
        self.sync_mode = 0
        self.pinned: set[int] = set()  # storages of the host
        self.patches = contextlib.ExitStack()

    # -- entering and leaving ----------------------------------------------------------------------------------

    def __enter__(self) -> "FakeCuda":
        for owner, name, value in self._replacements():
            self.patches.enter_context(mock.patch.object(owner, name, value, create=True))
        self.patches.enter_context(_device_guard())
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda"): made on the host, then sent
        self.patches.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        self._forget_devices()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()
        self._forget_devices()

    def _forget_devices(self) -> None:
        """What our modules remember of cuda:0 is of another one."""
        for name, module in list(sys.modules.items()):
            for value in list(vars(module).values()) if name.startswith(("kernels.", "lengthen.")) else ():
                if isinstance(value, functools._lru_cache_wrapper) and "device" in inspect.signature(value).parameters:
                    value.cache_clear()

    def _replacements(self) -> list[tuple[Any, str, Any]]:
        cuda = torch.cuda
        properties = SimpleNamespace(
            name="NVIDIA H200",
            total_memory=int(self.memory),
            multi_processor_count=132,
            major=self.capability[0],
            minor=self.capability[1],
        )
        free = int(0.9 * self.memory)
        simple = {
            "is_available": True,
            "is_initialized": True,
            "is_bf16_supported": True,
            "device_count": self.devices,
            "get_device_capability": self.capability,
            "get_device_name": properties.name,
            "get_device_properties": properties,
            "mem_get_info": (free, int(self.memory)),
            "get_sync_debug_mode": 0,
            **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0),
            **dict.fromkeys(("_lazy_init", "reset_peak_memory_stats", "manual_seed", "manual_seed_all"), None),
        }
        functions = {name: lambda *_, _value=value, **__: _value for name, value in simple.items()}
        functions |= {
            "current_device": lambda: self.device,
            "set_device": lambda device: self._exchange(self._index(device)),
            "_exchange_device": self._exchange,
            "_maybe_exchange_device": self._exchange,
            "empty_cache": self._empty_cache,
            "synchronize": lambda device=None: self._forbidden("the host waits"),
            "current_stream": lambda device=None: self.streams[self._index(device)],
            "default_stream": lambda device=None: self.defaults[self._index(device)],
            "set_stream": self._set_stream,
            "Stream": lambda device=None, **_: Stream(self, self._index(device)),
            "Event": lambda **_: Event(self),
            "CUDAGraph": lambda **_: Graph(self),
            "graph_pool_handle": lambda: object(),
            "is_current_stream_capturing": lambda: self.capturing is not None,
            "set_sync_debug_mode": self._set_sync_mode,
            "get_sync_debug_mode": lambda: self.sync_mode,
        }
        replacements = [(cuda, name, function) for name, function in functions.items()]
        replacements += [(cuda.graph, "default_capture_stream", None), (torch._C, "_host_emptyCache", lambda: None)]
        ends = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool", "_cuda_releasePool")
        replacements += [(torch._C, name, self._end_pool) for name in ends]
        tensor = torch.tensor

        def tensor_on_host_or_device(data: Any, *, pin_memory: bool = False, **options: Any) -> Tensor:
            made = tensor(data, **options)
            return self._pin(made) if pin_memory else made

        class Generator(torch.Generator):
            def __new__(cls, device: Any = "cpu") -> torch.Generator:
                return super().__new__(cls, "cpu")  # draws on a fake device are none

        replacements += [(torch, "tensor", tensor_on_host_or_device), (torch, "Generator", Generator)]
        replacements += [
            (Tensor, "pin_memory", lambda x, device=None: self._pin(x.clone())),
            (Tensor, "is_pinned", lambda x, device=None: self._is_pinned(x)),
            (Tensor, "record_stream", lambda x, stream: None),
            (Tensor, "backward", lambda x, gradient=None, **_: self._backward(x, gradient)),
            (torch.autograd, "grad", self._grad),
            (Tensor, "to", lambda x, *args, _to=Tensor.to, **named: _to(x, *self._indexed(args), **named)),
            (Tensor, "cuda", lambda x, device=None, **named: x.to(torch.device("cuda", self._index(device)), **named)),
            (FakeTensor, "__format__", lambda x, how: format(x.item(), how) if x.dim() == 0 else str(x)),
            (FakeTensor, "tolist", lambda x: self._read_by("tolist", x)),
        ]
        return replacements + self._kernels()

    def _kernels(self) -> list[tuple[Any, str, Any]]:
        """Every Triton kernel of kernels/, and INTERPRET where a module asks whether it is interpreted."""
        from triton.runtime.jit import KernelInterface

        replacements: list[tuple[Any, str, Any]] = []
        for path in sorted(KERNELS.glob("*_triton.py")):
            module = importlib.import_module(f"kernels.{path.stem}")
            for name, value in list(vars(module).items()):
                if isinstance(value, KernelInterface):
                    replacements.append((module, name, Kernel(self, value)))
            if hasattr(module, "INTERPRET"):
                replacements.append((module, "INTERPRET", False))
        return replacements

    # -- every operator ------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        pin = kwargs.pop("pin_memory", None)
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = torch.device("cuda", self.device)  # the borrowed guard's current device
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        if not fakes and not any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves):
            made = func(*args, **kwargs)
            return self._pin(made) if pin else made
        name = func.overloadpacket.__name__
        if name in READS:
            return self._read_by(name, args[0])
        if name == "_to_copy":
            return self._move(func, args[0], kwargs)
        if name == "copy_":
            source, target = args[1], args[0]
            if not isinstance(target, FakeTensor):
                self._read(waits=not (args[2:] == (True,) or kwargs.get("non_blocking")))
                return target.copy_(self._values(source))
            if not isinstance(source, FakeTensor):
                assert torch.broadcast_shapes(source.shape, target.shape) == target.shape, (source.shape, target.shape)
                self._upload(waits=not (args[2:] == (True,) or kwargs.get("non_blocking")))
                with self.fake:
                    target.zero_()  # a write, of whatever
                return target
        if name.rstrip("_") in PRODUCTS:  # whose shapes alone FakeTensorMode checks
            dtypes = {x.dtype for x in args if isinstance(x, Tensor)}
            if len(dtypes) > 1:
                raise RuntimeError(f"{name}: expected operands of the same dtype, but got {dtypes}")
        with self.fake:
            result = func(*args, **kwargs)
        if not (name in QUIET or name.startswith(("empty", "new_empty")) or func.is_view):
            self._count(name)
        result = tree_map_only(FakeTensor, self._from_fake, result)
        if name in ("unbind", "select", "slice", "unsqueeze", "view"):
            self._remember(result, lambda sent: func(sent, *args[1:], **kwargs), args[0])
        return result

    def _remember(self, result: Any, same: Callable[[Tensor], Any], source: FakeTensor) -> None:
        """Of what the host has sent, its views and copies are known to it as well."""
        known, version = getattr(source, "known", (None, -1))
        if version == source._version:
            for made, value in zip(tree_leaves(result), tree_leaves(same(known)), strict=True):
                made.known = value, made._version

    def _from_fake(self, x: FakeTensor) -> Tensor:
        """A result that lies on the host is a real tensor there."""
        return x if x.device.type == "cuda" else self._numbers(x.shape, x.dtype)

    def _move(self, func: Any, x: Tensor, kwargs: dict) -> Tensor:
        """Tensor.to."""
        target = kwargs.get("device") or x.device
        dtype = kwargs.get("dtype") or x.dtype
        waits = not kwargs.get("non_blocking")
        if target.type == "cpu":
            self._read(waits)
            return self._values(x).to(dtype)
        if not isinstance(x, FakeTensor):
            self._upload(waits)
            strides = torch.empty_like(x, device="meta").stride()
            with self.fake:
                sent = torch.empty_strided(x.shape, strides, dtype=dtype, device=target)
            if x.numel() <= KNOWN:
                sent.known = x.detach().to(dtype, copy=True), sent._version
            return sent
        with self.fake:
            result = func(x, **kwargs)
        self._count("_to_copy")
        self._remember(result, lambda sent: sent.to(dtype), x)
        return result

    # -- the host and the device --------------------------------------------------------------------------------

    def _count(self, name: str, times: int = 1) -> None:
        (self.capturing.kernels if self.capturing else self.kernels)[name] += times

    def _forbidden(self, why: str) -> None:
        """What no capture survives."""
        if self.capturing:
            self.capturing.broken = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({why})")

    def _host_waits(self) -> None:
        self._forbidden("the host waits")
        if self.sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    def _read(self, waits: bool = True) -> None:
        self.reads += 1
        if waits:
            self._host_waits()

    def _upload(self, waits: bool) -> None:
        self.uploads += 1
        self._forbidden("an upload")
        if waits:
            self._host_waits()

    def _read_by(self, name: str, x: Tensor) -> Any:
        self._read()
        if name == "nonzero":
            with self.fake:
                return torch.empty(0, x.dim(), dtype=torch.long, device=x.device)
        if name in ("equal", "allclose", "is_nonzero") or (name == "_local_scalar_dense" and x.dtype == torch.bool):
            return self._holds(True)
        return self._values(x).tolist()

    def _holds(self, default: bool) -> bool:
        """The answer to whoever asks: the first function on the stack that is neither torch's nor in this file."""
        frame: Any = sys._getframe(1)
        while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        return self.answers.get(frame.f_code.co_name, default) if frame else default

    def _values(self, x: FakeTensor) -> Tensor:
        """What the host reads of it."""
        known, version = getattr(x, "known", (None, -1))
        return known if version == x._version else self._numbers(x.shape, x.dtype)

    def _numbers(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Made up."""
        shape = tuple(shape)
        if dtype == torch.bool:
            return torch.full(shape, self._holds(False))
        if dtype.is_floating_point:
            return torch.ones(shape).to(dtype)
        if dtype == torch.uint8:  # bytes of activations on their way
            return torch.zeros(shape, dtype=dtype)
        return torch.tensor(list(itertools.islice(self.tokens, math.prod(shape))), dtype=dtype).view(shape)

    def _pin(self, x: Tensor) -> Tensor:
        self._forbidden("host memory is pinned")
        self.pinned.add(x.untyped_storage()._cdata)
        return x

    def _is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.pinned

    # -- backward passes -------------------------------------------------------------------------------------

    def _backward(self, x: Tensor, gradient: Tensor | None) -> None:
        for variable, grad in self._walk([x], [gradient], []).items():
            variable.grad = grad if variable.grad is None else variable.grad + grad

    def _grad(self, outputs: Any, inputs: Any, grad_outputs: Any = None, **_: Any) -> tuple[Tensor, ...]:
        outputs, inputs, grads = ([x] if isinstance(x, Tensor) else x for x in (outputs, inputs, grad_outputs))
        found = self._walk(outputs, grads or [None] * len(outputs), inputs)
        return tuple(found[x] for x in inputs)

    @torch.no_grad()
    def _walk(self, roots: Any, upstream: Any, inputs: Any) -> dict[Tensor, Tensor]:
        """Gradients of the inputs, or of all leaves where there are none."""
        edges = {torch.autograd.graph.get_gradient_edge(x)[:2]: x for x in inputs}
        waiting: Counter = Counter()  # node -> how many others have not handed it their gradient
        arrived: dict[Any, dict[int, Tensor]] = {}
        starts = [torch.autograd.graph.get_gradient_edge(x)[:2] for x in roots]
        stack, seen = [node for node, _ in starts], {node for node, _ in starts}
        while stack:
            for node, _ in stack.pop().next_functions:
                waiting[node] += 1
                if node is not None and node not in seen:
                    seen.add(node)
                    stack.append(node)
        for (node, place), x, gradient in zip(starts, roots, upstream, strict=True):
            arrived.setdefault(node, {})[place] = torch.ones_like(x) if gradient is None else gradient
        found: dict[Tensor, Tensor] = {}
        ready = [node for node, _ in starts if not waiting[node]]
        while ready:
            node = ready.pop()
            given = arrived.pop(node, {})
            found |= {x: given[place] for (owner, place), x in edges.items() if owner is node and place in given}
            if hasattr(node, "variable"):  # a leaf
                if not inputs and given:
                    found[node.variable] = given[0]
                continue
            python = isinstance(node, torch.autograd.function.BackwardCFunction)
            run = node.apply if python else node
            made: Any = run(*(given.get(i) for i in range(len(node._input_metadata)))) if given else ()
            made = list(made) if isinstance(made, tuple) else [made]
            following_nodes = node.next_functions
            if python:  # it also returns None for what is no tensor
                made = [x for x, needed in zip(made, node.needs_input_grad, strict=False) if needed]
                following_nodes = [edge for edge in following_nodes if edge[0] is not None]
            for (following, place), gradient in itertools.zip_longest(following_nodes, made[: len(following_nodes)]):
                if following is None:
                    continue
                if gradient is not None:
                    self._hand_over(arrived.setdefault(following, {}), following, place, gradient)
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)
        return found

    def _hand_over(self, given: dict[int, Tensor], node: Any, place: int, gradient: Tensor) -> None:
        """As torch's engine: summed over what was broadcast, in the dtype of what it is a gradient of."""
        like = node._input_metadata[place]
        assert gradient.device == like.device, f"a gradient on {gradient.device} of a tensor on {like.device}"
        gradient = gradient.sum_to_size(like.shape).to(like.dtype)
        given[place] = given[place] + gradient if place in given else gradient

    # -- torch.cuda ---------------------------------------------------------------------------------------------

    def _index(self, device: Any) -> int:
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        return self.device if index is None else index

    def _indexed(self, args: tuple) -> tuple:
        """What torch does in C++ for a device without an index, if it was built with CUDA."""
        bare = ("cuda", torch.device("cuda"))
        return tuple(
            torch.device("cuda", self.device) if isinstance(x, (str, torch.device)) and x in bare else x for x in args
        )

    def _exchange(self, device: int) -> int:
        before = self.device
        if device >= 0:
            assert device < self.devices, f"CUDA error: invalid device ordinal {device}"
            self.device = device
        return before

    def _set_stream(self, stream: "Stream") -> None:
        self.device = stream.device.index
        self.streams[self.device] = stream

    def _set_sync_mode(self, mode: int | str) -> None:
        self.sync_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)  # type: ignore[call-overload]

    def _empty_cache(self) -> None:
        self._forbidden("memory is given back")
        if self.broken_pool:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def _end_pool(self, *_: Any) -> None:
        self.broken_pool = False


class Stream:
    def __init__(self, gpu: FakeCuda, index: int):
        self.gpu, self.device = gpu, torch.device("cuda", index)

    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream), other

    def wait_event(self, event: "Event") -> None:
        assert isinstance(event, Event) and event.recorded, "an event that nobody has recorded"

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self.gpu)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.gpu._host_waits()

    def query(self) -> bool:
        return True

    def __enter__(self) -> "Stream":
        self.context = torch.cuda.stream(self)  # type: ignore[arg-type]
        self.context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


class Event:
    def __init__(self, gpu: FakeCuda):
        self.gpu, self.recorded = gpu, False

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded, "the host waits for an event that nobody has recorded"
        self.gpu._forbidden("the host waits")

    def wait(self, stream: Stream | None = None) -> None:
        assert self.recorded

    def query(self) -> bool:
        return self.recorded

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


class Graph:
    """torch.cuda.CUDAGraph: `kernels` is what a replay launches."""

    def __init__(self, gpu: FakeCuda):
        self.gpu, self.kernels, self.broken, self.device = gpu, Counter[str](), False, -1

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global", **_: Any) -> None:
        gpu = self.gpu
        assert gpu.capturing is None, "a capture inside another"
        assert gpu.streams[gpu.device] is not gpu.defaults[gpu.device], "a graph is captured on a side stream"
        self.handle, self.device, gpu.capturing, gpu.broken_pool = pool or object(), gpu.device, self, True

    def capture_end(self) -> None:
        gpu = self.gpu
        gpu.capturing = None
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        gpu.broken_pool = False
        gpu.graphs.append(self)

    def replay(self) -> None:
        assert self.kernels, "an empty graph is replayed"
        self.gpu.replays += 1
        self.gpu.kernels.update(self.kernels)

    def pool(self) -> object:
        return self.handle

    def reset(self) -> None:
        self.kernels = Counter()


class Kernel:
    """In place of a Triton kernel: its launches are checked against its parameters, and counted."""

    def __init__(self, gpu: FakeCuda, kernel: Any):
        function = kernel.fn
        while hasattr(function, "fn"):  # decorated more than once
            function = function.fn
        self.gpu, self.name = gpu, function.__name__.strip("_")
        self.parameters = inspect.signature(function).parameters
        words = re.findall(r"^\s+(\w+_ptr),? *# *(\w+)", inspect.getsource(function), re.M)
        self.dtypes = {name: DTYPES[word] for name, word in words if word in DTYPES}

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.launch(grid, args, kwargs)

    def launch(self, grid: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = self._bind(args, kwargs)
        for name, value in given.items():
            if "constexpr" in str(self.parameters[name].annotation):
                assert not isinstance(value, Tensor), f"{self.name}: {name} is a constant, not {value}"
            elif name.endswith("_ptr"):
                self._check_pointer(name, value, given)
            else:
                assert isinstance(value, (int, float)), f"{self.name}: {name} is {value!r}, not a number"
                assert isinstance(value, float) or -(2**63) <= value < 2**63, (self.name, name, value)
        grid = grid(given) if callable(grid) else grid
        sizes = [*grid, 1, 1][:3]
        fits = all(isinstance(n, int) and n >= 0 for n in sizes) and sizes[0] < 2**31 and max(sizes[1:]) < 2**16
        assert fits, f"{self.name}: a grid of {sizes}"
        if min(sizes):  # Triton launches nothing of an empty grid
            self.gpu._count(self.name)

    def _bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert len(args) <= len(self.parameters), f"{self.name} takes {len(self.parameters)} arguments, got {len(args)}"
        given = dict(zip(self.parameters, args, strict=False))
        options = {name: value for name, value in kwargs.items() if name not in self.parameters}
        assert options.keys() <= LAUNCH_OPTIONS, f"{self.name} has no {sorted(options.keys() - LAUNCH_OPTIONS)}"
        assert options.get("num_warps", 4) in (1, 2, 4, 8, 16, 32), f"{self.name}: {options['num_warps']} warps"
        kwargs = {name: value for name, value in kwargs.items() if name in self.parameters}
        assert not given.keys() & kwargs.keys(), f"{self.name}: {sorted(given.keys() & kwargs.keys())} are given twice"
        given |= kwargs
        defaults = {n for n, p in self.parameters.items() if p.default is not inspect.Parameter.empty}
        missing = self.parameters.keys() - given.keys() - defaults
        assert not missing, f"{self.name} is launched without {sorted(missing)}"
        return given

    def _check_pointer(self, name: str, value: Any, given: dict[str, Any]) -> None:
        where = f"{self.name}: {name}"
        assert isinstance(value, FakeTensor), f"{where} is no tensor on the GPU: {type(value).__name__}"
        current = torch.device("cuda", self.gpu.device)
        assert value.device == current, f"{where} is on {value.device}, the kernel is launched on {current}"
        unread = given.get("HAS_" + name.removesuffix("_ptr").upper(), True) is False
        unread |= sum(other is value for other in given.values()) > 1
        stated = self.dtypes.get(name)
        assert unread or stated in (None, value.dtype), f"{where} is {value.dtype}, not {stated}"
