"""Prompts: the templates in prompts/, and one way to turn messages into token ids for every stage.

What a user or a model wrote never becomes a control token. The tokenizer's own chat template is rendered with unique
sentinels in place of the contents and split at them; the template's pieces are encoded with their control tokens,
the contents without any (`<|im_end|>` in a prompt is then ten characters of text). A prefilled answer is encoded
behind the assistant header and never sees the template: one that trims would eat its trailing blank line. Nor are
contents trimmed: they go in as they are. No torch here.
"""

import hashlib
import re
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from lengthen.records import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---------------------------------------------------------------------------------------------------------
# prompts/NAME.LANGUAGE.md

PROMPTS = Path(__file__).parent.parent / "prompts"
LANGUAGES = ("en", "zh")
FIELDS = {  # what each template must hold, no more and no less
    "instruct": set(),
    "instruct_prefill": {"example_1", "example_2"},
    "judge": {"instruction", "words"},
    "extend": {"instruction", "draft"},
    "constrain": {"instruction", "constraint"},
}


@cache
def template(name: str, language: str) -> str:
    """The text of prompts/NAME.LANGUAGE.md, a str.format template whose fields are checked; no newline at its end."""
    path = PROMPTS / f"{name}.{language}.md"
    try:
        text = path.read_text("utf-8").rstrip("\n")
        fields = {field for _, field, _, _ in Formatter().parse(text) if field is not None}
    except FileNotFoundError:
        raise UserError(f"the prompt template {path} is missing", "git checkout prompts") from None
    except ValueError as error:  # a lone brace, or bytes that are not UTF-8
        raise UserError(f"the prompt template {path} cannot be read: {error}", "write { and } as {{ and }}") from None
    if fields != FIELDS[name]:
        wanted, found = (", ".join(sorted(f"{{{f}}}" for f in some)) or "none" for some in (FIELDS[name], fields))
        raise UserError(f"the prompt template {path} must have the fields {wanted}, it has {found}")
    return text


def fill(name: str, language: str, **fields: object) -> str:
    """The template with its fields filled in; braces inside the values are only text."""
    assert set(fields) == FIELDS[name], f"{name} takes {sorted(FIELDS[name])}, not {sorted(fields)}"
    return template(name, language).format(**fields)


def template_hashes(*names: str) -> dict[str, str]:
    """File name -> 16 hex digits of its sha256, both languages: for a stage's settings."""
    texts = {f"{name}.{language}.md": template(name, language) for name in names for language in LANGUAGES}
    return {file: hashlib.sha256(text.encode()).hexdigest()[:16] for file, text in texts.items()}


# ---------------------------------------------------------------------------------------------------------
# Messages -> ids

SENTINEL = "Qz{}kVx"  # mixed case and digits: a template that changes case, or drops or doubles contents, is noticed
SENTINELS = re.compile(SENTINEL.format(r"(\d+)"))
# Variables that templates ask for. Without a thought: a prefilled answer cannot follow an open one.
TEMPLATE_OPTIONS = {"enable_thinking": False}
ROUND_TRIP = "Two  spaces,\n\n\ta tab - and 12.5 things."


