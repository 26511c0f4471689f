"""Lists of messages in a cell of a table: read with all checks, or a fault that names the message and the way out."""

from typing import Any

from evolve_ray.data.read import text_of
from evolve_ray.store.turns import Message, Prompt, as_prompt

ROLES = ("system", "user", "assistant")
OTHER_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLE_ADVICE = {
    "developer": "write it as a system turn",
    "tool": "write the results of tools as text of the turns",
    "function": "write the results of tools as text of the turns",
}
# Keys of a message that change what a model sees; all others (names, ids, languages) are left alone.
UNREADABLE = {
    "tool_calls": "write the calls and their results as text of the turns",
    "function_call": "write the calls and their results as text of the turns",
    "thinking": "write it into the content, as the model writes it",
    "reasoning": "write it into the content, as the model writes it",
    "reasoning_content": "write it into the content, as the model writes it",
}


def is_messages(value: Any) -> bool:
    """Whether a cell is a list of messages. Parquet and `datasets` may also hold it as one dict of lists."""
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        return bool(value.keys() & {"role", "from"})
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool(value[0].keys() & {"role", "from"})


def read_messages(value: Any, where: str, faults: list[str]) -> list[Message] | None:
    """The messages of a cell, without a check of their order; None with a fault if one of them cannot be read."""
    if isinstance(value, dict):
        value = [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]
    messages: list[Message] = []
    for number, raw in enumerate(value, start=1):
        message = read_message(raw, f"{where}: message {number}", faults)
        if message is None:
            return None
        messages.append(message)
    return messages


def read_message(raw: Any, where: str, faults: list[str]) -> Message | None:
    """One message as role and content; `{"from", "value"}` is read too."""
    if not isinstance(raw, dict):
        faults.append(f"{where} is {type(raw).__name__}, but must have role and content")
        return None
    for key, advice in UNREADABLE.items():
        if raw.get(key):
            faults.append(f"{where} has {key!r}, which is not read; {advice}")
            return None
    role, content = raw.get("role"), raw.get("content")
    if role is None and "from" in raw:
        role, content = raw["from"], raw.get("value")
    role = OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        way_out = ROLE_ADVICE.get(str(role), "rename it")
        faults.append(f"{where} has role {role!r}, but must have one of {', '.join(ROLES)}; {way_out}")
        return None
    if isinstance(content, list):
        content = joined_parts(content, where, faults)
        if content is None:
            return None
    text = text_of({"content": content}, "content", where, faults, empty=role == "system")
    return None if text is None else {"role": role, "content": text}


def joined_parts(parts: list, where: str, faults: list[str]) -> str | None:
    """The text of a content in parts, if all of them are texts."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            faults.append(f"{where} has a part of type {kind!r}, but only text is read; use data without it")
            return None
        texts.append(part["text"])
    return "".join(texts)


def order_fault(messages: list[Message]) -> str:
    """What is wrong with the order of the turns; "" if nothing is."""
    spoken = messages[1:] if messages[0]["role"] == "system" else messages
    first = len(messages) - len(spoken) + 1  # the number of the first turn
    if not spoken:
        return "has a system prompt alone; add a user turn"
    for number, message in enumerate(spoken):
        role, expected = message["role"], ("user", "assistant")[number % 2]
        if role == "system":
            return f"has a system prompt as message {first + number}, but only the first can be one; write it as a user turn"
        if role != expected and number == 0:
            return "begins with an assistant turn; remove it, or add the user turn that it answers"
        if role != expected:
            return f"has two {role} turns in a row, messages {first + number - 1} and {first + number}; join them into one"
    return ""


def conversation(messages: list[Message], where: str, faults: list[str]) -> Prompt | None:
    """The prompt of messages whose turns are in order and end with a user turn; None with a fault for others."""
    fault = order_fault(messages) if messages else "has no turn before its last answer; add the user turn that it answers"
    if not fault and messages[-1]["role"] != "user":
        fault = "ends with an assistant turn, but a prompt ends with a user turn; remove the last turn"
    if fault:
        faults.append(f"{where} {fault}")
        return None
    return as_prompt(messages)
