"""Chat messages to token ids and back: one place, used by generation, scoring and training alike.

A context is the rendered conversation up to where the assistant starts to speak; a response is the tokens of its text
alone, plus the end-of-turn token if it was finished. So a context is a prefix of context + response by construction, and
training sees the very split at which the engine generated.
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
    """A tokenizer and its chat template, checked once."""

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
        added = set(self.tokenizer.get_added_vocab()) | set(self.tokenizer.all_special_tokens)
        self._special = re.compile("|".join(map(re.escape, sorted(filter(None, added), key=len, reverse=True))) or r"(?!)")
        self.end_id = self._end_of_turn(folder, field)
        eos_id = self.tokenizer.eos_token_id
        self.stop_ids = sorted({self.end_id, self.end_id if eos_id is None else eos_id})
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_id

    def _end_of_turn(self, folder: str | Path, field: str) -> int:
        """The token that the template writes after an assistant's text; the tokenizer's EOS if it writes none."""
        user = {"role": "user", "content": "question"}
        try:
            context = self._render((user,), generate=True)
            whole = self._render((user, {"role": "assistant", "content": "answer"}), generate=False)
            self._render((user, {"role": "assistant", "content": "answer"}, user), generate=True)
        except Exception as error:  # jinja raises what the template raises
            raise UserError(f"{field}: {folder}: its chat template fails on user/assistant turns: {first_line(error)}") from None
        if not whole.startswith(context + "answer"):
            raise UserError(
                f"{field}: {folder}: its chat template does not render prompt + answer as the prompt followed by the answer, "
                "so training and generation would differ; use a template without hidden text before the answer"
            )
        tail = self.tokenizer(whole[len(context + "answer") :], add_special_tokens=False)["input_ids"]
        if tail and tail[0] in self.tokenizer.all_special_ids + list(self.tokenizer.added_tokens_decoder):
            return tail[0]
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{field}: {folder}: neither its chat template nor its tokenizer has an end token; set eos_token")
        return self.tokenizer.eos_token_id

    def _render(self, messages: Messages, *, generate: bool) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)

    def context_ids(self, messages: Messages, *, generate: bool = True) -> list[int]:
        """Token ids of a conversation, ready for the assistant to speak. Markup inside a message stays plain text."""
        if not any(self._special.search(message["content"]) for message in messages):
            return self.tokenizer(self._render(messages, generate=generate), add_special_tokens=False)["input_ids"]
        marks = [f"Q7x{number}MARKx7Q" for number in range(len(messages))]
        marked = tuple({**m, "content": mark} for m, mark in zip(messages, marks, strict=True))
        pieces = re.split(r"Q7x(\d+)MARKx7Q", self._render(marked, generate=generate))
        ids: list[int] = []
        for position, piece in enumerate(pieces):
            if position % 2:
                ids += self.text_ids(messages[int(piece)]["content"])
            elif piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text: no special token is read out of it, none is added."""
        if not text:
            return []
        # Some markup (added tokens not marked as special) is read even with split_special_tokens: cut it in two.
        cuts = [0, *(match.start() + 1 for match in self._special.finditer(text)), len(text)]
        pieces = [text[first:last] for first, last in itertools.pairwise(cuts) if first < last]
        return [
            token
            for piece in pieces
            for token in self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ]

    def response_ids(self, text: str, *, finished: bool) -> list[int]:
        """Token ids of a response; the end token only where the answer was finished, never invented for a cut one."""
        return self.text_ids(text) + ([self.end_id] if finished else [])


def tokenizer_class(folder: Path) -> Any:
    """AutoTokenizer, or at once the generic class where the folder names it: that import is 8 s quicker on a slow core."""
    import transformers

    with contextlib.suppress(OSError, ValueError):
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("tokenizer_class")
        if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer
