"""The tokens that an engine was given and that it wrote are the tokens that are trained, through the real command."""

import json

import pytest

from evolve_ray.models.chat import Chat
from evolve_ray.refine.template import load_template
from evolve_ray.store import rows
from evolve_ray.train.logprobs import pair_sequences
from tests import templates
from tests.plain.conftest import make_bpe
from tests.real.conftest import start

pytestmark = pytest.mark.long

TAGS = ("<|im_start|>", "<|im_end|>"), ("<think>", "</think>", "\n\n")
MODELS = {  # special tokens, other added tokens, the template
    "thinks in tags": (*TAGS, templates.HIDDEN),
    "thinks in a tag that the template opens": (*TAGS, templates.OPENED),
    "thinks in channels": (("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"), (), templates.CHANNELS),
    "ends a line before its end token": (*TAGS, templates.LINE_BEFORE_END),
}


def save_model(folder, special, plain, template):
    """A tiny Qwen3 of random weights that writes its end token and its marks often, as trained models do."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_bpe(list(special), template, plain=plain, eos_token=special[-1])
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer) + 4, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id))
    with torch.no_grad():
        # One direction that every token has in the embedding, so that some tokens are likely after any other.
        model.model.embed_tokens.weight[:, 0] = 3.0
        model.lm_head.weight[:, 0] = -1.0
        for token in range(len(tokenizer) + 4):
            if tokenizer.decode([token]).isascii():
                model.lm_head.weight[token, 0] = 0.2 if token < len(tokenizer) else -0.1
        for token in (*special[1:], *plain):
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token), 0] = {"<think>": 0.1, "</think>": 0.5}.get(token, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_every_token_of_the_engine_is_trained_as_it_was_written(name, tmp_path):
    folder, record = save_model(tmp_path / "model", *MODELS[name]), tmp_path / "record"
    record.mkdir()
    rows.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"What is {number} and\n\n{number}?"} for number in range(50)])
    overrides = [
        f"model.path={folder}", f"prompts.path={tmp_path}/prompts.jsonl", 'prompts.answer_column=""', "prompts.per_iteration=50",
        "model.context_tokens=256", "scorer.name=tests.real.recording:Order", "selection.allow_cut=true",
        "sampling.max_tokens=24", "evaluation.splits={}", 'evaluation.answer_column=""',
        "engine.name=tests.real.recording:RecordingEngine",
        f'engine.env.RECORD_TOKENS="{record}"', "engine.actors=1", "ray.dashboard=false", "probe.tolerance=0.001",
    ]  # fmt: skip
    run = tmp_path / "run"
    assert start(run, *overrides, "--iterations", "1", "activation=none", "verifier=none", "toy=none").wait() == 0

    written = {row["id"]: row for file in record.iterdir() for row in rows.read_jsonl(file)}
    chat, template = Chat(folder), load_template("tiny", "conversation")
    table = [row for file in run.glob("iteration-01/generations/*/rows.parquet") for row in rows.read_table(file)]
    drafts = {row["draft_id"]: row for row in table}
    engine_of = {}
    for row in table:
        engine = written[f"{row['prompt_id']}/{row['sample']}/{row['round']}/0"]
        engine_of[row["draft_id"]] = engine
        stored = row.get("token_ids")
        ids = chat.response_ids(row["text"], finished=row["finish_reason"] == "stop") if stored is None else stored
        assert list(ids) == engine["response"]
    assert len(table) == 200
    assert any(row.get("token_ids") is not None for row in table), "re-encoding would have done"
    num_compared = 0
    pairs = rows.read_table(run / "iteration-01" / "pairs" / "pairs.parquet")
    for pair in pairs:
        for side in ("chosen", "rejected"):
            draft = drafts[pair[f"{side}_id"]]
            assert not draft.get("fault")
            sequence = pair_sequences(chat, template, pair, (side, f"{side}_after_{side}"))[side]
            assert list(sequence.response) == engine_of[draft["draft_id"]]["response"]
            num_compared += len(sequence.response)
            if draft["round"] == 1:
                assert list(sequence.context) == engine_of[draft["draft_id"]]["prompt"]
        following = [row for row in table if row["parent_id"] == pair["chosen_id"]]
        for row in following:
            sequence = pair_sequences(chat, template, pair, ("rejected_after_chosen",))["rejected_after_chosen"]
            assert list(sequence.context) == engine_of[row["draft_id"]]["prompt"]
    assert num_compared > (0 if "channels" in name else 200)
    (probe,) = rows.read_jsonl(run / "iteration-01" / "probe" / "probe.jsonl")
    assert probe["mean_difference"] < 1e-3
    log = rows.read_jsonl(run / "iteration-01" / "checkpoint" / "training_log.jsonl")
    assert abs(log[0]["loss_dpo"] - 0.6931) < 1e-4
    if "thinks" in name:
        thoughtless = [row for row in table if row.get("fault")]
        assert thoughtless, "no response without an answer, so nothing is tested"
        assert not {row["draft_id"] for row in thoughtless} & {pair[f"{s}_id"] for pair in pairs for s in ("chosen", "rejected")}
        manifest = json.loads((run / "iteration-01" / "generations" / "MANIFEST.json").read_text())
        assert manifest["stats"]["num_thinking_tokens"] > 0
