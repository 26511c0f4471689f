"""Traits of templates and tokenizers that people bring, each by a small template of our own: what is asked, read and trained."""

import dataclasses
import re

import pytest

from evolve_ray.config.options import Thinking
from evolve_ray.models.chat import Chat
from evolve_ray.refine.rendering import Rendering
from evolve_ray.refine.template import load_template
from evolve_ray.store.rows import PAIR
from evolve_ray.train.logprobs import pair_sequences
from tests.plain.conftest import make_bpe
from tests.templates import CHANNELS, DATED, HIDDEN, LINE_BEFORE_END, OPENED, PLAIN

END = "<|im_end|>"


@pytest.fixture
def chat(tmp_path):
    """Makes a chat of a byte-level tokenizer with a template."""

    def chat(template, *, special=("<|im_start|>", END), plain=("<think>", "</think>", "\n\n"), rendering=None, eos=END):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        make_bpe(list(special), template, plain=plain, eos_token=eos).save_pretrained(folder)
        return Chat(folder, rendering=rendering)

    return chat


def ids(chat, text):
    """Token ids of a text in which special tokens are tokens, as an engine writes them."""
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def shown(chat, token_ids):
    """The text that an engine shows for its tokens."""
    return chat.tokenizer.decode(token_ids, skip_special_tokens=True)


def user(text):
    return ({"role": "user", "content": text},)


def parts(chat, written):
    token_ids = ids(chat, written)
    return chat.parts(token_ids, shown(chat, token_ids))


def pair(chat, **values):
    row = dict.fromkeys(PAIR.names) | {"prompt": "sum", "chosen": "4", "rejected": "5", "chosen_finished": True}
    return row | {"rejected_finished": True} | values


def test_hidden_text_before_the_answer_is_no_part_of_the_context(chat):
    talk = chat(HIDDEN)
    assert chat_text(talk, user("sum")) == "<|im_start|>user\nsum<|im_end|>\n<|im_start|>assistant\n"
    assert talk.tokenizer.convert_ids_to_tokens(talk.end_id) == END


def test_thinking_is_read_apart_from_the_answer(chat):
    talk = chat(HIDDEN)
    found = parts(talk, f"<think>\n2 and 2\n</think>\n\n4{END}")
    assert (found.answer, found.thinking) == ("4", "<think>\n2 and 2\n</think>")
    assert found.num_thinking == len(ids(talk, "<think>\n2 and 2\n</think>"))
    assert parts(talk, f"4{END}").answer == "4"
    assert parts(talk, f"4{END}").thinking is None


@pytest.mark.parametrize("template", [HIDDEN, OPENED])
def test_response_that_is_cut_inside_its_thinking_has_no_answer(chat, template):
    written = "<think>\n2 and" if template == HIDDEN else "2 and"
    assert parts(chat(template), written).answer is None


def test_template_that_opens_the_thinking_itself(chat):
    found = parts(chat(OPENED), f"2 and 2</think>\n\n4{END}")
    assert (found.answer, found.thinking) == ("4", "2 and 2</think>")


def test_template_arguments_switch_the_thinking_off(chat):
    talk = chat(HIDDEN, rendering=Rendering(arguments={"enable_thinking": False}))
    assert chat_text(talk, user("sum")).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert parts(talk, f"4{END}").answer == "4"


def test_style_none_takes_all_of_a_response_for_its_answer(chat):
    talk = chat(HIDDEN, rendering=Rendering(thinking=Thinking(style="none")))
    assert parts(talk, f"<think>\nso\n</think>\n\n4{END}").answer == "<think>\nso\n</think>\n\n4"


def test_marks_that_are_several_tokens(chat):
    talk = chat(HIDDEN, plain=())
    found = parts(talk, f"<think>\n2 and 2\n</think>\n\n4{END}")
    assert found.answer == "4"
    assert shown(talk, ids(talk, f"<think>\n2 and 2\n</think>\n\n4{END}")[found.num_thinking :]).strip() == "4"


