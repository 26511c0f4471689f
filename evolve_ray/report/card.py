"""README.md of a checkpoint, a Hugging Face model card: its figures, how it was trained, and what was not measured.

A checkpoint is committed before it is evaluated, but the card must hold the figures of the evaluation. So the card is the one
file in a committed folder that the manifest does not list (`store.CARD`). It is written as a whole after each evaluation, from
committed stages only: the same run gives the same card. No stage reads it.
"""

import json
import re
from pathlib import Path
from typing import Any

from evolve_ray.config.run_options import MIN_PROMPTS
from evolve_ray.models import folders
from evolve_ray.report import recipe
from evolve_ray.report.tables import table_rows
from evolve_ray.store.files import write_atomic
from evolve_ray.store.manifest import CARD, read_manifest
from evolve_ray.store.rows import mixture_text
from evolve_ray.store.run import Run

TRAININGS = ("activation.training", "offline.training", "training")


def front_matter(tag: str, base: str) -> list[str]:
    """The YAML block that the Hugging Face hub reads; with `base` only if it can be the name of a model on the hub."""
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not base.startswith(".") and not Path(base).exists()
    base_model = [f"base_model: {json.dumps(base)}", "base_model_relation: finetune"] if is_hub_name else []
    tags = ["evolve-ray", "self-refinement", "preference-optimization", "arxiv:2502.05605"]
    return ["---", "library_name: transformers", f"pipeline_tag: {tag}", f"tags: {json.dumps(tags)}", *base_model, "---"]


def write(run: Run, config: dict[str, Any], models: list[dict[str, Any]]) -> None:
    """Writes the cards of all models that this run trained; `models` as in report.json."""
    for place, model in enumerate(models):
        folder = Path(model["path"])
        if folder.is_relative_to(run.root) and read_manifest(folder):
            for unfinished in folder.glob(f".{CARD}.*"):  # from a driver that was killed while it wrote a card
                unfinished.unlink()
            path, text = folder / CARD, render(run, config, models[: place + 1]).encode()
            if not path.exists() or path.read_bytes() != text:
                write_atomic(path, text)


def render(run: Run, config: dict[str, Any], models: list[dict[str, Any]]) -> str:
    """The card of the last of `models`."""
    model, public_config = models[-1], without_folders(config)
    ancestry = [other for other in models if other is model or not other.get("rolled_back")]
    lines = [*front_matter("text-generation", config["model"]["path"]), ""]
    lines += [f"# {plain(config['name'])}, {model['name']}", ""]
    lines += ["A language model trained to answer a prompt well, and to improve its own answer when it is asked to refine it."]
    lines += [f"Made by evolve-ray with the method EVOLVE (arXiv 2502.05605). Content hash `{model['model']}`.", ""]
    if model.get("rolled_back"):
        lines += [f"**This iteration was rolled back**: {plain(model['decision']['reason'])}.", ""]
    lines += ["## Evaluation", "", *evaluation(config, model, ancestry), ""]
    lines += ["## Recipe", "", *(f"* {term}: {plain(text)}" for term, text in recipe.sentences(public_config)), "", "```json"]
    lines += [json.dumps({name: part for name in TRAININGS if (part := find(public_config, name))}, indent=1), "```", ""]
    lines += ["## Lineage", "", *lineage(run, public_config, ancestry), ""]
    lines += ["## Limits", "", *(f"* {plain(text)}" for text in limits(config, model))]
    return "\n".join(lines) + "\n"


def evaluation(config: dict[str, Any], model: dict[str, Any], models: list[dict[str, Any]]) -> list[str]:
    """The figures of all models up to this one by split and round, and what refinement changed in this model's answers."""
    header, lines = table_rows({"models": models})
    if not any(figures["rounds"] for figures in model["splits"].values()):
        return ["This model was not evaluated."]
    temperature = config["evaluation"]["temperature"]
    text = [
        f"Held-out prompts at temperature {temperature:g}, measured by the scorer and the verifier of the recipe. y1 is the "
        "direct answer, y2 its refinement, and so on in one chain. Brackets are 95 % intervals over the prompts (Wilson's for "
        "shares and means, Tango's for the gain, which is paired by prompt; Student's t for rewards beyond -1 to 1). "
        f"The last row of each split and measure ({plain(model['name'])}) is this model.",
        "",
        *grid(header, lines),
        "",
    ]
    for split, figures in model["splits"].items():
        changes = figures["rounds"][max(figures["rounds"], key=int)].get("against_first", {}) if figures["rounds"] else {}
        if "wrong_to_right" in changes:
            text.append(
                f"* {plain(split)}: from the first round to the last, {changes['wrong_to_right']} answers became right and "
                f"{changes['right_to_wrong']} became wrong; {changes['kept_right']} stayed right and {changes['kept_wrong']} "
                "stayed wrong"
            )
    return text


