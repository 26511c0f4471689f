"""The models of the tiny world: a base model that can sort but often samples wrong answers, and a reward model."""

import contextlib
import random
import time
from pathlib import Path

from evolve_ray.toy.task import corrupt, draw_judgement, draw_letters, gold_reward, solve
from evolve_ray.toy.tokenizer import make_tokenizer, render

# Heavy imports are inside the functions, so that the configuration is checked before they are loaded.
HEAD_SIZE = 32  # the smallest size that vLLM's attention kernels for CPU support, so it is not hidden / heads


@contextlib.contextmanager
def fixed_torch(seed: int, threads: int):
    """Sets `threads` threads and seeds torch inside the block; restores the caller's threads and random state after it."""
    import torch

    threads_before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads_before)


def draw_chat(rng: random.Random, lengths: tuple[int, int], desc_fraction: float, side: str) -> tuple[str, str]:
    """(a prompt of `lengths[0]` to `lengths[1]` letters, `desc` with probability `desc_fraction`; its right answer)."""
    verb = "desc" if rng.random() < desc_fraction else "sort"
    letters = draw_letters(rng, *lengths, side)
    return f"{verb}:{letters}", solve(verb, letters)


def draw_pair(rng: random.Random, side: str) -> tuple[str, str]:
    """(better chat, worse chat) on one prompt, rendered; an answer is right, or at most 3 or 6 edits away, never equally good."""
    prompt, answer = draw_chat(rng, (8, 12), 0.2, side)
    rewards = (0.0, 0.0)
    while rewards[0] == rewards[1]:
        pair = [answer, answer]
        for place in (0, 1):
            for _ in range(rng.choices((0, 1, 2), weights=(0.4, 0.45, 0.15))[0]):
                pair[place] = corrupt(pair[place], rng)
        rewards = (gold_reward(pair[0], answer), gold_reward(pair[1], answer))
    if rewards[0] < rewards[1]:
        pair.reverse()
    return render(prompt, pair[0]), render(prompt, pair[1])


