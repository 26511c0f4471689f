"""Every family that people train: through the gate, one rank of ZeRO-3, and out again as a checkpoint that others read."""

import json
import math

import pytest

from evolve_ray.models import gate
from tests.tensors import zoo
from tests.tensors.one_rank import process_group, train

__all__ = ["process_group"]

NEED = gate.Need("model.path", 128, "model.context_tokens")


@pytest.mark.parametrize("name", sorted(zoo.FAMILIES))
@pytest.mark.slow
def test_a_released_model_is_trained_from_ln_2_and_exported_as_it_came(name, tmp_path, monkeypatch, process_group):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = zoo.save(name, tmp_path / "model")
    found = gate.inspect(folder, NEED)
    plain = train(folder, tmp_path / "plain", monkeypatch)
    assert plain["log"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    again = train(folder, tmp_path / "again", monkeypatch)
    assert again["reference"] == plain["reference"]
    assert again["log"] == plain["log"]
    tree = train(folder, tmp_path / "tree", monkeypatch, trainer={"forward": "tree"})
    for separate, in_tree in zip(plain["reference"], tree["reference"], strict=True):
        assert in_tree == pytest.approx(separate, abs=2e-4)
    checkpoint = plain["checkpoint"]
    assert gate.inspect(checkpoint, NEED) == found
    for file in ("config.json", "generation_config.json"):
        released, exported = (json.loads((place / file).read_text()) for place in (folder, checkpoint))
        assert exported.items() >= released.items()
    weights, trained = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (folder, checkpoint))
    assert weights.keys() == trained.keys()
    assert any(not weights[key].equal(trained[key]) for key in weights)
    text = "sort cab"
    assert AutoTokenizer.from_pretrained(checkpoint)(text) == AutoTokenizer.from_pretrained(folder)(text)


@pytest.mark.slow
def test_a_model_with_a_text_part_is_exported_with_its_processor_and_its_other_parts(tmp_path, monkeypatch, process_group):
    from transformers import AutoModelForCausalLM

    folder = zoo.save_composite(tmp_path / "gemma3")
    result = train(folder, tmp_path / "out", monkeypatch)
    assert result["log"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    checkpoint = result["checkpoint"]
    for file in ("preprocessor_config.json", "processor_config.json"):
        assert (checkpoint / file).read_bytes() == (folder / file).read_bytes()
    weights, trained = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (folder, checkpoint))
    assert weights.keys() == trained.keys()
    changed = {key for key in weights if not weights[key].equal(trained[key])}
    assert changed
    assert not [key for key in changed if "vision" in key or "projector" in key], "only the text part is trained"
    assert gate.inspect(checkpoint, NEED) == gate.inspect(folder, NEED)
