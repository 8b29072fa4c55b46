"""Kernels, each beside its plain-torch reference: Triton for a GPU, Numba for a CPU.

A Hugging Face package has this name too, and transformers and bitsandbytes may import it. Where one is installed, its
folder is searched after ours for submodules (`kernels.layer.mode`), and its own names (`kernels.get_kernel`) are
handed out when somebody asks for one. Until then nothing of it runs, and nothing heavy is imported here.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

HAS_TRITON, HAS_NUMBA = (find_spec(name) is not None for name in ("triton", "numba"))


def _find_namesake() -> ModuleSpec | None:
    """The other `kernels` on the path: the first regular package of that name that is not this folder."""
    for entry in sys.path:
        spec = PathFinder.find_spec("kernels", [entry])
        if spec and spec.origin and not Path(spec.origin).samefile(__file__):
            return spec
    return None


def _load_namesake(origin: str) -> ModuleType:
    """Run the other package's `__init__` under a private name; `kernels.X` inside it finds its own submodules."""
    name = f"{__name__}._namesake"
    if name not in sys.modules:
        # Not as a package, though its file is an `__init__`: its `from .layer import` must mean kernels.layer.
        spec = spec_from_file_location(name, origin, submodule_search_locations=None)
        assert spec and spec.loader, f"{origin} was a regular package when it was found"
        module = module_from_spec(spec)
        sys.modules[name] = module  # first, as the import system does: its submodules may ask us for its names
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def __getattr__(name: str) -> object:
    dunder = name.startswith("__") and name != "__version__"  # tools probe for these: no reason to import anything
    if _namesake is None or not _namesake.origin or dunder:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_load_namesake(_namesake.origin), name)


_namesake = _find_namesake()
if _namesake:
    __path__.extend(_namesake.submodule_search_locations or [])
