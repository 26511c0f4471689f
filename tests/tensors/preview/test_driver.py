"""`jobs/preview.py`: what is asked in each round, what is trained, lengths, dropped rows and warnings, through the command."""

import json
import re

import pytest

from evolve_ray.models.chat import Chat
from evolve_ray.preview import driver
from evolve_ray.refine.template import load_template
from evolve_ray.store.turns import assistant, system, user
from tests.plain.conftest import allow_systems

CHAT = [system("Be kind."), user("one"), assistant("1"), user("two")]


@pytest.fixture
def preview(recipe, tmp_path, tiny_model, capsys):
    """Runs the command on tables that are written to files first; gives its exit code, its JSON and its text."""
    model = allow_systems(tiny_model, tmp_path / "model")

    def preview(prompts, *arguments, triples=(), held=()):
        names = []
        for name, table in (("prompts", prompts), ("activation", triples), ("evaluation.splits.held", held)):
            if table:
                path = tmp_path / f"{name}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in table))
                names.append(f"{name}={path}" if "." in name else f"{name}.path={path}")
        fixed = ["model.context_tokens=250", "sampling.max_tokens=20", "prompts.per_iteration=2", "iterations=1"]
        out = tmp_path / "preview.json"
        out.unlink(missing_ok=True)
        arguments = [*names, *fixed, "template.name=tiny", "strategy.rounds=3", *arguments]
        code = driver.main([str(recipe()), f"model.path={model}", *arguments, "--json", str(out)])
        captured = capsys.readouterr()
        return code, json.loads(out.read_text()) if out.exists() else None, captured.out + captured.err

    preview.model = model
    return preview


def test_each_round_is_shown_as_the_model_is_asked(preview):
    code, content, shown = preview([{"prompt": CHAT}, {"prompt": "short"}], "--prompts", "2")
    chat, template = Chat(preview.model), load_template("tiny", "conversation")
    (prompt,) = [part for part in content["prompts"] if part["prompt"].startswith("[system]")]
    expected = [template.direct(tuple(CHAT))]
    expected += [template.refinement(tuple(CHAT), f"[response 1 of round {number}]") for number in (1, 2)]
    assert [ask["ids"] for ask in prompt["asks"]] == [chat.context_ids(messages) for messages in expected]
    first = prompt["asks"][0]
    assert first["text"] == "<|user|>Be kind.<|end|><|user|>one<|end|><|assistant|>1<|end|><|user|>two<|end|><|assistant|>"
    assert "".join(first["pieces"]) == first["text"]
    assert [first["pieces"][place] for place in first["special"]] == re.findall(r"<\|\w+\|>", first["text"])
    assert first["text"] in shown
    assert code == 0


def test_lengths_are_those_of_the_asks_with_responses_of_the_largest_size(preview):
    _, content, _ = preview([{"prompt": "short"}, {"prompt": "x" * 40}])
    chat, template = Chat(preview.model), load_template("tiny", "conversation")
    longest = len(chat.context_ids(template.refinement("x" * 40, "y" * 20)))
    first, second, third = content["lengths"]
    assert (first["longest_ask"], first["longest_whole"]) == (43, 63)
    assert (second["longest_ask"], second["longest_whole"]) == (longest, longest + 20)
    assert third["longest_whole"] == second["longest_whole"]


TRIPLES = [{"prompt": CHAT, "chosen": "good", "rejected": "bad"}]


def test_trained_tokens_are_told_from_the_context_and_end_with_the_end_token(preview):
    _, content, shown = preview([{"prompt": "a"}, {"prompt": "b"}], "activation.training.objective=sft", triples=TRIPLES)
    training, activation = content["pairs"]
    assert [part["name"] for part in activation["sequences"]] == ["chosen", "chosen_after_rejected"]
    assert (training["from"], len(training["sequences"])) == ("a triple", 6)
    after = activation["sequences"][1]
    assert (after["trained"]["text"], after["end_token"]) == ("good<|end|>", "<|end|>")
    assert after["context"]["text"].startswith("<|user|>Be kind.<|end|>")
    assert "<|assistant|>bad<|end|>" in after["context"]["text"]
    assert content["triples"]["activation"]["answer_max"] == 5
    assert ">>>good<|end|><<<" in shown


