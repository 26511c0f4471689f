"""What a running stage or measurement has done: a live line on a terminal, one line a minute in a log."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from evolve_ray.store.run import Run, new_events

TICK_S = 0.5
LOG_EVERY_S = 60.0
T = TypeVar("T")


class State:
    """The stage that runs now: its name, how much of it is done, and since when. Fed with events, in their order."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.stage, self.detail, self.unit = "", "", ""
        self.done = self.total = self.begun = 0
        self.started = self.last = clock()

    def apply(self, event: dict[str, Any]) -> None:
        kind, now = event["event"], self.clock()
        if kind == "stage_start":
            number = event["iteration"]
            self.stage = event["stage"] if number is None else f"iteration {number}: {event['stage']}"
            self.detail, self.unit, self.done, self.total, self.begun, self.started = "", "", 0, 0, 0, now
        elif kind == "stage_end":
            self.stage = ""
        elif kind == "shard" and self.stage:
            self.advance("shards", self.done + 1, event["num_shards"])
        elif kind == "training" and self.stage:
            self.advance("steps", event["step"] + 1, event["num_steps"])
            self.detail = f"loss {event['loss']:.4f}"

    def advance(self, unit: str, done: int, total: int) -> None:
        if not self.unit:  # the rate counts from the first sign of life, so that the start of actors does not slow it
            self.begun, self.started = done, self.clock()
        self.unit, self.done, self.total, self.last = unit, done, total, self.clock()

    @property
    def rate(self) -> float | None:
        """Shards or steps a second; None before the second one, and while all of them came in one look at the events."""
        seconds = self.last - self.started
        return (self.done - self.begun) / seconds if seconds >= TICK_S / 2 and self.done > self.begun else None

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate else None

    def text(self) -> str:
        """`iteration 1: generations: 12 of 40 shards, 0.40/s, 1 min left`."""
        if not self.unit:
            return f"{self.stage}: started {duration(self.clock() - self.started)} ago"
        parts = [f"{self.done:,} of {self.total:,} {self.unit}"]
        if self.rate and self.seconds_left is not None:
            parts += [f"{self.rate:.2f}/s", f"{duration(self.seconds_left)} left"]
        return f"{self.stage}: " + ", ".join([*parts, *([self.detail] if self.detail else [])])


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def displayed(state: State, say: Callable[[str], None], update: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Shows `state` while the block runs: live on a terminal, else one line a minute by `say`. `update` brings it up to date."""
    ended = threading.Event()
    with contextlib.ExitStack() as stack:
        if sys.stdout.isatty():
            from rich.live import Live
            from rich.text import Text

            line = Text("", no_wrap=True, overflow="ellipsis")
            live = stack.enter_context(Live(line, refresh_per_second=2, transient=True, redirect_stderr=False))

            def show() -> None:
                line.plain = f"  {state.text()}" if state.stage else ""
                live.refresh()
        else:
            last = time.monotonic()

            def show() -> None:
                nonlocal last
                if not state.stage:
                    last = time.monotonic()
                elif time.monotonic() - last >= LOG_EVERY_S:
                    last = time.monotonic()
                    say(f"  {state.text()}")

        def follow() -> None:
            last_turn = False
            while not last_turn:
                last_turn = ended.wait(TICK_S)
                update()
                show()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextlib.contextmanager
def shown(run: Run, say: Callable[[str], None]) -> Iterator[None]:
    """Shows the progress of the stages of `run` that run inside the block."""
    state = State()
    with open(run.root / "events.jsonl", "rb") as file:
        file.seek(0, 2)

        def update() -> None:
            for event in new_events(file):
                state.apply(event)

        with displayed(state, say, update):
            yield


def each(items: Iterable[T], total: int, name: str, unit: str, say: Callable[[str], None]) -> Iterator[T]:
    """The `total` items one by one; `name: 3 of 12 units, 0.40/s, 23 s left` is shown while they are worked on."""
    state = State()
    state.stage = name
    with displayed(state, say):
        for number, item in enumerate(items, start=1):
            yield item
            state.advance(unit, number, total)
