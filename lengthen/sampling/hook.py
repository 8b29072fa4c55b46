"""Runs an unmodified model on packed tokens: its attention is ours for one forward pass, everything else its own.

The sampler runs a model on *packed* tokens: one sequence [1, T] that holds, one after the other, the newest token of
every decoding text and chunks of new prompts, with explicit positions, no mask and no Cache object. The one thing that
must know which token belongs to which text is attention. So this module registers an attention function with
transformers (`AttentionInterface.register`), and the batch of the pass is a keyword argument of the model call, which
transformers hands down to that function. (Nemotron's layers keep it to themselves: there the attention modules hold the
batch for the time of the pass.)

Not every model can be carried so. `Hook` compares a packed pass, and one split over pages, with the model's own before
the first use: a model that would be silently wrong is refused by name. A model of 16 bits whose logits are further
apart is judged layer by layer against fp32: large key biases (Qwen2.5), and layers that are few numbers wide (SmolLM2),
make any two roundings differ.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lengthen.errors import out_of_memory
from lengthen.models.errors import logits_not_finite
from lengthen.models.exact import WIDER, as_near, given_in, in_dtype, squared_errors
from lengthen.models.families import PLAIN_LAYERS, REBUILT_LAYERS
from lengthen.models.flash import dense
from lengthen.records import UserError
from lengthen.sampling import cache as caches
from lengthen.sampling.batch import Batch, Rule
from lengthen.sampling.cache import LayerShape, PagedCache, least_page_tokens
from lengthen.sampling.layer import forwards

NAME = "lengthen_paged"  # key in transformers' registry
PROBE, SPLIT = 8, 5  # tokens of the probe; of its prefill chunk, the others are decoded
# The largest difference of the probe's logits, as a share of the largest logit.
BOUNDS, BOUND_16_BITS = {torch.float32: 1e-3, torch.float64: 1e-6}, 8e-2
DRAWS = 16  # most texts by which a model of 16 bits is judged layer by layer

# T packed tokens, H hidden size, V vocabulary, n tokens whose logits are asked for.


class NotHandedDown(Exception):
    """The model called its attention without the batch."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    lengthen_batch: Batch | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The registered function. query [1, Hq, T, D], key and value [1, Hkv, T, D] with positions applied.

    Returns ([1, T, Hq, D], None). `sliding_window`, `softcap` (tanh bound of the scores) and `s_aux` (a learned
    sink per query head) come from the model, layer by layer. The mask is ignored: none is built for our key.
    """
    batch = getattr(module, "lengthen_batch", None) if lengthen_batch is None else lengthen_batch
    if batch is None:
        raise NotHandedDown
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, H, D]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return batch.attend(layer, q, k, v, Rule(scaling, sliding_window or 0, softcap, s_aux))[None], None


AttentionInterface.register(NAME, attend)


class ProbeBatch:
    """One text in no pages: attends to the batch itself and notes what each layer hands to attention."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        self.shapes[layer] = LayerShape(k.shape[1], k.shape[2], v.shape[2], rule.window)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H, T, D], as `dense` wants them
        return dense(q, k, v, 0, *rule).transpose(0, 1)


