"""The Ray Serve application: deployments and their resources, for `jobs/serve.py` and for `serve deploy` (cluster/serve.yaml)."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from evolve_ray.errors import UserError
from evolve_ray.serve.metrics import MULTIPROC
from evolve_ray.serve.settings import Settings, read_keys, settings_of

APP = "evolve-ray"
GUARD = "evolve_ray.serve.guard:middlewares"
# For every process of Serve on a node, before Ray starts there. Serve's proxy runs the guard, and gives routing no thread of its
# own, which would cost each request two switches. On a busy machine it may take a while to start.
NODE_ENV = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": GUARD,
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
# A replica does nothing but serve, so it runs in the loop of its actor; and vLLM says on its own only what went wrong.
REPLICA_ENV = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
HEALTH_CHECK_S = 2.0
STARTED = time.time_ns()
START_ATTEMPTS = 2  # of a replica before the deployment counts as failed
DIRECT_CALLS = 100  # requests beyond the places that a replica accepts, in order to refuse them itself


def application(settings: Settings, kind: Any = None) -> Any:
    """The application; its ingress is the replica, so that a request and all its rounds stay in one process.

    `kind` is the class of a replica.
    """
    from ray import serve
    from ray.serve.config import BackpressureConfig

    from evolve_ray.serve.replica import Replica, Scoring

    config = settings.config
    engine, limits = config.engine, config.serve
    env = REPLICA_ENV | {MULTIPROC: metrics_folder()} | {name: str(value) for name, value in engine.env.items()}
    options: dict[str, Any] = {
        "name": "replica",
        "ray_actor_options": {
            "num_cpus": engine.cpus_per_actor, "num_gpus": engine.gpus_per_actor, "runtime_env": {"env_vars": env}
        },
        "max_ongoing_requests": settings.places + DIRECT_CALLS,
        "max_queued_requests": settings.places,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=limits.retry_after_s),
        "graceful_shutdown_timeout_s": limits.drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_CHECK_S,
        "max_constructor_retry_count": START_ATTEMPTS,
    }  # fmt: skip
    if limits.max_replicas:
        options["autoscaling_config"] = {
            "min_replicas": limits.replicas,
            "max_replicas": limits.max_replicas,
            "target_ongoing_requests": limits.target_rounds,
            "policy": {"policy_function": "evolve_ray.serve.scaling:by_rounds"},
        }
    else:
        options["num_replicas"] = limits.replicas
    scoring = None
    if settings.has_scorer or config.verifier:
        scorer = config.scorer
        scoring = serve.deployment(
            Scoring,
            name="scorer",
            num_replicas=scorer.actors,
            max_ongoing_requests=settings.places,
            ray_actor_options={"num_cpus": scorer.cpus_per_actor, "num_gpus": scorer.gpus_per_actor},
            max_constructor_retry_count=START_ATTEMPTS,
        ).bind(settings)
    return serve.deployment(serve.ingress()(kind or Replica), **options).bind(settings, scoring)


def metrics_folder() -> str:
    """The folder for the counts of the replicas that this process deploys; on each node they make it themselves."""
    return str(Path(tempfile.gettempdir()) / f"evolve-ray-metrics-{os.getpid()}-{STARTED}")


def build(args: dict[str, Any]) -> Any:
    """The application for `serve deploy`; `args` are those of the configuration file, see cluster/serve.yaml."""
    known = {"model": str, "recipe": str, "options": list, "name": str, "api_key_env": list, "open_to_all": bool}
    for key, value in args.items():
        if key not in known:
            raise UserError(f"args.{key}: unknown argument; the arguments are {', '.join(known)}")
        if not isinstance(value, known[key]):
            raise UserError(f"args.{key}: is {value!r}, but must be a {known[key].__name__}")
    if "model" not in args:
        raise UserError("args.model: is missing; name a model folder or a run")
    keys = read_keys(args.get("api_key_env", []))
    if not keys and not args.get("open_to_all"):
        raise UserError(
            "args.api_key_env: is missing; name an environment variable that holds a key, or set open_to_all: true if only "
            "trusted clients reach this endpoint"
        )
    return application(settings_of(args["model"], args.get("recipe"), args.get("options", []), args.get("name"), keys))
