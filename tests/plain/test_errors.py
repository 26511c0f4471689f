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


def test_process_that_ray_lost_is_one_sentence_and_exit_code_five_and_an_error_of_an_actor_stays_a_traceback(capsys):
    from ray import exceptions
    from ray.core.generated.common_pb2 import ActorDiedErrorContext

    context = ActorDiedErrorContext(class_name="TrainController", actor_id=bytes(16), error_message="killed\nby somebody")
    died = "died unexpectedly before finishing this task. class_name: TrainController"
    for lost, said in ((exceptions.ActorDiedError(context), died), (exceptions.WorkerCrashedError(), "worker died unexpectedly")):

        def command(lost=lost):
            raise lost

        assert errors.run_command(command, "python jobs/iterate.py r.toml") == 5
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ray: The ")
        assert said in line
        assert line.endswith("; continue with: python jobs/iterate.py r.toml")

    def broken():
        raise exceptions.ActorDiedError(exceptions.RayTaskError("Host.__init__", "Traceback ...", ValueError("x")))

    with pytest.raises(exceptions.ActorDiedError):
        errors.run_command(broken, "")


def test_class_that_ray_derives_from_the_cause_is_undone():
    derived = type("RayTaskError(UserError)", (RuntimeError, UserError), {})("traceback text")
    derived.cause = UserError("plain sentence")
    assert pack(derived) == {"kind": "UserError", "message": "plain sentence"}
