"""The asks of a strategy without an engine: also where it asks the verifier, takes options, or breaks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from evolve_ray.config.load import load
from evolve_ray.errors import UserError
from evolve_ray.preview.asks import round_lengths, run_strategy, show_asks
from evolve_ray.refine.asks import Ask
from evolve_ray.refine.template import load_template


def asks_of(recipe, name, **args):
    config = load(recipe(), ["prompts.answer_column=a", "verifier.name=exact", "strategy.rounds=2"])
    config = replace(config, strategy=replace(config.strategy, name=name, args=args))
    return run_strategy(config, load_template("default", "conversation", "feedback"), {"prompt_id": "p", "prompt": "q"})


def several(prompt, template, options, args):
    yield [Ask(template.direct(prompt), number, 1) for number in range(args["times"])]


def broken(prompt, template, options):
    yield Ask(template.direct(prompt), 0, 1)
    raise KeyError("plan")


def test_the_verifiers_words_are_a_placeholder(recipe):
    asks = asks_of(recipe, "feedback")
    assert [ask.round for ask in asks] == [1, 2]
    assert "[what the verifier says]" in asks[1].messages[-1]["content"]


def test_a_strategy_gets_its_options(recipe):
    assert len(asks_of(recipe, f"{__name__}:several", times=3)) == 3


def test_a_strategy_that_breaks_is_one_sentence(recipe):
    with pytest.raises(
        UserError, match=r"strategy\.name: '.*:broken' raised KeyError: 'plan', at \S*test_asks\.py:\d+; fix the plug"
    ):
        asks_of(recipe, f"{__name__}:broken")


class LetterChat:
    """A token for each character, after a mark of its own."""

    def __init__(self, mark):
        self.mark = mark
        self.tokenizer = SimpleNamespace(
            all_special_ids=[], added_tokens_decoder={}, decode=lambda ids, **_: "".join(map(chr, ids))
        )

    def context_ids(self, messages):
        return [ord(self.mark), *(ord(letter) for message in messages for letter in message["content"])]


def criticised(prompt, template, options):
    messages = ({"role": "user", "content": "abc"},)
    yield Ask(messages, 0, 1)
    yield Ask(messages, 0, 1, kind="critique", model="critic")


def unknown(prompt, template, options):
    yield Ask(template.direct(prompt), 0, 1, model="".join(["cri", "ti"]))


def models_of(recipe, name):
    return load(recipe('[models.critic]\npath = "c"\n'), [f"strategy.name={__name__}:{name}"])


def test_an_ask_to_another_model_is_rendered_by_its_own_template(recipe):
    config, template = models_of(recipe, "criticised"), load_template("default", "conversation")
    row = {"prompt_id": "p", "prompt": "q"}
    ours, theirs = show_asks(config, template, LetterChat("P"), row, {"critic": LetterChat("C")})
    assert (ours["text"], ours.get("model")) == ("Pabc", None)
    assert (theirs["text"], theirs["model"]) == ("Cabc", "critic")
    assert [part.kind for part in round_lengths(config, template, LetterChat("P"), row)] == ["answer"], "the policy's alone"


def test_an_ask_to_an_unknown_model_is_one_sentence(recipe):
    with pytest.raises(UserError, match=r"asks the model 'criti'; did you mean 'critic'\?; see test_asks\.py:\d+$"):
        run_strategy(models_of(recipe, "unknown"), load_template("default", "conversation"), {"prompt_id": "p", "prompt": "q"})
