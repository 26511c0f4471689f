"""generations, scores -> NAME_pairs -> NAME_reference -> NAME_checkpoint: further models are trained on the same drafts."""

from evolve_ray.inputs.context import Context, Policy
from evolve_ray.stages.pairs import Owner, select_for
from evolve_ray.stages.second import template_of
from evolve_ray.stages.training import train
from evolve_ray.store.manifest import Manifest


def train_models(context: Context, iteration: int, drafts: Manifest, scores: Manifest) -> dict[str, Policy]:
    """The further models by name after the iteration: those that the recipe trains are new checkpoints."""
    models = dict(context.models)
    for name, model in context.config.models.items():
        if model.selection and model.training:
            owner = Owner(models[name], template_of(context).rendering, own=True)
            pairs = select_for(context, iteration, drafts, scores, model.selection, f"{name}_pairs", owner)
            models[name] = train(context, iteration, models[name], pairs, model.training, f"{name}_checkpoint", second=name)
    return models
