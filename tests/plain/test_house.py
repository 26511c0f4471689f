"""Rules of the house that no single module can hold: floors, imports, sizes, dangerous code, options that nobody reads."""

import ast
import dataclasses
import functools
import json
import re
import typing

import pytest

from evolve_ray.config import describe, options
from tests import floors
from tests.plain.processes import ROOT, run_python

PACKAGE = ROOT / "evolve_ray"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BESIDE_THE_ROOMS = {"__init__.py", "driver.py", "errors.py", "iterate.py"}
HEAVY = ("matplotlib", "ray", "torch", "vllm", "deepspeed", "transformers", "datasets", "accelerate", "mlflow", "wandb",
         "tensorboardX")  # fmt: skip
# What a training worker imports at once; all else loads nothing heavy before it is needed.
LOADS_TORCH = {f"evolve_ray.train.{name}" for name in (
    "adapters", "attention", "dropout", "forwards", "logprobs",
    "objectives", "policy_gradient", "rank", "reference", "steps", "tokens", "tree_check", "turn_objectives")}  # fmt: skip
LOADS_TORCH |= {"evolve_ray.toy.__main__"}
MAX_LINES, MAX_TEST_LINES = 350, 500

# What could run code that came with data. A line that needs one of these stands here with its reason.
DANGEROUS = re.compile(
    r"\b(?:c?pickle|cloudpickle|dill|marshal|shelve|joblib)\b|torch\.load\b|load_checkpoint\b|allow_pickle|trust_remote_code"
    r"|(?<![\w.])(?:eval|exec)\(|os\.system|shell=True|yaml\.load\b"
)
ALLOWED_DANGER = {
    ("train/stored_steps.py", 'engine.load_checkpoint(str(manifest.folder), tag="state")'): "its hashes are in our own manifest",
}

# Under which names the package holds a section of the configuration.
HOLDERS = {
    "Config": {"config"}, "Model": {"model"}, "Prompts": {"prompts", "part"}, "Template": {"template"},
    "Thinking": {"thinking", "options"},
    "Strategy": {"strategy", "options"}, "Sampling": {"sampling"}, "Engine": {"engine"}, "Scorer": {"scorer", "options"},
    "Verifier": {"verifier"}, "Selection": {"selection", "options"}, "Training": {"training"}, "Trainer": {"trainer"},
    "Preferences": {"part", "activation", "offline"}, "Evaluation": {"evaluation", "part"}, "RayOptions": {"ray"},
    "Toy": {"toy"}, "Refresh": {"refresh", "part"}, "Probe": {"probe"}, "Controller": {"controller", "options"},
    "Trackers": {"trackers"}, "SecondModel": {"model", "part"}, "Serve": {"serve", "limits"},
}  # fmt: skip
# Options that nothing reads by that way, and why.
UNREAD = dict.fromkeys(("Toy.hidden", "Toy.layers", "Toy.heads"), "toy/__main__.py hands it to build_base by its name")
UNREAD |= dict.fromkeys(("SecondModel.cpus_per_actor", "SecondModel.args"), "SecondModel.engine hands it on")


def test_rooms_import_from_lower_floors_only_and_nothing_goes_round():
    assert floors.upward() == []
    assert floors.circles(floors.room_graph()) == []
    assert floors.circles(floors.file_graph()) == []


def test_circles_and_upward_arrows_are_seen():
    assert floors.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert floors.circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_file_is_in_a_room_and_every_room_says_what_it_is():
    assert {path.name for path in PACKAGE.glob("*.py")} == BESIDE_THE_ROOMS
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms | {name.removesuffix(".py") for name in BESIDE_THE_ROOMS - {"__init__.py"}} == set(floors.FLOOR_OF)
    for room in sorted(rooms):
        tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
        doc = ast.get_docstring(tree) or ""
        assert len(tree.body) == 1, f"{room}/__init__.py holds more than a docstring"
        for word in ("In:", "Out:", "Never imports:"):
            assert word in doc, f"{room}/__init__.py does not say what is {word}"


@pytest.mark.parametrize("tier", ["plain", "tensors"])
def test_tests_stand_where_their_file_does(tier):
    """`tests/plain/store/test_run_faults.py` is about `evolve_ray/store/run.py`; what is about several rooms stands outside."""
    for path in sorted((ROOT / "tests" / tier).glob("*/test_*.py")):
        stem = path.stem.removeprefix("test_")
        files = [file.stem for file in (PACKAGE / path.parent.name).glob("*.py")]
        assert any(stem == name or stem.startswith(f"{name}_") for name in files), f"{path}: is about no file of its room"


def test_modules_load_nothing_heavy_before_they_need_it():
    names = sorted(set(floors.files()) - LOADS_TORCH)
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n"
    loaded = run_python(code + "import json; print(json.dumps(sorted(sys.modules)))")
    assert [name for name in json.loads(loaded) if name in HEAVY] == []


def test_no_code_that_came_with_data_is_run():
    lines = [
        (path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).as_posix(), line.strip())
        for path in [*FILES, *(ROOT / "jobs").rglob("*.py")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if DANGEROUS.search(line.replace("trust_remote_code=False", ""))  # which says that it is off
    ]
    assert [line for line in lines if line not in ALLOWED_DANGER] == []
    assert set(ALLOWED_DANGER) <= set(lines), "a line that no longer exists is still allowed"


def test_files_are_short_enough_to_read():
    sizes = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES + TESTS}
    limits = {name: MAX_TEST_LINES if name.startswith("tests/") else MAX_LINES for name in sizes}
    assert {name: size for name, size in sizes.items() if size > limits[name]} == {}


def test_page_of_the_options_is_up_to_date():
    written = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == describe.as_markdown(), "write it again: python -m evolve_ray.config.describe > docs/options.md"


def test_every_option_says_what_it_is_in_one_line():
    for name, kind, _ in describe.tables():
        for field in describe.options_of(kind):
            text = field.metadata["text"]
            assert text == text.strip(), (name, field.name)
            assert text, (name, field.name)
            assert "\n" not in text, (name, field.name)


@functools.cache
def reads() -> set[tuple[str, str]]:
    """(holder, option) of every `holder.option`, `holder["option"]` and `getattr(holder, name)` over literal names."""
    found = set()
    for path in FILES:
        if path.parent.name == "config":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute | ast.Subscript):
                holder = node.value
                name = holder.attr if isinstance(holder, ast.Attribute) else getattr(holder, "id", "")
                key = node.attr if isinstance(node, ast.Attribute) else getattr(node.slice, "value", None)
                found.add((name, key))
    return found


@pytest.mark.parametrize("section", HOLDERS)
def test_every_option_is_read_somewhere(section):
    found = reads()
    fields = [field.name for field in dataclasses.fields(getattr(options, section))]
    unread = [name for name in fields if not any((holder, name) in found for holder in HOLDERS[section])]
    assert unread == [name.partition(".")[2] for name in UNREAD if name.startswith(f"{section}.")]


def test_every_section_is_held_to_that_rule():
    sections = {kind.__name__ for kind in vars(options).values() if dataclasses.is_dataclass(kind)}
    assert sections - {"Source"} == set(HOLDERS)  # Source is the part of Prompts that other tables may share
    assert set(typing.get_type_hints(options.Config)) >= {"toy", "activation", "offline"}
