"""Reward models: sequence classifiers, one output of which is the score."""

import itertools
import math
from typing import Any

from evolve_ray.config import options
from evolve_ray.models.chat import Chat
from evolve_ray.refine.rendering import Rendering
from evolve_ray.store.turns import Prompt, assistant, turns


class RewardModel:
    """A Hugging Face sequence classifier. The score is the raw logit of one output, without softmax or sigmoid.

    The reward model's own chat template renders the whole conversation `[turns of the prompt, assistant: response]`. It ends as a
    finished turn even if the response was cut by length, because a reward model has never seen an unfinished one. The
    selection handles cut responses: it does not choose them, except with `selection.allow_cut`. Rows are scored in fixed
    batches and in their order, so a score does not depend on the number of actors.
    """

    def __init__(self, scorer: options.Scorer, folder: str, field: str = "scorer.model", day: str = ""):
        import torch
        from transformers import AutoModelForSequenceClassification

        self.torch = torch
        self.batch_size, self.max_tokens, self.output = scorer.batch_size, scorer.max_tokens, max(scorer.output, 0)
        self.chat = Chat(folder, field, Rendering(day=day))
        self.device = torch.device("cuda" if scorer.gpus_per_actor else "cpu")
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=getattr(torch, scorer.dtype), trust_remote_code=False
        )
        self.model = model.to(self.device).eval()

    def __call__(self, prompts: list[Prompt], answers: list[str | None], responses: list[str]) -> list[float]:
        scores: list[float] = []
        ids = [
            self.chat.context_ids((*turns(prompt), assistant(response)), generate=False)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        for first in range(0, len(ids), self.batch_size):
            batch = ids[first : first + self.batch_size]
            # A response that is too long for the reward model is never cut: its score is NaN, which rejects the row.
            fits = [row for row in batch if len(row) <= self.max_tokens]
            with self.torch.inference_mode():
                values = iter(classify(self.model, fits, self.device, self.output).tolist() if fits else [])
            scores += [next(values) if len(row) <= self.max_tokens else math.nan for row in batch]
        return scores


def classify(model: Any, ids: list[list[int]], device: Any, output: int = 0) -> Any:
    """The raw logit of a sequence classifier for each row of token ids, a float32 tensor of shape `B`.

    Scoring with a reward model and training one share this forward, so it computes gradients unless they are switched off.
    `model` can be a DeepSpeed engine around the classifier; `output` is the output that is the score. transformers reads the
    score at the last token that is not the pad token: if the pad token is also the end token, at the one before the end token.
    """
    import torch

    module = getattr(model, "module", model)
    # A configuration in parts has the pad token in its text part; some have one outside too.
    configs = [part for part in (module.config, module.config.get_text_config()) if hasattr(part, "pad_token_id")]
    model_pad_ids, last_ids = [config.pad_token_id for config in configs], {row[-1] for row in ids}
    usable = [pad_id for pad_id in reversed(model_pad_ids) if pad_id is not None and pad_id >= 0]
    # A model without a pad token gets one that ends no row here.
    pad_id = usable[0] if usable else next(token for token in itertools.count() if token not in last_ids)
    ids_BT = torch.full((len(ids), max(map(len, ids))), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for row, tokens in enumerate(ids):  # padded on the right
        ids_BT[row, : len(tokens)] = torch.tensor(tokens)
        mask_BT[row, : len(tokens)] = 1
    for config in configs:
        config.pad_token_id = pad_id
    try:
        logits_BK = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device)).logits
    finally:
        for config, model_pad_id in zip(configs, model_pad_ids, strict=True):
            config.pad_token_id = model_pad_id
    return logits_BK[:, output].float()
