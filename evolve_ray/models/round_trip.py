"""Checks that a tokenizer gives back the texts that it encodes. One that loses spaces or letters would spoil every answer."""

import string

from evolve_ray.models.chat import Chat

TEXTS = {
    "code": 'def total(rows):\n    """Sum."""\n    return {"n": [1, 2], \'s\': sum(rows)}  # ok\n',
    "indentation": "if x:\n        y = (a+b) * 2\n  - item\n      - item",
    "blank lines": "one\n\ntwo\n\n\nthree",
    "spaces": "The answer  is   42 , and then ...  so !",
    "numbers": "3.14159 1,000,000 007 1e-9 50% $5 #1",
    "tabs": "a\tb\t\tc",
    "accents": "na\u00efve \u00dcber \u0142\u00f3d\u017a",
    "emoji": "ok \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "Chinese, Japanese and Korean": "\u6f22\u5b57 \u304b\u306a \ud55c\uad6d\uc5b4",
    "right-to-left text": "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "mathematics": "\u2200x \u2208 \u211d: x\u00b2 \u2265 0, \u221ax \u2260 \u2212\u03c0",
}
BASIC = set(string.ascii_letters + string.digits + string.punctuation + " \n")


def round_trip(chat: Chat, where: str) -> tuple[list[str], list[str]]:
    """(faults, notes): a fault for a text that comes back changed, a note for kinds of characters without any token."""
    lost = {character for text in TEXTS.values() for character in text if back(chat, f"a{character}b") != f"a{character}b"}
    lost_basic = sorted(lost & BASIC)
    if lost_basic:
        example = f"a{lost_basic[0]}b"
        return [
            f"{where}: its tokenizer loses {', '.join(map(repr, lost_basic[:5]))}: {example!r} becomes {back(chat, example)!r}; "
            "use the tokenizer that the model was trained with, in a version that this transformers can read"
        ], []
    faults = []
    for kind, text in TEXTS.items():
        kept = "".join(character for character in text if character not in lost)
        if back(chat, kept) != kept:
            faults.append(
                f"{where}: its tokenizer changes {kind}: {kept!r} becomes {back(chat, kept)!r}; use the tokenizer that the model "
                "was trained with, in a version that this transformers can read"
            )
    kinds = [kind for kind, text in TEXTS.items() if lost & set(text)]
    return faults[:1], [f"no tokens for {', '.join(kinds)}"] if kinds else []


def back(chat: Chat, text: str) -> str:
    """The text that the engine would show for the tokens of a text."""
    return chat.tokenizer.decode(chat.text_ids(text), skip_special_tokens=True, clean_up_tokenization_spaces=False)
