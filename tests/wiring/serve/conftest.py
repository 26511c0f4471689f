"""A real Serve with two replicas whose engines are fakes, and clients for it."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from evolve_ray.serve import driver
from evolve_ray.serve.deploy import APP, application
from evolve_ray.serve.settings import hash_key, settings_of
from tests.plain.conftest import tiny_model
from tests.real.cluster import free_port

__all__ = ["tiny_model"]
KEYS = ("first-key-0123456789", "second-key-0123456789")
RUNNING, QUEUED = 6, 2  # rounds in a replica's engine, and rounds that may wait
OPTIONS = (f"engine.max_num_seqs={RUNNING}", f"serve.max_queued={QUEUED}", "engine.cpus_per_actor=0.2", "ray.num_cpus=4",
           "ray.object_store_mib=80", "ray.dashboard=false", "serve.max_tokens=4000", "serve.drain_s=20",
           "template.name=tiny")  # fmt: skip


class Endpoint:
    """Where the endpoint is, and what its metrics count."""

    def __init__(self, port: int, model: str):
        self.url, self.model = f"http://127.0.0.1:{port}", model
        self.headers = {"Authorization": f"Bearer {KEYS[1]}"}

    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEYS[0], max_retries=0, timeout=60)

    def asynchronous(self) -> Any:
        import httpx

        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=60, limits=limits)

    def body(self, text: str, **more: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": [{"role": "user", "content": text}], **more}

    def metrics(self) -> dict[str, float]:
        """Every sample, summed over the replicas of this node."""
        import httpx

        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def until(self, found: Any, what: str, seconds: float = 60) -> Any:
        """Waits until a function of the metrics is true."""
        end = time.monotonic() + seconds
        while not found(metrics := self.metrics()):
            assert time.monotonic() < end, (what, metrics)
            time.sleep(0.1)
        return metrics

    def pids(self) -> list[int]:
        """The processes of the replicas, which are descendants of this one."""
        found = psutil.Process().children(recursive=True)
        return [process.pid for process in found if is_replica(process)]


def is_replica(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[:1] == ["ray::ServeReplica:evolve-ray:replica"]
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def serving(folder: str, kind: Any, *options: str) -> Iterator[Endpoint]:
    """An endpoint of its own on a local Ray. `kind` is the class of its replicas."""
    from ray import serve

    from evolve_ray.pools.session import start_ray, stop_ray

    before = dict(os.environ)
    settings = settings_of(folder, None, [*OPTIONS, *options], "tiny", KEYS)
    assert settings.key_hashes == tuple(map(hash_key, KEYS))
    driver.prepare_node()
    try:
        start_ray(settings.config)
        port = free_port()
        driver.deploy(application(settings, kind), "127.0.0.1", port)
        yield Endpoint(port, settings.name)
        serve.delete(APP)
    finally:
        stop_ray()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="package")
def endpoint(tiny_model) -> Iterator[Endpoint]:
    from tests.wiring.serve.fake import FakeReplica

    with serving(str(tiny_model), FakeReplica, "serve.replicas=2") as found:
        yield found
