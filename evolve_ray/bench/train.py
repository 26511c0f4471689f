"""Training steps (forward, backward, AdamW) of a random Llama in plain PyTorch, with the log-probabilities of the product.

* `evolve_tree_vs_separate`: pairs/s of objective `evolve`, trees over a padded row for each of the six sequences;
* `dpo_vs_trl`: pairs/s of objective `dpo`, trees over TRL's DPOTrainer with a precomputed reference, the same pairs;
* `memory_vs_trl` and `memory_vs_full_logits`: what a step allocates at its peak beside weights and optimiser, over the same
  of TRL, and of trees whose logits are all made at once.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evolve_ray.bench.table import Row
from evolve_ray.config import options as options_of
from evolve_ray.errors import UserError
from evolve_ray.store.rows import REFERENCE
from evolve_ray.train.tree import Forward, Sequence, pack

NAMES = ("evolve_tree_vs_separate", "dpo_vs_trl", "memory_vs_trl", "memory_vs_full_logits")
SIX = tuple(REFERENCE.names[1:])
Spent = tuple[float, float]  # wall and CPU seconds
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="rows to measure")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of a step of evolve")
    parser.add_argument("--dpo-pairs", type=int, default=8, help="pairs of a step of dpo")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--instruction", type=int, default=32, help="tokens of the refinement instruction")
    parser.add_argument("--answer", type=int, default=256, help="tokens of an answer; for dpo the most, the least is a quarter")
    parser.add_argument(
        "--model", metavar="FOLDER_OR_NAME", help="has the shape that is initialised at random, in place of these"
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--memory-vocabulary", type=int, default=32768, help="vocabulary of the rows about memory")
    parser.add_argument("--memory-layers", type=int, default=2, help="layers of the rows about memory")
    parser.add_argument("--max-tokens", type=int, default=16384, help="tokens of a forward")


def rows(given: argparse.Namespace) -> list[Row]:
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: is cuda, but torch finds no GPU here; leave it out")
    measured = [evolve(given)] if "evolve_tree_vs_separate" in given.only else []
    if "dpo_vs_trl" in given.only:
        measured.append(against_trl(given, given.vocabulary, given.layers, memory=False))
    if "memory_vs_trl" in given.only:
        measured.append(against_trl(given, given.memory_vocabulary, given.memory_layers, memory=True))
    if "memory_vs_full_logits" in given.only:
        measured.append(full_logits(given))
    return measured


class Policy:
    """A random model with AdamW and the objective on given pairs; log-probabilities of the start are the reference."""

    def __init__(self, given: argparse.Namespace, training: options_of.Training, model: Any, names: tuple[str, ...]):
        import torch

        from evolve_ray.train import objectives
        from evolve_ray.train.tree_check import tree_model

        self.given, self.training, self.names, self.model = given, training, names, model
        self.device = torch.device(given.device)
        self.tree = tree_model(model, self.device)
        self.attention = model.config._attn_implementation  # that of trees; separate rows are read as always
        self.objective = objectives.find(training)
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)

    def packed(self, groups: list[list[Sequence]]) -> list[Forward]:
        limits = {"max_tokens": self.given.max_tokens, "max_groups": len(groups)}
        return pack(groups, keys=[str(n) for n in range(len(groups))], one_row=self.device.type == "cuda", **limits)

    def by_trees(self, groups: list[list[Sequence]], *, chunked: bool = True) -> dict[str, Any]:
        """One step, packing included; gives back its counts."""
        from evolve_ray.train.logprobs import num_chunks, tree_logps

        self.model.set_attn_implementation(self.attention)
        forwards = self.packed(groups)
        for forward in forwards:
            flat = tree_logps(self.tree, forward, self.device, num_chunks(forward) if chunked else 0)
            self.backward(flat, [groups[group] for group in forward.groups], len(groups))
        self.update()
        return counted(sum(f.num_tokens for f in forwards), sum(f.ids_RW.size for f in forwards), len(forwards))

    def by_rows(self, groups: list[list[Sequence]]) -> dict[str, Any]:
        """The same step from a padded row for each sequence."""
        from evolve_ray.train.logprobs import sequence_logps

        self.model.set_attn_implementation("sdpa")
        flat = [sequence for group in groups for sequence in group]
        self.backward(sequence_logps(self.model, flat, 0, self.device), groups, len(groups))
        self.update()
        lengths = [len(s.context) + len(s.response) for s in flat]
        return counted(sum(lengths), len(flat) * max(lengths), 1)

    def backward(self, flat: Any, groups: list[list[Sequence]], num_pairs: int) -> None:
        import torch

        from evolve_ray.train import objectives

        values = dict(zip(self.names, flat.view(-1, len(self.names)).unbind(1), strict=True))
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


def counted(used: int, read: int, forwards: int) -> dict[str, Any]:
    return {"tokens forwarded": read, "padding share": round(1 - used / read, 3), "forwards": forwards}


def random_model(given: argparse.Namespace, vocabulary: int, layers: int) -> Any:
    """A Llama, or what `--model` has the shape of, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    heads = max(1, given.hidden // 64)
    if given.model:
        config = AutoConfig.from_pretrained(given.model, trust_remote_code=False)
    else:
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=given.hidden, intermediate_size=given.hidden * 11 // 4, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=8192,
        )  # fmt: skip
    with torch.device(given.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, given.dtype)).train()


