"""The files beside the weights of a checkpoint: copied as they are, with what transformers 4 needs beside it."""

import json

from evolve_ray.models import companions

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "attention_dropout": 0.1,
    "temperature": 0.6,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8192},
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def exported(tmp_path, *, config=CONFIG, settings=None, tokenizer=None, dtype="float32", end_id=7):
    """The JSON files of an export of a model folder, by name."""
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir(parents=True)
    write(source / "config.json", config)
    write(source / "tokenizer_config.json", tokenizer or {"tokenizer_class": "PreTrainedTokenizerFast"})
    if settings is not None:
        write(source / "generation_config.json", settings)
    (source / "model.safetensors").write_bytes(b"weights")
    write(source / "model.safetensors.index.json", {})
    write(source / "preprocessor_config.json", {"image_processor_type": "Gemma3ImageProcessor"})
    (source / "chat_template.jinja").write_text("{{ messages }}\n")
    companions.copy(source, out, dtype=dtype, end_id=end_id)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}\n"
    return {file.name: json.loads(file.read_text()) for file in out.glob("*.json")}


def test_every_file_but_the_weights_comes_along_and_nothing_in_it_is_lost(tmp_path):
    files = exported(tmp_path, settings={"temperature": 0.6, "top_p": 0.9})
    assert sorted(files) == ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"]
    assert files["generation_config.json"] == {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 7}
    assert files["config.json"].items() >= (CONFIG | {"dtype": "float32"}).items()


def test_transformers_4_finds_the_older_names(tmp_path):
    config = exported(tmp_path)["config.json"]
    assert (config["rope_theta"], config["torch_dtype"]) == (500000.0, "float32")
    assert config["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


def test_older_names_of_each_kind_of_layer_and_of_a_text_part(tmp_path):
    rope = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
    config = exported(tmp_path, config={"text_config": {"dtype": "float32", "rope_parameters": rope}}, dtype="bfloat16")
    text = config["config.json"]["text_config"]
    assert (text["rope_theta"], text["rope_local_base_freq"], text["dtype"]) == (1e6, 1e4, "bfloat16")
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_a_name_that_is_there_is_left_as_it_is(tmp_path):
    config = exported(tmp_path, config={"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}})["config.json"]
    assert config["rope_theta"] == 5.0


def test_older_names_of_a_tokenizer(tmp_path):
    written = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    files = exported(tmp_path, tokenizer=written)
    assert files["tokenizer_config.json"] == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
    }


def test_the_end_token_of_the_template_is_among_the_end_tokens(tmp_path):
    kept = {
        None: 7,
        0: [0, 7],
        7: 7,
    }
    for number, (before, after) in enumerate(kept.items()):
        files = exported(tmp_path / str(number), settings={} if before is None else {"eos_token_id": before})
        assert files["generation_config.json"]["eos_token_id"] == after
    files = exported(tmp_path / "list", settings={"eos_token_id": [2, 7]})
    assert files["generation_config.json"]["eos_token_id"] == [2, 7]
