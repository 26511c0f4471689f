"""The command `jobs/explain.py RUN PAIR_ID`: traces a training pair back through the committed tables of its run."""

import argparse
import difflib
import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from evolve_ray.config.load import from_json
from evolve_ray.config.options import Config
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import IntegrityError, UserError, run_command
from evolve_ray.models.folders import content_hash
from evolve_ray.refine.template import load_template
from evolve_ray.store import rows
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import Manifest, read_manifest
from evolve_ray.store.places import run_argument
from evolve_ray.store.turns import as_text

# Folder of pairs -> the folder of the scores that selected them; None for pairs that were read from a file.
PAIRS = {"pairs": "scores", "reward_pairs": "labels", "activation_pairs": None, "offline_pairs": None}
TRAINED = ("activation", "checkpoint", "reward_model")  # the stages that train on a table of pairs
NO_REASON = "no reason is recorded"
SHOWN = 5  # ids that a message lists


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known error is one sentence on stderr."""
    description = "Traces a training pair back to its prompt, drafts, scores and models."
    parser = argparse.ArgumentParser(prog="explain.py", description=description)
    parser.add_argument("run", metavar="RUN", type=run_argument, help="a run directory")
    parser.add_argument("pair", metavar="PAIR_ID", help="a pair_id in one of its pairs.parquet, or the first characters of one")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args(arguments)

    def command() -> int:
        explanation = explain(args.run, args.pair)
        print(json.dumps(explanation, indent=1, ensure_ascii=False) if args.json else text(explanation))
        return 0

    return run_command(command, shlex.join(["python", "jobs/explain.py", *arguments]))


def explain(run: Path, wanted: str) -> dict[str, Any]:
    """Returns all that the run stores about the pair whose id begins with `wanted`; checks the hash of every file it reads."""
    config = read_config(run)
    tables = PAIRS | {f"{name}_pairs": "scores" for name in config.models}
    pairs, pair = find_pair(run, wanted, tables)
    iteration = int(pairs.folder.parent.name.removeprefix("iteration-"))
    explanation: dict[str, Any] = {
        "pair": pair,
        "iteration": iteration,
        "table": pairs.folder.name,
        "template": {"name": config.template.name, "layout": config.template.layout, "hash": template_hash(config)},
        "scorer": resolved(config.scorer),
        "verifier": resolved(config.verifier),
    }
    manifests = {pairs.folder.name: pairs}
    scores_name = tables[pairs.folder.name]
    if scores_name is None:
        explanation["source"] = source(config, pairs.folder.name)
    else:
        for name in ("prompts", "generations", scores_name):
            manifests[name] = committed(pairs.folder.parent / name)
            check_input(pairs, "scores" if name == scores_name else name, manifests[name])
        explanation |= drafts_of(config, pair, manifests, scores_name)
        hashes = sorted({draft["model"] for draft in explanation["drafts"] if draft["model"]})  # a composed draft has none
        explanation["models"] = {hash_: model_path(run, hash_) for hash_ in hashes}
    explanation["replayed"] = replayed(run, pairs, pair)
    rows_of_training = trained_rows(pairs)
    explanation["reference"] = reference(rows_of_training, pair, manifests)
    for name in trainings_of(config):
        trained = read_manifest(pairs.folder.parent / name)
        if trained is not None and trained.inputs.get("pairs") == rows_of_training.identity:
            manifests[name] = trained
    explanation["manifests"] = {
        name: {"folder": str(part.folder), "identity": part.identity, "key": part.key} for name, part in manifests.items()
    }
    return explanation


def read_config(run: Path) -> Config:
    path = run / "config.json"
    try:
        return from_json(json.loads(path.read_bytes()), str(path))
    except (FileNotFoundError, NotADirectoryError):
        neighbours = sorted(p.name for p in run.parent.glob("*") if (p / "config.json").exists()) if run.parent.is_dir() else []
        hint = f"; runs in the same folder: {', '.join(neighbours[:SHOWN])}" if neighbours else ""
        raise UserError(f"{run}: is not a run directory (it has no config.json){hint}") from None
    except ValueError:
        raise IntegrityError(f"{path}: is damaged; submit the run's command again to rewrite it") from None


def trainings_of(config: Config) -> tuple[str, ...]:
    """The stages that train on a table of pairs, those of further models too."""
    return (*TRAINED, *(f"{name}_checkpoint" for name in config.models))


def find_pair(run: Path, wanted: str, tables: dict[str, str | None]) -> tuple[Manifest, dict]:
    """Returns the manifest of a table of pairs, and its one pair whose id begins with `wanted`."""
    matches: dict[str, Manifest] = {}
    all_ids: list[str] = []
    for folder in sorted(run.glob("iteration-*/*")):
        manifest = read_manifest(folder) if folder.name in tables else None
        if manifest is not None:
            ids = pq.read_table(checked(manifest, "pairs.parquet"), columns=["pair_id"]).column("pair_id").to_pylist()
            all_ids += ids
            matches |= {name: manifest for name in ids if name.startswith(wanted)}
    if wanted in matches:
        matches = {wanted: matches[wanted]}
    if not all_ids:
        raise UserError(f"{run}: has no pairs yet; try again when its first iteration has committed the stage pairs")
    if not matches:
        closest = difflib.get_close_matches(wanted, all_ids, n=SHOWN, cutoff=0.0)
        raise UserError(f"{run}: has no pair {wanted!r}; the closest of its {len(all_ids)} ids are {', '.join(closest)}")
    if len(matches) > 1:
        shown = ", ".join(sorted(matches)[:SHOWN])
        raise UserError(f"{run}: {len(matches)} pairs begin with {wanted!r}: {shown}; give more characters of the id")
    ((name, manifest),) = matches.items()
    (pair,) = rows.from_table(pq.read_table(manifest.path("pairs.parquet"), filters=[("pair_id", "=", name)]))
    return manifest, pair


def committed(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise IntegrityError(f"{folder}: is missing, but pairs were selected from it; submit the run's command again")
    return manifest


def checked(manifest: Manifest, name: str) -> Path:
    """Returns the path of a file in a committed folder, after comparing its hash with the manifest."""
    path, expected = manifest.path(name), manifest.files[name]["sha256"]
    actual = sha256_file(path) if path.is_file() else "missing"
    if actual != expected:
        raise IntegrityError(
            f"{path}: is damaged: sha256 is {actual}, but its manifest says {expected}; delete {manifest.folder} and submit the "
            "run's command again to rebuild it"
        )
    return path


def check_input(pairs: Manifest, name: str, used: Manifest) -> None:
    """Raises an IntegrityError unless the pairs were selected from this version of the folder."""
    if pairs.inputs.get(name) != used.identity:
        raise IntegrityError(f"{pairs.folder}: was selected from a different version of {used.folder}; delete {pairs.folder} and "
                             "submit the run's command again")  # fmt: skip


def drafts_of(config: Config, pair: dict, manifests: dict[str, Manifest], scores_name: str) -> dict[str, Any]:
    """Returns the pair's prompt, and all drafts of that prompt with their scores and what the selection did with each."""
    pairs, prompts = manifests[next(iter(manifests))], rows.read_table(checked(manifests["prompts"], "prompts.parquet"))
    position = next((n for n, row in enumerate(prompts) if row["prompt_id"] == pair["prompt_id"]), None)
    if position is None:
        raise IntegrityError(
            f"{pairs.folder}: prompt {pair['prompt_id']} is not in {manifests['prompts'].folder}; delete the pairs"
        )
    name = f"shard-{position // config.engine.shard_prompts:05d}/rows.parquet"
    of_prompt = [("prompt_id", "=", pair["prompt_id"])]
    drafts = pq.read_table(checked(manifests["generations"], name), filters=of_prompt).to_pylist()
    scores = pq.read_table(checked(manifests[scores_name], name), filters=of_prompt).to_pylist()
    score_of = {row["draft_id"]: row for row in scores}
    reasons = {row["id"]: row["reason"] for row in rows.read_jsonl(checked(pairs, "rejected.jsonl"))}
    unscored = {row["id"]: row["reason"] for row in rows.read_jsonl(checked(manifests[scores_name], "rejected.jsonl"))}
    prompt_pairs = rows.from_table(pq.read_table(pairs.path("pairs.parquet"), filters=of_prompt))
    for draft in drafts:
        row = score_of.get(draft["draft_id"], {})
        draft |= {"score": row.get("score"), "correct": row.get("correct")}
        recorded = filter(None, (reasons.get(draft["draft_id"]), unscored.get(draft["draft_id"])))
        draft["fate"] = fate(draft, pair, prompt_pairs, "; ".join(recorded) or NO_REASON)
    for member in ("chosen", "rejected"):
        if pair[member] not in [draft["text"] for draft in drafts if draft["draft_id"] == pair[f"{member}_id"]]:
            raise IntegrityError(f"{pairs.folder}: the {member} draft {pair[f'{member}_id']} is not in {name}; delete the pairs")
    return {"prompt": prompts[position], "drafts": drafts}


