"""Splits what a model wrote into its thinking and its answer.

Two forms are known. Tags: `<think> ... </think> answer`, as Qwen3 and DeepSeek-R1 write it; some templates open the tag
themselves. Channels, as gpt-oss writes them:
`<|channel|>analysis<|message|> ... <|end|><|start|>assistant<|channel|>final<|message|> answer`.
"""

from dataclasses import dataclass
from typing import Any

CHANNEL, MESSAGE, FINAL = "<|channel|>", "<|message|>", "final"
NO_ANSWER = "its thinking did not end, so it has no answer"


@dataclass(frozen=True)
class Parts:
    """A response in parts. `thinking` is None if there is none; the first `num_thinking` tokens are no part of the answer.

    `answer` is None if the response ended inside its thinking.
    """

    answer: str | None
    thinking: str | None = None
    num_thinking: int = 0


class Tags:
    """Thinking between two marks. `opened` says whether the template opens the thinking itself."""

    def __init__(self, tokenizer: Any, opening: str, closing: str, rendered: str):
        self.tokenizer, self.opening, self.closing = tokenizer, opening, closing
        self.opened = rendered.rfind(opening) > rendered.rfind(closing)

    def split(self, ids: list[int], text: str) -> Parts:
        whole = text if self.closing in text or self.opening in text else self.tokenizer.decode(ids)
        if self.closing not in whole:
            if self.opened or self.opening in whole:
                return Parts(None, text, len(ids))
            return Parts(text)
        num_thinking = self.end_of_thinking(ids)
        thinking = self.tokenizer.decode(ids[:num_thinking], skip_special_tokens=True)
        answer = text.rpartition(self.closing)[2] if self.closing in text else self.visible(ids[num_thinking:])
        return Parts(answer.lstrip("\n"), thinking, num_thinking)

    def end_of_thinking(self, ids: list[int]) -> int:
        """The number of tokens up to and with the last closing mark."""
        known = self.tokenizer.get_vocab().get(self.closing)
        if known in ids:
            return len(ids) - ids[::-1].index(known)
        # The mark is several tokens: the shortest beginning that holds as many marks as the whole.
        count = self.tokenizer.decode(ids).count(self.closing)
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if self.tokenizer.decode(ids[:middle]).count(self.closing) < count:
                low = middle + 1
            else:
                high = middle
        return low

    def visible(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class Channels:
    """Thinking in channels: the answer is the last message of the channel `final`."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.channel, self.message = (tokenizer.get_vocab()[token] for token in (CHANNEL, MESSAGE))

    def split(self, ids: list[int], text: str) -> Parts:
        if self.channel not in ids:
            return Parts(text)
        for start in reversed([position for position, token in enumerate(ids) if token == self.channel]):
            if self.message not in ids[start:]:
                continue
            begin = ids.index(self.message, start) + 1
            if self.tokenizer.decode(ids[start + 1 : begin - 1]).strip() == FINAL:
                answer = self.tokenizer.decode(ids[begin:], skip_special_tokens=True)
                thinking = self.tokenizer.decode(ids[:begin], skip_special_tokens=True) if start else None
                return Parts(answer, thinking, begin)
            break  # the last message is not the answer
        return Parts(None, text, len(ids))


def find_thinking(tokenizer: Any, style: str, opening: str, closing: str, rendered: str) -> Tags | Channels | None:
    """How the model thinks; None if it writes its answer alone. `rendered` is a conversation up to where it speaks."""
    vocabulary = tokenizer.get_vocab()
    if style == "channels" or (style == "auto" and CHANNEL in vocabulary and MESSAGE in vocabulary):
        return Channels(tokenizer)
    template = tokenizer.chat_template or ""
    if style == "tags" or (style == "auto" and (closing in vocabulary or closing in template)):
        return Tags(tokenizer, opening, closing, rendered)
    return None
