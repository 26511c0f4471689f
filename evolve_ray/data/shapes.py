"""What people's tables look like, as prompts and triples: found by the columns of each row, or a fault that names the way out.

A cell with a prompt is a text, or a list of messages: `{"role", "content"}` as in TRL, `{"from", "value"}` as in ShareGPT, or
`{"content"}` as in Arena-Hard. Of a conversation that ends with an answer, the prompt is what stands before that answer.
"""

from dataclasses import dataclass

from evolve_ray.data.messages import conversation, is_messages, read_messages
from evolve_ray.data.read import text_of
from evolve_ray.store.turns import Message, Prompt, has_system, turns, with_system

DEFAULT = "prompt"  # only if `prompt_column` has this default, another column may hold the prompt
# Columns that hold the prompt where there is no column `prompt`, in the order in which they are looked for.
INSTEAD = ("messages", "conversations", "conversation", "turns", "instruction")
# Columns that change how the messages of a row are rendered.
UNREADABLE_COLUMNS = {
    "tools": "write what the tools do into a system prompt",
    "images": "use data without images",
    "image": "use data without images",
    "chat_template_kwargs": "remove it: what a template is given holds for a whole run",
}
Faults = list[str]


@dataclass
class Shape:
    """What a table was taken for, counted while it is read."""

    column: str = ""
    num_texts: int = 0
    num_conversations: int = 0
    fewest: int = 0
    most: int = 0
    num_systems: int = 0
    num_systems_added: int = 0
    num_answered: int = 0  # conversations whose last answer is not part of the prompt

    def count(self, prompt: Prompt) -> None:
        """Adds a prompt."""
        number = sum(message["role"] != "system" for message in turns(prompt))
        if isinstance(prompt, str):
            self.num_texts += 1
        else:
            self.num_conversations += 1
            self.fewest = min(self.fewest or number, number)
            self.most = max(self.most, number)
            self.num_systems += has_system(prompt)

    def __str__(self) -> str:
        """One line, for example `conversations of 1-5 turns from column 'messages', 212 with a system prompt`."""
        lengths = f"{self.fewest}" if self.fewest == self.most else f"{self.fewest}-{self.most}"
        conversations = f"conversations of {lengths} turn{'s' if self.most > 1 else ''}"
        both = self.num_texts and self.num_conversations
        kinds = [f"{self.num_texts:,} texts" if both else "texts"] if self.num_texts else []
        kinds += [f"{self.num_conversations:,} {conversations}" if both else conversations] if self.num_conversations else []
        notes = [f"{' and '.join(kinds) or 'no rows'} from column {self.column!r}"]
        if self.num_systems:
            added = f" ({self.num_systems_added:,} of them from prompts.system)" if self.num_systems_added else ""
            notes.append(f"{self.num_systems:,} with a system prompt{added}")
        if self.num_answered:
            notes.append(f"the last answers of {self.num_answered:,} are not used")
        return ", ".join(notes)


def read_prompt(record: dict, column: str, where: str, faults: Faults, shape: Shape, *, system: str = "") -> Prompt | None:
    """The prompt of a row, with the `system` prompt if it has none; appends a fault and returns None if there is none."""
    prompt: Prompt | None
    source = prompt_column(record, column)
    if source == "chosen":
        triple = read_triple(record, DEFAULT, "chosen", "rejected", where, faults, shape)
        if triple is None:
            return None
        prompt, shape.num_answered = triple[0], shape.num_answered + 1
    elif source is None:
        faults.append(f"{where}: {without_prompt(record, column)}")
        return None
    else:
        prompt = read_cell(record, source, where, faults, shape)
        shape.column = shape.column or source
        if prompt is None:
            return None
    return counted(prompt, system, shape)


def counted(prompt: Prompt, system: str, shape: Shape) -> Prompt:
    """The prompt with the `system` prompt if it has none, counted in `shape`."""
    complete = with_system(prompt, system)
    shape.num_systems_added += complete is not prompt
    shape.count(complete)
    return complete


def prompt_column(record: dict, column: str) -> str | None:
    """The column that holds the prompt of a row: `column`, or a known one instead of the default; None if there is none.

    "chosen" means that the prompt is what `chosen` and `rejected` have in common.
    """
    if column in record:
        return "chosen" if column == "chosen" and is_messages(record["chosen"]) and "rejected" in record else column
    if column != DEFAULT:
        return None
    name = next((name for name in INSTEAD if name in record), None)
    if name is None and is_messages(record.get("chosen")) and "rejected" in record:
        return "chosen"
    return name


def read_cell(record: dict, column: str, where: str, faults: Faults, shape: Shape) -> Prompt | None:
    """The prompt in a cell: a text, or a conversation, without its last answer if it ends with one."""
    value = record[column]
    where_column = f"{where}: column {column!r}"
    if is_messages(value):
        messages = None if unreadable_column(record, where, faults) else read_messages(value, where_column, faults)
        if messages is None:
            return None
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
            shape.num_answered += 1
        return conversation(messages, where_column, faults)
    if column == "turns" and isinstance(value, list) and value:
        return read_turns(value, where_column, faults)
    if isinstance(value, list | dict):
        faults.append(
            f"{where_column} is {type(value).__name__}, but must be a string or a list of messages with role and content"
        )
        return None
    text = text_of(record, column, where, faults)
    if text is None or column != "instruction" or not record.get("input"):
        return text
    more = text_of(record, "input", where, faults)  # Alpaca: what the instruction is about
    return None if more is None else f"{text}\n\n{more}"


