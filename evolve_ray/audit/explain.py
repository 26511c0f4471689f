"""Where a training pair comes from: `jobs/explain.py RUN PAIR_ID` follows it back through the run's committed tables."""

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

# Folder of pairs -> the folder of the scores that they were selected by; None for pairs that were given.
PAIRS = {"pairs": "scores", "reward_pairs": "labels", "activation_pairs": None, "offline_pairs": None}
TRAINED = ("activation", "checkpoint", "reward_model")  # what a table of pairs may have been trained into
SHOWN = 5  # ids that an error lists


def main(arguments: list[str]) -> int:
    """Returns the exit code; a known fault is one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="explain.py", description="Follows a training pair back to where it comes from.")
    parser.add_argument("run", metavar="RUN", type=run_argument, help="a run directory")
    parser.add_argument("pair", metavar="PAIR_ID", help="a pair_id of one of its pairs.parquet, or the beginning of one")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    given = parser.parse_args(arguments)

    def command() -> int:
        found = explain(given.run, given.pair)
        print(json.dumps(found, indent=1, ensure_ascii=False) if given.json else text(found))
        return 0

    return run_command(command, shlex.join(["python", "jobs/explain.py", *arguments]))


def explain(run: Path, wanted: str) -> dict[str, Any]:
    """Everything that is known of the pair whose id begins with `wanted`, from files whose hashes are right."""
    config = read_config(run)
    pairs, pair = find_pair(run, wanted)
    iteration = int(pairs.folder.parent.name.removeprefix("iteration-"))
    found: dict[str, Any] = {
        "pair": pair,
        "iteration": iteration,
        "table": pairs.folder.name,
        "template": {"name": config.template.name, "layout": config.template.layout, "hash": template_hash(config)},
        "scorer": resolved(config.scorer),
        "verifier": resolved(config.verifier),
    }
    manifests = {pairs.folder.name: pairs}
    scores_name = PAIRS[pairs.folder.name]
    if scores_name is None:
        found["source"] = source(config, pairs.folder.name)
    else:
        for name in ("prompts", "generations", scores_name):
            manifests[name] = committed(pairs.folder.parent / name)
            check_input(pairs, "scores" if name == scores_name else name, manifests[name])
        found |= drafts_of(config, pair, manifests, scores_name)
        found["models"] = {hash_: model_path(run, hash_) for hash_ in sorted({d["model"] for d in found["drafts"]})}
    found["reference"] = reference(pairs, pair, manifests)
    for name in TRAINED:
        made = read_manifest(pairs.folder.parent / name)
        if made is not None and made.inputs.get("pairs") == pairs.identity:
            manifests[name] = made
    found["manifests"] = {
        name: {"folder": str(part.folder), "identity": part.identity, "key": part.key} for name, part in manifests.items()
    }
    return found


def read_config(run: Path) -> Config:
    path = run / "config.json"
    try:
        return from_json(json.loads(path.read_bytes()), str(path))
    except (FileNotFoundError, NotADirectoryError):
        beside = sorted(p.name for p in run.parent.glob("*") if (p / "config.json").exists()) if run.parent.is_dir() else []
        near = f"; beside it are {', '.join(beside[:SHOWN])}" if beside else ""
        raise UserError(f"{run}: is no run directory (it has no config.json){near}") from None
    except ValueError:
        raise IntegrityError(f"{path}: is damaged; submit the run's own command again to write it anew") from None


def find_pair(run: Path, wanted: str) -> tuple[Manifest, dict]:
    """The one pair whose id begins with `wanted`, and the manifest of its table."""
    hits: dict[str, Manifest] = {}
    every: list[str] = []
    for folder in sorted(run.glob("iteration-*/*")):
        manifest = read_manifest(folder) if folder.name in PAIRS else None
        if manifest is not None:
            ids = pq.read_table(checked(manifest, "pairs.parquet"), columns=["pair_id"]).column("pair_id").to_pylist()
            every += ids
            hits |= {name: manifest for name in ids if name.startswith(wanted)}
    if wanted in hits:
        hits = {wanted: hits[wanted]}
    if not every:
        raise UserError(f"{run}: holds no pairs yet; its first iteration has not come that far")
    if not hits:
        near = difflib.get_close_matches(wanted, every, n=SHOWN, cutoff=0.0)
        raise UserError(f"{run}: has no pair {wanted!r}; the nearest of its {len(every)} ids are {', '.join(near)}")
    if len(hits) > 1:
        raise UserError(f"{run}: {len(hits)} pairs begin with {wanted!r}: {', '.join(sorted(hits)[:SHOWN])}; give more of the id")
    ((name, manifest),) = hits.items()
    (pair,) = pq.read_table(manifest.path("pairs.parquet"), filters=[("pair_id", "=", name)]).to_pylist()
    return manifest, pair


def committed(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise IntegrityError(f"{folder}: is gone, but pairs were made from it; submit the run's own command again")
    return manifest


def checked(manifest: Manifest, name: str) -> Path:
    """A file of a committed folder, with its hash compared."""
    path, expected = manifest.path(name), manifest.files[name]["sha256"]
    actual = sha256_file(path) if path.is_file() else "missing"
    if actual != expected:
        raise IntegrityError(
            f"{path}: is damaged: sha256 is {actual}, but its manifest says {expected}; delete {manifest.folder} and submit the "
            "run's own command again to rebuild it"
        )
    return path


def check_input(pairs: Manifest, name: str, used: Manifest) -> None:
    """The pairs were made from this very folder."""
    if pairs.inputs.get(name) != used.identity:
        raise IntegrityError(f"{pairs.folder}: was made from another {used.folder.name} than {used.folder} is now; delete it and "
                             "submit the run's own command again")  # fmt: skip


def drafts_of(config: Config, pair: dict, manifests: dict[str, Manifest], scores_name: str) -> dict[str, Any]:
    """The pair's prompt, and all drafts of it with their scores, and what became of each."""
    pairs, prompts = manifests[next(iter(manifests))], rows.read_table(checked(manifests["prompts"], "prompts.parquet"))
    place = next((n for n, row in enumerate(prompts) if row["prompt_id"] == pair["prompt_id"]), None)
    if place is None:
        raise IntegrityError(f"{pairs.folder}: prompt {pair['prompt_id']} is not in {manifests['prompts'].folder}; delete it")
    name = f"shard-{place // config.engine.shard_prompts:05d}/rows.parquet"
    of_prompt = [("prompt_id", "=", pair["prompt_id"])]
    drafts = pq.read_table(checked(manifests["generations"], name), filters=of_prompt).to_pylist()
    scores = pq.read_table(checked(manifests[scores_name], name), filters=of_prompt).to_pylist()
    score_of = {row["draft_id"]: row for row in scores}
    reasons = {row["id"]: row["reason"] for row in rows.read_jsonl(checked(pairs, "rejected.jsonl"))}
    unscored = {row["id"]: row["reason"] for row in rows.read_jsonl(checked(manifests[scores_name], "rejected.jsonl"))}
    also = pq.read_table(pairs.path("pairs.parquet"), filters=of_prompt).to_pylist()
    for draft in drafts:
        row = score_of.get(draft["draft_id"], {})
        draft |= {"score": row.get("score"), "correct": row.get("correct")}
        told = filter(None, (reasons.get(draft["draft_id"]), unscored.get(draft["draft_id"])))
        draft["fate"] = fate(draft, pair, also, "; ".join(told) or "no reason is recorded")
    for member in ("chosen", "rejected"):
        if pair[member] not in [draft["text"] for draft in drafts if draft["draft_id"] == pair[f"{member}_id"]]:
            raise IntegrityError(f"{pairs.folder}: the {member} draft {pair[f'{member}_id']} is not in {name}; delete it")
    return {"prompt": prompts[place], "drafts": drafts}


