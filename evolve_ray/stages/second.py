"""Further models beside the policy: their engines, and their trainings with a line of checkpoints of their own."""

import dataclasses
from typing import Any

from evolve_ray.config.resolve import resolved
from evolve_ray.generate.second import RemoteModel
from evolve_ray.generate.spec import GenerateSpec
from evolve_ray.generate.worker import engine_pool
from evolve_ray.inputs.context import Context
from evolve_ray.refine.template import Template


def pool_name(name: str) -> str:
    return f"model {name}"


def template_of(context: Context) -> Template:
    """The recipe's template as further models render it: by their own chat template."""
    return dataclasses.replace(context.template, rendering=context.template.rendering.for_reward_model)


def models_key(context: Context) -> dict[str, Any]:
    """The part of a stage key that decides what further models answer."""
    return {
        name: [context.models[name].hash, model.context_tokens, resolved(model.engine(context.config.engine), runtime=False)]
        for name, model in context.config.models.items()
    }


def remote_models(context: Context, spec: GenerateSpec) -> dict[str, RemoteModel]:
    """The further models by name: opens their engines. `spec` is that of the policy's engines for the same job."""
    found = {}
    for name, model in context.config.models.items():
        engine = model.engine(context.config.engine)
        actors = context.pools.open(engine_pool(engine, pool_name(name)))
        own = dataclasses.replace(
            spec, model=str(context.models[name].folder), model_hash=context.models[name].hash, engine=engine,
            context_tokens=model.context_tokens or spec.context_tokens, template=template_of(context), remote_scorer=None,
            verifier=None, models={}, table=f"models.{name}" if model.context_tokens else "model",
        )  # fmt: skip
        found[name] = RemoteModel(tuple(actors), own)
    return found
