"""Compares chains on one vLLM engine with the same requests round by round, and with all requests at once.

A random tiny Llama generates a set number of tokens for each request, so that lengths vary and all three sides write the same
texts. Most refinements are as long as their draft, as with a trained model that returns the draft unchanged. Each repeat draws
other lengths. The sides take turns on one engine; the prefix cache is emptied before each turn.

* `chain_steps_vs_barrier`, `chain_steps_vs_flat`: engine steps of the other side over those of the chains;
* `chain_vs_barrier`, `chain_vs_flat`: tokens/s of the chains over those of the other side.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve_ray.bench import table
from evolve_ray.bench.table import Row
from evolve_ray.config import options as options_of
from evolve_ray.errors import UserError
from evolve_ray.store import rows as tables
from evolve_ray.store.rows import derive_seed

CPU_ARGUMENTS = {
    "enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 30, "block_size": 32,
}  # fmt: skip
CPU_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONTEXT_TOKENS = 1024
ORDERS = (
    ("chains", "barriers", "flat"),
    ("barriers", "flat", "chains"),
    ("chains", "flat", "barriers"),
    ("barriers", "chains", "flat"),
)
CHECKED = ("num_tokens", "num_prompt_tokens")  # counts that must be the same on all sides


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each side")
    parser.add_argument("--seats", type=int, default=64, help="requests that run in the engine at a time (max_num_seqs)")
    parser.add_argument("--prompts", type=int, default=160, help="prompts, one chain each; the default is 2.5 for each seat")
    parser.add_argument("--rounds", type=int, default=4, help="drafts of a chain")
    parser.add_argument("--prompt", type=int, default=48, help="letters of a prompt")
    parser.add_argument("--new", type=int, nargs=2, default=[8, 96], metavar=("LEAST", "MOST"), help="tokens of a draft")
    parser.add_argument("--copies", type=float, default=0.6, help="share of refinements that are as long as their draft")
    parser.add_argument("--layout", choices=("conversation", "one_message"), default="conversation")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--engine-args",
        type=json.loads,
        default=CPU_ARGUMENTS,
        metavar="JSON",
        help="arguments of vLLM's LLM, for another device",
    )


@dataclass
class Turn:
    """The work and time of one side in one turn."""

    seconds: float
    cpu_s: float
    steps: int
    counts: dict[str, int]
    texts: dict[tuple[str, int], str] = field(repr=False)  # by prompt and round

    @property
    def speed(self) -> float:
        return self.counts["num_tokens"] / self.seconds

    def summary(self) -> str:
        prompt, cached = self.counts["num_prompt_tokens"], self.counts["num_cached_tokens"]
        return (
            f"{self.steps} steps, {self.seconds:.1f} s, CPU {self.cpu_s:.1f} s, {self.speed:.0f} tokens/s; "
            f"prompt tokens {prompt}, of these cached {cached} ({cached / prompt:.0%}), "
            f"generated tokens {self.counts['num_tokens']}"
        )


def rows(args: argparse.Namespace) -> list[Row]:
    from evolve_ray.generate.vllm import ENGINE_ENV

    low, high = args.new
    longest = args.prompt + 2 * high + 16  # the draft to refine, the new one, and the chat markup around them
    if not 0 < low <= high or longest > CONTEXT_TOKENS:
        raise UserError(
            f"--new: is {low} {high}; must be 1 <= LEAST <= MOST, and prompt and two drafts must fit into {CONTEXT_TOKENS} tokens"
        )
    os.environ.update(ENGINE_ENV)
    for name, value in CPU_ENV.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), args)
        turns = Bench(Path(folder), args).turns()
    return ratio_rows(turns, args.seats)


def random_model(folder: Path, args: argparse.Namespace) -> None:
    """Writes a Llama with random weights, and the tokenizer of the tiny world: one token for each letter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from evolve_ray.toy.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(CONTEXT_TOKENS)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    heads = max(1, args.hidden // 32)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=CONTEXT_TOKENS, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, args.dtype)).save_pretrained(folder)


class Bench:
    """One engine, and three ways to use it."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        from evolve_ray.generate.spec import GenerateSpec
        from evolve_ray.generate.vllm import VllmEngine
        from evolve_ray.models.chat import Chat
        from evolve_ray.refine.template import load_template

        chat = Chat(folder)
        letters = chat.text_ids(LETTERS)
        self.lengths: dict[int, int] = {}  # seed -> tokens of the draft with this seed

        class Varying(VllmEngine):
            """Generates drafts with the numbers of letters in `lengths`."""

            def use(engine, spec: GenerateSpec, chat: Chat) -> None:
                super().use(spec, chat)
                base_sampling = engine.sampling

                def sampling(seed: int, logps: bool) -> Any:
                    params = base_sampling(seed, logps)
                    params.max_tokens, params.ignore_eos, params.allowed_token_ids = self.lengths[seed], True, letters
                    return params

                engine.sampling = sampling

        template = load_template("tiny", args.layout)
        self.args, self.chat, self.strategy = args, chat, options_of.Strategy(rounds=args.rounds)
        self.spec = GenerateSpec(
            prompts="", work="", key="", shard_prompts=args.prompts, model=str(folder), model_hash="", dtype=args.dtype,
            context_tokens=CONTEXT_TOKENS, template=template, strategy=self.strategy,
            sampling=options_of.Sampling(max_tokens=args.new[1]),
            engine=options_of.Engine(max_num_seqs=args.seats, args=args.engine_args), seed=0, scope=1,
        )  # fmt: skip
        self.engine = Varying(self.spec, chat)
        self.steps = 0
        step = self.engine.llm.llm_engine.step

        def counted_step() -> Any:
            self.steps += 1
            return step()

        self.engine.llm.llm_engine.step = counted_step
        texts = (tables.digest(["prompt", number]) for number in range(args.prompts))
        digit_letters = str.maketrans("0123456789", LETTERS[10:20])
        self.prompts = [
            {"prompt_id": f"p{number}", "prompt": (text.translate(digit_letters) * args.prompt)[: args.prompt], "split": "train"}
            for number, text in enumerate(texts)
        ]

    def turns(self) -> dict[str, list[Turn]]:
        """Returns `repeats` turns of each side, after a warm-up turn. The order of sides changes, and flat is never first."""
        sides = {"chains": self.chains, "barriers": self.barriers, "flat": self.flat}
        turns_by_side: dict[str, list[Turn]] = {name: [] for name in sides}
        for repeat in table.turns("generate", self.args.repeats + 1):
            self.set_lengths(repeat)
            for name in ORDERS[repeat % len(ORDERS)]:
                turns_by_side[name].append(self.turn(sides[name]))
        return {name: turns[1:] for name, turns in turns_by_side.items()}

    def set_lengths(self, repeat: int) -> None:
        """Sets new seeds, which give new lengths and texts."""
        self.spec, (low, high) = dataclasses.replace(self.spec, seed=repeat), self.args.new
        for prompt in self.prompts:
            seeds = [self.seed(prompt, round_number) for round_number in range(1, self.args.rounds + 1)]
            self.lengths |= zip(seeds, lengths(seeds, low, high, self.args.copies), strict=True)

    def seed(self, prompt: dict[str, str], round_number: int) -> int:
        return derive_seed(self.spec.seed, self.spec.scope, prompt["prompt_id"], 0, round_number)

    def turn(self, side: Callable[[], tuple[dict[tuple[str, int], str], dict[str, int]]]) -> Turn:
        self.engine.llm.reset_prefix_cache()
        steps, started, cpu = self.steps, time.perf_counter(), time.process_time()
        texts, counts = side()
        self.texts = texts
        return Turn(time.perf_counter() - started, time.process_time() - cpu, self.steps - steps, counts, texts)

    def chains(self) -> tuple[dict[tuple[str, int], str], dict[str, int]]:
        """Generates as a run does: no barrier between rounds."""
        from evolve_ray.generate.drive import Drive
        from evolve_ray.refine.strategies import chain

        drive = Drive(self.engine, lambda ask: self.chat.context_ids(ask.messages), self.spec)
        drafts, _, stats = drive.run(self.prompts, lambda prompt: chain(prompt, self.spec.template, self.strategy))
        return {(row["prompt_id"], row["round"]): row["text"] for row in drafts}, stats

    def barriers(self) -> tuple[dict[tuple[str, int], str], dict[str, int]]:
        """Calls `LLM.generate` once per round."""
        texts: dict[tuple[str, int], str] = {}
        stats = dict.fromkeys((*CHECKED, "num_cached_tokens"), 0)
        for round_number in range(1, self.args.rounds + 1):
            self.generate(self.requests(round_number, texts), texts, stats)
        return texts, stats

    def flat(self) -> tuple[dict[tuple[str, int], str], dict[str, int]]:
        """Calls `LLM.generate` once with the prompts of all rounds. Real runs cannot do this: the drafts are not known before."""
        texts: dict[tuple[str, int], str] = {}
        stats = dict.fromkeys((*CHECKED, "num_cached_tokens"), 0)
        rounds = range(1, self.args.rounds + 1)
        self.generate([request for round_number in rounds for request in self.requests(round_number, self.texts)], texts, stats)
        return texts, stats

    def requests(self, round_number: int, texts: dict[tuple[str, int], str]) -> list[tuple[tuple[str, int], list[int], int]]:
        """Returns (prompt id and round, prompt token ids, seed) of each request of a round; `texts` has the previous round."""
        template, requests = self.spec.template, []
        for prompt in self.prompts:
            prompt_id, text = prompt["prompt_id"], prompt["prompt"]
            messages = (
                template.direct(text) if round_number == 1 else template.refinement(text, texts[prompt_id, round_number - 1])
            )
            requests.append(((prompt_id, round_number), self.chat.context_ids(messages), self.seed(prompt, round_number)))
        return requests

    def generate(self, requests: list, texts: dict[tuple[str, int], str], stats: dict[str, int]) -> None:
        prompts = [{"prompt_token_ids": ids} for _, ids, _ in requests]
        params = [self.engine.sampling(seed, False) for _, _, seed in requests]
        for (place, _, _), output in zip(requests, self.engine.llm.generate(prompts, params, use_tqdm=False), strict=True):
            texts[place] = output.outputs[0].text
            stats["num_tokens"] += len(output.outputs[0].token_ids)
            stats["num_prompt_tokens"] += len(output.prompt_token_ids)
            stats["num_cached_tokens"] += output.num_cached_tokens or 0


def lengths(seeds: list[int], low: int, high: int, copies: float) -> list[int]:
    """Returns the tokens of each draft of a chain: uniform from low to high, or with probability `copies` as the draft before."""
    tokens: list[int] = []
    for seed in seeds:
        generator = random.Random(seed)
        is_copy = generator.random() < copies
        tokens.append(tokens[-1] if tokens and is_copy else generator.randint(low, high))
    return tokens


def ratio_rows(turns_by_side: dict[str, list[Turn]], seats: int) -> list[Row]:
    """Returns the rows; raises a UserError if the sides of a repeat did different work."""
    chains = turns_by_side["chains"]
    fewest_steps = [least_turn_steps(turn, seats) for turn in chains]
    rows = []
    for other in ("barriers", "flat"):
        name, turns = other.removesuffix("s"), turns_by_side[other]
        turn_pairs = list(zip(chains, turns, strict=True))
        for ours, theirs in turn_pairs:
            if any(theirs.counts[key] != ours.counts[key] for key in CHECKED):
                raise UserError(
                    f"generate: {other} and chains did different work ({theirs.summary()}; {ours.summary()}); no ratio is valid"
                )
        num_different = sum(text != theirs.texts.get(place) for ours, theirs in turn_pairs for place, text in ours.texts.items())
        counts = {"chains": chains[0].summary(), other: turns[0].summary(), "texts that differ": num_different}
        limits = [round(turn.steps / steps, 3) for turn, steps in zip(turns, fewest_steps, strict=True)]
        bound = {"no schedule has fewer steps than": fewest_steps, "so the limits are": limits}
        rows.append(
            Row(f"chain_steps_vs_{name}", "x", [theirs.steps / ours.steps for ours, theirs in turn_pairs], counts | bound)
        )
        cpu_ratios = [round(theirs.cpu_s / ours.cpu_s, 3) for ours, theirs in turn_pairs]
        rows.append(
            Row(f"chain_vs_{name}", "x", [ours.speed / theirs.speed for ours, theirs in turn_pairs], {"CPU ratios": cpu_ratios})
        )
    return rows


def least_turn_steps(turn: Turn, seats: int) -> int:
    """Returns `least_steps` for the texts of a turn."""
    lengths: dict[str, list[int]] = {}
    for (prompt, _), text in sorted(turn.texts.items()):
        lengths.setdefault(prompt, []).append(len(text))
    return least_steps(list(lengths.values()), seats)


def least_steps(lengths: list[list[int]], seats: int) -> int:
    """Returns the least engine steps of any schedule: a seat writes one token per step, and drafts of a chain come one by one."""
    total = sum(itertools.chain.from_iterable(lengths))
    return max(math.ceil(total / seats), max(map(sum, lengths)))
