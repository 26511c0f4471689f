"""The fixtures of the plain tests, for those that load torch."""

from tests.plain.conftest import bpe_folder, recipe, tiny_model

__all__ = ["bpe_folder", "recipe", "tiny_model"]
