"""A score is one finite number for each draft; a reward model gives what a plain forward gives."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from evolve_ray import config as options
from evolve_ray import rows
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.score import ExactMatch, RewardModel, ScoreSpec, ScoreWorker, build_verifier
from evolve_ray.store import commit
from evolve_ray.toy.task import SortVerifier
from evolve_ray.toy.tokenizer import make_tokenizer, render
from tests.plain.conftest import LLAMA_TEMPLATE, llama_config, make_bpe

RESPONSES = ["abc", "a longer answer than the others", "", "cab"]


class Listed:
    """A scorer that returns the values of a list, whatever it is asked."""

    values: list = []  # noqa: RUF012

    def __call__(self, prompts, answers, responses):
        return self.values


@pytest.fixture
def worker(tmp_path):
    """A worker over one committed shard of four drafts, with a plugged scorer that returns `values`."""

    def make(values, **spec):
        Listed.values = values
        aside = tmp_path / "aside"
        aside.mkdir()
        drafts = [
            {
                "draft_id": f"d{n}", "prompt_id": "p", "split": "train", "sample": 0, "round": n + 1, "parent_id": None,
                "text": text, "finish_reason": "stop", "num_prompt_tokens": 1, "num_tokens": 1, "seed": 0, "model": "m",
            }
            for n, text in enumerate(RESPONSES)
        ]  # fmt: skip
        rows.write_table(aside / "rows.parquet", drafts, rows.GENERATION)
        commit(aside, tmp_path / "drafts" / "shard-00000", stage="shard", key="k")
        fields = {"scorer": options.Scorer(name=f"{__name__}:Listed"), "verifier": None} | spec
        return ScoreWorker(
            ScoreSpec(prompts="", drafts=str(tmp_path / "drafts"), work="", key="", shard_prompts=1, reward_model="", **fields)
        )

    return make


PROMPTS = [{"prompt_id": "p", "prompt": "sort:cab", "answer": "abc", "file": "f", "line": 3}]


def test_every_draft_gets_its_number(worker):
    scored, rejected, stats = worker([0.5, 1, -2.0, 0.0]).process(0, PROMPTS)
    assert [(row["draft_id"], row["score"], row["correct"]) for row in scored] == [
        ("d0", 0.5, None), ("d1", 1.0, None), ("d2", -2.0, None), ("d3", 0.0, None),
    ]  # fmt: skip
    assert (rejected, stats["num_in"]) == ([], 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "0.5", None, [1.0]])
def test_value_that_is_no_finite_number_rejects_its_draft_alone_and_is_named(worker, value):
    scored, rejected, _ = worker([0.5, value, 1.0, 0.0]).process(0, PROMPTS)
    assert [row["draft_id"] for row in scored] == ["d0", "d2", "d3"]
    assert [(row["id"], row["file"], row["line"], row["stage"]) for row in rejected] == [("d1", "f", 3, "scores")]
    assert rejected[0]["reason"] == f"scorer gave {value!r}, verifier None: not a finite number"


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_number_of_numpy_is_a_number(worker, kind):
    scored, _, _ = worker([kind(2)] * 4).process(0, PROMPTS)
    assert [row["score"] for row in scored] == [2.0] * 4


@pytest.mark.parametrize("values", [[1.0] * 3, [1.0] * 5, []])
def test_wrong_number_of_values_is_refused(worker, values):
    with pytest.raises(IntegrityError, match=f"scorer: gave {len(values)} values for 4 responses"):
        worker(values).process(0, PROMPTS)


def test_verifier_is_the_scorer_where_the_recipe_says_so(worker):
    given = {"scorer": options.Scorer(name="verifier"), "verifier": options.Verifier()}
    scored, _, _ = worker([], **given).process(0, PROMPTS)
    assert [(row["score"], row["correct"]) for row in scored] == [(1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]


def test_verifier_judges_beside_a_scorer(worker):
    scored, _, _ = worker([0.1, 0.2, 0.3, 0.4], verifier=options.Verifier()).process(0, PROMPTS)
    assert [(row["score"], row["correct"]) for row in scored] == [(0.1, 1.0), (0.2, 0.0), (0.3, 0.0), (0.4, 0.0)]


def test_shard_that_is_not_committed_is_not_scored(worker):
    with pytest.raises(IntegrityError, match="shard-00007: is not committed"):
        worker([1.0] * 4).process(7, PROMPTS)


def test_damaged_shard_is_not_scored(worker, tmp_path):
    ready = worker([1.0] * 4)
    with open(tmp_path / "drafts" / "shard-00000" / "rows.parquet", "r+b") as file:
        file.write(b"X")
    with pytest.raises(IntegrityError, match=r"rows\.parquet: sha256 is"):
        ready.process(0, PROMPTS)


def test_exact_match_ignores_only_surrounding_space():
    verdicts = ExactMatch()(["q"] * 5, ["a b", "a b", "a b", "a b", None], ["a b", " a b\n", "ab", "A b", "a b"])
    assert verdicts == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_verifier_is_found_by_short_name_and_by_module():
    assert isinstance(build_verifier(options.Verifier()), ExactMatch)
    assert isinstance(build_verifier(options.Verifier(name="evolve_ray.toy.task:SortVerifier")), SortVerifier)
    with pytest.raises(UserError, match=r"verifier\.name"):
        build_verifier(options.Verifier(name="none:Such"))


def save_reward_model(folder, tokenizer):
    torch.manual_seed(1)
    config = llama_config(LlamaConfig, len(tokenizer), num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def toy_rewards(tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("rewards"), make_tokenizer())


def at_the_last_token(folder, ids):
    """The score head at the last token of one unpadded conversation."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()


def score(folder, **more):
    model = RewardModel(options.Scorer(**more), folder)
    return model(["sort:cab"] * len(RESPONSES), [None] * len(RESPONSES), RESPONSES)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_are_those_of_a_plain_forward_whatever_the_batch(toy_rewards, batch_size):
    tokenizer = make_tokenizer()
    ids = [tokenizer(render("sort:cab", text))["input_ids"] for text in RESPONSES]
    expected = [at_the_last_token(toy_rewards, row) for row in ids]
    assert score(toy_rewards, batch_size=batch_size) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in expected}) == len(expected)


def test_answer_too_long_for_the_reward_model_gets_no_number(toy_rewards):
    values = score(toy_rewards, max_tokens=20, batch_size=3)
    assert [math.isnan(value) for value in values] == [False, True, False, False]
    whole = score(toy_rewards)
    assert [values[0], *values[2:]] == pytest.approx([whole[0], *whole[2:]], abs=1e-5)


def test_scores_are_those_of_a_plain_forward_without_a_padding_token(tmp_path):
    special = ["<|begin|>", "<|end_of_text|>", "<|header|>", "<|/header|>", "<|eot|>"]
    tokenizer = make_bpe(special, LLAMA_TEMPLATE, eos_token="<|eot|>")
    folder = save_reward_model(tmp_path, tokenizer)
    chats = [[{"role": "user", "content": "sort:cab"}, {"role": "assistant", "content": text}] for text in RESPONSES]
    ids = [
        tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"] for chat in chats
    ]
    assert score(folder) == pytest.approx([at_the_last_token(folder, row) for row in ids], abs=1e-5)
