"""A score does not depend on the other rows of its batch, whatever family and pad token the reward model has."""

import json

import pytest
import torch

from evolve_ray.config.options import Scorer
from evolve_ray.score.reward_model import RewardModel, classify
from tests.tensors import zoo

RESPONSES = ["ab", "the answer is 12", "", "fed cab hgi"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("reward")
    made = {kind: zoo.save_classifier(kind, root / kind, num_labels=1) for kind in ("LlamaConfig", "Qwen2Config", "Gemma2Config")}
    made |= {"GPT2Config": zoo.save_classifier("GPT2Config", root / "gpt2", num_labels=1, **zoo.GPT2_SHAPE)}
    made |= {"no pad": zoo.save_classifier("LlamaConfig", root / "none", num_labels=1, pad_token_id=None)}
    made |= {"pad = end": zoo.save_classifier("LlamaConfig", root / "end", num_labels=1, pad_token_id=3)}
    made |= {
        f"Gemma 3, inner pad {pad}": zoo.save_composite(root / f"gemma3-{pad}", classifier=True, text_pad=pad)
        for pad in (0, 5, None)
    }
    return made


@pytest.mark.parametrize(
    "name",
    ["LlamaConfig", "Qwen2Config", "Gemma2Config", "GPT2Config", "no pad", "pad = end", "Gemma 3, inner pad 0",
     "Gemma 3, inner pad 5", "Gemma 3, inner pad None"],
)  # fmt: skip
def test_a_batch_has_the_scores_of_its_rows_alone(folders, name):
    model = RewardModel(Scorer(max_tokens=128, batch_size=4), str(folders[name]))
    prompts, answers = ["sort"] * len(RESPONSES), [None] * len(RESPONSES)
    together = model(prompts, answers, RESPONSES)
    alone = [model([prompt], [None], [response])[0] for prompt, response in zip(prompts, RESPONSES, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in alone}) == len(RESPONSES)


def test_a_conversation_is_scored_with_all_its_turns(folders):
    model = RewardModel(Scorer(max_tokens=128), str(folders["LlamaConfig"]))
    turns = tuple({"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c")))
    whole, last = model([turns, "c"], [None, None], ["d", "d"])
    ids = model.chat.context_ids((*turns, {"role": "assistant", "content": "d"}), generate=False)
    assert whole == pytest.approx(model.model(input_ids=torch.tensor([ids])).logits[0].item(), abs=1e-5)
    assert whole != pytest.approx(last, abs=1e-3)


def test_the_score_is_the_output_that_the_option_names(tmp_path):
    folder = zoo.save_classifier("LlamaConfig", tmp_path / "two", num_labels=2)
    first, second = (
        RewardModel(Scorer(max_tokens=128, output=output), str(folder))(["a"], [None], ["b"])[0] for output in (0, 1)
    )
    model = RewardModel(Scorer(max_tokens=128, output=1), str(folder))
    ids = model.chat.context_ids(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), generate=False)
    logits = model.model(input_ids=torch.tensor([ids])).logits[0]
    assert [first, second] == pytest.approx(logits.tolist(), abs=1e-6)
    assert first != second


def test_a_negative_pad_token_is_none(tmp_path):
    """Older Llama configurations say -1."""
    folder = zoo.save_classifier("LlamaConfig", tmp_path / "old", num_labels=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": -1}))
    model = RewardModel(Scorer(max_tokens=128, batch_size=2), str(folder)).model
    both = classify(model, [[5, 6, 7], [5, 6, 7, 8, 9]], torch.device("cpu"))
    assert both[0].item() == pytest.approx(classify(model, [[5, 6, 7]], torch.device("cpu")).item(), abs=1e-5)
