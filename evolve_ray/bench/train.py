"""Measures training steps (forward, backward, AdamW) of a random Llama in PyTorch, with the log-probabilities of a real run.

* `evolve_tree_vs_separate`: pairs/s of objective `evolve`, trees over a padded row for each of the six sequences;
* `dpo_vs_trl`: pairs/s of objective `dpo`, trees over TRL's DPOTrainer with a precomputed reference, on the same pairs;
* `memory_vs_trl`: peak memory that a step allocates, without weights and optimiser, over that of TRL;
* `memory_vs_full_logits`: the same over that of trees with all logits in memory at once.
"""

import argparse
import dataclasses
import random
import statistics
from collections.abc import Callable
from typing import Any

from evolve_ray.bench.busy import busy_processes
from evolve_ray.bench.table import Row, turns
from evolve_ray.bench.watches import NoPeak, Peak, Seconds, Watch
from evolve_ray.config import options as options_of
from evolve_ray.errors import UserError
from evolve_ray.store.rows import REFERENCE
from evolve_ray.train.tree import Forward, Sequence, pack

NAMES = ("evolve_tree_vs_separate", "dpo_vs_trl", "memory_vs_trl", "memory_vs_full_logits")
SIX = tuple(REFERENCE.names[1:])
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="rows to measure")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--busy", type=int, default=0, help="measure the rows about time again beside this many busy processes")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of a step of evolve")
    parser.add_argument("--dpo-pairs", type=int, default=8, help="pairs of a step of dpo")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--instruction", type=int, default=32, help="tokens of the refinement instruction")
    parser.add_argument("--answer", type=int, default=256, help="tokens of an answer; dpo draws from a quarter of it to all")
    parser.add_argument(
        "--model", metavar="FOLDER_OR_NAME", help="a model whose shape replaces the options below; its weights are random"
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--memory-vocabulary", type=int, default=32768, help="vocabulary of the rows about memory")
    parser.add_argument("--memory-layers", type=int, default=2, help="layers of the rows about memory")
    parser.add_argument("--max-tokens", type=int, default=16384, help="tokens of a forward")


def rows(args: argparse.Namespace) -> list[Row]:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: is cuda, but torch finds no GPU; use --device cpu")
    rows = speed_rows(args)
    if args.busy:
        with busy_processes(args.busy):
            rows += [dataclasses.replace(row, name=f"{row.name}, {args.busy} busy processes") for row in speed_rows(args)]
    if "memory_vs_trl" in args.only:
        rows.append(against_trl(args, args.memory_vocabulary, args.memory_layers, memory=True))
    if "memory_vs_full_logits" in args.only:
        rows.append(full_logits(args))
    return rows


def speed_rows(args: argparse.Namespace) -> list[Row]:
    rows = [evolve(args)] if "evolve_tree_vs_separate" in args.only else []
    if "dpo_vs_trl" in args.only:
        rows.append(against_trl(args, args.vocabulary, args.layers, memory=False))
    return rows


class Policy:
    """A random model with AdamW and an objective. The reference is its own log-probabilities in the same step."""

    def __init__(self, args: argparse.Namespace, training: options_of.Training, model: Any, names: tuple[str, ...]):
        import torch

        from evolve_ray.train import objectives
        from evolve_ray.train.tree_check import tree_model

        self.args, self.training, self.names, self.model = args, training, names, model
        self.device = torch.device(args.device)
        self.tree = tree_model(model, self.device)
        self.attention = model.config._attn_implementation  # the attention of trees; separate rows use sdpa
        self.objective = objectives.find(training)
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)

    def packed(self, groups: list[list[Sequence]]) -> list[Forward]:
        limits = {"max_tokens": self.args.max_tokens, "max_groups": len(groups)}
        return pack(groups, keys=[str(n) for n in range(len(groups))], one_row=self.device.type == "cuda", **limits)

    def by_trees(self, groups: list[list[Sequence]], *, chunked: bool = True) -> dict[str, Any]:
        """Trains one step on trees, packing included; returns its counts."""
        from evolve_ray.train.logprobs import num_chunks, tree_logps

        self.model.set_attn_implementation(self.attention)
        forwards = self.packed(groups)
        for forward in forwards:
            logps = tree_logps(self.tree, forward, self.device, num_chunks(forward) if chunked else 0)
            self.backward(logps, [groups[group] for group in forward.groups], len(groups))
        self.update()
        return token_counts(sum(f.num_tokens for f in forwards), sum(f.ids_RW.size for f in forwards), len(forwards))

    def by_rows(self, groups: list[list[Sequence]]) -> dict[str, Any]:
        """Trains the same step on a padded row for each sequence; returns its counts."""
        from evolve_ray.train.logprobs import sequence_logps

        self.model.set_attn_implementation("sdpa")
        sequences = [sequence for group in groups for sequence in group]
        self.backward(sequence_logps(self.model, sequences, 0, self.device), groups, len(groups))
        self.update()
        lengths = [len(s.context) + len(s.response) for s in sequences]
        return token_counts(sum(lengths), len(sequences) * max(lengths), 1)

    def backward(self, logps: Any, groups: list[list[Sequence]], num_pairs: int) -> None:
        import torch

        from evolve_ray.train import objectives

        values = dict(zip(self.names, logps.view(-1, len(self.names)).unbind(1), strict=True))
        lengths = {
            name: torch.tensor([max(1, len(group[place].response)) for group in groups], device=self.device)
            for place, name in enumerate(self.names)
        }
        reference = {name: value.detach() for name, value in values.items()}
        loss_B, _ = objectives.total(self.objective, values, reference, lengths, self.training)
        (loss_B.sum() / num_pairs).backward()

    def update(self) -> None:
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def token_counts(num_used: int, num_read: int, forwards: int) -> dict[str, Any]:
    return {"tokens forwarded": num_read, "padding share": round(1 - num_used / num_read, 3), "forwards": forwards}


