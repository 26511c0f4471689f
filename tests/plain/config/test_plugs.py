"""Plugs of one's own: loading, signatures, options, the hash of their source, and one sentence for an error inside one."""

import pickle
import textwrap
from dataclasses import dataclass

import pytest

from evolve_ray.config import plugs
from evolve_ray.config.option import option
from evolve_ray.errors import NumericsError, UserError, failure, pack, unpack


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into a folder of the Python path; returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    plugs.source_hash.cache_clear()

    def write(text, name):
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return name

    yield write
    plugs.source_hash.cache_clear()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "broken_syntax",
            "x = 1\ny = = 2\n",
            r"cannot be loaded: SyntaxError: invalid syntax, at broken_syntax\.py:2; fix",
        ),
        ("broken_name", "x = 1\n\ny = missing\n", r"cannot be loaded: NameError: name 'missing' .*, at broken_name\.py:3"),
        (
            "broken_import",
            "import no_such_module\n",
            r".* No module named 'no_such_module' \(broken_import\.py:1\)",
        ),
        ("fine", "x = 1\n", r"cannot be loaded: module 'fine' has no attribute 'Plug'; check the name and the Python path"),
    ],
)
def test_a_plug_that_cannot_be_loaded_is_one_sentence_with_its_line(module, name, text, message):
    module(text, name)
    with pytest.raises(UserError, match=r"^scorer\.name: '" + name + ":Plug' " + message):
        plugs.find_plug({}, f"{name}:Plug", "scorer.name")


def test_an_error_inside_a_plug_names_plug_row_and_the_line_of_its_own_file(module):
    name = module("import json\n\ndef score(text):\n    return json.loads(text)\n", "raising")
    score = plugs.find_plug({}, f"{name}:score", "scorer.name")
    with pytest.raises(UserError) as raised, plugs.blame("scorer.name", f"{name}:score", "prompt p7"):
        score("{")
    assert str(raised.value) == (
        "scorer.name: 'raising:score' raised JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1), at raising.py:4, for prompt p7; fix the plug, then submit the same command again; its traceback is in "
        "events.jsonl"
    )
    assert "in score" in raised.value.log
    assert failure(raised.value) == {"error": f"UserError: {raised.value}", "traceback": raised.value.log}
    assert failure(ValueError("x")) == {"error": "ValueError: x"}
    for copy in (unpack(pack(raised.value)), pickle.loads(pickle.dumps(raised.value))):
        assert (str(copy), copy.log) == (str(raised.value), raised.value.log)


@pytest.mark.parametrize(
    ("name", "error"),
    [("mine:plug", NumericsError("known")), ("mine:plug", MemoryError()), ("chain", ValueError("a fault of this package"))],
)
def test_what_is_no_fault_of_a_plug_passes_unchanged(name, error):
    with pytest.raises(type(error)) as raised, plugs.blame("strategy.name", name):
        raise error
    assert raised.value is error


class RayLike(UserError):
    """What Ray makes of an error that passes two processes: its text is a traceback."""

    def __init__(self, cause):
        super().__init__("ray::Host.call()\n  Traceback ...")
        self.cause = cause


def test_a_known_error_that_passed_several_processes_is_still_its_own_sentence():
    assert unpack(pack(RayLike(RayLike(UserError("one sentence"))))).args == ("one sentence",)


def test_the_hash_of_a_plug_changes_with_its_file_and_with_what_it_imports_from_its_folder(module):
    def hash_of():
        plugs.source_hash.cache_clear()
        return plugs.sources("plugged.mine:Plug")["plugs"]["plugged.mine:Plug"]

    module("", "plugged.__init__")
    module("from plugged import near\n\nclass Plug:\n    def late(self):\n        from .late import x\n", "plugged.mine")
    for name in ("near", "late", "stranger"):
        module("x = 1\n", f"plugged.{name}")
    module("x = 1\n", "beside")
    hashes = [hash_of()]
    for name in ("near", "late"):
        module("x = 2\n", f"plugged.{name}")
        hashes.append(hash_of())
    assert len(set(hashes)) == 3
    for name in ("plugged.stranger", "beside"):
        module("x = 2\n", name)
        assert hash_of() == hashes[-1]


def test_shipped_plugs_add_nothing_to_a_stage_key():
    assert plugs.sources("chain", "evolve_ray.refine.strategies:refine_given", "verifier") == {}


@dataclass(frozen=True)
class Vote:
    threshold: float = option("smallest share of the votes", 0.5, low=0.0, high=1.0)
    lowest: int = option("fewest votes", 2, low=1)


def by_vote(prompt, drafts, options, args: Vote):
    return args


def by_table(prompt, drafts, options, args):
    return args


def without(prompt, drafts, options):
    return None


def test_a_plug_gets_its_options_checked_and_with_their_defaults():
    call = plugs.with_args("selection.args", "mine:by_vote", by_vote, {"threshold": 1})
    assert call(1, 2, 3) == Vote(threshold=1.0, lowest=2)
    assert plugs.with_args("selection.args", "mine:by_table", by_table, {"any": [1]})(1, 2, 3) == {"any": [1]}
    assert plugs.with_args("selection.args", "mine:without", without, {}) is without


@pytest.mark.parametrize(
    ("plug", "table", "message"),
    [
        (by_vote, {"treshold": 0.7}, r"selection\.args\.treshold: unknown option; did you mean 'threshold'\?"),
        (by_vote, {"threshold": 2.0}, r"selection\.args\.threshold: is 2\.0, but must be at most 1\.0"),
        (by_vote, {"lowest": "two"}, r"selection\.args\.lowest: is 'two' \(a string\), but must be a whole number"),
        (without, {"threshold": 0.7}, r"selection\.args: holds threshold, but 'mine:plug' takes no `args`; remove the table"),
    ],
)
def test_a_wrong_option_of_a_plug_is_refused(plug, table, message):
    with pytest.raises(UserError, match=message):
        plugs.with_args("selection.args", "mine:plug", plug, table)
