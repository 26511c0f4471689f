"""The undisturbed twin that every fault is compared with: the small run of the real tests."""

from tests.real.conftest import place, small

__all__ = ["place", "small"]
