"""The probe after an iteration: do the engines use the weights of the checkpoint, and how far has the policy moved?

An engine's log-probabilities of its own tokens must equal those of a plain transformers forward of the checkpoint; old weights
or an old prefix cache would make a difference. The same forwards under earlier models give the KL divergences.
"""

from typing import Any

from evolve_ray.config import options
from evolve_ray.pools.actors import Actors, PoolOptions, Pools, call_all

VERSION = 1


class Prober:
    """The worker of a probing actor: plain forwards, with one model at a time. `spec` is (device, dtype)."""

    def __init__(self, spec: tuple[str, str]):
        self.spec = spec

    def ready(self) -> None:
        """Imports what the forwards need."""
        import torch  # noqa: F401
        import transformers  # noqa: F401

    def token_logps(self, folder: str, samples: list[dict]) -> list[list[float]]:
        """For each sample the log-probability of each response token under the model in `folder`, in nats."""
        import torch
        from transformers import AutoModelForCausalLM

        device, dtype = self.spec
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=False)
        model = model.to(device).eval()
        logps = []
        with torch.inference_mode():
            for sample in samples:
                response_N = torch.tensor(sample["response"], device=device)
                ids_1T = torch.tensor([[*sample["context"], *sample["response"]]], device=device)
                logits_NV = model(input_ids=ids_1T, use_cache=False).logits[0, len(sample["context"]) - 1 : -1].float()
                logps_N = logits_NV.gather(1, response_N[:, None])[:, 0] - logits_NV.logsumexp(dim=1)
                logps.append(logps_N.tolist())
        return logps


Spec = tuple[str, str]  # device, dtype


def open_prober(pools: Pools, probe: options.Probe, dtype: str) -> tuple[Actors, Spec]:
    """Starts the probing actor without waiting for it; returns it with its spec."""
    actors = pools.open(PoolOptions("probers", Prober, 1, probe.cpus, probe.gpus, restarts=3))
    spec = ("cuda" if probe.gpus else "cpu", dtype)
    for actor in actors:
        actor.call.remote(spec, "ready")
    return actors, spec


def compare(actors: Actors, spec: Spec, models: dict[str, str], samples: list[list[dict]]) -> dict[str, Any]:
    """The figures of one probe. `samples` holds the samples of each engine, drawn from the policy at temperature 1.

    `mean_difference` and `max_difference` (nats a token) compare engine and checkpoint. `kl_iteration` and `kl_initial` estimate
    KL(policy || model) in nats a response: the mean of log policy - log model over samples of the policy.
    """
    flat = [sample for part in samples for sample in part]
    by_folder = {folder: call_all(actors, spec, "token_logps", folder, flat)[0] for folder in dict.fromkeys(models.values())}
    logps = {name: by_folder[folder] for name, folder in models.items()}
    differences = [
        abs(engine - plain)
        for sample, policy_logps in zip(flat, logps["policy"], strict=True)
        for engine, plain in zip(sample["logps"], policy_logps, strict=True)
    ]
    sums = {name: [sum(tokens) for tokens in part] for name, part in logps.items()}
    kl = {
        f"kl_{name}": sum(policy - model for policy, model in zip(sums["policy"], sums[name], strict=True)) / len(flat)
        for name in models
        if name != "policy"
    }
    return {
        "num_responses": len(flat),
        "num_tokens": len(differences),
        "mean_difference": sum(differences) / len(differences),
        "max_difference": max(differences),
        **kl,
    }
