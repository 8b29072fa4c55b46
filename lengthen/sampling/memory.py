"""How much memory there is for keys and values, and what to do where it is not enough."""

import torch
from torch import Tensor

from lengthen.errors import out_of_memory
from lengthen.models.cards import physical_memory
from lengthen.records import UserError
from lengthen.sampling.cache import PagedCache, bytes_per_token
from lengthen.sampling.draw import draw
from lengthen.sampling.hook import Hook
from lengthen.sampling.prefix_cache import PrefixCache
from lengthen.sampling.scheduler import LEAST_CHUNK

CPU_SHARE = 4  # keys and values get a quarter of a computer's memory
CUDA_SHARE = 0.9  # of what the largest step leaves on a GPU; the rest is for the allocator's fragments
PREFIX_SHARE = 2  # the prefix cache may hold half of the pages: those that no text needs
HINT = "a smaller model, or --quantize nf4"


def kv_room(hook: Hook, dtype: torch.dtype, page_tokens: int, chunk: int, context: int, rows: int) -> tuple[int, int]:
    """(tokens that there is room for, prompt tokens in a step): `chunk`, or fewer if these do not fit.

    A quarter of the memory of a computer; on CUDA nine tenths of what a step of the largest size leaves.
    """
    room = physical_memory() // CPU_SHARE
    if hook.device.type == "cuda":
        taken, chunk = warm_up(hook, dtype, page_tokens, chunk, context, rows)
        torch.cuda.empty_cache()  # what the warm-up gave back is free for the pages
        room = max(0, int((torch.cuda.mem_get_info(hook.device)[0] - taken) * CUDA_SHARE))
    return room // bytes_per_token(hook.shapes, dtype), chunk


@torch.no_grad()
def warm_up(hook: Hook, dtype: torch.dtype, page_tokens: int, chunk: int, context: int, rows: int) -> tuple[int, int]:
    """Computes a prompt of `chunk` tokens and draws for all rows: (bytes that took, on CUDA; the chunk that fits).

    Out of memory means half the tokens, and another go. Raises UserError where the fewest do not fit.
    """
    while True:
        try:
            return _largest_step(hook, dtype, page_tokens, min(chunk, context), rows), chunk
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if chunk <= LEAST_CHUNK:
                raise UserError("the model leaves no memory to compute with", HINT) from None
        chunk = max(LEAST_CHUNK, chunk // 2)  # a step halves with its prompt tokens


def _largest_step(hook: Hook, dtype: torch.dtype, page_tokens: int, chunk: int, rows: int) -> int:
    device = hook.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    cache = PagedCache(hook.shapes, -(-chunk // page_tokens), page_tokens, device, dtype)
    every = torch.arange(chunk, device=device)
    last = every[-1:].expand(rows)  # logits of as many rows as may ever draw at once
    batch = cache.batch([], [(list(range(cache.num_pages)), 0, chunk)])
    logits: Tensor = hook.forward(batch, torch.zeros_like(every), every, last).float()
    share = torch.full((rows,), 0.8, device=device)  # both temperature and top-p
    draw(logits, share, last.clamp(max=20), share, seeds=last, positions=last)  # settings that rank candidates
    return torch.cuda.max_memory_allocated(device) - before if cuda else 0


def make_caches(
    hook: Hook, pages: int, page_tokens: int, dtype: torch.dtype, notes: list[str]
) -> tuple[PagedCache, PrefixCache]:
    """Pages for running texts, and the prefix cache. What does not fit is shrunk, which `notes` then say."""
    asked = pages
    while pages > 0:
        try:
            cache = PagedCache(hook.shapes, pages, page_tokens, hook.device, dtype)
            prefixes = PrefixCache(cache, -(-pages // PREFIX_SHARE))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            pages = pages * 9 // 10  # a tenth less, until it fits
            continue
        if pages < asked:
            room, wish = pages * page_tokens, asked * page_tokens
            notes.append(f"out of memory: keys and values have room for {room} tokens, not {wish}")
        return cache, prefixes
    raise UserError("no memory is left for keys and values", HINT)