class Hook:
    """Sends a model's attention here while a batch is running, and nowhere else.

    Raises UserError for a model whose attention cannot be carried: it would be silently wrong.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.device, self.dtype = (getattr(model.get_input_embeddings().weight, x) for x in ("device", "dtype"))
        self.holders: list[Any] = []  # modules that hold the batch, of a model that does not hand it down
        # Forwards that stand in for modules' own while a batch is running (layer.py).
        self.replaced: list[tuple[nn.Module, Callable]] = []
        self.notes: list[str] = []  # lines for people
        configs = [model.config, *(m.config for m in model.modules() if hasattr(m, "config"))]
        self.configs = list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())
        self.shapes = self._probe()

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """The model's attention is `attend`; afterwards the model is its own again."""
        before = [c._attn_implementation for c in self.configs]  # nested configs may differ
        for config in self.configs:
            config._attn_implementation = NAME
        for module, forward in self.replaced:
            module.forward = forward
        for module in self.holders:
            module.lengthen_batch = batch
        try:
            yield
        finally:
            for module in self.holders:
                del module.lengthen_batch
            for module, _ in self.replaced:
                del module.forward  # its class's own is visible again
            for config, name in zip(self.configs, before, strict=True):
                config._attn_implementation = name

    def forward(self, batch: Batch, ids: Tensor, positions: Tensor, keep: Tensor, hidden: bool = False) -> Tensor:
        """ids, positions int64 [T], keep int64 [n] packed indices -> logits [n, V] of those, in the model's dtype.

        hidden: what the head would be given instead, [n, H].
        """
        packed = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False, "lengthen_batch": batch}
        with self.running(batch):
            if hidden:
                return self.model.get_decoder()(**packed).last_hidden_state[0].index_select(0, keep)
            return self.model(**packed, logits_to_keep=keep).logits[0]

    def _refuse(self, why: str) -> NoReturn:
        name = f"{type(self.model).__name__} (model_type {self.model.config.model_type!r})"
        raise UserError(
            f"the sampler cannot run {name}: {why}",
            "take a model whose layers are all softmax attention: the Llama, Qwen2.5, Qwen3, Mistral, Gemma families",
        )

    @torch.no_grad()
    def _probe(self) -> dict[int, LayerShape]:
        """Runs a few tokens: by the model's own attention, by ours, and split over the pages. All three must agree."""
        config = self.model.config.get_text_config()
        types = getattr(config, "layer_types", None) or []
        if strange := sorted(set(types) - PLAIN_LAYERS):
            self._refuse(f"it has {', '.join(strange)} layers")
        if not getattr(self.model, "_supports_attention_backend", False):
            self._refuse("its attention does not go through transformers' attention interface")
        every = torch.arange(PROBE, device=self.device)
        ids = (every * 7919 + 11) % config.vocab_size  # spread over the vocabulary, all different
        own = self.model(input_ids=ids[None], use_cache=False).logits[0]  # [PROBE, V]
        if not own.amax(-1).isfinite().all():  # one that masks a token by -inf is served
            raise logits_not_finite(self.model)
        batch = ProbeBatch()  # no pages yet: their shapes are what it finds out
        try:
            packed = self.forward(batch, ids, every, every)
        except NotHandedDown:
            self.holders = [m for m in self.model.modules() if hasattr(m, "layer_idx")]
            packed = self.forward(batch, ids, every, every)
        except TypeError as error:
            if "lengthen_batch" not in str(error):
                raise
            self._refuse("it takes no keyword arguments that it does not know")
        if len(batch.shapes) != config.num_hidden_layers:
            self._refuse(f"{config.num_hidden_layers - len(batch.shapes)} of its layers are not attention layers")
        for layer, name in enumerate(types):
            if name == "sliding_attention" and not batch.shapes[layer].window:
                self._refuse(f"layer {layer} slides, but its window is not passed to the attention function")
        del packed

        def alone(ids: Tensor) -> Tensor:
            return self.forward(ProbeBatch(), ids, every, every)

        def split(ids: Tensor) -> Tensor:
            return self._split(batch.shapes, ids)

        if why := self._judge("a packed pass", alone, ids, own):
            self._refuse(why)
        windows = {layer: shape.window for layer, shape in batch.shapes.items()}
        self.replaced = forwards(self.model, windows, caches.on_gpu(self.device))
        try:
            why = self._judge("a pass split over pages", split, ids, own)
        except (AttributeError, TypeError, ValueError) as error:  # remote code with the name of a known layer
            if not self.replaced:
                raise
            why = f"{type(error).__name__}: {error}"
        dropped = why
        if why and self.replaced:  # a model of a known kind that is not quite that: its own code serves it
            self.replaced = []
            why = self._judge("a pass split over pages", split, ids, own)
        if why:
            self._refuse(why)
        known = {m for m in self.model.modules() if type(m).__name__ in REBUILT_LAYERS}
        if slow := len(known - {module for module, _ in self.replaced}):
            reason = dropped or "they are not quite what they look like"
            self.notes.append(f"{slow} layers run on the model's own code, which is slower: {reason}")
        return batch.shapes

    def _split(self, shapes: dict[int, LayerShape], ids: Tensor) -> Tensor:
        """The logits [PROBE, V] of the probe's tokens: a prefill chunk, then token by token, through pages."""
        cache = PagedCache(shapes, 3, least_page_tokens(self.device), self.device, self.dtype)
        table, every = [cache.take() for _ in range(3)], torch.arange(PROBE, device=self.device)
        chunk = cache.batch([], [(table, 0, SPLIT)])  # on a CPU over two pages
        logits = [self.forward(chunk, ids[:SPLIT], every[:SPLIT], every[:SPLIT])]
        for i in range(SPLIT, PROBE):
            one = slice(i, i + 1)
            logits.append(self.forward(cache.batch([(table, i, 1)], []), ids[one], every[one], every[:1]))
        return torch.cat(logits)

    def _judge(self, what: str, run: Callable[[Tensor], Tensor], ids: Tensor, own: Tensor) -> str:
        """Why a pass is not the model's own, "" = it is. run: ids [PROBE] -> logits [PROBE, V]."""
        why = self._differs(what, run(ids), own)
        if not why or own.dtype in BOUNDS:
            return why
        try:
            return "" if self._as_near(run, ids) else why
        except RuntimeError as error:
            if not out_of_memory(error):  # one layer in fp32
                raise
            return why

    def _as_near(self, run: Callable[[Tensor], Tensor], ids: Tensor) -> bool:
        """Whether each layer, given what it is given in the model's own pass, is about as near to its own code in fp32
        as that code is (exact.as_near). Errors are added up over up to DRAWS texts."""
        decoder: Any = self.model.get_decoder()
        parts: list[nn.Module] = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        if len(parts) != self.model.config.get_text_config().num_hidden_layers or not hasattr(decoder, "norm"):
            return False
        parts.append(decoder.norm)  # with what it is given, the logits are those of the own pass
        squares = torch.zeros(len(parts), 3, dtype=torch.float64)
        dtype, share = WIDER[self.dtype]
        for draw in range(DRAWS):
            some = (ids + 104_729 * draw) % self.model.config.get_text_config().vocab_size
            calls, own = self._watch(parts, partial(self.model, input_ids=some[None], use_cache=False))
            found, ours = self._watch(parts, partial(run, some), calls)
            if self._differs("", ours, own.logits[0]):
                return False
            for i, part in enumerate(parts):
                ((args, named, theirs),) = calls[part]
                wide_args, wide_named = given_in(dtype, (args, named))
                exact = _first(in_dtype(part, dtype)(*wide_args, **wide_named))
                mine = torch.cat([out for *_, out in found[part]], 1)
                squares[i] += squared_errors([mine], [theirs], [exact])[0].cpu()
            if as_near(squares, share):
                return True
        return False

    def _watch(self, parts: list[nn.Module], run: Callable[[], Any], given: "Calls | None" = None) -> tuple[Any, Any]:
        """-> (what each part was given, and what it gave, [1, T, H] each call, what `run` returns).

        given: of another pass over the same tokens; each part is given those vectors instead of its own.
        """
        calls: Calls = {part: [] for part in parts}

        def before(part: nn.Module, args: tuple, named: dict) -> tuple[tuple, dict] | None:
            if given is None:
                return None
            first, own_args, own_named = sum(out.shape[1] for *_, out in calls[part]), *given[part][0][:2]
            x, old = ((a[0] if a else n["hidden_states"]) for a, n in ((own_args, own_named), (args, named)))
            x = x[:, first : first + old.shape[1]].clone()  # layers that are lent change it
            return ((x, *args[1:]), named) if args else (args, {**named, "hidden_states": x})

        def after(part: nn.Module, args: tuple, named: dict, out: Any) -> None:
            calls[part].append((args, named, _first(out)))

        hooks = [part.register_forward_pre_hook(before, with_kwargs=True) for part in parts]
        hooks += [part.register_forward_hook(after, with_kwargs=True) for part in parts]
        try:
            return calls, run()
        finally:
            for hook in hooks:
                hook.remove()

    def _differs(self, what: str, logits: Tensor, own: Tensor) -> str:
        """Why the logits are not the model's own, "" = they are."""
        bound = BOUNDS.get(own.dtype, BOUND_16_BITS) * own.float().abs().max().clamp(min=1)
        error = (logits.float() - own.float()).abs().max()  # bf16 rounds each logit to 3 digits
        why = f"the logits of {what} differ from the model's own by {error:.2g} (bound {bound:.2g})"
        return "" if error <= bound else why


Calls = dict[nn.Module, list[tuple[tuple, dict[str, Any], Tensor]]]  # by module: arguments and result of each call


def _first(out: Any) -> Tensor:
    """What a layer returns, which some wrap into a tuple."""
    return out[0] if isinstance(out, tuple) else out