def lineage(run: Run, config: dict[str, Any], models: list[dict[str, Any]]) -> list[str]:
    """A table from the base to this model: the data, the reference policy and the content hash of each training."""
    header = ["training", "prompts", "drafts", "pairs", "updates", "reference policy", "content hash"]
    lines = [[f"base: {config['model']['path']}", "", "", "", "", "", models[0]["model"]]]
    first = "offline" if config["offline"] else "activation"
    numbers = dict.fromkeys(model["iteration"] for model in models)
    for iteration, name in [(0, "activation"), *((number, "checkpoint") for number in numbers)]:
        folder = run.iteration(iteration)
        trained = read_manifest(folder / name)
        if trained is None:
            continue
        title = f"iteration {iteration}" if iteration else name.replace("checkpoint", first)
        data = [read_manifest(folder / stage) if iteration else None for stage in ("prompts", "generations")]
        counts = [f"{stage.stats['num_rows']:,}" if stage else "" for stage in (*data, trained)]
        mixed = read_manifest(folder / "mixed") if iteration else None
        counts[-1] += f" ({mixture_text(mixed.stats)})" if mixed else ""
        reference = read_manifest(folder / "reference") if title != "activation" else None
        policy = f"{reference.stats['policy']}: {reference.stats['model'][:12]}" if reference else "none"
        title += f", from the initial policy {trained.stats['start_model'][:12]}" if "start" in trained.stats else ""
        lines.append([title, *counts, f"{trained.stats['num_steps']:,}", policy, folders.content_hash(trained.folder)])
    return grid(header, lines)


def limits(config: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """What the figures do not cover, as far as the run itself shows it."""
    facts, splits = [], {name: figures for name, figures in model["splits"].items() if figures["rounds"]}
    for split, figures in model["splits"].items():
        num_prompts, num_scored = figures["num_prompts"], figures["rounds"]["1"]["n"] if figures["rounds"] else 0
        if num_prompts > num_scored:
            facts.append(
                f"{split}: {num_prompts - num_scored} of {num_prompts} prompts are not in the figures, because some round has no "
                "score"
            )
    for split, figures in splits.items():
        num_cut, answers = [part["num_cut"] for part in figures["rounds"].values()], figures["rounds"]["1"]["n"]
        if sum(num_cut):
            limit = config["sampling"]["max_tokens"]
            facts.append(
                f"{split}: {sum(num_cut)} of {len(num_cut) * answers} answers were cut at {limit} tokens ({num_cut} by round)"
            )
        if answers < MIN_PROMPTS:
            facts.append(
                f"{split}: {answers} prompts are too few to say whether refinement helps; at least {MIN_PROMPTS} are needed"
            )
            continue
        for measure, gain in figures["gain"].items():
            if gain["low"] <= 0:
                verdict = "hurts" if gain["high"] < 0 else "has no clear effect"
                facts.append(f"{split}: refinement {verdict} by {measure.replace('_', ' ')}")
    if len(splits) > 1:
        facts.append(f"only prompts of these splits were measured: {', '.join(splits)}")
    else:
        facts.append("nothing was measured on other kinds of prompts than those of the evaluation")
    if config["verifier"] is None:
        facts.append("only the scorer measured the answers, and the training used the same scorer; there is no verifier")
    return [
        *facts,
        f"one seed ({config['seed']}): the intervals do not cover the variation between training seeds",
        "not measured: safety, bias, other languages, and skills that the prompts above do not ask for",
        "the licences of the base model and of the data apply; this card sets none",
    ]


def without_folders(tree: Any) -> Any:
    """The configuration with local paths cut to their last name: readers of the card have other folders."""
    if isinstance(tree, dict):
        return {name: without_folders(part) for name, part in tree.items()}
    if isinstance(tree, str) and (tree.startswith(("/", "~", ".", "file:")) or ("/" in tree and Path(tree).exists())):
        return Path(tree).name
    return tree


def find(tree: dict[str, Any], dotted: str) -> Any:
    """The part of the configuration at a dotted name; None if a table on the way is absent."""
    part: Any = tree
    for name in dotted.split("."):
        part = part and part[name]
    return part


def plain(text: str) -> str:
    """A text with Markdown escaped and line breaks removed, so that it stays in its cell or line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def grid(header: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table."""
    escaped = [[plain(cell) for cell in line] for line in lines]
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *escaped)]
