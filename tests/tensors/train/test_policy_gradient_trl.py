"""`policy_gradient` against TRL's own GRPOTrainer: loss and gradient on the same model, answers, advantages and old policy."""

import importlib
import os
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from evolve_ray.config.options import Training
from evolve_ray.models.chat import Chat
from evolve_ray.refine.template import Template
from evolve_ray.store import rows
from evolve_ray.train import objectives
from evolve_ray.train.forwards import Part, Separate
from evolve_ray.train.steps import Steps

CPU = torch.device("cpu")
TEMPLATE = Template(layout="conversation", first="{prompt}", refine="fix", one_message="fix {prompt} {draft}")
ANSWERS = [("sort:bca", "abc"), ("sort:bca", "cab"), ("sort:zyxwv", "zyx wv and more"), ("2+2", ""), ("2+2", "4")]
PAIRS = [
    {"pair_id": str(number), "prompt": prompt, "chosen": answer, "rejected": answer, "chosen_finished": True,
     "rejected_finished": True, "numbers": {"advantage": advantage, "refined": 0.0}}
    for number, ((prompt, answer), advantage) in enumerate(zip(ANSWERS, (1.0, -1.0, 0.7, -0.4, 2.0), strict=True))
]  # fmt: skip
LONGEST = 20


@pytest.fixture(scope="module")
def trainer(tiny_model, tmp_path_factory):
    """TRL's trainer, never run: it holds the options that its loss reads."""
    from datasets import Dataset

    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as monkeypatch:
        utils = importlib.import_module("trl.import_utils")
        monkeypatch.setattr(utils, "is_vllm_available", lambda *_, **__: False)  # it would be loaded, for seconds
        from trl import GRPOConfig, GRPOTrainer
    arguments = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=4,
        num_generations=4, max_completion_length=LONGEST, gradient_checkpointing=False, disable_tqdm=True,
        epsilon=0.15, epsilon_high=0.25, use_bias_correction_kl=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "x"}]), processing_class=Chat(tiny_model).tokenizer,
    )  # fmt: skip
    model.eval()
    yield trainer
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def left(parts):
    """Prompts as TRL pads them."""
    width = max(map(len, parts))
    return torch.tensor([[0] * (width - len(part)) + list(part) for part in parts])


def ours(model, tiny_model, noise, **options):
    """Loss and gradient of this package, and what TRL needs to compute the same."""
    training = Training(objective="policy_gradient", refine_weight=0.0, batch_pairs=len(PAIRS), **options)
    objective = objectives.find(training)
    alone = SimpleNamespace(rank=0, world=1, device=CPU, all_reduce=lambda values: None)
    reader = Separate(SimpleNamespace(template=TEMPLATE, training=training), Chat(tiny_model), PAIRS, objective.needs, alone)
    steps = Steps(PAIRS, [], training, objective, reader, alone)
    batch = list(range(len(PAIRS)))
    part = Part([(row, 1.0) for row in batch])
    with torch.no_grad():
        now, lengths = reader.token_values(model, part)
    old = [
        values[:length] + shift[:length] for values, length, shift in zip(now["chosen"], lengths["chosen"], noise, strict=True)
    ]
    reference = {"chosen": torch.stack([values.sum() for values in old]), rows.token_column("chosen"): old}
    if objective.tokens:
        policy, counts, tokens = steps.token_values(model, part, reference, steps.mean_lengths(batch))
    else:
        (policy, counts), tokens = reader.values(model, part), None
    sums = {"chosen": reference["chosen"]}
    loss, metrics = objectives.total(objective, policy, sums, counts, training, steps.numbers(batch), tokens)
    model.zero_grad()
    loss.mean().backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    sequences = [reader.sequences(row)[0] for row in batch]
    return loss.mean().item(), gradient, metrics, sequences, torch.nn.utils.rnn.pad_sequence(old, batch_first=True)


TOKEN = {"level": "token", "clip_low": 0.15, "clip_high": 0.25}
CASES = {
    "grpo": ({**TOKEN}, {"loss_type": "grpo"}),
    "grpo with kl": ({**TOKEN, "kl": 0.3}, {"loss_type": "grpo", "beta": 0.3}),
    "dr_grpo": ({**TOKEN, "length": "constant", "length_constant": LONGEST}, {"loss_type": "dr_grpo"}),
    "dapo": ({**TOKEN, "length": "batch", "kl": 0.1}, {"loss_type": "dapo", "beta": 0.1}),
    "gspo": ({"clip_low": 0.15, "clip_high": 0.25}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_trl(trainer, tiny_model, case):
    args, theirs = CASES[case]
    noise = 0.3 * torch.randn(len(PAIRS), 64, generator=torch.Generator().manual_seed(2))
    noise += torch.linspace(-0.4, 0.4, len(PAIRS))[:, None]  # so that the means of some answers are clipped too
    model = trainer.model
    more = {"length_normalised": True} if case == "gspo" else {}
    loss, gradient, metrics, sequences, old = ours(model, tiny_model, noise, objective_args=args, **more)
    answers = [torch.tensor(sequence.response) for sequence in sequences]
    inputs = {
        "prompt_ids": left([sequence.context for sequence in sequences]),
        "prompt_mask": left([[1] * len(sequence.context) for sequence in sequences]),
        "completion_ids": torch.nn.utils.rnn.pad_sequence(answers, batch_first=True),
        "completion_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(answer) for answer in answers], batch_first=True),
        "advantages": torch.tensor([pair["numbers"]["advantage"] for pair in PAIRS]),
        "old_per_token_logps": old, "ref_per_token_logps": old,
        "num_items_in_batch": torch.tensor(sum(map(len, answers))),
    }  # fmt: skip
    settings = {"loss_type": "grpo", "beta": 0.0, "importance_sampling_level": "token"} | theirs
    for name, value in settings.items():
        setattr(trainer, name, value)
    model.zero_grad()
    expected = trainer.compute_loss(model, inputs)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=0, abs=1e-5)
    theirs_gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    torch.testing.assert_close(gradient, theirs_gradient, rtol=1e-4, atol=1e-5)
    assert 0 < metrics["clipped"].mean() < 1, "the clip was not tried"
