"""Known faults survive the way between processes with their class and their sentence."""

import json
import pickle

import pytest

from evolve_ray import errors
from evolve_ray.errors import EvolveError, UserError, pack, unpack

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EvolveError)]
KNOWN = [kind for kind in KINDS if kind is not EvolveError]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_error_survives_pickling(kind):
    back = pickle.loads(pickle.dumps(kind("field: is wrong")))
    assert (type(back), str(back), back.exit_code) == (kind, "field: is wrong", kind.exit_code)


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)
def test_error_survives_json(kind):
    back = unpack(json.loads(json.dumps(pack(kind("p.jsonl:1: caf\u00e9 \u2028 is wrong")))))
    assert (type(back), str(back)) == (kind, "p.jsonl:1: caf\u00e9 \u2028 is wrong")


def test_exit_codes_are_the_documented_ones():
    codes = {kind.__name__.removesuffix("Error"): kind.exit_code for kind in KNOWN}
    assert codes == {"User": 2, "Locked": 3, "Integrity": 4, "Resource": 5, "Numerics": 6, "Stalled": 7}


def test_class_that_ray_derives_from_the_cause_is_undone():
    derived = type("RayTaskError(UserError)", (RuntimeError, UserError), {})("traceback text")
    derived.cause = UserError("plain sentence")
    assert pack(derived) == {"kind": "UserError", "message": "plain sentence"}
