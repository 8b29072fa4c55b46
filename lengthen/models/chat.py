"""Prompts: the templates in prompts/, and one way to turn messages into token ids for every stage.

What a user or a model wrote never becomes a control token. The tokenizer's own chat template is rendered with unique
sentinels in place of the contents and split at its control tokens; only then do the contents go in, and the text
between two control tokens is encoded without any (`<|im_end|>` in a prompt stays ten characters of text). A prefilled
answer is encoded after the assistant header and never sees the template: one that trims would eat its trailing blank
line. Nor are contents trimmed: they go in as they are. No torch here.

Models that think first are asked for the answer alone: templates have switches for it, and a thought that a template
opens in front of the answer is closed at once, in every prompt and in training alike.
"""

import json
import re
from collections.abc import Iterable
from datetime import datetime
from functools import cache, cached_property
from string import Formatter
from typing import TYPE_CHECKING, Any

from lengthen.records import UserError, hash_of
from lengthen.text import languages
from lengthen.text.thoughts import closing_of, is_opening, open_thought, without_thought

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---------------------------------------------------------------------------------------------------------
# prompts/LANGUAGE/NAME.md

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
    """The text of prompts/LANGUAGE/NAME.md, a str.format template whose fields are checked; no newline at its end."""
    path = languages.PROMPTS / language / f"{name}.md"
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


def template_hashes(asked: str, *names: str) -> dict[str, str]:
    """NAME.LANGUAGE.md -> 16 hex digits of its sha256, in the languages asked for: for a stage's settings."""
    texts = {f"{name}.{code}.md": template(name, code) for name in names for code in languages.chosen(asked)}
    return {file: hash_of(text) for file, text in texts.items()}


# ---------------------------------------------------------------------------------------------------------
# Messages -> ids

SENTINEL = "Qz{}kVx"  # mixed case and digits: a template that changes case, or drops or doubles contents, is noticed
SENTINELS = re.compile(SENTINEL.format(r"(\d+)"))
# Variables that templates ask for. No thinking: a prefilled answer cannot follow an unfinished thought.
TEMPLATE_OPTIONS = {"enable_thinking": False, "thinking": False, "reasoning": False, "thinking_budget": 0}
# What templates that print today's date are told: one day for all stages and runs, or a resumed run would go on with
# other prompts, and a training would show others than were asked. It is the one that Llama 3's prints without a clock.
TODAY = datetime(2024, 7, 26)
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
ANCHORS = ("\n", "a", "0")  # put before a text that must not be encoded as the first, and its ids cut off again
ROUND_TRIP = "Two  spaces,\n\n\ta tab - and 12.5 things."


