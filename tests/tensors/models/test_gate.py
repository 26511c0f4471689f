"""A model that a run cannot use is refused by what is wrong with it, before anything costs time."""

import json
import shutil
from dataclasses import replace

import pytest

from evolve_ray.errors import UserError
from evolve_ray.models import gate
from tests.plain.conftest import make_bpe
from tests.tensors import zoo

NEED = gate.Need("model.path", 128, "model.context_tokens")
SCORER = gate.Need("scorer.model", 128, "scorer.max_tokens", classifier=True)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    return {name: zoo.save(name, folder / name) for name in ("llama3", "llama_dropout", "gpt2", "opt", "gemma3")}


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    return {outputs: zoo.save_classifier("LlamaConfig", folder / str(outputs), num_labels=outputs) for outputs in (1, 2)}


@pytest.fixture
def copy(tmp_path):
    def copy(folder):
        return shutil.copytree(folder, tmp_path / "copy")

    return copy


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(folder, need=NEED):
    with pytest.raises(UserError) as caught:
        gate.inspect(folder, need)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_model_is_stands_in_one_line(policies):
    assert gate.inspect(policies["llama3"], NEED).summary == (
        "Llama, 2 layers, float32, ends with <|end|> or <|user|>, 256 positions, no tokens for tabs, accents, emoji, "
        "Chinese, Japanese and Korean, right-to-left text, mathematics"
    )
    assert "dropout off (attention_dropout)" in gate.inspect(policies["llama_dropout"], NEED).summary
    assert "float32 rounded to bfloat16" in gate.inspect(policies["llama3"], replace(NEED, dtype="bfloat16")).summary


def test_a_missing_tensor_is_named(policies, copy):
    folder = copy(policies["llama3"])
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert refusal(folder) == (
        f"model.path: {folder}: its weight files lack 1 tensor (model.layers.1.mlp.up_proj.weight) of LlamaForCausalLM, which "
        "would be random; use a complete checkpoint"
    )


def test_a_layer_too_many_is_named(policies, copy):
    folder = copy(policies["llama3"])
    change_config(folder, num_hidden_layers=1)
    assert "hold 9 tensors (model.layers.1.input_layernorm.weight, " in refusal(folder)


def test_a_resized_tensor_is_named(policies, copy):
    folder = copy(policies["llama3"])
    change_config(folder, intermediate_size=48)
    assert "model.layers.0.mlp.down_proj.weight has shape [64, 96] in the weight files and [64, 48] by config.json" in refusal(
        folder
    )


def test_a_damaged_weight_file_is_named(policies, copy):
    folder = copy(policies["llama3"])
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"{path}: is damaged or incomplete" in refusal(folder)


@pytest.mark.parametrize("layer", ["score.weight", "model.norm.weight"])
def test_a_reward_model_without_its_head_is_refused(classifiers, copy, layer):
    folder = copy(classifiers[1])
    change_weights(folder, lambda tensors: tensors.pop(layer))
    assert f"lack 1 tensor ({layer}) of LlamaForSequenceClassification" in refusal(folder, SCORER)


def test_a_reward_model_whose_head_has_another_name_is_refused_with_both_names(classifiers, copy):
    folder = copy(classifiers[1])
    change_weights(folder, lambda tensors: tensors.update({"value_head.weight": tensors.pop("score.weight")}))
    with pytest.raises(UserError) as caught:
        gate.inspect(folder, SCORER)
    lack, hold = str(caught.value).splitlines()
    assert "lack 1 tensor (score.weight)" in lack
    assert "hold 1 tensor (value_head.weight), which LlamaForSequenceClassification does not use" in hold


def test_a_classifier_with_several_outputs_needs_the_number_of_the_one_that_is_the_score(classifiers):
    assert "has 2 outputs (0: LABEL_0, 1: LABEL_1); set scorer.output" in refusal(classifiers[2], SCORER)
    assert gate.inspect(classifiers[2], replace(SCORER, output=1)).outputs == 2
    assert "scorer.output: is 2, but" in refusal(classifiers[2], replace(SCORER, output=2))
    assert "1 output, " in gate.inspect(classifiers[1], SCORER).summary


