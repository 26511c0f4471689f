"""Finds pairs of responses that differ as texts, but not as tokens: a preference between them has no gradient."""

import unicodedata
from pathlib import Path

from evolve_ray.refine.rendering import Rendering


class SameTokens:
    """Says whether two responses are the same tokens. The tokenizer is loaded only when two texts are nearly equal."""

    def __init__(self, folder: Path, rendering: Rendering):
        self.folder, self.rendering = folder, rendering
        self.chat: object = None

    def __call__(self, one: dict, other: dict) -> bool:
        """`one` and `other` have `text`, `finished`, and `token_ids` if the engine's are known."""
        if bare(one["text"]) != bare(other["text"]):
            return False
        return self.ids(one) == self.ids(other)

    def ids(self, response: dict) -> list[int]:
        from evolve_ray.models.chat import Chat

        if response.get("token_ids") is not None:
            return list(response["token_ids"])
        if not isinstance(self.chat, Chat):
            self.chat = Chat(self.folder, rendering=self.rendering)
        return self.chat.response_ids(response["text"], finished=response["finished"])


def bare(text: str) -> str:
    """What is left of a text without that which tokenizers drop or change: accents, spaces, case, foreign letters."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if c.isascii() and not c.isspace()).casefold()
