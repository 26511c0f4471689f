"""Chains on one vLLM engine against the same requests round by round, and against all of them at once.

A random tiny Llama answers with as many tokens as a request's seed says, so that lengths vary and all three sides write the
very same texts. Sides take turns on one engine; the prefix cache is emptied before each.

* `chain_steps_vs_barrier`, `chain_steps_vs_flat`: engine steps of the other side over those of the chains;
* `chain_vs_barrier`, `chain_vs_flat`: tokens/s of the chains over those of the other side.
"""

import argparse
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve_ray import config as options_of
from evolve_ray import rows as tables
from evolve_ray.bench.table import Row
from evolve_ray.errors import UserError
from evolve_ray.rows import derive_seed

CPU_ARGUMENTS = {
    "enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 29,
}  # fmt: skip
CPU_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONTEXT_TOKENS = 1024
CHECKED = ("num_tokens", "num_prompt_tokens")  # are the same on all sides


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=4, help="timed turns of each side")
    parser.add_argument("--seats", type=int, default=64, help="requests that the engine works on at a time")
    parser.add_argument("--prompts", type=int, default=160, help="chains; 2.5 for each seat")
    parser.add_argument("--rounds", type=int, default=4, help="drafts of a chain")
    parser.add_argument("--prompt", type=int, default=48, help="letters of a prompt")
    parser.add_argument("--new", type=int, nargs=2, default=[8, 96], metavar=("LEAST", "MOST"), help="tokens of a draft")
    parser.add_argument("--layout", choices=("conversation", "one_message"), default="conversation")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=3)
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
    from evolve_ray.generate import ENGINE_ENV

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
        from evolve_ray.chat import Chat
        from evolve_ray.drive import GenerateSpec
        from evolve_ray.generate import VllmEngine
        from evolve_ray.refine import load_template

        chat, (low, high) = Chat(folder), given.new
        letters = chat.text_ids(LETTERS)

        class Varying(VllmEngine):
            """Drafts of as many letters as the seed says."""

            def use(self, spec: GenerateSpec, chat: Chat) -> None:
                from vllm import SamplingParams

                self.sampling = lambda seed, logps: SamplingParams(
                    temperature=1.0, max_tokens=length(seed, low, high), ignore_eos=True, seed=seed, allowed_token_ids=letters
                )

        template = load_template("tiny", given.layout)
        self.given, self.chat, self.strategy = given, chat, options_of.Strategy(rounds=given.rounds)
        self.spec = GenerateSpec(
            prompts="", work="", key="", shard_prompts=given.prompts, model=str(folder), model_hash="", dtype=given.dtype,
            context_tokens=CONTEXT_TOKENS, template=template, strategy=self.strategy,
            sampling=options_of.Sampling(max_tokens=high),
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
        self.requests: list[tuple[tuple[str, int], list[int], int]] = []  # of all rounds: what the flat side is given

    def turns(self) -> dict[str, list[Turn]]:
        """`repeats` turns of each side, after one that is not timed; the side that begins changes."""
        sides = {"chains": self.chains, "barriers": self.barriers, "flat": self.flat}
        for side in sides.values():
            self.turn(side)
        found: dict[str, list[Turn]] = {name: [] for name in sides}
        for repeat in range(self.given.repeats):
            for place in range(len(sides)):
                name = list(sides)[(repeat + place) % len(sides)]
                found[name].append(self.turn(sides[name]))
        return found

    def turn(self, side: Callable[[], tuple[dict[tuple[str, int], str], dict[str, int]]]) -> Turn:
        self.engine.llm.reset_prefix_cache()
        steps, started, cpu = self.steps, time.perf_counter(), time.process_time()
        texts, counts = side()
        return Turn(time.perf_counter() - started, time.process_time() - cpu, self.steps - steps, counts, texts)

    def chains(self) -> tuple[dict[tuple[str, int], str], dict[str, int]]:
        """As the product generates: no barrier between rounds."""
        from evolve_ray.drive import Drive
        from evolve_ray.strategies import chain

        drive = Drive(self.engine, lambda ask: self.chat.context_ids(ask.messages), self.spec)
        made, _, stats = drive.run(self.prompts, lambda prompt: chain(prompt, self.spec.template, self.strategy))
        return {(row["prompt_id"], row["round"]): row["text"] for row in made}, stats

    def barriers(self) -> tuple[dict[tuple[str, int], str], dict[str, int]]:
        """`LLM.generate` once a round."""
        texts: dict[tuple[str, int], str] = {}
        stats, self.requests = dict.fromkeys((*CHECKED, "num_cached_tokens"), 0), []
        for number in range(1, self.given.rounds + 1):
            asked = []
            for prompt in self.prompts:
                name, text = prompt["prompt_id"], prompt["prompt"]
                template = self.spec.template
                messages = template.direct(text) if number == 1 else template.refinement(text, texts[name, number - 1])
                asked.append(((name, number), self.chat.context_ids(messages), derive_seed(0, 1, name, 0, number)))
            self.generate(asked, texts, stats)
            self.requests += asked
        return texts, stats

    def flat(self) -> tuple[dict[tuple[str, int], str], dict[str, int]]:
        """The prompts of all rounds, which nobody could know beforehand, in one `LLM.generate`."""
        texts: dict[tuple[str, int], str] = {}
        stats = dict.fromkeys((*CHECKED, "num_cached_tokens"), 0)
        self.generate(self.requests, texts, stats)
        return texts, stats

    def generate(self, asked: list, texts: dict[tuple[str, int], str], stats: dict[str, int]) -> None:
        given = [{"prompt_token_ids": ids} for _, ids, _ in asked]
        params = [self.engine.sampling(seed, False) for _, _, seed in asked]
        for (place, _, _), output in zip(asked, self.engine.llm.generate(given, params, use_tqdm=False), strict=True):
            texts[place] = output.outputs[0].text
            stats["num_tokens"] += len(output.outputs[0].token_ids)
            stats["num_prompt_tokens"] += len(output.prompt_token_ids)
            stats["num_cached_tokens"] += output.num_cached_tokens or 0


def length(seed: int, low: int, high: int) -> int:
    """Tokens of the draft with this seed."""
    return low + derive_seed("length", seed) % (high - low + 1)


def compared(found: dict[str, list[Turn]], seats: int) -> list[Row]:
    """The rows; on all sides the work must have been the same."""
    chains, first = found["chains"], found["chains"][0]
    lengths: dict[str, list[int]] = {}
    for (prompt, _), text in sorted(first.texts.items()):
        lengths.setdefault(prompt, []).append(len(text))
    least = least_steps(list(lengths.values()), seats)
    made = []
    for other in ("barriers", "flat"):
        name = other.removesuffix("s")
        turns = found[other]
        differ = sum(text != turns[0].texts.get(place) for place, text in first.texts.items())
        if any(turn.counts[key] != first.counts[key] for turn in turns for key in CHECKED):
            raise UserError(
                f"generate: the {other} did other work than the chains ({turns[0].told()}; {first.told()}), so no ratio holds"
            )
        counts = {"chains": first.told(), other: turns[0].told(), "texts that differ": differ}
        limit = {"no schedule has fewer steps than": least, "so the limit is": round(turns[0].steps / least, 3)}
        both = list(zip(chains, turns, strict=True))
        made.append(Row(f"chain_steps_vs_{name}", "x", [theirs.steps / ours.steps for ours, theirs in both], counts | limit))
        on_cpu = [round(theirs.cpu_s / ours.cpu_s, 3) for ours, theirs in both]
        made.append(Row(f"chain_vs_{name}", "x", [ours.speed / theirs.speed for ours, theirs in both], {"CPU ratios": on_cpu}))
    return made


def least_steps(lengths: list[list[int]], seats: int) -> int:
    """No schedule of chains takes fewer engine steps: a seat writes a token a step, and drafts of a chain follow each other."""
    total = sum(itertools.chain.from_iterable(lengths))
    return max(math.ceil(total / seats), max(map(sum, lengths)))
