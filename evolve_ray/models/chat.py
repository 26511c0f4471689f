"""Turns chat messages and responses into token ids. Generation, scoring and training all use this code.

A context is the rendered conversation up to the point where the assistant starts to speak. A response is the tokens of its text
alone, plus the end-of-turn token if it is finished. So context + response always begins with the context, and training splits
the tokens at the same place where the engine started to generate.
"""

import contextlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

from evolve_ray.errors import UserError, first_line
from evolve_ray.refine.asks import Messages


class Chat:
    """A tokenizer and its chat template, checked when it is loaded.

    `end_id` is the end-of-turn token, `stop_ids` are all tokens that end a response, `pad_id` is the padding token. `field` is
    the option that errors name. Raises UserError if the tokenizer or its template cannot be used.
    """

    def __init__(self, folder: str | Path, field: str = "model.path"):
        try:
            self.tokenizer: Any = tokenizer_class(Path(folder)).from_pretrained(str(folder), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{field}: {folder}: its tokenizer cannot be loaded: {first_line(error)}") from None
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{field}: {folder}: its tokenizer has no chat template; add chat_template.jinja to the folder "
                "or use an instruct model's tokenizer"
            )
        special_tokens = set(self.tokenizer.get_added_vocab()) | set(self.tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.end_id = self._end_of_turn(folder, field)
        eos_id = self.tokenizer.eos_token_id
        self.stop_ids = sorted({self.end_id, self.end_id if eos_id is None else eos_id})
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_id

    def _end_of_turn(self, folder: str | Path, field: str) -> int:
        """The token that the template writes after an assistant's text; the tokenizer's EOS token if it writes none."""
        user = {"role": "user", "content": "question"}
        try:
            context = self._render((user,), generate=True)
            conversation = self._render((user, {"role": "assistant", "content": "answer"}), generate=False)
            self._render((user, {"role": "assistant", "content": "answer"}, user), generate=True)
        except Exception as error:  # a template can raise any type
            raise UserError(f"{field}: {folder}: its chat template fails on user/assistant turns: {first_line(error)}") from None
        if not conversation.startswith(context + "answer"):
            raise UserError(
                f"{field}: {folder}: its chat template does not render prompt + answer as the prompt followed by the answer, "
                "so training and generation would differ; use a template without hidden text before the answer"
            )
        tail = self.tokenizer(conversation[len(context + "answer") :], add_special_tokens=False)["input_ids"]
        if tail and tail[0] in self.tokenizer.all_special_ids + list(self.tokenizer.added_tokens_decoder):
            return tail[0]
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{field}: {folder}: neither its chat template nor its tokenizer has an end token; set eos_token")
        return self.tokenizer.eos_token_id

    def _render(self, messages: Messages, *, generate: bool) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)

    def context_ids(self, messages: Messages, *, generate: bool = True) -> list[int]:
        """Token ids of a conversation; with `generate` it ends where the assistant starts to speak.

        Special tokens that are written inside a message are encoded as plain text.
        """
        if not any(self._special.search(message["content"]) for message in messages):
            return self.tokenizer(self._render(messages, generate=generate), add_special_tokens=False)["input_ids"]
        marks = [f"Q7x{number}MARKx7Q" for number in range(len(messages))]
        marked = tuple({**message, "content": mark} for message, mark in zip(messages, marks, strict=True))
        pieces = re.split(r"Q7x(\d+)MARKx7Q", self._render(marked, generate=generate))
        ids: list[int] = []
        for position, piece in enumerate(pieces):
            if position % 2:
                ids += self.text_ids(messages[int(piece)]["content"])
            elif piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text: special tokens in it are encoded as text, and none is added."""
        if not text:
            return []
        # Added tokens that are not marked as special are matched even with split_special_tokens, so cut them in two.
        cuts = [0, *(match.start() + 1 for match in self._special.finditer(text)), len(text)]
        pieces = [text[first:last] for first, last in itertools.pairwise(cuts) if first < last]
        return [
            token
            for piece in pieces
            for token in self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ]

    def response_ids(self, text: str, *, finished: bool) -> list[int]:
        """Token ids of a response, with the end token only if the response is finished: a cut response has none."""
        return self.text_ids(text) + ([self.end_id] if finished else [])


def tokenizer_class(folder: Path) -> Any:
    """AutoTokenizer, or the generic class if the folder names it: importing that one alone saves 8 s on a slow core."""
    import transformers

    with contextlib.suppress(OSError, ValueError):
        name = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
        if name in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer
