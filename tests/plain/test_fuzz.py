"""Whatever a file holds, reading it gives a result or one of our errors in one sentence, never a traceback.

FUZZ_CASES sets how many cases each test tries: `FUZZ_CASES=1000 pytest tests/plain/test_fuzz.py` tries 6,000.
"""

import io
import json
import os
import random
import tempfile
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evolve_ray.audit import verify
from evolve_ray.config.load import build, from_json, load
from evolve_ray.config.options import Config
from evolve_ray.config.resolve import flatten, resolved
from evolve_ray.data.prompts import read_prompts
from evolve_ray.data.triples import read_triples
from evolve_ray.errors import EvolveError, IntegrityError, UserError, one_line
from evolve_ray.refine import template as template_file
from evolve_ray.refine.template import load_template
from evolve_ray.store import rows
from evolve_ray.store.manifest import MANIFEST, Manifest, commit, read_manifest
from tests.plain.conftest import RECIPE

CASES = int(os.environ.get("FUZZ_CASES", "40"))
fuzz = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)  # fmt: skip

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3))
KEYS = sorted(flatten(resolved(build(tomllib.loads(RECIPE), "r", RECIPE, ()))))


def spoil(data: bytes, seed: int) -> bytes:
    """A file after an accident: bytes flipped, cut out, doubled or put in."""
    chance, spoilt = random.Random(seed), bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(spoilt) + 1)
        match chance.randrange(4):
            case 0:
                spoilt[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                del spoilt[place : place + chance.randint(1, 20)]
            case 2:
                spoilt[place:place] = spoilt[place : place + chance.randint(1, 20)]
            case _:
                spoilt[place:place] = chance.choice(
                    [b"\x00", b"\xff", b"[", b"{", b'"', b"\n", b"nan", b"1e999", b"\xed\xa0\x80"]
                )
    return bytes(spoilt)


def outcome(read, kind=EvolveError):
    """What `read` gives; an error must be of ours, say something, and be a single printable line."""
    told = ["no error"]
    try:
        return read()
    except kind as error:
        told = [str(error), one_line(error)]
        return None
    finally:
        assert all(text.strip() for text in told)
        assert told[-1].isprintable()


@fuzz
@given(st.integers(), st.binary(max_size=60), st.booleans())
def test_any_recipe_file_is_a_configuration_or_refused(seed, data, whole):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.toml")
        path.write_bytes(data if whole else spoil(RECIPE.encode(), seed))
        found = outcome(lambda: load(path), UserError)
    assert found is None or isinstance(found, Config)


@fuzz
@given(st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=12), SCALARS | JSON), max_size=4), st.booleans())
def test_any_overrides_are_a_configuration_or_refused(given_, as_json):
    overrides = [f"{key}={json.dumps(value) if as_json else value}" for key, value in given_]
    tree = tomllib.loads(RECIPE)
    found = outcome(lambda: build(tree, "recipe.toml", RECIPE, overrides), UserError)
    if found is not None:
        assert from_json(json.loads(json.dumps(resolved(found))), "config.json") == found


LINE = json.dumps({"prompt": "one", "answer": "x", "id": "1", "chosen": "a", "rejected": "b"}).encode()


@fuzz
@given(st.lists(st.binary(max_size=30) | st.integers() | JSON | st.fixed_dictionaries({"prompt": JSON, "id": JSON}), max_size=5))
def test_any_prompt_file_is_rows_or_refused_and_no_row_is_lost(given_):
    lines = [LINE]
    for part in given_:
        raw = spoil(LINE, part) if isinstance(part, int) else part if isinstance(part, bytes) else json.dumps(part).encode()
        lines.append(raw.replace(b"\n", b" "))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.jsonl")
        path.write_bytes(b"\n".join(lines))
        number = sum(bool(line.strip()) for line in lines)
        for column in ("", "id"):
            found = outcome(lambda name=column: read_prompts(str(path), prompt_column="prompt", id_column=name), UserError)
            assert found is None or len(found[0]) + len(found[1]) == number
        columns = {"prompt_column": "prompt", "chosen_column": "chosen", "rejected_column": "rejected"}
        found = outcome(lambda: read_triples(str(path), **columns), UserError)
        assert found is None or len(found[0]) + len(found[1]) == number


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"prompt": f"text {number}", "n": number} for number in range(20)]), sink)
    return sink.getvalue()


