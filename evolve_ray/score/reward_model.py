"""A reward model: a sequence classifier whose one output is the score."""

import itertools
import math
from typing import Any

from evolve_ray.config import options as config
from evolve_ray.models.chat import Chat


class RewardModel:
    """A Hugging Face sequence classifier with one output; its raw logit is the score, with no softmax or sigmoid.

    The conversation `[user: prompt, assistant: response]` is rendered by the reward model's own chat template, whole: it ends
    as a finished turn also where the answer was cut by length, since a reward model has seen nothing else. That it was cut is
    for the selection to weigh, which chooses no such answer unless it is told to. Rows are scored in fixed batches in their
    given order, so a score does not depend on how many actors there are.
    """

    def __init__(self, options: config.Scorer, folder: str, field: str = "scorer.model"):
        import torch
        from transformers import AutoModelForSequenceClassification

        self.torch = torch
        self.batch_size, self.max_tokens = options.batch_size, options.max_tokens
        self.chat = Chat(folder, field)
        self.device = torch.device("cuda" if options.gpus_per_actor else "cpu")
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=getattr(torch, options.dtype), trust_remote_code=False
        )
        self.model = model.to(self.device).eval()

    def __call__(self, prompts: list[str], answers: list[str | None], responses: list[str]) -> list[float]:
        scores: list[float] = []
        ids = [
            self.chat.context_ids(({"role": "user", "content": p}, {"role": "assistant", "content": r}), generate=False)
            for p, r in zip(prompts, responses, strict=True)
        ]
        for first in range(0, len(ids), self.batch_size):
            batch = ids[first : first + self.batch_size]
            # An answer too long for the reward model is not cut and scored: it gets no number, which rejects the row.
            fits = [row for row in batch if len(row) <= self.max_tokens]
            with self.torch.inference_mode():
                values = iter(classify(self.model, fits, self.device).tolist() if fits else [])
            scores += [next(values) if len(row) <= self.max_tokens else math.nan for row in batch]
        return scores


def classify(model: Any, ids: list[list[int]], device: Any) -> Any:
    """The raw logit of a sequence classifier for each row of token ids: a float32 tensor `B`, with gradients where they are on.

    Scoring with a reward model and training one share this forward; `model` may be wrapped in a DeepSpeed engine.
    """
    import torch

    settings = getattr(model, "module", model).config
    own_pad, last = settings.pad_token_id, {row[-1] for row in ids}
    # The classifier reads the last token that is not padding: without a token for it, pad with one that ends none of these rows.
    pad = next(token for token in itertools.count() if token not in last) if own_pad is None else own_pad
    ids_BT = torch.full((len(ids), max(map(len, ids))), pad)
    mask_BT = torch.zeros_like(ids_BT)
    for row, tokens in enumerate(ids):  # padded on the right
        ids_BT[row, : len(tokens)] = torch.tensor(tokens)
        mask_BT[row, : len(tokens)] = 1
    settings.pad_token_id = pad
    try:
        logits_BK = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device)).logits
    finally:
        settings.pad_token_id = own_pad
    return logits_BK[:, 0].float()
