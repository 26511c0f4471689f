"""The plain script that `jobs/bench.py loop` compares with: one iteration by vLLM, transformers and TRL, in one process.

`python script.py JOB.json` imports nothing of this package. It is written as somebody would write it who knows the three
libraries, with the settings that are fastest here:

* one engine inside this process, with all cores, which stays and loads the new weights in place; all prompts of a round go into
  one call of `LLM.generate`, with the prefix cache on;
* rewards in batches of similar lengths;
* TRL's DPOTrainer with its reference precomputed (`alpha = 0`), or a loop with the six forwards of the refinement loss, whose
  reference is precomputed too (`alpha > 0`), in micro-batches of the size that was fastest;
* one training process with all cores, without DeepSpeed.

It writes RESULT.json beside JOB.json: pairs, losses, and seconds of each part; all else is start-up.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SECONDS: dict[str, float] = {}


@contextlib.contextmanager
def timed(part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    SECONDS[part] = SECONDS.get(part, 0.0) + time.perf_counter() - started


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    os.environ |= job["env"]
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from vllm import LLM

    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    llm = LLM(
        model=job["model"], dtype="float32", max_model_len=job["context_tokens"], max_num_seqs=job["seats"], **job["engine_args"]
    )
    reward_model = AutoModelForSequenceClassification.from_pretrained(job["reward_model"], dtype=torch.float32).eval()
    drafts = generate(llm, tokenizer, job)
    scores = score(reward_model, tokenizer, job, drafts)
    with timed("pairs"):
        pairs = best_and_worst(job["prompts"], drafts, scores)
        order = []
        for seed in job["shuffle_seeds"]:  # an epoch each
            order += shuffled(len(pairs), seed)
        pairs = [pairs[number] for number in order]
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    out = str(path.parent / "trained")
    losses = (train_six if job["alpha"] else train_trl)(model, tokenizer, pairs, job, out)
    with timed("new weights"):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": out})
        llm.reset_prefix_cache()
    result = {"pairs": pairs, "losses": losses, "seconds": SECONDS}
    (path.parent / "RESULT.json").write_text(json.dumps(result))


def generate(llm, tokenizer, job: dict) -> list[list[str]]:
    """Returns the drafts of each prompt, one for each round; a round begins when the round before is complete."""
    from vllm import SamplingParams

    drafts: list[list[str]] = [[] for _ in job["prompts"]]
    with timed("generation"):
        for round_number in range(job["rounds"]):
            requests, params = [], []
            for prompt, earlier in zip(job["prompts"], drafts, strict=True):
                messages = [{"role": "user", "content": prompt["prompt"]}]
                if earlier:
                    messages += [{"role": "assistant", "content": earlier[-1]}, {"role": "user", "content": job["refine"]}]
                ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                requests.append({"prompt_token_ids": ids})
                length = prompt["lengths"][round_number]
                params.append(
                    SamplingParams(
                        temperature=1.0, seed=prompt["seeds"][round_number], max_tokens=length, ignore_eos=True,
                        allowed_token_ids=job["letters"],
                    )
                )  # fmt: skip
            for earlier, output in zip(drafts, llm.generate(requests, params, use_tqdm=False), strict=True):
                earlier.append(output.outputs[0].text)
    return drafts


def score(model, tokenizer, job: dict, drafts: list[list[str]]) -> list[list[float]]:
    import torch

    with timed("scoring"), torch.inference_mode():
        rows = []
        for prompt, texts in zip(job["prompts"], drafts, strict=True):
            for text in texts:
                messages = [{"role": "user", "content": prompt["prompt"]}, {"role": "assistant", "content": text}]
                rows.append(tokenizer.apply_chat_template(messages, return_dict=False))
        by_length = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        values = [0.0] * len(rows)
        for first in range(0, len(rows), job["score_batch"]):
            batch = by_length[first : first + job["score_batch"]]
            inputs = tokenizer.pad({"input_ids": [rows[number] for number in batch]}, return_tensors="pt")
            for number, value in zip(batch, model(**inputs).logits[:, 0].tolist(), strict=True):
                values[number] = value
    rounds = job["rounds"]
    return [values[first : first + rounds] for first in range(0, len(values), rounds)]


def best_and_worst(prompts: list[dict], drafts: list[list[str]], scores: list[list[float]]) -> list[dict]:
    pairs = []
    for prompt, texts, values in zip(prompts, drafts, scores, strict=True):
        order = sorted(range(len(texts)), key=values.__getitem__)
        worst, best = texts[order[0]], texts[order[-1]]
        if worst != best:
            pairs.append({"prompt": prompt["prompt"], "chosen": best, "rejected": worst})
    return pairs


def shuffled(count: int, seed: int) -> list[int]:
    import numpy

    return numpy.random.default_rng(seed).permutation(count).tolist()


def train_trl(model, tokenizer, pairs: list[dict], job: dict, out: str) -> list[float]:
    """Trains with DPOTrainer, whose constructor computes the reference, and saves; returns the loss of each update."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": [{"role": "user", "content": pair["prompt"]}]}
        | {name: [{"role": "assistant", "content": pair[name]}] for name in ("chosen", "rejected")}
        for pair in pairs
    ]
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    config = DPOConfig(
        output_dir=out, report_to=[], use_cpu=True, bf16=False, max_length=None, save_strategy="no", num_train_epochs=1,
        per_device_train_batch_size=job["micro_pairs"], gradient_accumulation_steps=job["batch_pairs"] // job["micro_pairs"],
        optim="adamw_torch", learning_rate=job["learning_rate"], lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, gradient_checkpointing=False, train_sampling_strategy="sequential", disable_tqdm=True, logging_steps=1,
        beta=job["beta"], precompute_ref_log_probs=True, precompute_ref_batch_size=job["micro_pairs"],
    )  # fmt: skip
    with timed("reference"):  # and the tokens of all pairs
        trainer = DPOTrainer(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    with timed("updates"):
        trainer.train()
    with timed("saving"):
        trainer.save_model(out)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_six(model, tokenizer, pairs: list[dict], job: dict, out: str) -> list[float]:
    """Trains on (1 - alpha) L_dpo + alpha L_refine with six sequences a pair; saves; returns the loss of each update."""
    import torch
    import torch.nn.functional as F

    end = tokenizer.eos_token_id
    size, batch, alpha, beta = job["micro_pairs"], job["batch_pairs"], job["alpha"], job["beta"]

    def sequences(pair: dict) -> list[tuple[list[int], list[int]]]:
        """(context, response) of y_w|x, y_l|x, y_w|x,y_l,z, y_l|x,y_l,z, y_w|x,y_w,z, y_l|x,y_w,z."""
        user = {"role": "user", "content": pair["prompt"]}
        contexts = []
        for draft in (None, pair["rejected"], pair["chosen"]):
            refinement = [{"role": "assistant", "content": draft}, {"role": "user", "content": job["refine"]}] if draft else []
            contexts.append(tokenizer.apply_chat_template([user, *refinement], add_generation_prompt=True, return_dict=False))
        answers = [tokenizer(pair[name], add_special_tokens=False)["input_ids"] + [end] for name in ("chosen", "rejected")]
        return [(context, answer) for context in contexts for answer in answers]

    def forward(micro: list[dict]) -> torch.Tensor:
        """Log-probabilities of the six responses of each pair, of shape (pairs, 6)."""
        rows = [row for pair in micro for row in sequences(pair)]
        width = max(len(context) + len(answer) for context, answer in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        mask, response = torch.zeros_like(ids), torch.zeros(len(rows), width, dtype=torch.bool)
        for number, (context, answer) in enumerate(rows):
            ids[number, : len(context) + len(answer)] = torch.tensor(context + answer)
            mask[number, : len(context) + len(answer)] = 1
            response[number, len(context) : len(context) + len(answer)] = True
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        where = response[:, 1:]
        logps = -F.cross_entropy(logits[where], ids[:, 1:][where], reduction="none")
        sums = torch.zeros(len(rows)).index_add(0, where.nonzero()[:, 0], logps)
        return sums.view(len(micro), 6)

    micros = [pairs[first : first + size] for first in range(0, len(pairs), size)]
    with timed("reference"), torch.no_grad():
        references = [forward(micro) for micro in micros]
    losses = []
    optimiser = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"], weight_decay=0.0)
    model.train()
    with timed("updates"):
        for first in range(0, len(micros), batch // size):
            loss_sum = 0.0
            for micro, reference in list(zip(micros, references, strict=True))[first : first + batch // size]:
                chosen, rejected, *after = (forward(micro) - reference).unbind(1)
                dpo = -F.logsigmoid(beta * (chosen - rejected))
                improve, keep = beta * (after[0] - after[1]) - 0.5, beta * (after[2] - after[3]) - 0.5
                loss = ((1 - alpha) * dpo + alpha * (improve**2 + keep**2)).sum() / batch
                loss.backward()
                loss_sum += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            losses.append(loss_sum)
    with timed("saving"):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return losses


if __name__ == "__main__":
    main(Path(sys.argv[1]))
