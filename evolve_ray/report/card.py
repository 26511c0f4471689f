"""README.md of a checkpoint, a Hugging Face model card: what the model is worth, how it came to be, and what nobody has measured.

A checkpoint is committed before it is evaluated, and whoever copies the folder should have the figures with it. So the card
is the one file of a committed folder that no manifest holds (`store.CARD`): it is written whole after each evaluation, from what
is committed and nothing else, so that the same run gives the same card. Nothing is computed from it.
"""

import json
import re
from pathlib import Path
from typing import Any

from evolve_ray.models import folders
from evolve_ray.report import recipe
from evolve_ray.report.tables import table_rows
from evolve_ray.store.files import write_atomic
from evolve_ray.store.manifest import CARD, read_manifest
from evolve_ray.store.run import Run

TRAININGS = ("activation.training", "offline.training", "training")


def front_matter(tag: str, base: str) -> list[str]:
    """The YAML block that the hub reads; `base` only where it is a name that the hub can know."""
    hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not base.startswith(".") and not Path(base).exists()
    named = [f"base_model: {json.dumps(base)}", "base_model_relation: finetune"] if hub_name else []
    tags = ["evolve-ray", "self-refinement", "preference-optimization", "arxiv:2502.05605"]
    return ["---", "library_name: transformers", f"pipeline_tag: {tag}", f"tags: {json.dumps(tags)}", *named, "---"]


def write(run: Run, config: dict[str, Any], models: list[dict[str, Any]]) -> None:
    """The cards of all models that this run trained; `models` as in report.json."""
    for place, model in enumerate(models):
        folder = Path(model["path"])
        if folder.is_relative_to(run.root) and read_manifest(folder):
            for left in folder.glob(f".{CARD}.*"):  # by a driver that was killed as it wrote
                left.unlink()
            path, text = folder / CARD, render(run, config, models[: place + 1]).encode()
            if not path.exists() or path.read_bytes() != text:
                write_atomic(path, text)


def render(run: Run, config: dict[str, Any], models: list[dict[str, Any]]) -> str:
    """The card of the last of `models`."""
    model, told = models[-1], without_folders(config)
    line = [one for one in models if one is model or not one.get("rolled_back")]
    lines = [*front_matter("text-generation", config["model"]["path"]), ""]
    lines += [f"# {plain(config['name'])}, {model['name']}", ""]
    lines += ["A language model trained to refine its own answers: asked to improve a draft, and to answer well at once."]
    lines += [f"Made by evolve-ray with the method EVOLVE (arXiv 2502.05605). Content hash `{model['model']}`.", ""]
    if model.get("rolled_back"):
        lines += [f"**This iteration was rolled back**: {plain(model['decision']['reason'])}.", ""]
    lines += ["## Evaluation", "", *evaluation(config, model, line), ""]
    lines += ["## Recipe", "", *(f"* {term}: {plain(text)}" for term, text in recipe.sentences(told)), "", "```json"]
    lines += [json.dumps({name: part for name in TRAININGS if (part := find(told, name))}, indent=1), "```", ""]
    lines += ["## Lineage", "", *lineage(run, told, line), ""]
    lines += ["## Limits", "", *(f"* {plain(text)}" for text in limits(config, model))]
    return "\n".join(lines) + "\n"


def evaluation(config: dict[str, Any], model: dict[str, Any], models: list[dict[str, Any]]) -> list[str]:
    """Every model up to this one by split and round, and what refinement did to this one's answers."""
    header, lines = table_rows({"models": models})
    if not any(figures["rounds"] for figures in model["splits"].values()):
        return ["This model was not evaluated."]
    temperature = config["evaluation"]["temperature"]
    said = [
        f"Held-out prompts at temperature {temperature:g}, by the recipe's scorer and verifier. y1 is the direct answer, y2 its "
        "refinement, and so on, each in one chain; 95 % bootstrap intervals over prompts, the gain paired by prompt. The last "
        f"row of each split and measure ({plain(model['name'])}) is this model's.",
        "",
        *grid(header, lines),
        "",
    ]
    for split, figures in model["splits"].items():
        moved = figures["rounds"][max(figures["rounds"], key=int)].get("against_first", {}) if figures["rounds"] else {}
        if "wrong_to_right" in moved:
            said.append(
                f"* {plain(split)}: from the first round to the last {moved['wrong_to_right']} answers became right and "
                f"{moved['right_to_wrong']} wrong; {moved['kept_right']} stayed right, {moved['kept_wrong']} wrong"
            )
    return said


def lineage(run: Run, config: dict[str, Any], models: list[dict[str, Any]]) -> list[str]:
    """From the base to this model: what each training was given, and the content hashes."""
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
        made = [read_manifest(folder / stage) if iteration else None for stage in ("prompts", "generations")]
        counts = [f"{stage.stats['num_rows']:,}" if stage else "" for stage in (*made, trained)]
        before = read_manifest(folder / "reference") if title != "activation" else None
        compared = f"{before.stats['policy']}: {before.stats['model'][:12]}" if before else "none"
        lines.append([title, *counts, f"{trained.stats['num_steps']:,}", compared, folders.content_hash(trained.folder)])
    return grid(header, lines)


def limits(config: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """What the figures do not cover, as far as the run itself can know."""
    said, splits = [], {name: figures for name, figures in model["splits"].items() if figures["rounds"]}
    for split, figures in model["splits"].items():
        asked, whole = figures["num_prompts"], figures["rounds"]["1"]["n"] if figures["rounds"] else 0
        if asked > whole:
            said.append(f"{split}: {asked - whole} of {asked} prompts lack a score in some round and are not in the figures")
    for split, figures in splits.items():
        cut, answers = [part["num_cut"] for part in figures["rounds"].values()], figures["rounds"]["1"]["n"]
        if sum(cut):
            most = config["sampling"]["max_tokens"]
            said.append(f"{split}: {sum(cut)} of {len(cut) * answers} answers were cut at {most} tokens ({cut} by round)")
        for measure, gain in figures["gain"].items():
            if gain["low"] <= 0:
                verdict = "hurts" if gain["high"] < 0 else "has no clear effect"
                said.append(f"{split}: refinement {verdict} by {measure.replace('_', ' ')}")
    if len(splits) > 1:
        said.append(f"prompts of these splits alone were asked: {', '.join(splits)}")
    else:
        said.append("nothing was measured on prompts of another kind than those of the evaluation")
    if config["verifier"] is None:
        said.append("answers were judged by the scorer alone, which the training also rewarded; no truth was at hand")
    return [
        *said,
        f"one seed ({config['seed']}): the intervals do not cover what another seed of the training would give",
        "not measured: safety, bias, other languages, and skills that the prompts above do not ask for",
        "the licences of the base model and of the data apply; none is set here",
    ]


def without_folders(tree: Any) -> Any:
    """The configuration with local paths cut to their names: a card goes to people who have other folders."""
    if isinstance(tree, dict):
        return {name: without_folders(part) for name, part in tree.items()}
    if isinstance(tree, str) and (tree.startswith(("/", "~", ".", "file:")) or ("/" in tree and Path(tree).exists())):
        return Path(tree).name
    return tree


def find(tree: dict[str, Any], dotted: str) -> Any:
    """What stands at a dotted name; None where a table on the way is absent."""
    part: Any = tree
    for name in dotted.split("."):
        part = part and part[name]
    return part


def plain(text: str) -> str:
    """Text that stays in its cell or line and is no markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def grid(header: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table."""
    escaped = [[plain(cell) for cell in line] for line in lines]
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *escaped)]
