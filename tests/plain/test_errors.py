"""Known faults survive pickling between processes and are found below whatever wraps them."""

import pickle

import pytest

from evolve_ray import errors
from evolve_ray.errors import EvolveError, IntegrityError, NumericsError, UserError, find_cause

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EvolveError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_error_survives_pickling(kind):
    back = pickle.loads(pickle.dumps(kind("field: is wrong")))
    assert (type(back), str(back), back.exit_code) == (kind, "field: is wrong", kind.exit_code)


def test_exit_codes_are_the_documented_ones():
    codes = {kind.__name__.removesuffix("Error"): kind.exit_code for kind in KINDS if kind is not EvolveError}
    assert codes == {"User": 2, "Locked": 3, "Integrity": 4, "Resource": 5, "Numerics": 6, "Stalled": 7}


def test_error_itself_is_its_cause():
    error = UserError("x")
    assert find_cause(error) is error


def test_cause_is_found_through_several_levels():
    inner = IntegrityError("rows lost")

    def wrap():
        try:
            raise ValueError("wrapped") from inner
        except ValueError:
            return 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        wrap()
    assert find_cause(caught.value) is inner


def test_cause_is_found_in_the_attribute_that_ray_sets():
    wrapped = RuntimeError("task failed")
    wrapped.cause = RuntimeError("deeper")
    wrapped.cause.cause = UserError("model.path: gone")
    assert find_cause(wrapped) is wrapped.cause.cause


def test_cause_is_found_among_the_failures_of_workers():
    group = RuntimeError("worker group failed")
    group.worker_failures = {0: RuntimeError("other"), 1: NumericsError("loss is not finite")}
    assert str(find_cause(group)) == "loss is not finite"


def test_class_that_ray_derives_from_the_cause_is_undone():
    derived = type("RayTaskError(UserError)", (RuntimeError, UserError), {})("traceback text")
    derived.cause = UserError("plain sentence")
    assert find_cause(derived) is derived.cause


def test_unknown_fault_has_no_cause_even_in_a_circle():
    one, two = ValueError("1"), ValueError("2")
    one.__cause__, two.__cause__ = two, one
    assert find_cause(one) is None
