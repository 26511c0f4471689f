"""The Ray Serve deployments: a replica is one engine with its HTTP side; a scorer scores for all replicas."""

import asyncio
import math
import os
import threading
from typing import Any

from evolve_ray.models.chat import Chat
from evolve_ray.refine.asks import Verdict
from evolve_ray.score.combined import build_scorer
from evolve_ray.score.protocol import call_scorer, is_finite
from evolve_ray.score.verifiers import VERIFIERS, build_verifier, same_answer
from evolve_ray.serve.app import App
from evolve_ray.serve.engine import make_chat, make_engine
from evolve_ray.serve.metrics import ServeMetrics
from evolve_ray.serve.settings import Settings
from evolve_ray.serve.shortcut import SocketServer

EXIT_AFTER_S = 1.0  # a replica whose engine is dead first answers its clients, then ends, so that Serve starts another
DRAIN_POLL_S = 0.1
REPEAT_S = 1.0  # Ray shows a gauge only for a while after it was set


class Replica:
    """One engine and its endpoint; Serve calls the methods."""

    async def __init__(self, settings: Settings, scoring: Any = None):  # type: ignore[misc]  # Serve awaits it
        from ray import serve

        self.metrics = ServeMetrics()
        self.chat = Chat(settings.folder, rendering=settings.template.rendering)
        self.engine = self.start_engine(settings)
        serving = make_chat(self.engine, settings, self.chat)
        scorer = RemoteScorer(scoring) if scoring is not None else None
        self.endpoint = App(settings, serving, self.chat, scorer, self.metrics, self.end_soon)
        self.sockets = SocketServer(self.endpoint, serve.get_replica_context().replica_id.unique_id)
        self.tasks = [asyncio.create_task(self.sockets.serve()), asyncio.create_task(self.repeat())]
        self.ending = False

    def start_engine(self, settings: Settings) -> Any:
        return make_engine(settings, self.metrics)

    def __serve_build_asgi_app__(self) -> App:
        return self.endpoint

    async def check_health(self) -> None:
        """Serve replaces a replica whose check raises."""
        await self.engine.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {"running_rounds": float(self.metrics.running)}

    def end_soon(self) -> None:
        """Ends this process, because its engine is dead."""
        if not self.ending:
            self.ending = True
            threading.Timer(EXIT_AFTER_S, os._exit, (1,)).start()

    async def repeat(self) -> None:
        while True:
            await asyncio.sleep(REPEAT_S)
            self.metrics.ray.repeat()

    async def __del__(self) -> None:
        """Serve calls this at the end, and waits for it as long as `serve.drain_s`: what runs may finish."""
        self.sockets.hide()
        while self.endpoint.taken:
            await asyncio.sleep(DRAIN_POLL_S)
        for task in self.tasks:
            task.cancel()
        self.engine.shutdown()


class Scoring:
    """The recipe's scorer and verifier. Requests of all replicas come here, several at a time."""

    def __init__(self, settings: Settings):
        config = settings.config
        self.name, self.members = config.scorer.name, config.scorer.members
        self.compares = config.verifier is not None and config.verifier.name in VERIFIERS  # a plug may know the answer itself
        self.verifier = build_verifier(config.verifier) if config.verifier else None
        models, grading = settings.reward_models, config.verifier
        self.scorer = build_scorer(config.scorer, models, self.verifier, grading=grading) if settings.has_scorer else None
        self.same = same_answer(config.verifier)
        self.lock = threading.Lock()  # a verifier may talk to a process of its own

    async def score(self, prompt: str, answer: str | None, texts: list[str]) -> list[float | None]:
        return await asyncio.to_thread(self.values, self.scorer, prompt, answer, texts)

    async def verify(self, prompt: str, answer: str | None, text: str) -> float:
        (value,) = await asyncio.to_thread(self.values, self.verifier, prompt, answer, [text])
        return math.nan if value is None else value

    def values(self, scorer: Any, prompt: str, answer: str | None, texts: list[str]) -> list[float | None]:
        """The scores of some responses to one prompt; None for one that has no finite score."""
        with self.lock:
            try:
                values = call_scorer(f"scorer {self.name}", scorer, [prompt] * len(texts), [answer] * len(texts), texts)
            except Exception:
                if answer is None:  # what a verifier does that has nothing to compare with
                    return [None] * len(texts)
                raise
        return [value if isinstance(value, Verdict) else float(value) if is_finite(value) else None for value in values]

    async def needs_answer(self, part: str, prompt: str) -> bool:
        """Whether `part` ("scorer" or "verifier") has no value for a response to this prompt without the right answer."""
        if self.compares and (part == "verifier" or "verifier" in (self.name, *self.members)):
            return True
        scorer = self.scorer if part == "scorer" else self.verifier
        return await asyncio.to_thread(self.values, scorer, prompt, None, [""]) == [None]

    async def groups(self, texts: list[str]) -> list[int]:
        return await asyncio.to_thread(self.group, texts)

    def group(self, texts: list[str]) -> list[int]:
        """For each text the place of the first one that gives the same answer."""
        with self.lock:
            return [
                next(first for first in range(place + 1) if self.same(texts[first], text)) for place, text in enumerate(texts)
            ]


class RemoteScorer:
    """The scorer as the rounds see it (`rounds.Scorer`), behind a Serve handle."""

    def __init__(self, handle: Any):
        self.handle = handle

    def __getattr__(self, verb: str) -> Any:
        return getattr(self.handle, verb).remote