class Chat:
    """Renders conversations for one tokenizer; see the module's docstring.

    eos_ids: ids that end an answer (the tokenizer's, `extra_eos` of the model's generation config, and end_id).
    end_id: what the template itself puts behind an answer of the assistant.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", extra_eos: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self._rendered: dict[tuple, list[str | int]] = {}
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template",
                "take the instruct or chat version of the model",
            )
        if self._anchored(ROUND_TRIP) is None or self._decode_behind(self._anchored(ROUND_TRIP)) != ROUND_TRIP:
            raise UserError(f"the tokenizer {tokenizer.name_or_path} does not give text back as it was (white space?)")
        header = self._encode_parts(self._parts(("user",), True), [""])
        self._header_is_control = header[-1] in self._controls
        self._tail = self._answer_tail()
        self.end_id = self._tail[-1]
        self.eos_ids = {self.end_id, *extra_eos} | ({tokenizer.eos_token_id} - {None})

    def encode(self, messages: list[dict[str, str]], prefill: str = "") -> list[int]:
        """Ids of [{"role", "content"}, ...] and the assistant's header, then of the answer that is begun for it.

        UserError where the template refuses the roles or rewrites a content.
        """
        parts = self._parts(tuple(m["role"] for m in messages), True)
        return self._encode_parts(parts, [m["content"] for m in messages]) + self.encode_text(prefill)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text behind the assistant's header: no control token can arise."""
        return self._encode(text, after_control=self._header_is_control) if text else []

    def encode_answer(self, text: str) -> list[int]:
        """A whole answer as the model should write it: its text, then what the template puts there, up to end_id."""
        return self.encode_text(text) + self._tail

    # -- the template --------------------------------------------------------------------------------------

    def _parts(self, roles: tuple[str, ...], header: bool) -> list[str | int]:
        """The template for these roles: its pieces of text, and in between the index of the content that goes there."""
        if (roles, header) not in self._rendered:
            messages = [{"role": role, "content": SENTINEL.format(i)} for i, role in enumerate(roles)]
            text = self._render(messages, header)
            parts = [int(p) if i % 2 else p for i, p in enumerate(SENTINELS.split(text))]
            if sorted(parts[1::2]) != list(range(len(roles))):
                lost = next((r for i, r in enumerate(roles) if parts[1::2].count(i) != 1), roles[-1])
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} rewrites, drops or repeats what a {lost} says",
                    "set a plain chat_template in the model's folder",
                )
            self._rendered[roles, header] = parts
        return self._rendered[roles, header]

    def _render(self, messages: list[dict[str, str]], header: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=header, **TEMPLATE_OPTIONS
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(f"the chat template of {self.tokenizer.name_or_path} refuses ({roles}): {error}") from None

    def _encode_parts(self, parts: list[str | int], contents: list[str]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            is_content = isinstance(part, int)
            text = contents[part] if is_content else part
            if text and not ids and not is_content:
                ids = self._raw(text, control=True)
            elif text:
                ids += self._encode(text, after_control=not ids or ids[-1] in self._controls, control=not is_content)
        return ids

    def _answer_tail(self) -> list[int]:
        """Ids from the end of an answer to the control token that closes the assistant's turn."""
        last = self._parts(("user", "assistant"), False)[-1]
        tail = self._encode(last, after_control=False, control=True) if last else []
        for i, token in enumerate(tail):
            if token in self._controls:
                return tail[: i + 1]
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"nothing ends an answer: {self.tokenizer.name_or_path} names no EOS token")
        return [self.tokenizer.eos_token_id]

    @cached_property
    def _controls(self) -> dict[int, str]:
        """Control tokens, id -> text: all that the tokenizer calls special, and any added token the template writes."""
        added = self.tokenizer.added_tokens_decoder
        parts = [self._parts(("user",), True), self._parts(("user", "assistant"), False)]
        written = {i for some in parts for p in some if isinstance(p, str) for i in self._raw(p, control=True)}
        special = {i for i, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
        return {i: self.tokenizer.convert_ids_to_tokens(i) for i in special | (written & set(added))}

    # -- the tokenizer -------------------------------------------------------------------------------------

    def _raw(self, text: str, control: bool = False) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not control)

    def _encode(self, text: str, *, after_control: bool, control: bool = False) -> list[int]:
        """Ids of a text that goes on behind others; `control`: a piece of the template, its control tokens count."""
        ids = self._behind(text, after_control, control)
        if control or self._controls.keys().isdisjoint(ids):
            return ids
        # `split_special_tokens` leaves added tokens alone that are not marked special: cut each behind its first
        # character and encode the pieces apart.
        names = sorted(self._controls.values(), key=len, reverse=True)
        cuts = [m.start() + 1 for m in re.finditer("|".join(map(re.escape, names)), text) if len(m[0]) > 1]
        if not cuts:
            if self._controls.keys() & set(ids) == {self.tokenizer.unk_token_id}:
                return ids  # a character that the vocabulary lacks
            raise UserError(f"the tokenizer {self.tokenizer.name_or_path} makes control tokens out of plain text")
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        first = self._encode(pieces[0], after_control=after_control)
        return first + [i for piece in pieces[1:] if piece for i in self._encode(piece, after_control=False)]

    def _behind(self, text: str, after_control: bool, control: bool) -> list[int]:
        """SentencePiece-like tokenizers put a space before each text they are given: not wanted in mid-sentence."""
        if not self._adds_space or (after_control and self._adds_space_after_control):
            return self._raw(text, control)
        ids = self._anchored(text, control)
        if ids is None:
            raise UserError(f"the tokenizer {self.tokenizer.name_or_path} cannot encode a text in pieces")
        return ids

    def _anchored(self, text: str, control: bool = False) -> list[int] | None:
        """Ids of `text` behind another text, whose own ids are cut off again; None where the two always merge."""
        for anchor in ("\n", "a", "0"):
            head, ids = self._raw(anchor), self._raw(anchor + text, control)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return None

    @cached_property
    def _adds_space(self) -> bool:
        return self._anchored("x") != self._raw("x")

    @cached_property
    def _adds_space_after_control(self) -> bool:
        """Whether it does so behind every control token too, not only where a text begins ("first")."""
        token, name = next(iter(self._controls.items()))
        return self._raw(name + "x", control=True) == [token, *self._raw("x")]

    def _decode_behind(self, ids: list[int]) -> str:
        head = self._raw("\n")
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(head + ids, **options)[len(self.tokenizer.decode(head, **options)) :]
