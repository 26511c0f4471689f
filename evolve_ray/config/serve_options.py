"""Options of the endpoint that serves refined answers. No result of a run depends on them."""

from dataclasses import dataclass

from evolve_ray.config.option import option


@dataclass(frozen=True)
class Serve:
    """The endpoint of `jobs/serve.py`: replicas, places, and the limits of one request.

    A replica is one engine, as `[engine]` describes it. A round is one request to the engine.
    """

    replicas: int = option("replicas at the start, and the fewest when they are autoscaled", 1, low=1, runtime=True)
    max_replicas: int = option("the most replicas that autoscaling starts; 0: their number is fixed", 0, low=0, runtime=True)
    target_rounds: int = option("for autoscaling: running rounds per replica to aim at", 64, unit="rounds", low=1, runtime=True)
    max_queued: int = option(
        "rounds of a replica that may wait for a place in its engine (`engine.max_num_seqs`); a request for more is answered 429",
        64,
        unit="rounds",
        low=0,
        runtime=True,
    )
    retry_after_s: int = option("what a refused client is told to wait", 2, unit="s", low=1, runtime=True)
    max_rounds: int = option("most rounds of one request", 16, unit="rounds", low=1, runtime=True)
    max_samples: int = option("most samples in one round of a request, and its largest `n`", 16, low=1, runtime=True)
    max_tokens: int = option(
        "most tokens that all rounds of one request may write together", 65536, unit="tokens", low=1, runtime=True
    )
    max_seconds: float = option("longest time of one request", 600.0, unit="s", above=0.0, runtime=True)
    max_body_kib: int = option("largest body of a request", 1024, unit="KiB", low=1, runtime=True)
    drain_s: float = option("at the end: how long running requests may take to finish", 60.0, unit="s", low=0.0, runtime=True)
