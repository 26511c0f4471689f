"""Marks every test with the name of its folder: plain, tensors, wiring, browser, real or faults."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(getattr(pytest.mark, item.path.relative_to(HERE).parts[0]))