def evolve(given: argparse.Namespace) -> Row:
    """Six sequences a pair, as the `conversation` layout has them, of random tokens."""
    model = random_model(given, given.vocabulary, given.layers)
    policy = Policy(given, options_of.Training(objective="evolve"), model, SIX)
    draw = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(model.config.vocab_size) for _ in range(length))

    def group() -> list[Sequence]:
        x, z, w, l = tokens(given.prompt), tokens(given.instruction), tokens(given.answer), tokens(given.answer)  # noqa: E741
        return [Sequence(x, w), Sequence(x, l), *(Sequence(x + d + z, y) for d in (l, w) for y in (w, l))]

    groups = [group() for _ in range(given.pairs)]
    sides = {"tree": lambda: policy.by_trees(groups), "separate": lambda: policy.by_rows(groups)}
    read = model.num_parameters() - model.get_input_embeddings().weight.numel()  # weights that every token is multiplied with
    return in_turns("evolve_tree_vs_separate", given, sides, given.pairs, {"parameters": model.num_parameters()}, read)


def in_turns(
    name: str, given: argparse.Namespace, sides: dict[str, Callable], pairs: int, counts: dict[str, Any], read: int
) -> Row:  # fmt: skip
    """Seconds of the second side over those of the first, step by step, after one step of each that is not timed.

    Model FLOPs, for the utilisation of a device of known speed: 6 a weight and token that is no padding; attention is left out.
    """
    work = {side: step() for side, step in sides.items()}
    spent: dict[str, list[Spent]] = {side: [] for side in sides}
    for _ in range(given.repeats):
        for side, step in sides.items():
            with Watch(given) as watch:
                step()
            spent[side].append(watch.spent)
    used = {side: done["tokens forwarded"] * (1 - done["padding share"]) for side, done in work.items()}
    speed = {
        f"{side}, model TFLOP/s": round(6e-12 * read * used[side] / statistics.median(wall for wall, _ in times), 4)
        for side, times in spent.items()
    }
    return ratio(name, spent, pairs, counts | work | speed)


def ratio(name: str, spent: dict[str, list[Spent]], pairs: int, counts: dict[str, Any]) -> Row:
    """Of wall seconds; that of CPU seconds, which a loaded machine disturbs less, is among the counts."""
    ours, theirs = spent.values()
    speeds = {f"{side}, pairs/s": round(pairs * len(times) / sum(wall for wall, _ in times), 3) for side, times in spent.items()}
    on_cpu = [round(b / a, 3) for (_, a), (_, b) in zip(ours, theirs, strict=True)]
    return Row(name, "x", [b / a for (a, _), (b, _) in zip(ours, theirs, strict=True)], speeds | {"CPU ratios": on_cpu} | counts)


class Watch:
    """`with Watch(given) as watch`: then `watch.spent` are the wall and CPU seconds inside."""

    def __init__(self, given: argparse.Namespace):
        self.given = given

    def __enter__(self) -> "Watch":
        self.begun = (time.perf_counter(), time.process_time())
        return self

    def __exit__(self, *error: Any) -> None:
        synchronise(self.given)
        self.spent: Spent = (time.perf_counter() - self.begun[0], time.process_time() - self.begun[1])


def synchronise(given: argparse.Namespace) -> None:
    import torch

    if given.device == "cuda":
        torch.cuda.synchronize()


class Peak:
    """`with Peak(given) as peak`: then `peak.bytes` is the most that was allocated inside beyond what was there before."""

    def __init__(self, given: argparse.Namespace):
        self.cuda, self.bytes = given.device == "cuda", 0

    def __enter__(self) -> "Peak":
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.profiler.__exit__(*error)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
        live = 0
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
            live += event["args"]["Bytes"]
            self.bytes = max(self.bytes, live)