def fate(draft: dict, pair: dict, also: list[dict], reason: str) -> str:
    """What became of a draft in the selection."""
    for member in ("chosen", "rejected"):
        if draft["draft_id"] == pair[f"{member}_id"]:
            return member
        for other in also:
            if draft["draft_id"] == other[f"{member}_id"]:
                return f"{member} of pair {other['pair_id']}"
    if draft["kind"] == "skipped":
        return f"left out: the draft before it is {draft['finish_reason']}"
    return "critique" if draft["kind"] != "answer" else f"not used: {reason}"


def model_path(run: Path, hash_: str) -> str:
    """Where the model of this content hash is: a checkpoint of the run, or what its report names."""
    for folder in sorted(run.glob("iteration-*/*")):
        if folder.name in ("checkpoint", "activation") and read_manifest(folder) and content_hash(folder) == hash_:
            return str(folder)
    try:
        listed = json.loads((run / "report.json").read_bytes())["models"]
    except (FileNotFoundError, ValueError, KeyError):
        listed = []
    return next((model["path"] for model in listed if model["model"] == hash_), "a place that this run does not name")


def template_hash(config: Config) -> str | None:
    """Of the template as it is now; None where its file is gone."""
    try:
        return load_template(config.template.name, config.template.layout, config.strategy.name).hash
    except UserError:
        return None


