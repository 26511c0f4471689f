"""The objectives against TRL's own DPOTrainer: the same tiny model and pairs, and the loss of every step of AdamW.

TRL knows no refinement. But after a draft y the terms of `srpo` are a preference of y_w over y_l on the prompt (x, y, z), so
two TRL rows a pair train the very same loss. Where TRL takes a quantity over the tokens of the whole batch and we per pair,
a batch is one pair.
"""

import copy
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from evolve_ray.config.options import Training
from evolve_ray.models.chat import Chat
from evolve_ray.refine.template import Template
from evolve_ray.train import objectives
from evolve_ray.train.logprobs import pair_sequences, sequence_logps

CPU = torch.device("cpu")
RATE, BETA, STEPS = 2e-3, 0.3, 4
TEMPLATE = Template(layout="conversation", first="{prompt}", refine="fix", one_message="fix {prompt} {draft}")
PAIRS = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected, "chosen_finished": True, "rejected_finished": True}
    for prompt, chosen, rejected in [
        ("sort:bca", "abc", "cab"),
        ("sort:dac", "acd", "a"),
        ("sort:zyxwv", "vwxyz", "zyx wv and more"),
        ("2+2", "4", "22"),
        ("upper:hello", "HELLO", "Hello, world"),
        ("upper:a b", "A B", "a b"),
        ("reverse:abcdef", "fedcba", "f"),
        ("say nothing\nat all", "", "no"),
    ]
]
DIRECT, AFTER = ((None,), ("rejected", "chosen"))  # the drafts that TRL's rows of a pair follow


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Nothing is looked up on a network, and what the trainer writes into the environment ends with its test."""
    before, tried = dict(os.environ), []

    def refuse(self, address):
        tried.append(address)
        raise ConnectionError(f"a test against TRL connects to {address}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    yield
    for name in os.environ.keys() - before.keys():  # TRL sets VLLM_LOGGING_LEVEL
        del os.environ[name]
    assert tried == []


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trl_run(folder, tmp_path, drafts, batch_pairs, **options):
    """TRL's losses step by step, its token ids, and the weights that it ends with; one row for each draft of a pair."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows = []
    for pair in PAIRS:
        for draft in drafts:
            prompt = TEMPLATE.refinement(pair["prompt"], pair[draft]) if draft else TEMPLATE.direct(pair["prompt"])
            answers = {name: [{"role": "assistant", "content": pair[name]}] for name in ("chosen", "rejected")}
            rows.append({"prompt": list(prompt), **answers})
    chat, model = Chat(folder), load(folder)
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, disable_dropout=True, max_length=None,
        per_device_train_batch_size=batch_pairs * len(drafts), max_steps=STEPS, logging_steps=1, save_strategy="no",
        optim="adamw_torch", learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=0.0, gradient_checkpointing=False, train_sampling_strategy="sequential", disable_tqdm=True,
        beta=BETA, **options,
    )  # fmt: skip
    losses = []

    class Kept(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    trainer = DPOTrainer(
        model=model, ref_model=load(folder), args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=chat.tokenizer, callbacks=[Kept()],
    )  # fmt: skip
    trainer.train()
    return losses, trainer.train_dataset, {name: value.detach() for name, value in model.named_parameters()}


def our_run(folder, batch_pairs, **options):
    """The same with this package's log-probs and objective in a plain loop, and the sequences of each pair."""
    training = Training(beta=BETA, **options)
    found = objectives.find(training)
    chat, model = Chat(folder), load(folder).train()
    frozen = copy.deepcopy(model).eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    built = [pair_sequences(chat, TEMPLATE, pair, found.needs) for pair in PAIRS]

    def logps(policy, batch):
        flat = sequence_logps(policy, [sequences[name] for sequences in batch for name in found.needs], chat.pad_id, CPU)
        return dict(zip(found.needs, flat.view(len(batch), len(found.needs)).unbind(1), strict=True))

    losses = []
    for step in range(STEPS):
        first = step * batch_pairs % len(PAIRS)
        batch = built[first : first + batch_pairs]
        with torch.no_grad():
            reference = logps(frozen, batch)
        lengths = {}
        for name in found.needs:
            counts = [float(len(sequences[name].response)) for sequences in batch]
            lengths[name.partition("_after_")[0]] = torch.tensor(counts).clamp(min=1)
        loss, _ = objectives.total(found, logps(model, batch), reference, lengths, training)
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
        losses.append(loss.mean().item())
    return losses, built, {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize(
    ("ours", "drafts", "batch_pairs", "theirs"),
    [
        ({"objective": "dpo"}, DIRECT, 4, {"loss_type": "sigmoid"}),
        ({"objective": "dpo", "length_normalised": True}, DIRECT, 4, {"loss_type": "sigmoid_norm"}),
        # TRL sorts the margins of a batch for `aot` and averages `sft` over its tokens: one pair a batch undoes both.
        (
            {"objective": "dpo", "label_smoothing": 0.1, "nll": 0.3}, DIRECT, 1,
            {"loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.3], "label_smoothing": 0.1},
        ),
        ({"objective": "ipo", "length_normalised": True}, DIRECT, 4, {"loss_type": "ipo"}),
        # Two rows a pair, of which TRL takes the mean; (beta h - 1/2)^2 = beta^2 (h - 1/(2 beta))^2.
        (
            {"objective": "srpo", "length_normalised": True}, AFTER, 2,
            {"loss_type": "ipo", "loss_weights": [2 * BETA**2]},
        ),
        (
            {"objective": "evolve", "alpha": 1.0, "refine_form": "logistic"}, AFTER, 2,
            {"loss_type": "sigmoid", "loss_weights": [2.0]},
        ),
    ],
    ids=["dpo", "dpo per token", "dpo smoothed with nll", "ipo", "srpo", "logistic refinement"],
)  # fmt: skip
def test_every_step_has_the_loss_of_trl(tiny_model, tmp_path, ours, drafts, batch_pairs, theirs):
    expected, rows, their_weights = trl_run(tiny_model, tmp_path, drafts, batch_pairs, **theirs)
    losses, built, our_weights = our_run(tiny_model, batch_pairs, **ours)
    after = [f"_after_{draft}" if draft else "" for draft in drafts]
    for row, (sequences, suffix) in zip(rows, ((s, suffix) for s in built for suffix in after), strict=True):
        for name in ("chosen", "rejected"):
            assert tuple(row["prompt_ids"]) == sequences[name + suffix].context
            assert tuple(row[f"{name}_ids"]) == sequences[name + suffix].response
    assert len(expected) == STEPS
    assert losses == pytest.approx(expected, rel=0, abs=1e-5)
    assert max(losses) - min(losses) > 1e-3, "nothing was trained"
    for name, weight in our_weights.items():
        torch.testing.assert_close(weight, their_weights[name], rtol=0, atol=1e-4, msg=name)