def fate(draft: dict, pair: dict, prompt_pairs: list[dict], reason: str) -> str:
    """Returns what the selection did with a draft."""
    for member in ("chosen", "rejected"):
        if draft["draft_id"] == pair[f"{member}_id"]:
            return member
        for other in prompt_pairs:
            if draft["draft_id"] == other[f"{member}_id"]:
                return f"{member} of pair {other['pair_id']}"
    for row in (pair, *prompt_pairs):
        for turn in row.get("turns") or ():
            if draft["draft_id"] == turn["draft_id"]:
                return f"turn {turn['name']} of pair {row['pair_id']}"
    if draft["kind"] == "skipped":
        return f"skipped: the draft before it is {draft['finish_reason']}"
    return draft["kind"] if draft["kind"] != "answer" and reason == NO_REASON else f"not used: {reason}"


def model_path(run: Path, hash_: str) -> str:
    """Returns the path of the model with this content hash: a checkpoint of the run, or the path in its report."""
    for folder in sorted(run.glob("iteration-*/*")):
        if folder.name.endswith(("checkpoint", "activation")) and read_manifest(folder) and content_hash(folder) == hash_:
            return str(folder)
    try:
        models = json.loads((run / "report.json").read_bytes())["models"]
    except (FileNotFoundError, ValueError, KeyError):
        models = []
    return next((model["path"] for model in models if model["model"] == hash_), "a path that this run does not record")