def test_what_the_data_was_taken_for_and_what_is_dropped(preview):
    rows = [{"prompt": CHAT}, {"prompt": CHAT}, {"prompt": "held"}, {"prompt": "x" * 300}, {"prompt": "ok"}]
    _, content, shown = preview(rows, "prompts.max_rejected_fraction=0.5", held=[{"prompt": "held"}])
    held, table = content["tables"]
    assert (held["num_rows"], table["num_rows"]) == (1, 2)
    reasons = {part["reason"].split(" (")[0]: part["count"] for part in table["dropped"]}
    assert reasons == {
        "duplicate of line 1": 1, "is also a prompt of evaluation split 'held'": 1, "prompt has 303 tokens, limit 200": 1
    }  # fmt: skip
    assert "dropped 1: duplicate of line 1 (first: " in shown


def test_the_verifier_is_tried_on_gold_and_on_other_answers(preview):
    rows = [{"prompt": f"q{number}", "answer": str(number)} for number in range(2)]
    options = ("prompts.answer_column=answer", "verifier.name=exact", "scorer.name=verifier", "scorer.model=''")
    _, content, _ = preview(rows, *options, "--scorer")
    assert content["verifier"] == {
        "num_answers": 2, "num_checked": 2, "num_gold_right": 2, "num_wrong": 2, "num_wrong_right": 0
    }  # fmt: skip
    assert [row["scores"] for row in content["scorer"]] == [{"chosen": 1.0, "rejected": 0.0}] * 2
    assert not any("verifier" in warning for warning in content["warnings"])


class Backwards:
    """Prefers the shorter answer."""

    def __call__(self, prompts, answers, responses):
        return [-len(response) for response in responses]


class AlwaysRight:
    def __call__(self, prompts, answers, responses):
        return [1.0 if "1" in response else 0.0 for response in responses]


def test_a_scorer_that_prefers_the_rejected_answer_and_a_verifier_that_is_wrong_are_warned_of(preview):
    rows = [{"prompt": f"q{number}", "answer": f"{number} or 1"} for number in (5, 6)]
    options = ("prompts.answer_column=answer", f"verifier.name={__name__}:AlwaysRight", "scorer.model=''")
    _, content, shown = preview(rows, *options, f"scorer.name={__name__}:Backwards", "--scorer", triples=TRIPLES)
    assert f"scorer {__name__}:Backwards: does not prefer the chosen answer in 1 of 1 pairs" in content["warnings"]
    assert f"verifier {__name__}:AlwaysRight: takes 2 of 2 gold answers of other prompts for right" in content["warnings"]
    assert "== warnings\n* " in shown


def test_a_fault_of_the_data_is_shown_beside_what_can_be_read_and_ends_with_exit_code_two(preview):
    code, content, shown = preview([{"prompt": "a"}, {"prompt": ""}], triples=TRIPLES)
    assert code == 2
    assert [part["table"] for part in content["tables"]] == ["activation"]
    assert len(content["pairs"]) == 2
    assert shown.splitlines()[-1].endswith("prompts.jsonl:2: column 'prompt' is empty")


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda text: text, None),
        (lambda text: text.replace("message.content", "(message.content | trim)"), "the chat template trims"),
        (lambda text: text.replace("message.content", "message.content.split('</think>')[-1]"), "cuts `<think>` text out of"),
        (lambda text: text + "{%- set day = strftime_now('%d') -%}", "the chat template writes the date"),
        (lambda text: "{%- if messages[0].role == 'system' -%}{%- set messages = messages[1:] -%}{%- endif -%}" + text,
         "does not write system prompts"),
    ],
)  # fmt: skip
def test_what_a_template_does_that_a_user_may_not_expect(preview, change, warning):
    template = preview.model / "chat_template.jinja"
    template.write_text(change(template.read_text()))
    _, content, _ = preview([{"prompt": CHAT}, {"prompt": "b"}], "thinking.style=none")
    found = [text for text in content["warnings"] if "template" in text]
    assert [warning in text for text in found] == [True] if warning else found == []


def test_two_begin_tokens_are_warned_of(preview):
    config = preview.model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": "<|user|>"}))
    template = preview.model / "chat_template.jinja"
    template.write_text("<|user|>" + template.read_text())
    _, content, _ = preview([{"prompt": "a"}, {"prompt": "b"}])
    assert any(text.startswith("two begin tokens: a prompt begins with '<|user|>' twice") for text in content["warnings"])


def test_the_page_escapes_what_others_wrote_and_loads_nothing(preview, tmp_path):
    page = tmp_path / "preview.html"
    preview([{"prompt": "<script>alert(1)</script>"}, {"prompt": "b"}], "--html", str(page), "--prompts", "2", triples=TRIPLES)
    written = page.read_text()
    assert "<script" not in written
    assert "default-src 'none'" in written
    assert '<span class="trained even" title="' in written or '<span class="even trained" title="' in written
    assert not re.search(r'(?:src|href)="(?!#)', written)
