"""Log-probabilities of rows of turns: equal to separate forwards of the same messages, in rows and in trees."""

import dataclasses

import pyarrow as pa
import pytest
import torch

from evolve_ray.refine.template import Template
from evolve_ray.select.pairs import make_pair, make_turn
from evolve_ray.store import rows
from evolve_ray.train.logprobs import TreeModel, num_chunks, pair_sequences, sequence_logps, tree_logps
from evolve_ray.train.tree import pack

CPU = torch.device("cpu")
SIX = tuple(rows.REFERENCE.names[1:])
TEMPLATE = Template(layout="conversation", first="Q {prompt}", refine="fix", one_message="fix {prompt} {draft}", critique="check")
PROMPT = {"prompt_id": "p", "prompt": "sort:bca"}
ASKED = TEMPLATE.critical("sort:bca", "bac")


def draft(name, text, messages, **more):
    return {"draft_id": name, "round": 2, "text": text, "finish_reason": "stop", "kind": "critique", "messages": messages} | more


CHOSEN, REJECTED = draft("a", "b first", ASKED), draft("b", "c is last", ASKED, finish_reason="length")
REVISED = draft("c", "abc", (*ASKED, {"role": "assistant", "content": "b first"}, {"role": "user", "content": "mend"}))
OWN_TOKENS = draft("d", "ab", ASKED[:1], token_ids=[40, 41, 42, 3], num_thinking_tokens=2)
ROW = make_turn(PROMPT, CHOSEN, rejected=REJECTED, turns={"revised": REVISED, "own": OWN_TOKENS, "none": None})
NAMES = (*SIX, "revised", "own", "none")


def stored(row, tmp_path):
    """The row as a training reads it from its table."""
    schema = pa.schema([*rows.PAIR, *rows.TURN_DETAILS])
    rows.write_table(tmp_path / "pairs.parquet", rows.to_table([row], schema), schema)
    return rows.read_table(tmp_path / "pairs.parquet")[0]


def by_hand(model, chat, messages, ids):
    """log p of the tokens after the rendered messages, one forward in float64."""
    context = chat.tokenizer(chat.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True),
                             add_special_tokens=False)["input_ids"]  # fmt: skip
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + list(ids)])).logits[0].double()
    logps = torch.log_softmax(logits, dim=1)
    return sum(logps[len(context) - 1 + place, token].item() for place, token in enumerate(ids))


def expected(model, chat):
    response = {"chosen": chat.response_ids("b first", finished=True), "rejected": chat.response_ids("c is last", finished=False)}
    text = {"chosen": "b first", "rejected": "c is last"}
    values = {}
    for name in SIX:
        side, _, before = name.partition("_after_")
        more = ({"role": "assistant", "content": text[before]}, {"role": "user", "content": "fix"}) if before else ()
        values[name] = by_hand(model, chat, (*ASKED, *more), response[side])
    revised = by_hand(model, chat, REVISED["messages"], chat.response_ids("abc", finished=True))
    return values | {"revised": revised, "own": by_hand(model, chat, ASKED[:1], [40, 41, 42, 3]), "none": 0.0}


def test_separate_rows_equal_forwards_of_the_same_messages(model, chat, tmp_path):
    sequences = pair_sequences(chat, TEMPLATE, stored(ROW, tmp_path), NAMES)
    assert tuple(sequences) == NAMES
    with torch.no_grad():
        found = sequence_logps(model, list(sequences.values()), chat.pad_id, CPU)
    values = expected(model, chat)
    assert dict(zip(NAMES, found.tolist(), strict=True)) == pytest.approx(values, abs=2e-5)
    assert len({round(value, 3) for value in values.values()}) == len(NAMES)


def test_trees_equal_forwards_of_the_same_messages(model, chat, tmp_path):
    """Three rows of one prompt share their trunk; the columns of turns change nothing for a row without them."""
    plain = stored(make_pair(PROMPT, draft("e", "abc", None, kind="answer"), draft("f", "bac", None, kind="answer")), tmp_path)
    groups = [list(pair_sequences(chat, TEMPLATE, stored(ROW, tmp_path), NAMES).values())]
    groups += [list(pair_sequences(chat, TEMPLATE, plain, SIX).values()), groups[0][::-1]]
    forwards = pack(groups, keys=["p"] * 3, max_tokens=4096, max_groups=3)
    (forward,) = forwards
    with torch.no_grad():
        found = tree_logps(TreeModel(model), forward, CPU, num_chunks(forward)).tolist()
    flat = [sequence for group in forward.groups for sequence in groups[group]]
    with torch.no_grad():
        alone = [sequence_logps(model, [sequence], chat.pad_id, CPU).item() for sequence in flat]
    assert found == pytest.approx(alone, abs=2e-5)
    assert forward.num_tokens < sum(len(s.context) + len(s.response) for s in flat) / 2


def test_a_row_without_turns_has_the_sequences_that_it_had(chat, tmp_path):
    pair = make_pair(PROMPT, draft("e", "abc", None, kind="answer"), draft("f", "bac", None, kind="answer"))
    assert pair_sequences(chat, TEMPLATE, stored(pair, tmp_path), SIX) == pair_sequences(chat, TEMPLATE, pair, SIX)
    before = pair_sequences(chat, TEMPLATE, pair, SIX)
    assert before["chosen"].context == tuple(chat.context_ids(TEMPLATE.direct("sort:bca")))


def test_thinking_in_a_further_turn_is_context_where_answers_alone_are_trained(chat):
    thinking = dataclasses.replace(TEMPLATE.rendering.thinking, train="answer")
    template = dataclasses.replace(TEMPLATE, rendering=dataclasses.replace(TEMPLATE.rendering, thinking=thinking))
    all_of_it, answer = (pair_sequences(chat, part, ROW, ("own",))["own"] for part in (TEMPLATE, template))
    assert (all_of_it.response, answer.response) == ((40, 41, 42, 3), (42, 3))
    assert answer.context == (*all_of_it.context, 40, 41)
