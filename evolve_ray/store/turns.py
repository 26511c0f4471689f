"""What a prompt is: a text, which is one user turn, or a conversation of several turns that ends with a user turn.

A conversation may begin with a system prompt. One user turn alone is always a text, so the same prompt has the same id in
whatever shape it was read.
"""

from collections.abc import Sequence
from typing import Any

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}
Messages = tuple[Message, ...]
Prompt = str | Messages


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def turns(prompt: Prompt) -> Messages:
    """The messages of a prompt."""
    return (user(prompt),) if isinstance(prompt, str) else prompt


def as_prompt(messages: Sequence[Message]) -> Prompt:
    """The prompt of messages that end with a user turn: a text if that is the only turn."""
    return messages[0]["content"] if len(messages) == 1 else tuple(messages)


def earlier_turns(prompt: Prompt) -> Messages:
    """The system prompt and the turns before the last user turn; none for a text."""
    return turns(prompt)[:-1]


def last_turn(prompt: Prompt) -> str:
    """The text of the last user turn."""
    return turns(prompt)[-1]["content"]


def has_system(prompt: Prompt) -> bool:
    return turns(prompt)[0]["role"] == "system"


def with_system(prompt: Prompt, content: str) -> Prompt:
    """The prompt with a system prompt if it has none; with empty `content` as it is."""
    return prompt if not content or has_system(prompt) else (system(content), *turns(prompt))


def as_text(prompt: Prompt) -> str:
    """A prompt for readers: a text as it is, a conversation with the role before each turn."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)


def are_messages(messages: Any) -> bool:
    """Whether a value is chat messages: at least one, each with the texts `role` and `content`."""
    if not isinstance(messages, tuple | list) or not messages:
        return False
    parts = [(message.get("role"), message.get("content")) for message in messages if isinstance(message, dict)]
    return len(parts) == len(messages) and all(isinstance(text, str) for part in parts for text in part)
