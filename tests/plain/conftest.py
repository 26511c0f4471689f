"""What several plain tests share: a recipe on disk, and tiny models and tokenizers made on the spot."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("plain", derandomize=True, deadline=None, database=None, max_examples=75)
settings.load_profile("plain")

RECIPE = """\
name = "small"

[model]
path = "some/model"

[prompts]
path = "prompts.jsonl"

[scorer]
model = "some/reward-model"
"""

# The shape of Llama 3's template: a begin token, headers, trimmed texts.
LLAMA_TEMPLATE = """\
{{- '<|begin|>' -}}
{%- for message in messages -%}
{{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' + message['content'] | trim + '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|header|>assistant<|/header|>\\n\\n' -}}{%- endif -%}
"""
CORPUS = ["the question is what the answer to the question is", "sort the letters and fix the answer", "a\n\nb\n\nc"]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe: the smallest valid one plus `more`, or `whole` as it is."""

    def write(more: str = "", *, whole: str | None = None) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE + more if whole is None else whole, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with the tiny world's tokenizer, as a model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from evolve_ray.toy.tokenizer import make_tokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = make_tokenizer(256)
    LlamaForCausalLM(llama_config(LlamaConfig, len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def allow_systems(model: Path, folder: Path) -> Path:
    """A copy of a model of the tiny world whose chat template writes a system prompt as a turn of its own."""
    shutil.copytree(model, folder)
    template = folder / "chat_template.jinja"
    written = template.read_text()
    changed = re.sub(r"\{%- if message.role not in.*?endif -%\}\n", "", written, flags=re.S)
    changed = changed.replace("~ message.role ~", "~ (message.role if message.role == 'assistant' else 'user') ~")
    assert changed != written
    template.write_text(changed)
    return folder


def llama_config(kind: Any, vocabulary: int, **more: Any) -> Any:
    """A large initial range, so that no two sequences have nearly the same probability."""
    return kind(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        **more,
    )


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with a template in the shape of Llama 3's."""
    special = ["<|begin|>", "<|end_of_text|>", "<|header|>", "<|/header|>", "<|eot|>"]
    tokenizer = make_bpe(special, LLAMA_TEMPLATE, bos_token="<|begin|>", eos_token="<|end_of_text|>")
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer.save_pretrained(folder)
    return folder


def make_bpe(special: list[str], template: str | None, plain: tuple[str, ...] = (), **names: str) -> Any:
    """A trained byte-level BPE tokenizer; `plain` are added tokens that are not marked as special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False, **names
    )
