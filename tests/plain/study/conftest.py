"""No waiting and no drawing in the tests of the study."""

import os

import pytest

from evolve_ray.report import report as evolve_ray_report
from evolve_ray.study import driver
from evolve_ray.study import tables as study_tables


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Hundreds of small files are committed here, and no power fails."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(autouse=True)
def drawing_is_for_its_own_tests(monkeypatch, request):
    """A figure costs a second; two tests look at it."""
    if not any(word in request.node.name for word in ("and_figure", "same_files")):
        monkeypatch.setattr(study_tables, "figure", lambda results, path: path.write_text("not drawn"))
    monkeypatch.setattr(evolve_ray_report, "write_page", lambda *_: None)


@pytest.fixture(autouse=True)
def judge(monkeypatch):
    """In place of the trained reward model: what it gives, by run folder."""
    given = {}
    monkeypatch.setattr(driver, "judge_run", lambda root, seed, jobs: given.get(root.name, {}))
    return given


# --- outcomes in memory: {"01": 20} are twenty prompts whose y1 is wrong and whose y2 is right ---------------------------------
