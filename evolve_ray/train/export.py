"""Export: gathers the trained weights, one parameter at a time, and commits them as a Hugging Face folder.

Only the weights are written anew. All other files are those of the model that the training started from (`models/companions.py`),
so that every tool reads the checkpoint as it reads that model.
"""

import shutil
from pathlib import Path
from typing import Any

from evolve_ray.errors import NumericsError
from evolve_ray.models import companions
from evolve_ray.models.chat import Chat
from evolve_ray.report.card import front_matter
from evolve_ray.store import rows
from evolve_ray.store.manifest import CARD, commit
from evolve_ray.train.collectives import Collectives
from evolve_ray.train.model import ShardedModel
from evolve_ray.train.spec import TrainSpec


def gather(model: ShardedModel, collectives: Collectives) -> dict[str, Any]:
    """Returns every weight of the plain model by name, adapters merged, on the CPU of rank 0; the other ranks get {}.

    Raises NumericsError if a parameter is not finite. All ranks raise it, because a rank alone would wait for the others.
    """
    from evolve_ray.train import adapters

    state: dict[str, Any] = {}
    names, bad = [""], 0
    for name, parts, scale in adapters.weight_parts(model.module):
        names.append(name)
        with model.gathered(parts):
            if collectives.rank == 0:
                state[name] = adapters.merge(parts, scale)
                bad = bad or len(state) * int(not state[name].isfinite().all())
    (bad,) = collectives.all_max([bad])
    if bad:
        raise NumericsError(f"export: the parameter {names[bad]} is not finite; nothing was committed; lower learning_rate")
    if collectives.rank == 0:
        saved = model.module.state_dict()
        state |= {name: buffer.detach().cpu() for name, buffer in model.module.named_buffers() if name in saved}
    return state


def commit_checkpoint(
    spec: TrainSpec, module: Any, state: dict[str, Any], chat: Chat, log: list[dict], num_pairs: int, *,
    reference: bool, train_seconds: float,
) -> None:  # fmt: skip
    """Writes weights, companion files, training log and model card to a temporary folder and commits it, on rank 0 alone."""
    stage = spec.checkpoint
    out = stage.work.with_name(f"{stage.work.name}-export")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    save_weights(module, state, out)
    companions.copy(Path(spec.model), out, dtype=spec.dtype, end_id=chat.end_id, chat_template=chat.rendering.chat_template)
    rows.write_jsonl(out / "training_log.jsonl", log)
    card = unfinished_card(spec.training.objective, spec.iteration, num_pairs, len(log), spec.reference_hash if reference else "")
    (out / CARD).write_text(card, encoding="utf-8")
    rows.write_jsonl(out / "rejected.jsonl", [])
    counts: dict[str, Any] = {"num_in": num_pairs, "num_rows": num_pairs, "num_rejected": 0, "num_steps": len(log)}
    if spec.start_hash:
        counts |= {"start": spec.training.start, "start_model": spec.start_hash}
    commit(
        out, stage.final, stage=stage.name, key=stage.key, inputs=stage.inputs, **counts, train_seconds=round(train_seconds, 3)
    )
    shutil.rmtree(stage.work, ignore_errors=True)


def save_weights(module: Any, state: dict[str, Any], out: Path) -> None:
    """Writes the weight files, under the names that the model's family has on disk, and config.json."""
    from transformers import GenerationConfig

    # transformers refuses to write sampling options in config.json, or a generation config that contradicts itself. Both files
    # are those of the source afterwards.
    for name in module.config._get_generation_parameters():
        setattr(module.config, name, None)
    module.generation_config = GenerationConfig()
    module.save_pretrained(out, state_dict=state, safe_serialization=True)


def unfinished_card(objective: str, iteration: int, num_pairs: int, num_updates: int, reference: str) -> str:
    """The model card until the evaluation writes the full one; `reference` is the content hash of the reference policy or ""."""
    tag = "text-classification" if objective == "reward" else "text-generation"
    lines = [*front_matter(tag, ""), "", "# Model trained by evolve-ray", ""]
    lines += [f"* objective `{objective}`, iteration {iteration}, {num_pairs:,} pairs, {num_updates:,} updates"]
    lines += [f"* reference policy: content hash `{reference}`"] if reference else []
    return "\n".join([*lines, "", "Nothing is measured here: this model is not evaluated, or not yet."]) + "\n"