def template_hash(config: Config) -> str | None:
    """Returns the hash of the template as it is now; None if its file is missing."""
    try:
        return load_template(config.template.name, config.template.layout, config.strategy.name).hash
    except UserError:
        return None


def trained_rows(pairs: Manifest) -> Manifest:
    """Returns the table that was trained: the pairs, or that into which other rows were mixed."""
    mixed = read_manifest(pairs.folder.parent / "mixed")
    return mixed if mixed is not None and mixed.inputs.get("pairs") == pairs.identity else pairs


def replayed(run: Path, pairs: Manifest, pair: dict) -> list[int]:
    """Returns the other iterations that trained this row again."""
    found, place = [], (int(pairs.folder.parent.name.removeprefix("iteration-")), pairs.folder.name)
    for folder in sorted(run.glob("iteration-*/mixed")):
        manifest = read_manifest(folder)
        if manifest is not None and folder.parent != pairs.folder.parent:
            path = checked(manifest, "origins.parquet")
            for row in pq.read_table(path, filters=[("pair_id", "=", pair["pair_id"])]).to_pylist():
                found += [int(folder.parent.name[10:])] if (row["iteration"], row["table"]) == place else []
    return found


def source(config: Config, table: str) -> dict[str, Any]:
    """Returns the file that pairs were read from, and the objective that trained on them."""
    preferences = getattr(config, table.removesuffix("_pairs"))
    return (
        {"path": preferences.path, "split": preferences.split, "objective": preferences.training.objective} if preferences else {}
    )


