"""What one command serves: a model, the recipe that it was trained with, keys and limits; plain data for the replicas."""

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve_ray.config import options
from evolve_ray.config.load import build, load, load_stored
from evolve_ray.config.options import Config
from evolve_ray.config.plugs import find_plug
from evolve_ray.errors import UserError
from evolve_ray.inputs.prepare import BEGAN, began, policy_need, read_chat_template, reward_model_need
from evolve_ray.models import checkpoints, folders, gate
from evolve_ray.refine.rendering import Rendering
from evolve_ray.refine.strategies import ALL_STRATEGIES, STRATEGIES
from evolve_ray.refine.template import Template, load_template
from evolve_ray.score.combined import reward_model_field, reward_model_names
from evolve_ray.serve.request import Rules
from evolve_ray.store.run import Run
from evolve_ray.toy.parts import toy_parts
from evolve_ray.watch.terminal import say

# What vLLM's CPU build needs where no recipe says it.
CPU_ENGINE = {
    "enforce_eager": True, "enable_chunked_prefill": False, "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 30, "block_size": 32,
}  # fmt: skip
CPU_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SHARE_OF_CONTEXT = 4  # without a recipe a response may have a quarter of the context: prompt, draft and refinement must fit
NO_SCORER = "none"  # as `scorer.model`
BY_GROUP = ("vote", "strategy")  # scorers that have no value for one response alone
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MIN_KEY_LENGTH = 16


@dataclass(frozen=True)
class Settings:
    """Everything that a replica needs, picklable. Of the keys it holds hashes alone."""

    name: str
    folder: str
    config: Config
    template: Template
    reward_models: dict[str, str]  # the names in the recipe -> local folders
    has_recipe: bool  # without one, sampling defaults are those of the model's generation_config.json, as in vLLM
    key_hashes: tuple[str, ...] = ()

    @property
    def has_scorer(self) -> bool:
        scorer = self.config.scorer
        return scorer.name not in BY_GROUP and (scorer.name != "reward_model" or scorer.model != NO_SCORER)

    @property
    def rules(self) -> Rules:
        config = self.config
        return Rules(config.strategy, self.template, config.serve, self.has_scorer, config.verifier is not None)

    @property
    def places(self) -> int:
        """The rounds that a replica takes at a time: those that its engine runs, and those that wait."""
        return self.config.engine.max_num_seqs + self.config.serve.max_queued


def settings_of(
    model: str, recipe: str | None, overrides: list[str], name: str | None = None, keys: tuple[str, ...] = ()
) -> Settings:
    """What a command serves; raises UserError for anything that cannot be served as it is."""
    found = checkpoints.find(model)
    config, has_recipe = configuration(found, recipe, overrides)
    if config.engine.name != "vllm":
        raise UserError(f"engine.name: is {config.engine.name!r}, but only 'vllm' can serve; set engine.name=vllm")
    if config.serve.max_replicas and config.serve.max_replicas < config.serve.replicas:
        raise UserError(
            f"serve.max_replicas: is {config.serve.max_replicas}, but must be 0 or at least serve.replicas "
            f"({config.serve.replicas})"
        )
    find_plug(ALL_STRATEGIES, config.strategy.name, "strategy.name")
    rendering = rendering_of(config, found.run)
    gate.inspect(found.folder, policy_need(config, rendering, "MODEL"))
    template = load_template(config.template.name, config.template.layout, config.strategy.name)
    template = dataclasses.replace(template, rendering=rendering)
    settings = Settings(name or found.name, str(found.folder), config, template, {}, has_recipe, tuple(map(hash_key, keys)))
    return dataclasses.replace(settings, reward_models=reward_model_folders(settings, found.run))


def rendering_of(config: Config, run: Path | None) -> Rendering:
    """How conversations are rendered, as in the run of the model; a template that prints the date prints that run's day."""
    day = began(Run(run)) if run and (run / BEGAN).exists() else ""
    return Rendering(read_chat_template(config), config.model.template_arguments, day, config.thinking)