def test_the_reach_of_policy_and_reward_model_is_checked(policies, classifiers):
    need = replace(NEED, length=257)
    expected = f"model.context_tokens: is 257, but {policies['llama3']} has 256 positions; lower it"
    assert refusal(policies["llama3"], need) == expected
    for name in ("gpt2", "opt"):
        assert "has 256 positions" in refusal(policies[name], need)
    assert "scorer.max_tokens: is 257" in refusal(classifiers[1], replace(SCORER, length=257))


def test_the_reach_of_a_model_in_parts_is_that_of_its_text_part(tmp_path):
    folder = zoo.save_composite(tmp_path / "gemma3")
    assert "has 256 positions" in refusal(folder, replace(NEED, length=257))
    assert gate.inspect(folder, NEED).positions == 256


def test_positions_that_begin_after_the_padding_index_are_fewer(tmp_path):
    folder = zoo.save_classifier("RobertaConfig", tmp_path / "roberta", num_labels=1, pad_token_id=1)
    assert "has 254 positions" in refusal(folder, replace(SCORER, length=255))


def test_stretched_positions_count(policies, copy):
    folder = copy(policies["llama_dropout"])
    change_config(folder, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    assert gate.inspect(folder, replace(NEED, length=1024)).positions == 1024


@pytest.mark.parametrize(
    ("architectures", "model_type"),
    [
        (["T5ForConditionalGeneration"], "t5"),
        (["BertForMaskedLM"], "bert"),
        (["LlamaForSequenceClassification"], "llama"),
        ([], "llama"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(policies, copy, architectures, model_type):
    folder = copy(policies["llama_dropout"])
    change_config(folder, architectures=architectures, model_type=model_type)
    assert f"is not a causal language model (architectures {architectures})" in refusal(folder)


def test_a_language_model_is_no_reward_model(policies):
    assert "is not a sequence classifier (architectures ['LlamaForCausalLM'])" in refusal(policies["llama3"], SCORER)


def test_an_unknown_family_is_refused_by_its_name(policies, copy):
    folder = copy(policies["llama3"])
    change_config(folder, model_type="next_year")
    assert "config.json: transformers cannot read it: " in refusal(folder)
    assert "next_year" in refusal(folder)


def test_quantised_weights_are_refused(policies, copy):
    folder = copy(policies["llama3"])
    change_config(folder, quantization_config={"quant_method": "fp8"})
    assert "its weights are quantised (fp8), so they cannot be trained" in refusal(folder)


def test_a_token_without_a_row_in_the_embedding_is_named(policies, copy):
    folder = copy(policies["llama3"])
    tokenizer = make_bpe(["<|im_start|>", "<|im_end|>"], zoo.CHATML, eos_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    assert "its tokenizer does not fit the model: token " in refusal(folder)
    assert "but the embedding has 104 rows" in refusal(folder)


@pytest.mark.parametrize("ends", [[3, 900], "<|end|>", -1])
def test_an_end_token_that_is_none_is_refused(policies, copy, ends):
    folder = copy(policies["llama3"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert "generation_config.json: eos_token_id " in refusal(folder)


def test_generation_settings_that_are_no_object_are_refused(policies, copy):
    folder = copy(policies["llama3"])
    (folder / "generation_config.json").write_text("[")
    assert "generation_config.json: is not a JSON object" in refusal(folder)


def test_what_was_found_is_read_again_from_the_run(policies, tmp_path, monkeypatch):
    found = gate.check(policies["llama3"], "content", NEED, tmp_path)
    monkeypatch.setattr(gate, "inspect", lambda *_: pytest.fail("inspected again"))
    assert gate.check(policies["llama3"], "content", NEED, tmp_path) == found


@pytest.mark.parametrize(("content_hash", "need"), [("other", NEED), ("content", replace(NEED, length=64))])
def test_another_model_or_another_need_is_inspected(policies, tmp_path, monkeypatch, content_hash, need):
    gate.check(policies["llama3"], "content", NEED, tmp_path)
    monkeypatch.setattr(gate, "inspect", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gate.check(policies["llama3"], content_hash, need, tmp_path)
