"""What a running stage has done: the text, the line a minute of a log, and the live line of a terminal."""

import io
import time

from evolve_ray.store.run import Run
from evolve_ray.watch import progress


def test_text_of_a_stage_from_its_events():
    now = [0.0]
    state = progress.State(clock=lambda: now[0])
    state.apply({"event": "stage_start", "stage": "generations", "iteration": 1})
    now[0] = 30.0
    assert state.text() == "iteration 1: generations: started 30 s ago"
    for seconds in (40.0, 42.0, 44.0):
        now[0] = seconds
        state.apply({"event": "shard", "num_shards": 203})
    assert state.text() == "iteration 1: generations: 3 of 203 shards, 0.50/s, 7 min left"
    state.apply({"event": "stage_end", "stage": "generations", "iteration": 1})
    assert state.stage == ""


def test_no_rate_for_what_came_in_one_look_at_the_events():
    now = [0.0]
    state = progress.State(clock=lambda: now[0])
    state.apply({"event": "stage_start", "stage": "evaluation", "iteration": 1})
    for seconds in (5.0, 5.00002):
        now[0] = seconds
        state.apply({"event": "shard", "num_shards": 4})
    assert state.text() == "iteration 1: evaluation: 2 of 4 shards"
    now[0] = 6.0
    state.apply({"event": "shard", "num_shards": 4})
    assert state.text() == "iteration 1: evaluation: 3 of 4 shards, 2.00/s, 0 s left"


def test_text_of_a_training_has_its_loss():
    now = [0.0]
    state = progress.State(clock=lambda: now[0])
    state.apply({"event": "stage_start", "stage": "checkpoint", "iteration": None})
    for step in (9, 19):
        now[0] += 10
        state.apply({"event": "training", "step": step, "num_steps": 40, "loss": 0.5})
    assert state.text() == "checkpoint: 20 of 40 steps, 1.00/s, 20 s left, loss 0.5000"


def run_stage(tmp_path):
    run = Run(tmp_path)
    run.event("driver_start")
    return run


def test_log_gets_a_line_when_the_time_has_come(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.05)
    run, lines = run_stage(tmp_path), []
    with progress.shown(run, lines.append), run.timed("generations", 2):
        run.event("shard", num_shards=4)
        deadline = time.monotonic() + 10
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lines[0].startswith("  iteration 2: generations: ")


def test_terminal_gets_a_live_line_that_is_gone_at_the_end(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    run = run_stage(tmp_path)
    with progress.shown(run, print), run.timed("pairs", 3):
        deadline = time.monotonic() + 10
        while "iteration 3: pairs" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        print("  a line of the run")
    text = terminal.getvalue()
    assert "iteration 3: pairs: started" in text
    assert "a line of the run" in text


def test_items_are_worked_on_one_by_one_and_their_progress_is_said(monkeypatch):
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.03)
    lines, worked_on = [], []
    for item in progress.each(iter("abc"), 3, "letters", "turns", lines.append):
        worked_on.append(item)
        time.sleep(0.05)
    assert worked_on == ["a", "b", "c"]
    assert lines[0].startswith("  letters: started ")
    assert any(line.startswith("  letters: 2 of 3 turns") for line in lines)
