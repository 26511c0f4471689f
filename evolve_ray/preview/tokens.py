"""Token ids as text that shows every token, the special ones too."""

from typing import Any


def decode(chat: Any, ids: list[int]) -> str:
    """The text of token ids, with special tokens as their names."""
    return chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def shown(chat: Any, ids: list[int]) -> dict[str, Any]:
    """`text`, `ids`, `pieces` (the text of each token alone) and `special` (the places of special tokens) of some tokens."""
    markup = set(chat.tokenizer.all_special_ids) | set(chat.tokenizer.added_tokens_decoder)
    return {
        "num_tokens": len(ids),
        "text": decode(chat, ids),
        "ids": list(ids),
        "pieces": [decode(chat, [token]) for token in ids],
        "special": [place for place, token in enumerate(ids) if token in markup],
    }