@fuzz
@given(st.integers(), st.sampled_from(["default", "tiny"]))
def test_any_parquet_file_and_any_template_is_read_or_refused(seed, name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.parquet")
        path.write_bytes(spoil(parquet(), seed))
        outcome(lambda: read_prompts(str(path), prompt_column="prompt"), UserError)
        template = Path(folder, "template.toml")
        shipped = Path(template_file.__file__).parent / "templates" / f"{name}.toml"
        template.write_bytes(spoil(shipped.read_bytes(), seed))
        outcome(lambda: load_template(str(template), "conversation"), UserError)


def committed(folder: Path) -> Path:
    work = folder / "work"
    work.mkdir()
    rows.write_table(work / "prompts.parquet", [dict.fromkeys(rows.PROMPT.names) | {"prompt_id": "p"}], rows.PROMPT)
    rows.write_jsonl(work / "rejected.jsonl", [])
    final = folder / "run" / "iteration-01" / "prompts"
    commit(work, final, stage="prompts", key="k", num_in=1, num_rows=1, num_rejected=0)
    return final


@fuzz
@given(st.integers(), JSON, st.sampled_from(["bytes", "json", "files", "inputs", "stats", "stage", "key"]))
def test_any_manifest_is_read_or_refused_and_verify_goes_on(seed, value, what):
    with tempfile.TemporaryDirectory() as folder:
        final = committed(Path(folder))
        path = final / MANIFEST
        body = json.loads(path.read_bytes())
        if what in body:
            path.write_text(json.dumps(body | {what: value}))
        else:
            path.write_bytes(spoil(path.read_bytes(), seed) if what == "bytes" else json.dumps(value).encode())
        for checked in (False, True):
            found = outcome(lambda full=checked: read_manifest(final, verify=full), IntegrityError)
            assert found is None or isinstance(found, Manifest)
        root = Path(folder, "run")
        (root / "config.json").write_text(json.dumps(resolved(build(tomllib.loads(RECIPE), "", "", ()))))
        verify.text(root, verify.verify(root))


@fuzz
@given(st.integers(), st.sampled_from(["prompts.parquet", "rejected.jsonl", MANIFEST, "../../config.json", "../../events.jsonl"]))
def test_any_damage_to_a_run_is_found_and_named(seed, name):
    with tempfile.TemporaryDirectory() as folder:
        final = committed(Path(folder))
        root = Path(folder, "run")
        config = json.dumps(resolved(build(tomllib.loads(RECIPE), "", "", ())))
        (root / "config.json").write_text(config)
        (root / "events.jsonl").write_text('{"event": "driver_start", "command": "c"}\n')
        before = (final / name).read_bytes()
        (final / name).write_bytes(spoil(before, seed))
        found = outcome(lambda: verify.verify(root))
        if found is not None and (final / name).read_bytes() != before and not name.startswith("..") and name != MANIFEST:
            assert list(found.faults) == ["iteration-01/prompts"]


def test_errors_are_printed_as_one_line_without_control_characters():
    assert one_line(UserError("a\nb\x1b[31m \ud800 caf\u00e9 \u2028")) == "a\\nb\\x1b[31m \\ud800 caf\u00e9 \\u2028"


@pytest.mark.parametrize("depth", [10**3, 10**5])
def test_json_that_is_nested_without_end_is_refused(tmp_path, depth):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(UserError):
        read_prompts(str(path), prompt_column="prompt")
    (tmp_path / MANIFEST).write_text("[" * depth)
    with pytest.raises(IntegrityError):
        read_manifest(tmp_path)
