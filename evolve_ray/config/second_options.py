"""Options of further models beside the policy: who they are, and how they are trained."""

import dataclasses
from dataclasses import dataclass

from evolve_ray.config.draft_options import Engine, Selection
from evolve_ray.config.option import option
from evolve_ray.config.training_options import Training


@dataclass(frozen=True)
class SecondModel:
    """A further model. A strategy of your own asks it by the name of this table: `Ask(messages, ..., model="NAME")`."""

    path: str = option("a Hugging Face folder or name (safetensors, a tokenizer with a chat template), or `toy:base`")
    context_tokens: int = option("its longest context; 0: `model.context_tokens`", 0, unit="tokens", low=0)
    actors: int = option("number of its engines", 1, low=1, runtime=True)
    cpus_per_actor: float = option("CPUs of each of its engines; -1: as [engine]", -1.0, low=-1.0, runtime=True)
    gpus_per_actor: float = option("GPUs of each of its engines; -1: as [engine]", -1.0, low=-1.0, runtime=True)
    args: dict = option("arguments for vLLM's `LLM`; empty: `engine.args`", {})
    selection: Selection | None = None
    training: Training | None = None

    def engine(self, engine: Engine) -> Engine:
        """The [engine] table as it holds for this model."""
        return dataclasses.replace(
            engine,
            actors=self.actors,
            args=self.args or engine.args,
            cpus_per_actor=engine.cpus_per_actor if self.cpus_per_actor < 0 else self.cpus_per_actor,
            gpus_per_actor=engine.gpus_per_actor if self.gpus_per_actor < 0 else self.gpus_per_actor,
        )
