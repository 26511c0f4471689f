"""The pages: every link and file that they name exists, every command parses, every code block of extending.md runs."""

import argparse
import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from evolve_ray.audit import explain, verify
from evolve_ray.bench import driver as bench
from evolve_ray.benchmarks import driver as benchmark
from evolve_ray.compare import driver as evaluate
from evolve_ray.config.load import build
from evolve_ray.preview import driver as preview
from evolve_ray.report import runs as report
from evolve_ray.serve import driver as serve
from evolve_ray.study import driver as study
from evolve_ray.watch import status
from tests import floors
from tests.plain.processes import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
COMMANDS = {
    "bench": bench.main, "benchmark": benchmark.main, "evaluate": evaluate.main, "explain": explain.main,
    "preview": preview.main, "report": report.main, "serve": serve.main, "status": status.main,
    "study": lambda arguments: study.main(arguments, ROOT / "jobs"), "verify": verify.main,
}  # fmt: skip
FOLDERS = ("evolve_ray", "jobs", "tests", "cluster", "docs", ".ci")


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_file_that_a_page_names_exists(page):
    for name in re.findall(r"`([\w./-]+)`", page.read_text(encoding="utf-8")):
        folder, slash, _ = name.partition("/")
        if slash and folder in FOLDERS:
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def commands(page: Path) -> list[list[str]]:
    """Every `python jobs/...` and `make ...` of the shell blocks, as words."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words):
                if word in ("python", "make") and place + 1 < len(words):
                    found.append(words[place:])
                    break
    return found


class Parsed(Exception):
    """Raised in place of running a command that was parsed."""


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_of_a_page_parses(page, monkeypatch):
    from evolve_ray import driver

    def parsed(method):
        def run(parser, *arguments, **named):
            method(parser, *arguments, **named)
            raise Parsed

        return run

    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        if words[0] == "make":
            assert words[1] in targets, f"{page.name}: make {words[1]}"
            continue
        if words[1] == "cluster/panels.py":
            continue
        name = Path(words[1]).stem
        assert (ROOT / words[1].removeprefix("/opt/evolve-ray/")).exists(), f"{page.name}: {words[1]}"
        with monkeypatch.context() as patch:
            for method in ("parse_args", "parse_intermixed_args"):
                patch.setattr(argparse.ArgumentParser, method, parsed(getattr(argparse.ArgumentParser, method)))
            with pytest.raises(Parsed):
                {**COMMANDS, "iterate": driver.main}[name](words[2:])


def test_recipe_of_the_readme_is_a_recipe():
    (text,) = blocks(ROOT / "README.md", "toml")
    config = build(tomllib.loads(text), "README.md", text, ())
    assert (config.prompts.per_iteration, config.scorer.name) == (5000, "reward_model")


def test_every_block_of_the_page_on_plugs_runs(tmp_path):
    code = "\n\n".join(blocks(ROOT / "docs" / "extending.md", "python"))
    (tmp_path / "my_plugs.py").write_text(code)
    ran = subprocess.run([sys.executable, "-c", "import my_plugs"], cwd=tmp_path, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
                         capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    recipe = "\n".join(blocks(ROOT / "docs" / "extending.md", "toml"))
    names = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef | ast.ClassDef)} | {"HINGE"}
    assert set(re.findall(r"my_plugs:(\w+)", recipe)) <= names


def test_page_of_the_rooms_draws_the_floors_that_there_are():
    """docs/architecture.md has a row for every room, floor by floor."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)`", text, re.MULTILINE)
    assert {room: len(floors.FLOORS) - int(number) for number, room in rows} == floors.FLOOR_OF


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220
