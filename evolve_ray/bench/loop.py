"""Compares a whole iteration with the plain script of vLLM, transformers and TRL that it replaces (`script.py`).

Both sides are commands of their own that run in turns: `jobs/iterate.py`, with all its checks and commits, and the script. Both
read the same model, reward model, prompts and seeds, and the lengths of the drafts are set by the seeds. The pairs must be the
same, and the losses equal to 1e-4, or no ratio is shown.

* `loop_vs_script`: seconds of the script over those of the iteration, without the start of either, `alpha = 0` (DPO by TRL);
* `loop_vs_script_with_start`: the same with everything from the start of the command to its end;
* `evolve_loop_vs_script`, `evolve_loop_vs_script_with_start`: the same at `alpha = 0.5`, against six separate forwards.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evolve_ray.bench import table
from evolve_ray.bench.busy import busy_processes
from evolve_ray.bench.generate import CPU_ARGUMENTS, CPU_ENV, LETTERS
from evolve_ray.bench.table import Row
from evolve_ray.errors import ResourceError, UserError
from evolve_ray.generate.spec import Completion, GenerateSpec
from evolve_ray.generate.vllm import ENGINE_ENV, VllmEngine
from evolve_ray.models.chat import Chat
from evolve_ray.store import rows as tables

NAMES = {"loop_vs_script": 0.0, "evolve_loop_vs_script": 0.5}  # with their alpha
JOBS = Path(__file__).resolve().parents[2] / "jobs"
BETA, LEARNING_RATE, SEED = 0.1, 1e-5, 0
SAME_LOSS = 1e-4
CORES = os.cpu_count() or 1
LOOK_S = 0.5  # interval between two readings of the CPU time of a command's processes


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="rows to measure")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--busy", type=int, default=0, help="busy processes beside both sides")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=48, help="letters of a prompt")
    parser.add_argument("--rounds", type=int, default=4, help="drafts of a chain")
    parser.add_argument("--new", type=int, default=96, help="most tokens of a draft; the least are an eighth")
    parser.add_argument("--batch", type=int, default=32, help="pairs of an update")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--engines", type=int, default=1, help="engines of the iteration; with one, both sides sample the same")
    parser.add_argument("--workers", type=int, default=2, help="training workers of the iteration")
    parser.add_argument("--seats", type=int, default=64, help="requests at a time of each engine of the iteration")
    parser.add_argument("--script-seats", type=int, default=128, help="requests at a time of the script's engine")
    parser.add_argument("--script-micro", type=int, default=4, help="pairs of a forward of the script")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="run in this folder and leave the last runs there")
    parser.set_defaults(device="cpu", dtype="float32", vocabulary=0, context=1024)


class FixedLengths(VllmEngine):
    """Writes drafts of letters whose numbers of tokens come from their seeds, from an eighth of `sampling.max_tokens` to all.

    A draft that has its length counts as finished.
    """

    def use(self, spec: GenerateSpec, chat: Chat) -> None:
        super().use(spec, chat)
        self.end_id = chat.end_id
        sampling, letters, longest = self.sampling, chat.text_ids(LETTERS), spec.sampling.max_tokens

        def fixed(seed: int, logps: bool) -> Any:
            params = sampling(seed, logps)
            params.max_tokens, params.ignore_eos, params.allowed_token_ids = length(seed, longest), True, letters
            params.stop_token_ids = []
            return params

        self.sampling = fixed

    def step(self) -> list[Completion]:
        return [
            dataclasses.replace(
                completion,
                finish_reason="stop",
                # As if the model had written its end token; the probe asks for log-probabilities, and this token has none.
                token_ids=completion.token_ids if completion.logps else (*completion.token_ids, self.end_id),
            )
            for completion in super().step()
        ]


def length(seed: int, longest: int) -> int:
    return random.Random(seed).randint(max(1, longest // 8), longest)


@dataclass(frozen=True)
class Turn:
    """One run of one side: wall seconds without start, with it, CPU seconds, seconds by part, pairs and losses."""

    work_s: float
    wall_s: float
    cpu_s: float
    parts: dict[str, float]
    pairs: list[dict[str, str]]
    losses: list[float]


def rows(args: argparse.Namespace) -> list[Row]:
    if args.batch % args.script_micro:
        raise UserError(f"--script-micro: is {args.script_micro}; must divide --batch, which is {args.batch}")
    if args.prompts % args.batch:
        raise UserError(f"--prompts: is {args.prompts}; must be a multiple of --batch, which is {args.batch}")
    with tempfile.TemporaryDirectory() as temporary, busy_processes(args.busy):
        folder = (args.keep or Path(temporary)).resolve()
        make_inputs(folder, args)
        result = []
        for name in args.only:
            turns: dict[str, list[Turn]] = {"ours": [], "script": []}
            for repeat in table.turns(name, args.repeats):
                for side in list(turns)[:: -1 if repeat % 2 else 1]:
                    turns[side].append((our_turn if side == "ours" else script_turn)(folder, args, NAMES[name]))
                    print(f"{name}: {side}: {summary(turns[side][-1])}", file=sys.stderr, flush=True)
                check_same(turns["ours"][-1], turns["script"][-1])
            result += compared(name, turns)
        return result


def make_inputs(folder: Path, args: argparse.Namespace) -> None:
    """Writes the policy, a reward model of the same shape, both with random weights, and the prompts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from evolve_ray.toy.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(args.context)
    heads = max(1, args.hidden // 64)
    config = LlamaConfig(
        vocab_size=args.vocabulary or len(tokenizer), hidden_size=args.hidden, intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads, head_dim=64,
        max_position_embeddings=args.context, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, num_labels=1,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, model_class) in enumerate(
        {"model": LlamaForCausalLM, "reward_model": LlamaForSequenceClassification}.items()
    ):
        torch.manual_seed(seed)
        model_class(config).to(getattr(torch, args.dtype)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    generator = random.Random(SEED)
    prompts = ({"prompt": "".join(generator.choices(LETTERS, k=args.prompt))} for _ in range(args.prompts))
    tables.write_jsonl(folder / "prompts.jsonl", prompts)


def recipe(folder: Path, args: argparse.Namespace, alpha: float) -> dict[str, Any]:
    """The options of one iteration, by their names in a recipe."""
    return {
        "name": "loop", "iterations": 1, "seed": SEED,
        "model.path": str(folder / "model"), "model.dtype": args.dtype, "model.context_tokens": args.context,
        "prompts.path": str(folder / "prompts.jsonl"), "prompts.per_iteration": args.prompts,
        "template.name": "tiny", "strategy.name": "chain", "strategy.rounds": args.rounds,
        "sampling.temperature": 1.0, "sampling.max_tokens": args.new,
        "engine.name": "evolve_ray.bench.loop:FixedLengths", "engine.actors": args.engines, "engine.max_num_seqs": args.seats,
        "engine.shard_prompts": -(-args.prompts // args.engines),
        "scorer.model": str(folder / "reward_model"), "scorer.dtype": args.dtype, "scorer.max_tokens": args.context,
        "training.objective": "evolve", "training.alpha": alpha, "training.beta": BETA, "training.epochs": args.epochs,
        "training.batch_pairs": args.batch, "training.micro_pairs": args.batch, "training.learning_rate": LEARNING_RATE,
        "training.schedule": "constant", "training.warmup_fraction": 0.0,
        "trainer.workers": args.workers, "trainer.forward": "tree", "trackers.use": [], "ray.dashboard": False,
        **(on_cpu(args) if args.device == "cpu" else ON_GPU),
    }  # fmt: skip


def on_cpu(args: argparse.Namespace) -> dict[str, Any]:
    """Engines and ranks share the cores, each with its part of the threads."""
    return {
        **{f"engine.args.{name}": value for name, value in CPU_ARGUMENTS.items()},
        **{f"engine.env.{name}": value for name, value in CPU_ENV.items()},
        "engine.env.OMP_NUM_THREADS": str(max(1, CORES // args.engines)), "engine.cpus_per_actor": 0.4,
        "engine.release_for_training": False, "scorer.cpus_per_actor": 0.1, "trainer.cpus_per_worker": 0.4,
        "trainer.env.OMP_NUM_THREADS": str(max(1, CORES // args.workers)), "trainer.max_tokens": 2048,
        "probe.cpus": 0.1, "probe.tolerance": 1e-3 if args.dtype == "float32" else 0.05, "ray.num_cpus": max(2, CORES),
    }  # fmt: skip


# One GPU that engine and scorer share, and that the training has alone afterwards.
ON_GPU: dict[str, Any] = {
    "engine.gpus_per_actor": 0.6, "engine.release_for_training": True, "engine.args.gpu_memory_utilization": 0.6,
    "engine.args.max_num_batched_tokens": 16384, "scorer.gpus_per_actor": 0.3, "trainer.use_gpu": True,
    "trainer.max_tokens": 16384, "trainer.gradient_checkpointing": True, "probe.prompts": 2, "probe.cpus": 4,
}  # fmt: skip


def our_turn(folder: Path, args: argparse.Namespace, alpha: float) -> Turn:
    """Runs `jobs/iterate.py` for one iteration; raises a ResourceError if it fails."""
    import shutil

    from evolve_ray.report.ledger import ledger
    from evolve_ray.store.run import Run

    path, root = folder / "recipe.toml", folder / "run"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in recipe(folder, args, alpha).items()))
    shutil.rmtree(root, ignore_errors=True)
    wall_s, cpu_s = watched([sys.executable, str(JOBS / "iterate.py"), str(path), "--run", str(root)], folder / "ours.log")
    parts: dict[str, float] = {}
    for row in ledger(Run(root), args.engines)["clock"]:
        for name in row.keys() - {"iteration", "seconds"}:
            parts[name] = parts.get(name, 0.0) + row[name]
    work_s = sum(seconds for name, seconds in parts.items() if name != "starts")
    iteration = Run(root).iteration(1)
    pairs = tables.read_table(iteration / "pairs" / "pairs.parquet")
    log = tables.read_jsonl(iteration / "checkpoint" / "training_log.jsonl")
    texts = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs]
    return Turn(work_s, wall_s, cpu_s, parts, texts, [step["loss"] for step in log])


def script_turn(folder: Path, args: argparse.Namespace, alpha: float) -> Turn:
    """Runs the script; raises a ResourceError if it fails."""
    chat = Chat(folder / "model")
    job = {
        "model": str(folder / "model"), "reward_model": str(folder / "reward_model"), "context_tokens": args.context,
        "seats": args.script_seats, "engine_args": CPU_ARGUMENTS, "threads": CORES, "rounds": args.rounds,
        "env": ENGINE_ENV | CPU_ENV | {"OMP_NUM_THREADS": str(CORES)}, "refine": "fix",
        "letters": chat.text_ids(LETTERS), "prompts": script_prompts(folder, args), "score_batch": 32, "alpha": alpha,
        "beta": BETA, "learning_rate": LEARNING_RATE, "batch_pairs": args.batch, "micro_pairs": args.script_micro,
        "shuffle_seeds": [tables.derive_seed("batches", SEED, 1, epoch) for epoch in range(args.epochs)],
    }  # fmt: skip
    (folder / "JOB.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("script.py")
    wall_s, cpu_s = watched([sys.executable, str(script), str(folder / "JOB.json")], folder / "script.log")
    result = json.loads((folder / "RESULT.json").read_text())
    seconds = result["seconds"]
    return Turn(sum(seconds.values()), wall_s, cpu_s, seconds, result["pairs"], result["losses"])


def script_prompts(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts in the order of a run, each with the seeds and lengths of its drafts."""
    import pyarrow as pa

    from evolve_ray.data.prompts import fresh_order, read_prompts

    prompts, _ = read_prompts(str(folder / "prompts.jsonl"), prompt_column="prompt")
    order = fresh_order(pa.chunked_array([[prompt["prompt_id"] for prompt in prompts]]), seed=SEED)
    result = []
    for prompt in (prompts[number] for number in order.to_pylist()):
        seeds = [tables.derive_seed(SEED, 1, prompt["prompt_id"], 0, number) for number in range(1, args.rounds + 1)]
        result.append({"prompt": prompt["prompt"], "seeds": seeds, "lengths": [length(seed, args.new) for seed in seeds]})
    return result


def watched(command: list[str], log: Path) -> tuple[float, float]:
    """Runs a command; returns its wall seconds and the CPU seconds of all its processes, read twice a second."""
    import psutil

    cpu_s: dict[tuple[int, float], float] = {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    started = time.perf_counter()
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        done = threading.Event()

        def look() -> None:
            root = psutil.Process(process.pid)
            while not done.wait(LOOK_S):
                try:
                    family = [root, *root.children(recursive=True)]
                except psutil.Error:
                    return
                for member in family:
                    try:
                        times = member.cpu_times()
                        cpu_s[member.pid, member.create_time()] = times.user + times.system
                    except psutil.Error:
                        continue

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        code = process.wait()
        wall_s = time.perf_counter() - started
        done.set()
        thread.join()
    if code:
        raise ResourceError(f"loop: {command[1]} ended with exit code {code}: {log.read_text(errors='replace')[-2000:]}")
    return wall_s, sum(cpu_s.values())


def check_same(ours: Turn, script: Turn) -> None:
    """Raises a UserError if the two sides have other pairs, or losses that differ."""
    theirs = sorted({(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in script.pairs})
    if theirs != sorted((pair["prompt"], pair["chosen"], pair["rejected"]) for pair in ours.pairs):
        raise UserError(f"loop: the pairs differ ({len(ours.pairs)} and {len(theirs)}); no ratio is valid")
    difference = loss_difference(ours, script)
    if len(ours.losses) != len(script.losses) or not difference <= SAME_LOSS:
        raise UserError(
            f"loop: the losses of {len(ours.losses)} and {len(script.losses)} updates differ by up to {difference:.2g}; "
            "no ratio is valid"
        )


def loss_difference(ours: Turn, script: Turn) -> float:
    differences = [abs(a - b) for a, b in zip(ours.losses, script.losses, strict=False)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def compared(name: str, turns: dict[str, list[Turn]]) -> list[Row]:
    """The two rows of a comparison."""
    both = list(zip(turns["ours"], turns["script"], strict=True))
    counts: dict[str, Any] = {side: [summary(turn) for turn in side_turns] for side, side_turns in turns.items()}
    counts |= {
        "pairs": len(turns["ours"][0].pairs),
        "updates": len(turns["ours"][0].losses),
        "losses differ by at most": f"{max(loss_difference(ours, script) for ours, script in both):.1g}",
        "CPU ratios": [round(script.cpu_s / ours.cpu_s, 3) for ours, script in both],
    }
    return [
        Row(name, "x", [script.work_s / ours.work_s for ours, script in both], counts),
        Row(f"{name}_with_start", "x", [script.wall_s / ours.wall_s for ours, script in both]),
    ]


def summary(turn: Turn) -> str:
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in turn.parts.items())
    return f"{turn.work_s:.1f} s of {turn.wall_s:.1f} s, CPU {turn.cpu_s:.0f} s ({parts})"
