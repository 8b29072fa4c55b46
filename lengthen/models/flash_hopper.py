"""FlashAttention 3 or 4 in the place of torch's own FlashAttention 2, where one is installed and computes the same.

torch can exchange what its FlashAttention operators run (torch.nn.attention.activate_flash_attention_impl), so the
calls in flash.py stay as they are. FlashAttention 2 was written for Ampere and leaves about half of a Hopper GPU
unused. Before one of the others is used for a head size, its outputs and gradients are compared with those of
FlashAttention 2; one that fails or differs is given up, and that is said. Neither has dropout.

cuDNN's attention, which torch has as well, is not used: it makes a plan for every length of a row that it has not seen
(pytorch#155958), and in a training nearly every row has another one.

No GPU has run this yet; the tests put stand-ins in the place of the three.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor
from torch.nn import attention

from lengthen import cli

# torch's name: (module that has the kernels, major compute capabilities that torch gives it)
MODULES = {"FA3": ("flash_attn_interface", (9,)), "FA4": ("flash_attn.cute.interface", (9, 10))}
LENGTHS = (257, 40, 1)  # of the samples that are compared; three blocks of keys and less than one
LAST = 17  # of their tokens, whose outputs are compared alone
CLOSE = 2e-2  # of the largest value, in bf16


@cache
def candidate(device: torch.device) -> str:
    """What is installed for this device, "" = nothing."""
    if device.type != "cuda" or not hasattr(attention, "activate_flash_attention_impl"):
        return ""
    found = [name for name, (module, _) in MODULES.items() if importable(module)]
    major = torch.cuda.get_device_capability(device)[0] if found else 0
    return next((name for name in found if major in MODULES[name][1]), "")


def importable(module: str) -> bool:
    """Whether a module is there; of the package around it, that is run."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # of the package around it, whatever that may raise without its own needs
        return False


@cache
def activated(device: torch.device, head: int) -> bool:
    """Whether FlashAttention 3 or 4 now serves heads of this size; brings it into place the first time."""
    if not (name := candidate(device)):
        return False
    if attention.current_flash_attention_impl():
        attention.restore_flash_attention_impl()
    own, why = _probe(device, head), ""
    try:
        attention.activate_flash_attention_impl(name)
        pairs = zip(own, _probe(device, head), strict=True)
        error = torch.stack([(a - b).abs().max() / a.abs().max() for a, b in pairs]).max().item()
        if not error <= CLOSE:  # also where it is no number
            why = f"it differs from FlashAttention 2 by {error:.2g}"
    except Exception as failure:  # whatever a library of that age may raise: there is a kernel that works
        why = str(failure).partition("\n")[0] or type(failure).__name__
    if why:
        if attention.current_flash_attention_impl():
            attention.restore_flash_attention_impl()
        del MODULES[name]
        candidate.cache_clear()
        activated.cache_clear()
        cli.say(f"{name} is installed and not used: {why}")
        return activated(device, head)  # the next one, or none
    return True


def _probe(device: torch.device, head: int) -> list[Tensor]:
    """Output and gradients of what is in place, over packed samples, with grouped heads, without a window and with; and
    the output of the last tokens of each sample alone, as a prompt's chunk asks for it."""
    generator = torch.Generator(device).manual_seed(0)
    ends = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    shapes = [(sum(LENGTHS), heads, head) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes)
    found: list[Tensor] = []
    for window in (-1, 30):
        sides = {"scale": head**-0.5, "window_size_left": window, "window_size_right": 0}
        row = ends, ends, max(LENGTHS), max(LENGTHS)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *row, 0.0, True, False, **sides)
        state = torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)
        backward = torch.ops.aten._flash_attention_backward
        found += [out, lse, *backward(dout, q, k, v, out, lse, *row, 0.0, True, *state, **sides)]
    # Fewer queries than keys: the last query sees all keys. Heads side by side in one matrix, as a joint product gives.
    joint = torch.cat([x.flatten(1) for x in (q, k, v)], 1)
    q, k, v = (x.unflatten(1, (-1, head)) for x in joint.split([x.shape[1] * head for x in (q, k, v)], 1))
    counts = torch.tensor([min(n, LAST) for n in LENGTHS], device=device)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    first = int(starts[-1])
    row = starts, ends, LAST, max(LENGTHS)
    sides["window_size_left"] = -1
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q[:first], k, v, *row, 0.0, True, False, **sides)
    return [x.float() for x in (*found, out, lse)]
