"""Rules of the house that no single module can hold: imports, code that is never run, options that nobody reads."""

import ast
import dataclasses
import functools
import json
import re
import typing
from pathlib import Path

import pytest

from evolve_ray.config import options
from tests.plain.processes import ROOT, run_python

PACKAGE = ROOT / "evolve_ray"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("matplotlib", "ray", "torch", "vllm", "deepspeed", "transformers", "datasets", "accelerate", "mlflow", "wandb",
         "tensorboardX")  # fmt: skip
PLAIN = [
    "strict",
    "schedule",
    "tree",
    "config",
    "rows",
    "store",
    "prompts",
    "refine",
    "strategies",
    "scorers",
    "pairs",
    "ledger",
    "shards",
    "pools",
    "markup",
    "charts",
    "views",
    "recipe",
    "chains",
    "costs",
    "page",
    "report",
    "compare",
    "evaluate",
    "drift",
    "controller",
    "together",
    "study",
    "study_tables",
    "plan",
    "models",
    "errors",
    "driver",
    "checkpoints",
    "probes",
    "evaluate_figures",
    "evaluate_tables",
    "evaluate_models",
    "evaluate_driver",
    "explain",
    "answers",
    "builds",
    "judge",
    "alpaca",
    "arena_hard",
    "benchmark",
    "trackers",
    "card",
    "status",
    "shapes",
    "sizing",
    "fitting",
    "estimate",
    "metrics",
    "attempts",
    "tallies",
    "verify",
    "objects",
    "lease",
    "mirror",
    "keeper",
]
STAGES = {"generate", "score", "train", "rank", "objective", "logprobs", "probe"}
ALLOWED_BETWEEN_STAGES = {("train", "rank"), ("rank", "train"), ("rank", "objective"), ("rank", "logprobs")}
MAX_LINES = 430

# What could run code that came with data. A line that needs one of these stands here with its reason.
DANGEROUS = re.compile(
    r"\b(?:c?pickle|cloudpickle|dill|marshal|shelve|joblib)\b|torch\.load\b|load_checkpoint\b|allow_pickle|trust_remote_code"
    r"|(?<![\w.])(?:eval|exec)\(|os\.system|shell=True|yaml\.load\b"
)
ALLOWED_DANGER = {
    (
        "chat.py",
        "self.tokenizer: Any = tokenizer_class(Path(folder)).from_pretrained(str(folder), trust_remote_code=False)",
    ): "off",
    ("train.py", "config = AutoConfig.from_pretrained(given.model, trust_remote_code=False)"): "off",
    ("scorers.py", "folder, dtype=getattr(torch, options.dtype), trust_remote_code=False"): "off",
    (
        "rank.py",
        "model = kind.from_pretrained(folder, dtype=getattr(self.torch, self.spec.dtype), trust_remote_code=False)",
    ): "off",
    (
        "probe.py",
        "model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=False)",
    ): "off",
    ("rank.py", 'self.engine.load_checkpoint(str(manifest.folder), tag="state")'): "its hashes are in our own manifest",
}

# Under which names the package holds a section of the configuration.
HOLDERS = {
    "Config": {"config"}, "Model": {"model"}, "Prompts": {"prompts", "part"}, "Template": {"template"},
    "Strategy": {"strategy", "options"}, "Sampling": {"sampling"}, "Engine": {"engine"}, "Scorer": {"scorer", "options"},
    "Verifier": {"verifier"}, "Selection": {"selection", "options"}, "Training": {"training"}, "Trainer": {"trainer"},
    "Preferences": {"part", "activation", "offline"}, "Evaluation": {"evaluation", "part"}, "RayOptions": {"ray"},
    "Toy": {"toy"}, "Refresh": {"refresh", "part"}, "Probe": {"probe"}, "Controller": {"controller", "options"},
    "Trackers": {"trackers"},
}  # fmt: skip
# Options that nothing reads by that way, and why.
UNREAD = dict.fromkeys(("Toy.hidden", "Toy.layers", "Toy.heads"), "toy/__main__.py hands it to build_base by its name")


def test_plain_modules_import_nothing_heavy():
    code = f"import sys\nfor name in {PLAIN}: __import__('evolve_ray.' + name)\n"
    loaded = run_python(code + "import json; print(json.dumps(sorted(sys.modules)))")
    assert [name for name in json.loads(loaded) if name in HEAVY] == []


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, at its top or inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("evolve_ray.")}


def test_stages_never_import_each_other():
    found = {(stage, other) for stage in STAGES for other in imported(PACKAGE / f"{stage}.py") & STAGES if other != stage}
    assert found <= ALLOWED_BETWEEN_STAGES


def test_imports_run_one_way():
    above = ("driver", "plan", "verify", "study", "study_tables", "scorers", "evaluate_models", "evaluate_driver", "benchmark")
    plain = {stem for stem in PLAIN if stem not in above}
    upwards = {stem: imported(PACKAGE / f"{stem}.py") - plain - {"config"} for stem in plain}
    assert {stem: names for stem, names in upwards.items() if names} == {}
    for stage in STAGES | {"chat", "shards", "scorers", "drive"}:
        assert not imported(PACKAGE / f"{stage}.py") & {"iterate", "pipeline", "driver", "inputs", "plan"}


def test_no_code_that_came_with_data_is_run():
    lines = [
        (path.name, line.strip())
        for path in [*FILES, *(ROOT / "jobs").rglob("*.py")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if DANGEROUS.search(line)
    ]
    assert [line for line in lines if line not in ALLOWED_DANGER] == []
    assert set(ALLOWED_DANGER) <= set(lines), "a line that no longer exists is still allowed"


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(PACKAGE).as_posix() for path in FILES])
def test_file_is_short_enough_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@functools.cache
def reads() -> set[tuple[str, str]]:
    """(holder, option) of every `holder.option`, `holder["option"]` and `getattr(holder, name)` over literal names."""
    found = set()
    for path in FILES:
        if path.name == "config.py":
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