class Chat:
    """Renders conversations for one tokenizer; see the module's docstring.

    eos_ids: ids that end an answer (the tokenizer's, `extra_eos` of the model's generation config, and end_id).
    end_id: what the template itself puts after an answer of the assistant. notes: lines for people.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", extra_eos: Iterable[int] = ()):
        self.tokenizer: Any = tokenizer
        self.name = tokenizer.name_or_path
        self.notes: list[str] = []
        self.date = ""  # what a template prints as today's
        self._runs: dict[tuple[str, ...], list[str]] = {}
        self._answer_header = ""  # what an answer has in front of it besides the generation prompt
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {self.name} has no chat template", "take the instruct or chat version of the model"
            )
        self._template = self._dated(tokenizer.get_chat_template())
        whole = self._render(("user", "assistant"), False)
        around = whole.split(SENTINEL.format(1))[0]
        header = self._close_thought(self._render(("user",), True), around)
        self._controls = self._control_tokens(header + whole)
        self._control_ids = set(self._controls.values())
        self._check_round_trip()
        self._header_end = "control" if self._split(header)[-1] == "" else "text"

        # Llama-2 writes " answer </s>" where its header ends without the space: what stands around an answer is kept.
        answer = self._split(whole.split(SENTINEL.format(1))[1])
        lead = around.removeprefix(header)
        self._lead = lead if lead.isspace() else ""
        extra_eos, own = set(extra_eos), tokenizer.eos_token_id
        # The generation config may know ends that the tokenizer does not.
        ends = [own] if own is not None else sorted(extra_eos)
        self._trail, end = (answer[0], self._controls[answer[1]]) if len(answer) > 1 else ("", (ends or [None])[0])
        if end is None:
            raise UserError(
                f"nothing ends an answer: the template of {self.name} writes no EOS, its tokenizer has none",
                "set eos_token in its tokenizer_config.json, or eos_token_id in its generation_config.json",
            )
        self.end_id: int = end
        self.eos_ids = {self.end_id, *extra_eos} | ({own} - {None})
        # Tokens that a decoded text does not show, and those of them that begin a thought.
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special.update(tokenizer.all_special_ids)
        self._hidden = {name: i for name, i in self._controls.items() if i in special}
        self._opens_hidden = {i for name, i in self._hidden.items() if is_opening(name)}

    @cached_property
    def hash(self) -> str:
        """16 hex digits over vocabulary, merges and chat template: what the ids of a text depend on."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        template = f"{self.tokenizer.chat_template}{self._answer_header}{self.date}"
        return hash_of(rules, template)

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
                self._runs[roles] = self._split(self._render(roles, True) + self._answer_header)
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

    def answer_of(self, text: str, token_ids: list[int], finish: str, stop: Iterable[str] = ()) -> tuple[str, str]:
        """(text, finish) of a drawn text without the thoughts in front of it; "length" where one has no end.

        `token_ids` and `stop`, its stop strings, count where the tags of a thought are tokens that no text shows.
        """
        shown = text
        if self._opens_hidden.intersection(token_ids):
            ids = token_ids[: len(token_ids) - (finish == "eos")]
            shown = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        answer, ended = without_thought(shown)
        if shown is not text:
            for name in self._hidden:
                answer = answer.replace(name, "")
            for end in stop:
                answer = answer.split(end)[0]
        return (answer, finish) if ended and (answer or not text) else ("", finish if finish == "error" else "length")

    # -- the template --------------------------------------------------------------------------------------

    def _close_thought(self, header: str, around: str) -> str:
        """The generation prompt, with what must follow it so that an answer does; kept in `_answer_header`.

        around: what the template writes in front of an answer of a finished conversation.
        """
        more = around.removeprefix(header) if around.startswith(header) else ""
        if more.strip():  # gpt-oss' final channel; the end of the thought that Qwen3's opens
            self._answer_header = more
        opening = open_thought((header + self._answer_header).rpartition(SENTINEL.format(0))[2])
        if opening and not (closing := closing_of(opening)):
            raise UserError(
                f"the chat template of {self.name} opens a thought, {opening}, and nothing is known to end it",
                "set a chat_template without it in the model's folder, or take the model without thoughts",
            )
        if opening:
            # As models are trained to skip it: <think>, an empty line, </think>, an empty line; control tokens alone.
            gap = "" if "|" in opening or opening.startswith("[") else "\n"
            self._answer_header += gap * (2 - header.endswith("\n")) + closing + 2 * gap
        if self._answer_header:
            self.notes.append(
                f"chat template: the prompt ends in {self._answer_header!r}, so that no thought is written"
            )
        return header + self._answer_header

    def _render(self, roles: tuple[str, ...], header: bool) -> str:
        """The template's text with a sentinel for each content."""
        from jinja2 import TemplateError

        messages = [{"role": role, "content": SENTINEL.format(i)} for i, role in enumerate(roles)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=header, chat_template=self._template, **TEMPLATE_OPTIONS
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

    def _dated(self, template: str) -> str:
        """The template with a date in place of each call of the clock."""
        dated = CLOCK.sub(lambda match: json.dumps(TODAY.strftime(match[2])), template)
        if "strftime_now(" in dated:
            raise UserError(
                f"the chat template of {self.name} prints the date in a way that is not known",
                "set a chat_template without strftime_now in the model's folder",
            )
        if dated != template:
            self.date = f"{TODAY:%Y-%m-%d}"
            self.notes.append(f"chat template: it prints the date, which is {self.date} in all stages and runs")
        return dated

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
