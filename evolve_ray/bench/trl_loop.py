"""Runs TRL's DPOTrainer step by step, with a callback after each step."""

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

from evolve_ray.bench.letters import chat
from evolve_ray.errors import UserError


def steps_of_trl(
    bench_args: argparse.Namespace,
    model: Any,
    pairs: list[dict[str, str]],
    between: Callable[[int, tuple[float, float], int], None],
    watches: tuple[Any, Any],
) -> None:
    """Trains `model` on rows of `prompt`, `chosen` and `rejected`; calls `between(step, seconds, peak bytes)` after each step.

    A measured step is TRL's forward, backward and AdamW, without data loading. The reference is precomputed.
    """
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError:
        raise UserError(
            "--only: the rows that compare with TRL need the package trl, which is not installed; install the extra dev"
        ) from None
    import datasets
    from transformers import PrinterCallback, TrainerCallback

    rows = [
        {"prompt": [{"role": "user", "content": pair["prompt"]}]}
        | {name: [{"role": "assistant", "content": pair[name]}] for name in ("chosen", "rejected")}
        for pair in pairs
    ]

    class Between(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.watch, self.peak = (watch_class(bench_args) for watch_class in watches)
            self.peak.__enter__()
            self.watch.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.watch.__exit__()
            self.peak.__exit__(None, None, None)
            between(state.global_step - 1, self.watch.spent, self.peak.bytes)

    with tempfile.TemporaryDirectory() as folder:
        training_args = DPOConfig(
            output_dir=folder, report_to=[], use_cpu=bench_args.device == "cpu", bf16=False, max_length=None, save_strategy="no",
            per_device_train_batch_size=bench_args.dpo_pairs, max_steps=len(rows) // bench_args.dpo_pairs, logging_steps=10**6,
            optim="adamw_torch", learning_rate=1e-6, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
            max_grad_norm=0.0, gradient_checkpointing=False, train_sampling_strategy="sequential", disable_tqdm=True,
            precompute_ref_log_probs=True,
        )  # fmt: skip
        datasets.disable_progress_bars()
        trainer = DPOTrainer(
            model=model, args=training_args, train_dataset=datasets.Dataset.from_list(rows), processing_class=chat().tokenizer,
            callbacks=[Between()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
