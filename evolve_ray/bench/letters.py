"""The tokenizer of the tiny world, a token a letter: so that lengths in tokens can be chosen."""

import functools
import tempfile

from evolve_ray.models.chat import Chat
from evolve_ray.toy.tokenizer import make_tokenizer


@functools.cache
def chat() -> Chat:
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(8192).save_pretrained(folder)
        return Chat(folder)
