"""The two servers of the serving benchmark as child processes on loopback: this endpoint and `vllm serve`."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import IO, Any

import psutil

from evolve_ray.config.options import Config
from evolve_ray.errors import ResourceError

JOB = Path(__file__).resolve().parents[2] / "jobs" / "serve.py"
START_S, STOP_S, POLL_S = 300.0, 90.0, 0.5


class Server:
    """A server that answers at `url`; `stop` ends it and what it has started."""

    def __init__(self, name: str, command: list[str], port: int, log: Path, env: dict[str, str]):
        self.name, self.log, self.url = name, log, f"http://127.0.0.1:{port}"
        self.file: IO[bytes] = log.open("wb")
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | env
        self.process = subprocess.Popen(command, stdout=self.file, stderr=subprocess.STDOUT, env=environment)

    def wait(self) -> None:
        """Returns when it answers; raises ResourceError with its last line if it does not."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5):
                    return
            except OSError:
                time.sleep(POLL_S)
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["it wrote nothing"]
        raise ResourceError(f"serve: {self.name} did not start: {lines[-1]}")

    def cpu_s(self) -> float:
        """CPU seconds of the server and of all that it has started, so far."""
        total = 0.0
        for process in (root := psutil.Process(self.process.pid), *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.file.close()


def start(name: str, command: list[str], port: int, folder: Path, env: dict[str, str]) -> Server:
    return Server(name, command, port, folder / f"{name.split()[0]}.log", env)


def endpoint(model: str, port: int, folder: Path, overrides: list[str], recipe: str | None = None) -> Server:
    """This package's endpoint, as a user starts it."""
    more = ["--recipe", recipe] if recipe else []
    command = [sys.executable, str(JOB), model, "--name", "model", "--port", str(port), *more, *overrides]
    return start("evolve-ray", command, port, folder, {})


def vllm(model: str, port: int, folder: Path, args: dict[str, Any], env: dict[str, str]) -> Server:
    """`vllm serve` with the same arguments for its engine."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "model",
               "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log", *flags(args)]  # fmt: skip
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return start("vllm serve", command, port, folder, quiet | env)


def engine_arguments(config: Config) -> dict[str, Any]:
    """The engine of a recipe as vLLM's own arguments."""
    more = {"dtype": config.model.dtype, "max_model_len": config.model.context_tokens, "max_num_seqs": config.engine.max_num_seqs}
    return config.engine.args | more


def flags(args: dict[str, Any]) -> list[str]:
    """Engine arguments as flags of `vllm serve`."""
    found = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