def full_logits(given: argparse.Namespace) -> Row:
    """The peak of a step of dpo with chunked logits over that with all logits of the same trees."""
    policy = Policy(
        given,
        options_of.Training(objective="dpo"),
        random_model(given, given.memory_vocabulary, given.memory_layers),
        ("chosen", "rejected"),
    )
    groups = [group for _, group in preferences(given, given.dpo_pairs)]
    peaks: dict[bool, list[int]] = {True: [], False: []}
    policy.by_trees(groups)
    for _ in range(max(1, min(2, given.repeats))):
        for chunked, found in peaks.items():
            with Peak(given) as peak:
                work = policy.by_trees(groups, chunked=chunked)
            found.append(peak.bytes)
    counts = {"chunked, peak MiB": mib(peaks[True]), "all logits, peak MiB": mib(peaks[False]), "both": work}
    return Row("memory_vs_full_logits", "x", [a / b for a, b in zip(peaks[True], peaks[False], strict=True)], counts)


def mib(peaks: list[int]) -> float:
    return round(max(peaks) / 2**20, 1)


def preferences(given: argparse.Namespace, count: int) -> list[tuple[dict[str, str], list[Sequence]]]:
    """Random letters as rows for TRL, and the sequences of the same tokens: prompts of one length, answers spread fourfold."""
    from evolve_ray.bench.letters import chat

    draw, talk, made = random.Random(0), chat(), []
    for _ in range(count):
        prompt = "".join(draw.choices(LETTERS, k=given.prompt))
        answers = ["".join(draw.choices(LETTERS, k=draw.randint(given.answer // 4, given.answer))) for _ in range(2)]
        context = tuple(talk.context_ids(({"role": "user", "content": prompt},)))
        group = [Sequence(context, tuple(talk.response_ids(answer, finished=True))) for answer in answers]
        made.append(({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}, group))
    return made


def against_trl(given: argparse.Namespace, vocabulary: int, layers: int, *, memory: bool) -> Row:
    """TRL's own loop; after each of its steps comes one of ours on the pairs of that step."""
    from evolve_ray.bench.trl_loop import steps_of_trl

    pairs = preferences(given, given.dpo_pairs * (given.repeats + 1))
    policy = Policy(given, options_of.Training(objective="dpo"), random_model(given, vocabulary, layers), ("chosen", "rejected"))
    spent: dict[str, list[Spent]] = {"ours": [], "TRL": []}
    peaks: dict[str, list[int]] = {"ours": [], "TRL": []}
    work: list[dict[str, Any]] = []

    def ours(step: int, took: Spent, peak: int) -> None:
        batch = [group for _, group in pairs[step * given.dpo_pairs : (step + 1) * given.dpo_pairs]]
        with Peak(given) if memory else NoPeak() as own, Watch(given) as watch:
            work.append(policy.by_trees(batch))
        if step:  # the first step of each side warms up
            spent["ours"].append(watch.spent)
            spent["TRL"].append(took)
            peaks["ours"].append(own.bytes)
            peaks["TRL"].append(peak)

    watches = (Watch, Peak if memory else NoPeak)
    steps_of_trl(given, random_model(given, vocabulary, layers), [row for row, _ in pairs], ours, watches)
    counts = {"parameters": policy.model.num_parameters(), "ours": work[-1], "TRL": padded(given, [g for _, g in pairs])}
    if not memory:
        return ratio("dpo_vs_trl", spent, given.dpo_pairs, counts)
    counts |= {"ours, peak MiB": mib(peaks["ours"]), "TRL, peak MiB": mib(peaks["TRL"])}
    return Row("memory_vs_trl", "x", [a / b for a, b in zip(peaks["ours"], peaks["TRL"], strict=True)], counts)


class NoPeak:
    """In the place of `Peak` where time is measured: the profiler would cost some."""

    bytes = 0

    def __init__(self, given: Any = None):
        pass

    def __enter__(self) -> "NoPeak":
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def padded(given: argparse.Namespace, groups: list[list[Sequence]]) -> dict[str, Any]:
    """What TRL reads in its last step: a row for each answer, as long as the longest."""
    lengths = [len(s.context) + len(s.response) for group in groups[-given.dpo_pairs :] for s in group]
    return counted(sum(lengths), len(lengths) * max(lengths), 1)
