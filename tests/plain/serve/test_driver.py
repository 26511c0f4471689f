"""The command's arguments, and what it says of a start that failed."""

import pytest

from evolve_ray.errors import ResourceError, UserError
from evolve_ray.serve.driver import main, reason_of

TRACEBACK = """\
The deployment failed to start 2 times in a row. See logs. Error:
\x1b[36mray::ServeReplica:evolve-ray:replica.initialize_and_get_metadata()\x1b[39m (pid=1, ip=127.0.0.1)
  File "replica.py", line 30, in __init__
    raise UserError("x")
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model", "--port", "0"], "--port: is 0, but must be from 1 to 65535"),
        (["no-such-model", "--host", "0.0.0.0"], "--host 0.0.0.0: others can reach this address, so the endpoint needs keys"),
        (["no-such-model", "--api-key-env", "NOT_THERE"], "--api-key-env NOT_THERE: the environment variable is not set"),
        (["./no-such-model", "--plan"], "no-such-model"),
        (["./x", "--recipe", "no.toml", "--plan"], "no such recipe"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "no.toml" in arguments:
        monkeypatch.setattr("evolve_ray.models.checkpoints.find", lambda argument: None)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_the_reason_of_a_failed_start_is_our_own_error_if_there_is_one():
    error = reason_of(TRACEBACK + "evolve_ray.errors.UserError: engine.args: no such argument\n")
    assert (type(error), str(error)) == (UserError, "engine.args: no such argument")


def test_else_the_last_error_that_python_named():
    error = reason_of(TRACEBACK + "RuntimeError: one\nValueError: not enough memory\nsome text\n")
    assert isinstance(error, ResourceError)
    assert "the model did not start: ValueError: not enough memory; see" in str(error)
    assert "no reason was given" in str(reason_of(""))