def configuration(model: checkpoints.Named, recipe: str | None, overrides: list[str]) -> tuple[Config, bool]:
    """(the recipe, else the configuration of the model's run, else defaults that fit the model; whether there is a recipe)."""
    if recipe:
        return load(recipe, overrides), True
    if model.run:
        return load_stored(model.run, overrides), True
    folder_config = folders.read_model_config(model.folder, f"MODEL {model.given}")
    positions = folder_config.get("max_position_embeddings") or options.Model.context_tokens
    tree: dict[str, Any] = {
        "model": {"path": str(model.folder), "context_tokens": positions},
        "prompts": {"path": NO_SCORER},
        "sampling": {"max_tokens": max(1, positions // SHARE_OF_CONTEXT)},
        "scorer": {"model": NO_SCORER},
    }
    config = build(tree, f"MODEL {model.given}", "", overrides)
    if not config.engine.gpus_per_actor and not config.engine.args:
        engine = {"args": CPU_ENGINE | {"max_num_batched_tokens": max(4096, positions)}, "env": CPU_ENV | config.engine.env}
        tree = tree | {"engine": engine}
        config = build(tree, f"MODEL {model.given}", "", overrides)
    return config, False


def reward_model_folders(settings: Settings, run: Path | None) -> dict[str, str]:
    """The local folder of each reward model of the recipe; parts of the tiny world are those beside the run."""
    config, found = settings.config, {}
    if not settings.has_scorer:
        return {}
    for name in reward_model_names(config.scorer):
        field = reward_model_field(config.scorer)
        path = toy_parts(config, Run(run or Path("runs") / config.name), say)[name] if name.startswith("toy:") else name
        folder = folders.resolve(path, field)
        gate.inspect(folder, reward_model_need(config, settings.template.rendering.for_reward_model))
        found[name] = str(folder)
    return found


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(names: list[str]) -> tuple[str, ...]:
    """The keys in the named environment variables; a variable may hold several, separated by commas or white space."""
    keys: list[str] = []
    for name in names:
        value = os.environ.get(name, "")
        found = [key for key in re.split(r"[,\s]+", value) if key]
        if not found:
            raise UserError(f"--api-key-env {name}: the environment variable is not set or empty; set it to one or more keys")
        for key in found:
            if len(key) < MIN_KEY_LENGTH or not key.isascii():
                raise UserError(
                    f"--api-key-env {name}: a key must have at least {MIN_KEY_LENGTH} ASCII characters; "
                    "make one with: openssl rand -hex 32"
                )
        keys += found
    return tuple(dict.fromkeys(keys))


def check_host(host: str, keys: tuple[str, ...]) -> None:
    """Raises UserError if an endpoint that others can reach would have no key."""
    if host not in LOOPBACK and not keys:
        raise UserError(
            f"--host {host}: others can reach this address, so the endpoint needs keys; name an environment variable that "
            "holds one with --api-key-env, or leave --host at 127.0.0.1"
        )


def describe(settings: Settings, host: str, port: int) -> str:
    """What the command starts, as text for --plan."""
    config, serve = settings.config, settings.config.serve
    engine, sampling, strategy = config.engine, config.sampling, config.strategy
    replicas = f"{serve.replicas}" + (f" to {serve.max_replicas}" if serve.max_replicas else "")
    args = ", ".join(f"{name}={value}" for name, value in engine.args.items()) or "vLLM's defaults"
    rules = settings.rules
    usable = [name for name in dict.fromkeys([*STRATEGIES, strategy.name]) if rules.can_use(name)]
    defaults = f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, max_tokens {sampling.max_tokens}"
    if not settings.has_recipe:
        defaults = f"of generation_config.json; max_tokens of a refinement {sampling.max_tokens}"
    scorer = "none"
    if settings.has_scorer:
        scorer = config.scorer.name + (f" {config.scorer.model}" if config.scorer.name == "reward_model" else "")
    lines = [
        ("model", f"{settings.name}: {settings.folder}"),
        ("at", f"http://{host}:{port}, page at /, API at /v1"),
        ("keys", f"{len(settings.key_hashes)} accepted" if settings.key_hashes else "none needed: only this machine can connect"),
        ("template", f"{config.template.name}, {config.template.layout}"),
        ("strategy", f"{strategy.name}, {strategy.rounds} rounds; a request may use {', '.join(usable)}"),
        ("sampling", defaults),
        ("scorer", scorer),
        ("verifier", config.verifier.name if config.verifier else "none"),
        ("replicas", f"{replicas}, each {engine.cpus_per_actor:g} CPU and {engine.gpus_per_actor:g} GPU"),
        ("engine", f"vLLM, {config.model.dtype}, context {config.model.context_tokens}, {args}"),
        ("places", f"{engine.max_num_seqs} rounds of a replica run, {serve.max_queued} wait; more are answered 429"),
        ("a request", f"at most {serve.max_rounds} rounds, {serve.max_samples} samples, {serve.max_tokens} tokens, "
                      f"{serve.max_seconds:g} s, {serve.max_body_kib} KiB"),
    ]  # fmt: skip
    return "\n".join(f"  {title:<10} {text}" for title, text in lines)