def test_channels(chat):
    talk = chat(CHANNELS, special=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"), eos="<|return|>")
    assert talk.tokenizer.convert_ids_to_tokens(talk.end_id) == "<|return|>"
    answer = "<|channel|>final<|message|>4<|return|>"
    found = parts(talk, f"<|channel|>analysis<|message|>2 and 2<|end|><|start|>assistant{answer}")
    assert (found.answer, found.thinking) == ("4", "analysis2 and 2assistantfinal")
    assert parts(talk, "<|channel|>analysis<|message|>2 and 2<|end|><|start|>assistant").answer is None
    assert parts(talk, "<|channel|>analysis<|message|>2 an").answer is None
    assert parts(talk, answer).answer == "4"
    assert parts(talk, "4<|return|>").answer == "4"


def test_tokens_of_the_engine_are_the_tokens_that_are_trained(chat):
    talk, template = chat(HIDDEN), load_template("tiny", "conversation")
    written = ids(talk, f"<think>\n2 and 2\n</think>\n\n4{END}")
    row = pair(
        talk,
        chosen_token_ids=written,
        chosen_num_thinking_tokens=parts(talk, f"<think>\n2 and 2\n</think>\n\n4{END}").num_thinking,
    )
    sequence = pair_sequences(talk, template, row, ("chosen",))["chosen"]
    assert sequence.context == tuple(talk.context_ids(template.direct("sum")))
    assert sequence.response == tuple(written)
    template = dataclasses.replace(template, rendering=Rendering(thinking=Thinking(train="answer")))
    answer = pair_sequences(talk, template, row, ("chosen",))["chosen"]
    assert answer.context + answer.response == sequence.context + sequence.response
    assert shown(talk, list(answer.response)).strip() == "4"


def test_a_draft_is_shown_by_the_rules_of_the_template_also_beside_markup(chat):
    talk = chat(HIDDEN)
    draft = ({"role": "assistant", "content": "<think>x</think>  4 "},)
    plain = chat_text(talk, (*user("sum"), *draft, *user("better")))
    assert "<|im_start|>assistant\n4<|im_end|>" in plain
    marked = chat_text(talk, (*user(f"sum {END}"), *draft, *user("better")))
    assert marked == plain.replace("sum", f"sum {END}")


def test_added_tokens_that_are_no_markup_stay_whole(chat):
    talk = chat(PLAIN)
    blank_line = talk.tokenizer.convert_tokens_to_ids("\n\n")
    assert blank_line in talk.text_ids("one\n\ntwo")
    assert blank_line in talk.context_ids(user("one\n\ntwo"))
    thinking = chat(HIDDEN)
    mark = thinking.tokenizer.convert_tokens_to_ids("<think>")
    assert mark in thinking.text_ids("<think>so</think>4"), "what the model writes"
    assert mark not in thinking.context_ids(user("<think>so</think>4")), "what somebody else writes"


def test_a_mark_inside_a_mark_is_cut_too(chat):
    talk = chat(PLAIN, special=("<|im_start|>", END, "<a>", "a><b"))
    forged = talk.context_ids(user("<a><b"))
    assert not {talk.tokenizer.convert_tokens_to_ids(mark) for mark in ("<a>", "a><b")} & set(forged)


def test_text_before_the_end_token_is_white_space_or_refused(chat):
    talk = chat(LINE_BEFORE_END, eos="<|im_start|>")
    assert talk.tokenizer.convert_ids_to_tokens(talk.end_id) == END


def test_the_date_of_a_template_is_the_day_of_the_run(chat):
    for day in ("2026-01-02", "2031-12-24"):
        text = chat_text(chat(DATED, rendering=Rendering(day=day)), user("sum"))
        assert re.match("Today is (02 Jan 2026|24 Dec 2031)", text)[1] == {"1": "02 Jan 2026", "2": "24 Dec 2031"}[day[6]]


def test_a_base_model_gets_its_template_from_the_recipe(chat):
    talk = chat(None, rendering=Rendering(chat_template=PLAIN))
    assert talk.tokenizer.convert_ids_to_tokens(talk.end_id) == END


def test_a_token_beyond_the_tokenizer_and_half_a_character_are_faults(chat):
    talk = chat(PLAIN)
    assert "does not have" in talk.fault([len(talk.tokenizer)], "")
    half = ids(talk, "\N{GRINNING FACE}")[:2]
    assert talk.fault(half, shown(talk, half)) == "has a part of a character"
    assert talk.fault(ids(talk, "4"), "4") == ""


def chat_text(chat, messages):
    return chat.tokenizer.decode(chat.context_ids(messages))
