"""Turns chat messages and responses into token ids. Generation, scoring and training all use this code.

A context is the rendered conversation up to the point where the assistant starts to speak. A response is what the engine then
wrote, token by token, hidden text included; if only its text is known, it is the tokens of the text plus the end token if it is
finished. So context + response always begins with the context, and training splits the tokens where the engine started to
generate. Only the drafts inside a conversation go through the template's own rules.
"""

import contextlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

from evolve_ray.errors import UserError, first_line
from evolve_ray.models.thinking import Parts, find_thinking
from evolve_ray.refine.asks import Messages
from evolve_ray.refine.rendering import Rendering

ANSWER = "q7xanswerx7q"  # stands for an answer while the template is read
BROKEN = "\N{REPLACEMENT CHARACTER}"


class Chat:
    """A tokenizer and its chat template, checked when it is loaded.

    `end_id` is the end-of-turn token, `stop_ids` are all tokens that end a response, `pad_id` is the padding token. `field` is
    the option that errors name. Raises UserError if the tokenizer or its template cannot be used.
    """

    def __init__(self, folder: str | Path, field: str = "model.path", rendering: Rendering | None = None):
        self.rendering = rendering or Rendering()
        try:
            self.tokenizer: Any = tokenizer_class(Path(folder)).from_pretrained(str(folder), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{field}: {folder}: its tokenizer cannot be loaded: {first_line(error)}") from None
        if self.rendering.chat_template:
            self.tokenizer.chat_template = self.rendering.chat_template
        if not self.tokenizer.chat_template:
            way_out = "set model.chat_template" if field.startswith("model.") else "add chat_template.jinja to the folder"
            raise UserError(
                f"{field}: {folder}: its tokenizer has no chat template; {way_out} or use an instruct model's tokenizer"
            )
        self.arguments = self.rendering.template_arguments()
        options = self.rendering.thinking
        marks = self.marks()
        self._others, self._own = occurrences(marks), occurrences(marks - {options.open, options.close})
        self._single = {mark for mark in marks if len(mark) == 1}
        self.end_id, context = self.read_template(folder, field)
        eos_id = self.tokenizer.eos_token_id
        self.stop_ids = sorted({self.end_id, self.end_id if eos_id is None else eos_id})
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_id
        self.thinking = find_thinking(self.tokenizer, options.style, options.open, options.close, context)

    def marks(self) -> set[str]:
        """The tokens that no text may contain: special ones, and those that the template writes.

        Other added tokens (a blank line, an indentation) are ordinary text. In the texts of an assistant the marks of thinking
        are ordinary too.
        """
        template = str(self.tokenizer.chat_template)
        marks = {str(token) for token in self.tokenizer.all_special_tokens}
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special or (token.content.strip() and token.content in template):
                marks.add(token.content)
        return marks - {""}

    def read_template(self, folder: str | Path, field: str) -> tuple[int, str]:
        """(the token that ends an assistant's text, a conversation up to where the assistant speaks).

        The end is the first special token that the template writes after the text, or the tokenizer's EOS token if there is none.
        """
        user, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}
        try:
            context = self._render((user,), generate=True)
            conversation = self._render((user, answer), generate=False)
            self._render((user, answer, user), generate=True)
        except Exception as error:  # a template can raise any type
            raise UserError(f"{field}: {folder}: its chat template fails on user/assistant turns: {first_line(error)}") from None
        if "question" not in context or ANSWER not in conversation:
            lost = "user's" if "question" not in context else "assistant's"
            raise UserError(f"{field}: {folder}: its chat template leaves out the {lost} text; use another template")
        tail = conversation.rpartition(ANSWER)[2]
        added = {token.content: number for number, token in self.tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(filter(str.strip, added), key=len, reverse=True)
        end = re.search("|".join(map(re.escape, longest_first)) or r"(?!)", tail)
        if end and tail[: end.start()].strip():
            raise UserError(
                f"{field}: {folder}: its chat template writes {tail[: end.start()].strip()!r} between an answer and its end "
                f"token {end[0]}, which an engine would not; use a template that ends an answer with its end token"
            )
        if end:
            return added[end[0]], context
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{field}: {folder}: neither its chat template nor its tokenizer has an end token; set eos_token")
        return self.tokenizer.eos_token_id, context

    def _render(self, messages: Messages, *, generate: bool) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generate, **self.arguments
        )

    def context_ids(self, messages: Messages, *, generate: bool = True) -> list[int]:
        """Token ids of a conversation; with `generate` it ends where the assistant starts to speak.

        Special tokens that are written inside a message are encoded as plain text: a character of no meaning cuts them in two
        while the template renders the conversation by its own rules.
        """
        contents = [message["content"] for message in messages]
        marks = [self._own if message["role"] == "assistant" else self._others for message in messages]
        if not any(mark.search(content) for mark, content in zip(marks, contents, strict=True)):
            return self.tokenizer(self._render(messages, generate=generate), add_special_tokens=False)["input_ids"]
        knife = next(chr(code) for code in range(0xE000, 0xF8FF) if not any(chr(code) in content for content in contents))
        cut = tuple(
            {**message, "content": knife.join(self.pieces(message["content"], mark))}
            for message, mark in zip(messages, marks, strict=True)
        )
        return [token for piece in self._render(cut, generate=generate).split(knife) for token in self.piece_ids(piece)]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text: special tokens in it are encoded as text, and none is added."""
        return [token for piece in self.pieces(text, self._own) for token in self.piece_ids(piece, split=True)]

    def pieces(self, text: str, marks: re.Pattern) -> list[str]:
        """The text in pieces that hold no mark: each is cut after its first character."""
        cuts = {0, len(text)}
        for match in marks.finditer(text):
            cuts |= {match.start(), match.start() + 1} if text[match.start()] in self._single else {match.start() + 1}
        return [text[first:last] for first, last in itertools.pairwise(sorted(cuts))]

    def piece_ids(self, piece: str, *, split: bool = False) -> list[int]:
        if not piece:
            return []
        split = split or piece in self._single
        return self.tokenizer(piece, add_special_tokens=False, split_special_tokens=split)["input_ids"]

    def response_ids(self, text: str, *, finished: bool) -> list[int]:
        """Token ids of a response, with the end token only if the response is finished: a cut response has none."""
        return self.text_ids(text) + ([self.end_id] if finished else [])

    def parts(self, ids: list[int], text: str) -> Parts:
        """The thinking and the answer of a response; `text` is what the engine shows for its token ids."""
        return self.thinking.split(ids, text) if self.thinking else Parts(text)

    def fault(self, ids: list[int], text: str) -> str:
        """Why a response must not be learned: a token without a text, or a part of a character; "" if it may be."""
        beyond = [token for token in ids if token >= len(self.tokenizer)]
        if beyond:
            return f"has token {beyond[0]}, which the tokenizer does not have"
        return "has a part of a character" if BROKEN in text else ""


def occurrences(marks: set[str]) -> re.Pattern:
    """A pattern that finds every place where one of the marks begins, also inside another one."""
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile(f"(?={'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")


def tokenizer_class(folder: Path) -> Any:
    """AutoTokenizer, or the generic class if the folder names it: importing that one alone saves 8 s on a slow core."""
    import transformers

    with contextlib.suppress(OSError, ValueError):
        name = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
        if name in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer
