"""Chains on one vLLM engine against the same requests round by round, and against all of them at once.

A random tiny Llama answers with as many tokens as it is told to, so that lengths vary and all three sides write the very same
texts; most refinements are as long as their draft, as where a trained model returns it unchanged. Each repeat draws other
lengths. Sides take turns on one engine; the prefix cache is emptied before each.

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
CHECKED = ("num_tokens", "num_prompt_tokens")  # are the same on all sides


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each side")
    parser.add_argument("--seats", type=int, default=64, help="requests that the engine works on at a time")
    parser.add_argument("--prompts", type=int, default=160, help="chains; 2.5 for each seat")
    parser.add_argument("--rounds", type=int, default=4, help="drafts of a chain")
    parser.add_argument("--prompt", type=int, default=48, help="letters of a prompt")
    parser.add_argument("--new", type=int, nargs=2, default=[8, 96], metavar=("LEAST", "MOST"), help="tokens of a draft")
    parser.add_argument("--copies", type=float, default=0.6, help="share of the refinements that are as long as their draft")
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
    """What one side did in one turn."""

    seconds: float
    cpu_s: float
    steps: int
    counts: dict[str, int]
    texts: dict[tuple[str, int], str] = field(repr=False)  # by prompt and round

    @property
    def speed(self) -> float:
        return self.counts["num_tokens"] / self.seconds

    def told(self) -> str:
        prompted, cached, made = (self.counts[name] for name in ("num_prompt_tokens", "num_cached_tokens", "num_tokens"))
        return (
            f"{self.steps} steps, {self.seconds:.1f} s, CPU {self.cpu_s:.1f} s, {self.speed:.0f} tokens/s; "
            f"tokens prompted {prompted}, of these cached {cached} ({cached / prompted:.0%}), generated {made}"
        )


def rows(given: argparse.Namespace) -> list[Row]:
    from evolve_ray.generate.vllm import ENGINE_ENV

    low, high = given.new
    longest = given.prompt + 2 * high + 16  # a draft in view and the one being written, with the markup around them
    if not 0 < low <= high or longest > CONTEXT_TOKENS:
        raise UserError(f"--new: is {low} {high}, but must ascend from 1, and two drafts must fit into {CONTEXT_TOKENS} tokens")
    os.environ.update(ENGINE_ENV)
    for name, value in CPU_ENV.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), given)
        found = Bench(Path(folder), given).turns()
    return compared(found, given.seats)


def random_model(folder: Path, given: argparse.Namespace) -> None:
    """A Llama of random weights with the tokenizer of the tiny world, a token a letter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from evolve_ray.toy.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(CONTEXT_TOKENS)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    heads = max(1, given.hidden // 32)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=given.hidden, intermediate_size=4 * given.hidden, num_hidden_layers=given.layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=CONTEXT_TOKENS, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, given.dtype)).save_pretrained(folder)


class Bench:
    """One engine and the three ways to use it."""

    def __init__(self, folder: Path, given: argparse.Namespace):
        from evolve_ray.generate.spec import GenerateSpec
        from evolve_ray.generate.vllm import VllmEngine
        from evolve_ray.models.chat import Chat
        from evolve_ray.refine.template import load_template

        chat = Chat(folder)
        letters = chat.text_ids(LETTERS)
        self.lengths: dict[int, int] = {}  # of the draft with a seed

        class Varying(VllmEngine):
            """Drafts of as many letters as `lengths` says."""

            def use(engine, spec: GenerateSpec, chat: Chat) -> None:
                super().use(spec, chat)
                product = engine.sampling

                def sampling(seed: int, logps: bool) -> Any:
                    params = product(seed, logps)
                    params.max_tokens, params.ignore_eos, params.allowed_token_ids = self.lengths[seed], True, letters
                    return params

                engine.sampling = sampling

        template = load_template("tiny", given.layout)
        self.given, self.chat, self.strategy = given, chat, options_of.Strategy(rounds=given.rounds)
        self.spec = GenerateSpec(
            prompts="", work="", key="", shard_prompts=given.prompts, model=str(folder), model_hash="", dtype=given.dtype,
            context_tokens=CONTEXT_TOKENS, template=template, strategy=self.strategy,
            sampling=options_of.Sampling(max_tokens=given.new[1]),
            engine=options_of.Engine(max_num_seqs=given.seats, args=given.engine_args), seed=0, scope=1,
        )  # fmt: skip
        self.engine = Varying(self.spec, chat)
        self.steps = 0
        step = self.engine.llm.llm_engine.step

        def counted() -> Any:
            self.steps += 1
            return step()

        self.engine.llm.llm_engine.step = counted
        texts = (tables.digest(["prompt", number]) for number in range(given.prompts))
        letters_of = str.maketrans("0123456789", LETTERS[10:20])
        self.prompts = [
            {"prompt_id": f"p{number}", "prompt": (text.translate(letters_of) * given.prompt)[: given.prompt], "split": "train"}
            for number, text in enumerate(texts)
        ]

    def turns(self) -> dict[str, list[Turn]]:
        """`repeats` turns of each side, after one that is not timed; their order changes, and flat is never the first."""
        sides = {"chains": self.chains, "barriers": self.barriers, "flat": self.flat}
        found: dict[str, list[Turn]] = {name: [] for name in sides}
        for repeat in range(self.given.repeats + 1):
            self.draw(repeat)
            for name in ORDERS[repeat % len(ORDERS)]:
                found[name].append(self.turn(sides[name]))
        return {name: turns[1:] for name, turns in found.items()}

    def draw(self, repeat: int) -> None:
        """Other seeds, and with them other lengths and texts."""
        self.spec, (low, high) = dataclasses.replace(self.spec, seed=repeat), self.given.new
        for prompt in self.prompts:
            seeds = [self.seed(prompt, number) for number in range(1, self.given.rounds + 1)]
            self.lengths |= zip(seeds, lengths(seeds, low, high, self.given.copies), strict=True)

    def seed(self, prompt: dict[str, str], number: int) -> int:
        return derive_seed(self.spec.seed, self.spec.scope, prompt["prompt_id"], 0, number)

    def turn(self, side: Callable[[], tuple[dict[tuple[str, int], str], dict[str, int]]]) -> Turn:
        self.engine.llm.reset_prefix_cache()
        steps, started, cpu = self.steps, time.perf_counter(), time.process_time()
        texts, counts = side()
        self.texts = texts
        return Turn(time.perf_counter() - started, time.process_time() - cpu, self.steps - steps, counts, texts)

    def chains(self) -> tuple[dict[tuple[str, int], str], dict[str, int]]:
        """As the product generates: no barrier between rounds."""
        from evolve_ray.generate.drive import Drive
        from evolve_ray.refine.strategies import chain

        drive = Drive(self.engine, lambda ask: self.chat.context_ids(ask.messages), self.spec)
        made, _, stats = drive.run(self.prompts, lambda prompt: chain(prompt, self.spec.template, self.strategy))
        return {(row["prompt_id"], row["round"]): row["text"] for row in made}, stats

    def barriers(self) -> tuple[dict[tuple[str, int], str], dict[str, int]]:
        """`LLM.generate` once a round."""
        texts: dict[tuple[str, int], str] = {}
        stats = dict.fromkeys((*CHECKED, "num_cached_tokens"), 0)
        for number in range(1, self.given.rounds + 1):
            self.generate(self.asked(number, texts), texts, stats)
        return texts, stats

    def flat(self) -> tuple[dict[tuple[str, int], str], dict[str, int]]:
        """The prompts of all rounds, which nobody could know beforehand, in one `LLM.generate`."""
        texts: dict[tuple[str, int], str] = {}
        stats = dict.fromkeys((*CHECKED, "num_cached_tokens"), 0)
        rounds = range(1, self.given.rounds + 1)
        self.generate([ask for number in rounds for ask in self.asked(number, self.texts)], texts, stats)
        return texts, stats

    def asked(self, number: int, texts: dict[tuple[str, int], str]) -> list[tuple[tuple[str, int], list[int], int]]:
        """Place, prompt ids and seed of each request of a round, given the texts of the one before."""
        template, found = self.spec.template, []
        for prompt in self.prompts:
            name, text = prompt["prompt_id"], prompt["prompt"]
            messages = template.direct(text) if number == 1 else template.refinement(text, texts[name, number - 1])
            found.append(((name, number), self.chat.context_ids(messages), self.seed(prompt, number)))
        return found

    def generate(self, asked: list, texts: dict[tuple[str, int], str], stats: dict[str, int]) -> None:
        given = [{"prompt_token_ids": ids} for _, ids, _ in asked]
        params = [self.engine.sampling(seed, False) for _, _, seed in asked]
        for (place, _, _), output in zip(asked, self.engine.llm.generate(given, params, use_tqdm=False), strict=True):
            texts[place] = output.outputs[0].text
            stats["num_tokens"] += len(output.outputs[0].token_ids)
            stats["num_prompt_tokens"] += len(output.prompt_token_ids)
            stats["num_cached_tokens"] += output.num_cached_tokens or 0


def lengths(seeds: list[int], low: int, high: int, copies: float) -> list[int]:
    """Tokens of the drafts of a chain with these seeds: the first even between the bounds, the next perhaps the same."""
    found: list[int] = []
    for seed in seeds:
        chance = random.Random(seed)
        copied = chance.random() < copies
        found.append(found[-1] if found and copied else chance.randint(low, high))
    return found


def compared(found: dict[str, list[Turn]], seats: int) -> list[Row]:
    """The rows; on all sides of a repeat the work must have been the same."""
    chains = found["chains"]
    least = [least_of(turn, seats) for turn in chains]
    made = []
    for other in ("barriers", "flat"):
        name, turns = other.removesuffix("s"), found[other]
        both = list(zip(chains, turns, strict=True))
        for ours, theirs in both:
            if any(theirs.counts[key] != ours.counts[key] for key in CHECKED):
                raise UserError(
                    f"generate: the {other} did other work than the chains ({theirs.told()}; {ours.told()}), so no ratio holds"
                )
        differ = sum(text != theirs.texts.get(place) for ours, theirs in both for place, text in ours.texts.items())
        counts = {"chains": chains[0].told(), other: turns[0].told(), "texts that differ": differ}
        limit = [round(turn.steps / steps, 3) for turn, steps in zip(turns, least, strict=True)]
        bound = {"no schedule has fewer steps than": least, "so the limits are": limit}
        made.append(Row(f"chain_steps_vs_{name}", "x", [theirs.steps / ours.steps for ours, theirs in both], counts | bound))
        on_cpu = [round(theirs.cpu_s / ours.cpu_s, 3) for ours, theirs in both]
        made.append(Row(f"chain_vs_{name}", "x", [ours.speed / theirs.speed for ours, theirs in both], {"CPU ratios": on_cpu}))
    return made


def least_of(turn: Turn, seats: int) -> int:
    """`least_steps` of what a turn wrote."""
    found: dict[str, list[int]] = {}
    for (prompt, _), text in sorted(turn.texts.items()):
        found.setdefault(prompt, []).append(len(text))
    return least_steps(list(found.values()), seats)


def least_steps(lengths: list[list[int]], seats: int) -> int:
    """No schedule of chains takes fewer engine steps: a seat writes a token a step, and drafts of a chain follow each other."""
    total = sum(itertools.chain.from_iterable(lengths))
    return max(math.ceil(total / seats), max(map(sum, lengths)))