def reference(pairs: Manifest, pair: dict, manifests: dict[str, Manifest]) -> dict[str, Any] | None:
    """Returns the pair's stored log-probabilities under the reference policy (nats, sums over response tokens), or None."""
    table = pairs.folder.name
    name = table.removesuffix("pairs") + "reference" if table.endswith("_pairs") and table not in PAIRS else "reference"
    manifest = read_manifest(pairs.folder.parent / name)
    if manifest is None or manifest.inputs.get("pairs") != pairs.identity:
        return None
    manifests["reference"] = manifest
    path = checked(manifest, "reference.parquet")
    logps = pq.read_table(path, filters=[("pair_id", "=", pair["pair_id"])]).to_pylist()
    return {"model": manifest.stats.get("model"), "policy": manifest.stats.get("policy"), "logps": logps[0]} if logps else None


def text(explanation: dict[str, Any]) -> str:
    """Returns the explanation as text, in the order of the data."""
    pair, template = explanation["pair"], explanation["template"]
    lines = [f"pair {pair['pair_id']} of iteration {explanation['iteration']} ({explanation['table']})"]
    prompt = explanation.get("prompt")
    if prompt:
        lines += [f"prompt {prompt['prompt_id']}, {prompt['file']}:{prompt['line']}", indented(as_text(prompt["prompt"]))]
        lines += ["gold answer", indented(prompt["answer"])] if prompt["answer"] is not None else []
        lines += ["drafts"]
        for draft in explanation["drafts"]:
            score = "no score" if draft["score"] is None else f"score {draft['score']:.4g}"
            correct = "" if draft["correct"] is None else f", verifier {draft['correct']:g}"
            kind = "" if draft["kind"] in ("answer", "skipped") else f", {draft['kind']}"
            lines.append(
                f"  sample {draft['sample']} round {draft['round']}{kind}: {score}{correct}, {draft['num_tokens']} tokens, "
                f"{draft['finish_reason']}, seed {draft['seed']}, draft {draft['draft_id']}: {draft['fate']}"
            )
            lines.append(indented(draft["text"], 6))
    else:
        source = explanation["source"]
        lines += [f"read from {source.get('path')} (split {source.get('split')}), trained with {source.get('objective')}"]
        for part in ("prompt", "chosen", "rejected"):
            lines += [part, indented(as_text(pair[part]))]
    lines += ["context, in place of the prompt", indented(as_text(pair["context"]))] if pair.get("context") else []
    if explanation["replayed"]:
        lines += [f"trained again in iteration {', '.join(map(str, explanation['replayed']))}"]
    lines += [f"model {hash_[:16]} at {path}" for hash_, path in explanation.get("models", {}).items()]
    verifier = f", verifier {explanation['verifier']['name']}" if explanation["verifier"] else ""
    scorer = explanation["scorer"]
    lines += (
        [f"scorer {' '.join(filter(None, [scorer['name'], scorer['model'], *scorer['members']]))}{verifier}"] if prompt else []
    )
    lines += [f"template {template['name']} ({template['layout']}), current hash {(template['hash'] or 'missing')[:16]}"]
    if explanation["reference"]:
        stored = explanation["reference"]
        logps = {name: value for name, value in stored["logps"].items() if name != "pair_id" and value is not None}
        lines += [f"reference {stored['policy']}, model {str(stored['model'])[:16]}, nats:"]
        lines += [f"  {name} {value:.4f}" for name, value in logps.items()]
    for name, part in explanation["manifests"].items():
        lines += [f"{'used to train' if name.endswith(TRAINED) else 'from'} {part['folder']}, identity {part['identity'][:16]}"]
    return "\n".join(lines)


def indented(value: str, by: int = 4) -> str:
    return "\n".join(" " * by + line for line in value.splitlines() or [""])