def fit(model, loss_of, *, steps: int, learning_rate: float, progress) -> float:
    """Takes `steps` optimizer steps on the scalar `loss_of(step)`; returns the mean loss of the last tenth of the steps.

    Muon updates the matrices inside the layers, AdamW all other weights. On this task that needs about a third fewer steps than
    AdamW alone. One learning rate works for both, because Muon's updates are scaled to the size of AdamW's.
    """
    import torch

    matrices = [weight for name, weight in model.named_parameters() if ".layers." in name and weight.dim() == 2]
    matrix_ids = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in matrix_ids]
    optimizers = [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    warmup = max(1, steps // 15)
    losses = []
    model.train()
    for step in range(steps):
        rate = learning_rate * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            progress(f"step {step + 1}/{steps}: loss {losses[-1]:.3f}")
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def build_base(
    out: Path,
    *,
    seed: int,
    hidden: int = 96,
    layers: int = 3,
    heads: int = 4,
    steps: int = 550,
    batch: int = 64,
    max_positions: int = 256,
    learning_rate: float = 6e-3,
    clean_fraction: float = 0.47,
    desc_fraction: float = 0.2,
    copy_fraction: float = 0.3,
    threads: int = 2,
    progress=print,
) -> dict:
    """Trains the base model on single-turn chats with mostly wrong answers and saves it as a Hugging Face folder in `out`.

    It learns to sort, and to add errors to what it sorted: greedy decoding is nearly always right, a sample at temperature 1 is
    right in about one case of three. This gap is the latent skill that refinement can bring out.

    Prompts are train-side strings only: 6 to 9 letters in the first fifth of the steps, then 8 to 12, never longer. A share
    `desc_fraction` asks for descending order. In a share `copy_fraction` of the chats the user then says "again" and the answer
    is repeated, so that the model can copy from its context, as any pretrained model can. The loss covers all tokens from the
    first answer on. Input and output embeddings are tied.

    The same seed and `threads` give the same weights. Two threads save a quarter of the time on idle cores, but take several
    times as long on busy ones. Returns `seconds` and `final_loss` (nats per answer token).
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    started = time.perf_counter()
    rng = random.Random(f"corpus:{seed}")
    tokenizer = make_tokenizer(max_positions)
    assistant, pad, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|pad|>", "<|end|>"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
    )
    with fixed_torch(seed, threads):
        model = LlamaForCausalLM(config)

        def loss_of(step: int):
            lengths = (6, 9) if step < steps // 5 else (8, 12)
            texts = []
            for _ in range(batch):
                prompt, answer = draw_chat(rng, lengths, desc_fraction, "train")
                text = render(prompt, answer := answer if rng.random() < clean_fraction else corrupt(answer, rng))
                texts.append(text + render("again", answer) if rng.random() < copy_fraction else text)
            # Padding is on the right and attention is causal, so no position with a loss attends to padding.
            ids_BT = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
            answered_BT = (ids_BT == assistant).cumsum(1).bool() & (ids_BT != assistant) & (ids_BT != pad)
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
            predicted_BT = answered_BT[:, 1:]
            return torch.nn.functional.cross_entropy(logits_BTV[predicted_BT], ids_BT[:, 1:][predicted_BT])

        final_loss = fit(model, loss_of, steps=steps, learning_rate=learning_rate, progress=progress)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"seconds": time.perf_counter() - started, "final_loss": final_loss}


def build_judging_base(
    out: Path, base: Path, *, seed: int, steps: int = 300, batch: int = 64, threads: int = 2, progress=print
) -> float:
    """Teaches `base` to judge answers, and saves it in `out`; returns the loss at the end (nats per answer token).

    Four in five chats are judgements, the others noisy answers as the base model has learned them: it still makes mistakes.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    rng = random.Random(f"judging:{seed}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    assistant, pad = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|pad|>"])
    with fixed_torch(seed, threads):
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)

        def draw_text() -> str:
            if rng.random() < 0.8:
                row = draw_judgement(rng, draw_letters(rng, 8, 12, "train"))
                return render(row["prompt"], row["chosen"])
            prompt, answer = draw_chat(rng, (8, 12), 0.2, "train")
            return render(prompt, answer if rng.random() < 0.47 else corrupt(answer, rng))

        def loss_of(step: int):
            ids_BT = tokenizer([draw_text() for _ in range(batch)], padding=True, return_tensors="pt")["input_ids"]
            answered_BT = (ids_BT == assistant).cumsum(1).bool() & (ids_BT != assistant) & (ids_BT != pad)
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
            predicted_BT = answered_BT[:, 1:]
            return torch.nn.functional.cross_entropy(logits_BTV[predicted_BT], ids_BT[:, 1:][predicted_BT])

        final_loss = fit(model, loss_of, steps=steps, learning_rate=4e-3, progress=progress)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return final_loss


def build_reward_model(
    out: Path, base: Path, *, seed: int, steps: int = 120, batch: int = 64, threads: int = 2, progress=print
) -> dict:
    """Trains a Bradley-Terry reward model from the trunk of `base` and saves it as a Hugging Face folder in `out`.

    Its score is one number per chat `[user, assistant]` as the chat template renders it, read at the last token that is not
    padding. Returns `seconds` and `pair_accuracy`: the share of 1,000 new synthetic pairs on held-out strings that it orders
    rightly.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    started = time.perf_counter()
    rng = random.Random(f"reward-pairs:{seed}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    with fixed_torch(seed, threads):
        model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)

        def margins_of(count: int, side: str):
            """Reward of the better answer minus that of the worse one, for `count` new pairs: shape (count,)."""
            better, worse = zip(*(draw_pair(rng, side) for _ in range(count)), strict=True)
            batch_2BT = tokenizer([*better, *worse], padding=True, return_tensors="pt")
            rewards_2B = model(**batch_2BT, use_cache=False).logits[:, 0]
            return rewards_2B[:count] - rewards_2B[count:]

        def loss_of(step: int):
            return -torch.nn.functional.logsigmoid(margins_of(batch, "train")).mean()

        fit(model, loss_of, steps=steps, learning_rate=2e-3, progress=progress)
        model.eval()
        with torch.no_grad():
            pair_accuracy = (margins_of(1000, "heldout") > 0).float().mean().item()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"seconds": time.perf_counter() - started, "pair_accuracy": pair_accuracy}
