"""The tokenizer of the tiny world: one token for each letter, so that a benchmark can choose lengths in tokens."""

import functools
import tempfile

from evolve_ray.models.chat import Chat
from evolve_ray.toy.tokenizer import make_tokenizer


@functools.cache
def chat() -> Chat:
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(8192).save_pretrained(folder)
        return Chat(folder)