def source(config: Config, table: str) -> dict[str, Any]:
    """The file that given pairs were read from."""
    part = getattr(config, table.removesuffix("_pairs"))
    return {"path": part.path, "split": part.split, "objective": part.training.objective} if part else {}


def reference(pairs: Manifest, pair: dict, manifests: dict[str, Manifest]) -> dict[str, Any] | None:
    """The stored log-probabilities of the pair under the reference policy (nats, sums over response tokens); None without."""
    manifest = read_manifest(pairs.folder.parent / "reference")
    if manifest is None or manifest.inputs.get("pairs") != pairs.identity:
        return None
    manifests["reference"] = manifest
    path = checked(manifest, "reference.parquet")
    found = pq.read_table(path, filters=[("pair_id", "=", pair["pair_id"])]).to_pylist()
    return {"model": manifest.stats.get("model"), "policy": manifest.stats.get("policy"), "logps": found[0]} if found else None


def text(found: dict[str, Any]) -> str:
    """The same for people, in the order of the data."""
    pair, template = found["pair"], found["template"]
    lines = [f"pair {pair['pair_id']} of iteration {found['iteration']} ({found['table']})"]
    prompt = found.get("prompt")
    if prompt:
        lines += [f"prompt {prompt['prompt_id']}, {prompt['file']}:{prompt['line']}", indented(prompt["prompt"])]
        lines += ["answer", indented(prompt["answer"])] if prompt["answer"] is not None else []
        lines += ["drafts"]
        for draft in found["drafts"]:
            score = "no score" if draft["score"] is None else f"score {draft['score']:.4g}"
            right = "" if draft["correct"] is None else f", verdict {draft['correct']:g}"
            lines.append(
                f"  sample {draft['sample']} round {draft['round']}: {score}{right}, {draft['num_tokens']} tokens, "
                f"{draft['finish_reason']}, seed {draft['seed']}, draft {draft['draft_id']}: {draft['fate']}"
            )
            lines.append(indented(draft["text"], 6))
    else:
        given = found["source"]
        lines += [f"given by {given.get('path')} (split {given.get('split')}), trained on with {given.get('objective')}"]
        for part in ("prompt", "chosen", "rejected"):
            lines += [part, indented(pair[part])]
    lines += [f"model {hash_[:16]} at {path}" for hash_, path in found.get("models", {}).items()]
    verifier = f", verifier {found['verifier']['name']}" if found["verifier"] else ""
    scorer = found["scorer"]
    lines += (
        [f"scorer {' '.join(filter(None, [scorer['name'], scorer['model'], *scorer['members']]))}{verifier}"] if prompt else []
    )
    lines += [f"template {template['name']} ({template['layout']}), hash {(template['hash'] or 'gone')[:16]} as it is now"]
    if found["reference"]:
        known = {name: value for name, value in found["reference"]["logps"].items() if name != "pair_id" and value is not None}
        lines += [f"reference {found['reference']['policy']}, model {str(found['reference']['model'])[:16]}, nats:"]
        lines += [f"  {name} {value:.4f}" for name, value in known.items()]
    for name, part in found["manifests"].items():
        lines += [f"{'trained into' if name in TRAINED else 'from'} {part['folder']}, identity {part['identity'][:16]}"]
    return "\n".join(lines)


def indented(value: str, by: int = 4) -> str:
    return "\n".join(" " * by + line for line in value.splitlines() or [""])
