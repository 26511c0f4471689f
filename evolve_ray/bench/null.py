"""The null engine: fixed responses without a model, to measure all that is around an engine. `engine.name` refers to it."""

import time
from collections import deque

from evolve_ray.generate.spec import Completion, GenerateSpec
from evolve_ray.models.chat import Chat

TEXTS = ("yes", "no")


class NullEngine:
    """Answers one request per step, after `engine.args.service_s` seconds, with one of two texts that the seed selects."""

    def __init__(self, spec: GenerateSpec, chat: Chat):
        self.waiting: deque[tuple[str, list[int], int]] = deque()
        self.use(spec, chat)

    def use(self, spec: GenerateSpec, chat: Chat) -> None:
        self.service_s = spec.engine.args["service_s"]

    def reload(self, spec: GenerateSpec, chat: Chat) -> None:
        self.use(spec, chat)

    def submit(self, request_id: str, prompt_ids: list[int], seed: int, *, logps: bool = False) -> None:
        self.waiting.append((request_id, prompt_ids, seed))

    def step(self) -> list[Completion]:
        request_id, prompt_ids, seed = self.waiting.popleft()
        if self.service_s:
            time.sleep(self.service_s)
        text = TEXTS[seed % 2]
        return [Completion(request_id, text, len(text) + 1, len(prompt_ids), 0, "stop")]

    def counts(self) -> dict[str, int]:
        return {}
