"""Prompts: the templates in prompts/, and one way to turn messages into token ids for every stage.

What a user or a model wrote never becomes a control token. The tokenizer's own chat template is rendered with unique
sentinels in place of the contents and split at its control tokens; only then do the contents go in, and the text
between two control tokens is encoded without any (`<|im_end|>` in a prompt stays ten characters of text). A prefilled
answer is encoded after the assistant header and never sees the template: one that trims would eat its trailing blank
line. Nor are contents trimmed: they go in as they are. No torch here.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

from lengthen.records import LANGUAGES, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---------------------------------------------------------------------------------------------------------
# prompts/NAME.LANGUAGE.md

PROMPTS = Path(__file__).parents[2] / "prompts"
FIELDS: dict[str, set[str]] = {  # what each template must hold, no more and no less
    "instruct": set(),
    "instruct_prefill": {"example_1", "example_2"},
    "judge": {"instruction", "words"},
    "extend": {"instruction", "draft"},
    "constrain": {"instruction", "constraint"},
    "quality": {"query", "answer", "mark"},
    "compare": {"query", "first", "second", "mark"},
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
        wanted, there = (", ".join(sorted(f"{{{f}}}" for f in some)) or "none" for some in (FIELDS[name], fields))
        raise UserError(f"the prompt template {path} must have the fields {wanted}, it has {there}")
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
# Variables that templates ask for. No thinking: a prefilled answer cannot follow an unfinished thought.
TEMPLATE_OPTIONS = {"enable_thinking": False}
ANCHORS = ("\n", "a", "0")  # put before a text that must not be encoded as the first, and its ids cut off again
ROUND_TRIP = "Two  spaces,\n\n\ta tab - and 12.5 things."


class Chat:
    """Renders conversations for one tokenizer; see the module's docstring.

    eos_ids: ids that end an answer (the tokenizer's, `extra_eos` of the model's generation config, and end_id).
    end_id: what the template itself puts after an answer of the assistant.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", extra_eos: Iterable[int] = ()):
        self.tokenizer: Any = tokenizer
        self.name = tokenizer.name_or_path
        self._runs: dict[tuple[str, ...], list[str]] = {}
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {self.name} has no chat template", "take the instruct or chat version of the model"
            )
        header, whole = self._render(("user",), True), self._render(("user", "assistant"), False)
        self._controls = self._control_tokens(header + whole)
        self._control_ids = set(self._controls.values())
        self._check_round_trip()
        self._header_end = "control" if self._split(header)[-1] == "" else "text"

        # Llama-2 writes " answer </s>" where its header ends without the space: what stands around an answer is kept.
        around, answer = whole.split(SENTINEL.format(1))[0], self._split(whole.split(SENTINEL.format(1))[1])
        lead = around.removeprefix(header)
        self._lead = lead if lead.isspace() else ""
        self._trail, end = (answer[0], self._controls[answer[1]]) if len(answer) > 1 else ("", tokenizer.eos_token_id)
        if end is None:
            raise UserError(
                f"nothing ends an answer: the template of {self.name} writes no EOS, its tokenizer has none"
            )
        self.end_id: int = end
        self.eos_ids = {self.end_id, *extra_eos} | ({tokenizer.eos_token_id} - {None})

    @cached_property
    def hash(self) -> str:
        """16 hex digits over vocabulary, merges and chat template: what the ids of a text depend on."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(f"{rules}\x1f{self.tokenizer.chat_template}".encode()).hexdigest()[:16]

    def encode(self, messages: list[dict[str, str]], prefill: str = "") -> list[int]:
        """Ids of [{"role", "content"}, ...] and the assistant's header, then of the answer that is begun for it.

        The header's ids are those that it has alone, as when a model is asked: a prefill changes none of them.
        UserError where the template refuses the roles or rewrites a content.
        """
        return self.encode_many([messages])[0] + (self.encode_text(prefill) if prefill else [])

    def encode_many(self, conversations: list[list[dict[str, str]]]) -> list[list[int]]:
        """`encode` of each, in one call of the tokenizer: a fast one then uses all cores."""
        texts: list[tuple[str, str]] = []  # of all conversations: (text, after what)
        gaps: list[list[int]] = []  # where the ids of each text go
        wholes: list[list[list[int]]] = []
        for messages in conversations:
            roles = tuple(m["role"] for m in messages)
            if roles not in self._runs:
                self._runs[roles] = self._split(self._render(roles, True))
            wholes.append([])
            for i, run in enumerate(self._runs[roles]):  # text, control token, text, ..., text
                if i % 2:
                    wholes[-1].append([self._controls[run]])
                elif run:
                    # Contents and the template's own text together, so that words join as in the whole string.
                    text = _with_contents(run, messages)
                    texts.append((text, "control" if i else "nothing"))
                    gaps.append([])
                    wholes[-1].append(gaps[-1])
        for gap, ids in zip(gaps, self._encode_all(texts), strict=True):
            gap += ids
        return [[i for ids in whole for i in ids] for whole in wholes]

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text as an answer begins, after the assistant's header: no control token can arise."""
        return self._encode(self._lead + text, after=self._header_end)

    def encode_answer(self, text: str) -> list[int]:
        """A whole answer as the model should write it, up to and including end_id."""
        return self.encode_answers([text])[0]

    def encode_answers(self, texts: list[str]) -> list[list[int]]:
        """`encode_answer` of each, in one call of the tokenizer."""
        encoded = self._encode_all([(self._lead + text + self._trail, self._header_end) for text in texts])
        return [[*ids, self.end_id] for ids in encoded]

    # -- the template --------------------------------------------------------------------------------------

    def _render(self, roles: tuple[str, ...], header: bool) -> str:
        """The template's text with a sentinel for each content."""
        from jinja2 import TemplateError

        messages = [{"role": role, "content": SENTINEL.format(i)} for i, role in enumerate(roles)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=header, **TEMPLATE_OPTIONS
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise UserError(f"the chat template of {self.name} refuses the roles {', '.join(roles)}: {error}") from None
        sentinels = SENTINELS.findall(text)
        for i, role in enumerate(roles):
            if sentinels.count(str(i)) != 1:
                raise UserError(
                    f"the chat template of {self.name} rewrites, drops or repeats what the {role} says",
                    "set a plain chat_template in the model's folder",
                )
        return text

    def _control_tokens(self, rendered: str) -> dict[str, int]:
        """Text -> id of all tokens that the tokenizer calls special, and of added tokens that the template writes."""
        added = self.tokenizer.added_tokens_decoder
        written = set(self.tokenizer.encode(rendered, add_special_tokens=False))
        ids = {i for i, token in added.items() if token.special or i in written} | set(self.tokenizer.all_special_ids)
        names = {self.tokenizer.convert_ids_to_tokens(i): i for i in ids}
        return {name: i for name, i in names.items() if len(name) > 1}  # "!" as PAD is still an exclamation mark

    def _split(self, rendered: str) -> list[str]:
        """[text, control token, text, ..., text]."""
        patterns = []
        for name in sorted(self._controls, key=len, reverse=True):
            token = self.tokenizer.added_tokens_decoder.get(self._controls[name])
            # Phi-3's take the space beside them
            left, right = (token.lstrip, token.rstrip) if token else (False, False)
            patterns.append(r"\s*" * left + f"({re.escape(name)})" + r"\s*" * right)
        runs: list[str] = []
        end = 0  # of the run before
        for match in re.finditer("|".join(patterns), rendered) if patterns else ():
            runs += [rendered[end : match.start()], match[match.lastindex or 0]]
            end = match.end()
        return [*runs, rendered[end:]]

    # -- the tokenizer -------------------------------------------------------------------------------------

    def _raw(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _encode(self, text: str, after: str) -> list[int]:
        """Ids of plain text after "nothing", a "control" token, or other "text"."""
        return self._encode_all([(text, after)])[0]

    def _encode_all(self, texts: list[tuple[str, str]]) -> list[list[int]]:
        """The same for several (text, after what), in one call of the tokenizer."""
        if not texts:
            return []
        alone = [self._is_encoded_alone(after) for _, after in texts]
        given = [text if plain else ANCHORS[0] + text for (text, _), plain in zip(texts, alone, strict=True)]
        encoded = self.tokenizer(
            given, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        head = [] if all(alone) else self._raw(ANCHORS[0])
        for i, ((text, after), plain) in enumerate(zip(texts, alone, strict=True)):
            if not text:
                encoded[i] = []
            elif not plain:
                starts_alike = encoded[i][: len(head)] == head
                encoded[i] = encoded[i][len(head) :] if starts_alike else self._anchored(text)
                if encoded[i] is None:
                    raise UserError(f"the tokenizer {self.name} cannot encode a text in several calls")
            if self._control_ids.intersection(encoded[i]):
                encoded[i] = self._without_controls(text, after, encoded[i])
        return encoded

    def _without_controls(self, text: str, after: str, ids: list[int]) -> list[int]:
        """The ids of a text in which the tokenizer sees control tokens, as the plain text that it is."""
        stray = self._control_ids.intersection(ids)
        # `split_special_tokens` leaves added tokens alone that are not marked special, though the template may use
        # them: cut each after its first character and encode the parts separately.
        names = "|".join(map(re.escape, sorted(self._controls, key=len, reverse=True)))
        cuts = [match.start() + 1 for match in re.finditer(names, text)]
        if not cuts and stray == {self.tokenizer.unk_token_id}:
            return ids  # a character that the vocabulary lacks
        if not cuts:
            raise UserError(f"the tokenizer {self.name} makes control tokens out of plain text")
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return self._encode(parts[0], after) + [i for text in parts[1:] for i in self._encode(text, "text")]

    def _is_encoded_alone(self, after: str) -> bool:
        """SentencePiece-like tokenizers put a space before each text they are given: not wanted in mid-sentence."""
        return after == "nothing" or not self._adds_space or (after == "control" and self._adds_space_after_control)

    def _anchored(self, text: str) -> list[int] | None:
        """Ids of `text` after another text, whose own ids are cut off again; None where the two always merge."""
        for anchor in ANCHORS:
            head, ids = self._raw(anchor), self._raw(anchor + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return None

    @cached_property
    def _adds_space(self) -> bool:
        return self._anchored("x") != self._raw("x")

    @cached_property
    def _adds_space_after_control(self) -> bool:
        """Whether it does so after every control token too, not only where a text begins ("first")."""
        name = next(iter(self._controls))
        return self.tokenizer.encode(name + "x", add_special_tokens=False)[1:] == self._raw("x")

    def _check_round_trip(self) -> None:
        """Texts are carried as ids between the stages: a tokenizer that eats white space would change them."""
        head, ids = self._raw("\n"), self._anchored(ROUND_TRIP) or []
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        if self.tokenizer.decode(head + ids, **options) != self.tokenizer.decode(head, **options) + ROUND_TRIP:
            raise UserError(f"the tokenizer {self.name} does not give a text back as it was")


def _with_contents(run: str, messages: list[dict[str, str]]) -> str:
    """A run of a rendered template with the messages' contents in place of their sentinels."""
    return SENTINELS.sub(lambda match: messages[int(match[1])]["content"], run)
