"""Fakes for tests of wiring alone: an engine without a model and scorers that misbehave on purpose."""

import contextlib
import hashlib
import os
import signal
import tempfile
import time
from pathlib import Path

from evolve_ray.generate.spec import Completion
from evolve_ray.generate.worker import Generator
from evolve_ray.score.worker import ScoreWorker


class FakeEngine:
    """Answers every request after a few steps with letters that only its seed decides."""

    def __init__(self, spec, chat):
        self.chat = chat
        self.waiting: list[tuple[str, list[int], int]] = []

    def use(self, spec, chat):
        self.chat = chat

    def reload(self, spec, chat):
        self.chat = chat

    def submit(self, request_id, prompt_ids, seed, *, logps=False):
        self.waiting.append((request_id, prompt_ids, seed))

    def step(self):
        # The latest request first: whoever relies on the order of submission is found out.
        request_id, prompt_ids, seed = self.waiting.pop()
        letters = hashlib.sha256(str(seed).encode()).hexdigest()[:6]
        return [Completion(request_id, letters, 7, len(prompt_ids), 0, "stop" if seed % 5 else "length")]

    def counts(self):
        return {}


class ModelEngine(FakeEngine):
    """Answers with three letters of `ab` that the model's hash, the request and its seed decide: often the same ones."""

    def __init__(self, spec, chat):
        super().__init__(spec, chat)
        self.model = spec.model_hash

    def reload(self, spec, chat):
        super().reload(spec, chat)
        self.model = spec.model_hash

    def step(self):
        request_id, prompt_ids, seed = self.waiting.pop()
        drawn = hashlib.sha256(f"{self.model} {seed}".encode()).digest()
        text = "".join("ab"[byte % 2] for byte in drawn[:3])
        return [Completion(request_id, text, 3 + drawn[4] % 4, len(prompt_ids), 0, "stop" if drawn[3] % 8 else "length")]


class SlowEngine(FakeEngine):
    """Takes a quarter of a second for each answer, so that somebody outside can act between two shards."""

    def step(self):
        time.sleep(0.25)
        return super().step()


class DyingEngine(FakeEngine):
    """Kills its process in the middle of a shard, once for each mark that it can still place in $FAKE_MARKS."""

    def step(self):
        marks = Path(os.environ["FAKE_MARKS"])
        placed = len(list(marks.iterdir()))
        if len(self.waiting) < 12 and placed < int(os.environ["FAKE_DEATHS"]):
            (marks / str(placed)).touch()
            os._exit(1)
        return super().step()


class MarkedEngine(FakeEngine):
    """Goes wrong at the request whose seed is $FAKE_SEED: kills its process, or hangs $FAKE_HANGS times."""

    def step(self):
        seeds = {str(seed) for _, _, seed in self.waiting}
        if os.environ["FAKE_SEED"] in seeds:
            marks = Path(os.environ["FAKE_MARKS"])
            placed = len(list(marks.iterdir()))
            if placed < int(os.environ.get("FAKE_DEATHS", 0)):
                (marks / str(placed)).touch()
                os._exit(1)
            if placed < int(os.environ.get("FAKE_HANGS", 0)):
                (marks / str(placed)).touch()
                os.kill(os.getpid(), signal.SIGSTOP)
        return super().step()


class SlowStartEngine(FakeEngine):
    """Takes its time with the request whose seed is $FAKE_SLOW."""

    def step(self):
        if os.environ["FAKE_SLOW"] in {str(seed) for _, _, seed in self.waiting}:
            time.sleep(1.5)
        return super().step()


class DyingAfter:
    """A worker of a pool that dies once, right after the rename that commits its first shard: nobody hears of it but RUN/died."""

    def commit_shard(self, shard):
        stats = super().commit_shard(shard)
        committed = Path(self.spec.work) / f"shard-{shard:05d}"
        with contextlib.suppress(FileExistsError), open(Path(self.spec.work).parents[1] / "died", "x") as mark:
            mark.write(f"{os.getpid()} {committed.name} {(committed / 'rows.parquet').stat().st_mtime_ns}")
            mark.close()
            os._exit(1)
        return stats


class DyingAfterCommit(DyingAfter, Generator):
    pass


class DyingScorerAfterCommit(DyingAfter, ScoreWorker):
    pass


class DyingScorer:
    """Kills its process at the first batch, once: the scores were computed and are lost on their way."""

    mark = Path(tempfile.gettempdir()) / "evolve-ray-dying-scorer"

    def __call__(self, prompts, answers, responses):
        found = LetterScorer()(prompts, answers, responses)
        if not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return found


class OddScorer:
    """Gives no number for one draft in eight."""

    odd: object = float("nan")

    def __call__(self, prompts, answers, responses):
        return [self.odd if r[0] in "01" else float(int(r, 16)) for r in responses]


class InfiniteScorer(OddScorer):
    """Gives what is above every number."""

    odd = float("inf")


class WordScorer(OddScorer):
    """Gives a number in words."""

    odd = "0.5"


class ShortScorer(OddScorer):
    """Leaves out the drafts that it has no number for, so that nobody can tell whose the others are."""

    odd = 0.0

    def __call__(self, prompts, answers, responses):
        return super().__call__(prompts, answers, responses)[:-1]


class LetterScorer:
    """A number for any text: the value of its characters and its length."""

    def __call__(self, prompts, answers, responses):
        return [sum(map(ord, response)) / (len(response) + 1) + len(response) / 100 for response in responses]


class EvenDigit:
    """A verifier that finds half of what `FakeEngine` writes right: texts that begin with an even digit."""

    def __call__(self, prompts, answers, responses):
        return [float(response[0] in "02468ace") for response in responses]


class LongerIsBetter:
    """A scorer that is easily hacked: the characters of a response."""

    def __call__(self, prompts, answers, responses):
        return [float(len(response)) for response in responses]