def read_turns(value: list, where: str, faults: Faults) -> Prompt | None:
    """The prompt of user turns without roles: of one turn, as in Arena-Hard; more turns need the answers between them."""
    if len(value) > 1:
        faults.append(
            f"{where} has {len(value)} user turns without the answers between them; use the first turn as the prompt, or write "
            "whole conversations as messages with role and content"
        )
        return None
    (turn,) = value
    return text_of({"content": turn.get("content") if isinstance(turn, dict) else turn}, "content", where, faults)


def read_triple(
    record: dict, prompt_name: str, chosen_name: str, rejected_name: str, where: str, faults: Faults, shape: Shape
) -> tuple[Prompt, str, str] | None:
    """(prompt, chosen, rejected) of a row; appends a fault and returns None if it holds no triple.

    The answers are texts or conversations. A conversation may hold the answer alone, what follows the prompt, or all turns: then
    its turns before the last answer are the prompt, and a text in the prompt's column must be one of its user turns.
    """
    answers, before = {}, {}
    for name in (chosen_name, rejected_name):
        if name not in record:
            faults.append(f"{where}: {without_answer(record, name)}")
            return None
        part = read_answer(record, name, where, faults)
        if part is None:
            return None
        before[name], answers[name] = part
    first, second = before[chosen_name], before[rejected_name]
    if first != second:
        number = next((n for n, pair in enumerate(zip(first, second, strict=False), start=1) if pair[0] != pair[1]), None)
        number = number or min(len(first), len(second)) + 1
        faults.append(
            f"{where}: columns {chosen_name!r} and {rejected_name!r} differ before their last answers, from message {number} on; "
            "a pair must answer the same conversation: cut both after their first difference"
        )
        return None
    prompt = whole_prompt(record, prompt_name, first, chosen_name, where, faults, shape)
    return None if prompt is None else (prompt, answers[chosen_name], answers[rejected_name])


def read_answer(record: dict, column: str, where: str, faults: Faults) -> tuple[list[Message], str] | None:
    """(the turns before the answer, the answer) of a cell with a text or a conversation."""
    value = record[column]
    if not is_messages(value):
        text = text_of(record, column, where, faults)
        return None if text is None else ([], text)
    unreadable = unreadable_column(record, where, faults)
    messages = None if unreadable else read_messages(value, f"{where}: column {column!r}", faults)
    if messages is None:
        return None
    if messages[-1]["role"] != "assistant":
        faults.append(f"{where}: column {column!r} ends with a {messages[-1]['role']} turn, but must end with the answer")
        return None
    return messages[:-1], messages[-1]["content"]


def whole_prompt(
    record: dict, column: str, before: list[Message], chosen_name: str, where: str, faults: Faults, shape: Shape
) -> Prompt | None:
    """The prompt of a triple from its own column and from the turns `before` the answers."""
    own: Prompt | None = None
    if column in record:
        own = read_cell(record, column, where, faults, Shape())
        if own is None:
            return None
    elif column != DEFAULT or not before:
        faults.append(f"{where}: {without_prompt(record, column)}")
        return None
    shape.column = shape.column or (chosen_name if own is None else column)
    if own is not None and not before:
        return own
    if own is not None and before[0]["role"] == "assistant":  # the answer goes on after the prompt
        before = [*turns(own), *before]
    elif own is not None and not agrees(own, before):
        faults.append(
            f"{where}: the conversation in column {chosen_name!r} does not hold the prompt in column {column!r}; correct one of "
            "them, or name the right column as prompt_column"
        )
        return None
    return conversation(before, f"{where}: column {chosen_name!r}", faults)


def agrees(own: Prompt, before: list[Message]) -> bool:
    """Whether a prompt is that of a conversation: the same turns, or a text that is one of its user turns."""
    if isinstance(own, str):
        return any(message["role"] == "user" and message["content"].strip() == own.strip() for message in before)
    return list(own) == before


def unreadable_column(record: dict, where: str, faults: Faults) -> bool:
    """Appends a fault if a column of the row would change how it is rendered."""
    for column, advice in UNREADABLE_COLUMNS.items():
        if record.get(column):
            faults.append(f"{where}: column {column!r} is not read; {advice}")
            return True
    return False


def without_prompt(record: dict, column: str) -> str:
    """The fault of a row that lacks the column of its prompt, with the conversion of its shape, if that is a known one."""
    said = f"has no column {column!r}; its columns are: {', '.join(map(str, record)) or 'none'}"
    if {"chosen", "rejected"} <= record.keys():
        return f"{said}; texts that hold prompt and answer must be split: trl.extract_prompt makes the column"
    return f"{said}; a whole text must be split into prompt and answer" if "text" in record else said


def without_answer(record: dict, column: str) -> str:
    """The fault of a row that lacks one of its two answers, with the conversion of its shape, if that is a known one."""
    said = f"has no column {column!r}; its columns are: {', '.join(map(str, record)) or 'none'}"
    has = record.keys()
    if {"completion", "label"} <= has:
        return (
            f"{said}; an unpaired row has one answer: join a prompt's answers with label true and false into chosen and rejected"
        )
    if {"completions", "labels"} <= has:
        return f"{said}; labelled steps are no answers: write a better and a worse whole answer into chosen and rejected"
    if has & {"completion", "messages", "conversations", "output", "text"}:
        return f"{said}; the row has one answer, but a triple needs a better and a worse one: let a model write the worse"
    return said