def random_model(args: argparse.Namespace, vocabulary: int, layers: int) -> Any:
    """Returns a Llama, or a model with the shape of `--model`, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    heads = max(1, args.hidden // 64)
    if args.model:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
    else:
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=8192,
        )  # fmt: skip
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).train()


def evolve(args: argparse.Namespace) -> Row:
    """Returns the row of `evolve`: six sequences per pair as in the `conversation` layout, of random tokens."""
    model = random_model(args, args.vocabulary, args.layers)
    policy = Policy(args, options_of.Training(objective="evolve"), model, SIX)
    generator = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(model.config.vocab_size) for _ in range(length))

    def group() -> list[Sequence]:
        x, z, w, l = tokens(args.prompt), tokens(args.instruction), tokens(args.answer), tokens(args.answer)  # noqa: E741
        return [Sequence(x, w), Sequence(x, l), *(Sequence(x + d + z, y) for d in (l, w) for y in (w, l))]

    groups = [group() for _ in range(args.pairs)]
    sides = {"tree": lambda: policy.by_trees(groups), "separate": lambda: policy.by_rows(groups)}
    num_weights = model.num_parameters() - model.get_input_embeddings().weight.numel()  # weights that multiply every token
    return in_turns("evolve_tree_vs_separate", args, sides, args.pairs, {"parameters": model.num_parameters()}, num_weights)


def in_turns(
    name: str, args: argparse.Namespace, sides: dict[str, Callable], pairs: int, counts: dict[str, Any], num_weights: int
) -> Row:  # fmt: skip
    """Returns seconds of the second side over those of the first, step by step, after a warm-up step of each side.

    The counts have model TFLOP/s, to compare with the peak of the device: 6 operations for each weight and each token that is
    not padding; attention is not counted.
    """
    work = {side: step() for side, step in sides.items()}
    seconds: dict[str, list[Seconds]] = {side: [] for side in sides}
    for _ in turns(name, args.repeats):
        for side, step in sides.items():
            with Watch(args) as watch:
                step()
            seconds[side].append(watch.spent)
    tokens = {side: step["tokens forwarded"] * (1 - step["padding share"]) for side, step in work.items()}
    speed = {
        f"{side}, model TFLOP/s": round(6e-12 * num_weights * tokens[side] / statistics.median(wall for wall, _ in times), 4)
        for side, times in seconds.items()
    }
    return ratio(name, seconds, pairs, counts | work | speed)


def ratio(name: str, seconds: dict[str, list[Seconds]], pairs: int, counts: dict[str, Any]) -> Row:
    """Returns the ratio of wall seconds. The counts have the ratio of CPU seconds, which other load disturbs less."""
    ours, theirs = seconds.values()
    speeds = {
        f"{side}, pairs/s": round(pairs * len(times) / sum(wall for wall, _ in times), 3) for side, times in seconds.items()
    }
    cpu_ratios = [round(b / a, 3) for (_, a), (_, b) in zip(ours, theirs, strict=True)]
    wall_ratios = [b / a for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    return Row(name, "x", wall_ratios, speeds | {"CPU ratios": cpu_ratios} | counts)


def full_logits(args: argparse.Namespace) -> Row:
    """Returns the peak of a step of dpo with chunked logits over the peak with all logits of the same trees."""
    policy = Policy(
        args,
        options_of.Training(objective="dpo"),
        random_model(args, args.memory_vocabulary, args.memory_layers),
        ("chosen", "rejected"),
    )
    groups = [group for _, group in preferences(args, args.dpo_pairs)]
    peaks: dict[bool, list[int]] = {True: [], False: []}
    policy.by_trees(groups)
    for _ in turns("memory_vs_full_logits", max(1, min(2, args.repeats))):
        for chunked, peaks_of_side in peaks.items():
            with Peak(args) as peak:
                work = policy.by_trees(groups, chunked=chunked)
            peaks_of_side.append(peak.bytes)
    counts = {"chunked, peak MiB": mib(peaks[True]), "all logits, peak MiB": mib(peaks[False]), "both": work}
    return Row("memory_vs_full_logits", "x", [a / b for a, b in zip(peaks[True], peaks[False], strict=True)], counts)


def mib(peaks: list[int]) -> float:
    return round(max(peaks) / 2**20, 1)


def preferences(args: argparse.Namespace, count: int) -> list[tuple[dict[str, str], list[Sequence]]]:
    """Returns random pairs as rows for TRL and as sequences of the same tokens; prompts have one length, answers vary."""
    from evolve_ray.bench.letters import chat

    generator, letters_chat, pairs = random.Random(0), chat(), []
    for _ in range(count):
        prompt = "".join(generator.choices(LETTERS, k=args.prompt))
        answers = ["".join(generator.choices(LETTERS, k=generator.randint(args.answer // 4, args.answer))) for _ in range(2)]
        context = tuple(letters_chat.context_ids(({"role": "user", "content": prompt},)))
        group = [Sequence(context, tuple(letters_chat.response_ids(answer, finished=True))) for answer in answers]
        pairs.append(({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}, group))
    return pairs


def against_trl(args: argparse.Namespace, vocabulary: int, layers: int, *, memory: bool) -> Row:
    """Runs TRL's own loop; after each of its steps, one of our steps runs on the same pairs."""
    from evolve_ray.bench.trl_loop import steps_of_trl

    pairs = preferences(args, args.dpo_pairs * (args.repeats + 1))
    policy = Policy(args, options_of.Training(objective="dpo"), random_model(args, vocabulary, layers), ("chosen", "rejected"))
    seconds: dict[str, list[Seconds]] = {"ours": [], "TRL": []}
    peaks: dict[str, list[int]] = {"ours": [], "TRL": []}
    work: list[dict[str, Any]] = []

    def our_step(step: int, trl_seconds: Seconds, trl_peak: int) -> None:
        batch = [group for _, group in pairs[step * args.dpo_pairs : (step + 1) * args.dpo_pairs]]
        with Peak(args) if memory else NoPeak() as our_peak, Watch(args) as watch:
            work.append(policy.by_trees(batch))
        if step:  # the first step of each side is a warm-up
            seconds["ours"].append(watch.spent)
            seconds["TRL"].append(trl_seconds)
            peaks["ours"].append(our_peak.bytes)
            peaks["TRL"].append(trl_peak)

    watches = (Watch, Peak if memory else NoPeak)
    steps_of_trl(args, random_model(args, vocabulary, layers), [row for row, _ in pairs], our_step, watches)
    counts = {"parameters": policy.model.num_parameters(), "ours": work[-1], "TRL": padded(args, [g for _, g in pairs])}
    if not memory:
        return ratio("dpo_vs_trl", seconds, args.dpo_pairs, counts)
    counts |= {"ours, peak MiB": mib(peaks["ours"]), "TRL, peak MiB": mib(peaks["TRL"])}
    return Row("memory_vs_trl", "x", [a / b for a, b in zip(peaks["ours"], peaks["TRL"], strict=True)], counts)


def padded(args: argparse.Namespace, groups: list[list[Sequence]]) -> dict[str, Any]:
    """Returns the counts of TRL's last step: a row for each answer, padded to the longest."""
    lengths = [len(s.context) + len(s.response) for group in groups[-args.dpo_pairs :] for s in group]
    return token_counts(sum(lengths), len(lengths) * max(lengths), 1)
