"""Tiny random models of the families that people train, with the dropout and the generation settings of their releases."""

import json
from pathlib import Path
from typing import Any

VOCABULARY = 104  # a few rows more than the tokenizer has tokens, as released models have

# Heads of 32: the smallest that vLLM has on a CPU.
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
GPT2_SHAPE = {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 2, "n_positions": 256}
GPT2_DROPOUT = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
MOE = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
LATENT = {  # the size of the cached state is the only one that vLLM has on a CPU
    "q_lora_rank": 8, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32,
}  # fmt: skip

# By name: the class of the configuration, its options, and generation_config.json (end tokens in words of the tokenizer).
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama3": ("LlamaConfig", {**SHAPE, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
    "llama_dropout": ("LlamaConfig", {**SHAPE, "attention_dropout": 0.1}, {"temperature": 0.6, "top_p": 0.9}),  # no do_sample
    "qwen2": ("Qwen2Config", {**SHAPE, "tie_word_embeddings": True},
              {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20}),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 32, "tie_word_embeddings": True},
              {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}),
    "mistral": ("MistralConfig", {**SHAPE, "sliding_window": None}, {}),
    "gemma2": ("Gemma2Config", {**SHAPE, "head_dim": 32, "sliding_window": 128, "query_pre_attn_scalar": 32},
               {"cache_implementation": "hybrid"}),
    "gemma3": ("Gemma3TextConfig", {**SHAPE, "head_dim": 32, "sliding_window": 128, "query_pre_attn_scalar": 32},
               {"cache_implementation": "hybrid", "do_sample": True, "top_k": 64, "top_p": 0.95}),
    "phi": ("PhiConfig", {**SHAPE, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "resid_pdrop": 0.1}, {}),
    "phi3": ("Phi3Config", {**SHAPE, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "pad_token_id": 0}, {}),
    "opt": ("OPTConfig", {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "word_embed_proj_dim": 64, "dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.1}, {}),
    "gpt2": ("GPT2Config", {**GPT2_SHAPE, **GPT2_DROPOUT}, {}),
    "gpt_bigcode": ("GPTBigCodeConfig", {**GPT2_SHAPE, **GPT2_DROPOUT}, {}),
    "starcoder2": ("Starcoder2Config", {**SHAPE, "attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1,
                                        "sliding_window": None}, {}),
    "olmo2": ("Olmo2Config", {**SHAPE, "num_key_value_heads": 2}, {}),
    "granite": ("GraniteConfig", {**SHAPE, "attention_dropout": 0.1, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
                                  "residual_multiplier": 0.22, "attention_multiplier": 0.125}, {}),
    "gpt_neox": ("GPTNeoXConfig", {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                                   "attention_dropout": 0.1, "hidden_dropout": 0.1, "rotary_pct": 0.5}, {}),
    "mixtral": ("MixtralConfig", {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1,
                                  "sliding_window": None}, {}),
    "deepseek_v3": ("DeepseekV3Config", {**SHAPE, "num_key_value_heads": 2, **MOE, **LATENT, "n_shared_experts": 1,
                                         "first_k_dense_replace": 1,
                                         "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
                    {"do_sample": True, "temperature": 0.6, "top_p": 0.95}),
}  # fmt: skip


def save(name: str, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Writes the model folder of a family: random weights, the tiny world's tokenizer, the released generation settings."""
    import torch
    import transformers

    from evolve_ray.toy.tokenizer import make_tokenizer

    kind, shape, generation = FAMILIES[name]
    tokenizer = make_tokenizer(256)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = getattr(transformers, kind)(
        **{"vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": 0.1, **ids, **shape, **options}
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"eos_token_id": [tokenizer.eos_token_id, 1], "pad_token_id": 0, **generation}
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


CHATML = """\
{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def save_classifier(kind: str, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Writes a reward model of a family: random weights and the tiny world's tokenizer."""
    import torch
    import transformers

    from evolve_ray.toy.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(256)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = getattr(transformers, kind)(
        **{"vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": 0.1, **ids, **SHAPE, **options}
    )
    torch.manual_seed(seed)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_composite(folder: Path, *, classifier: bool = False, text_pad: int | None = 0) -> Path:
    """Writes a Gemma 3 that reads pictures too: its text part has a configuration of its own, and it has processor files."""
    import torch
    import transformers

    from evolve_ray.toy.tokenizer import make_tokenizer

    tokenizer = make_tokenizer(256)
    _, shape, _ = FAMILIES["gemma3"]
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": 0.1, "pad_token_id": text_pad, **shape}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
              "patch_size": 8}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, num_labels=1, eos_token_id=[tokenizer.eos_token_id],
        boi_token_index=1, eoi_token_index=2, image_token_index=102,
    )  # fmt: skip
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification if classifier else transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Gemma3ImageProcessor"}))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": 4}))
    return folder
