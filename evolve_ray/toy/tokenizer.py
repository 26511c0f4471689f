"""The tiny world's tokenizer: one token per character and a chat template."""

import string

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ('user', 'assistant') -%}
{{- raise_exception('the tiny world knows the roles user and assistant, not ' ~ message.role) -}}
{%- endif -%}
{{- '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def render(prompt: str, response: str) -> str:
    """The chat template applied to one user and one assistant message, but faster than the template itself."""
    return f"<|user|>{prompt}<|end|><|assistant|>{response}<|end|>"


def make_tokenizer(max_positions: int = 256):
    """A `PreTrainedTokenizerFast` with one token per character: printable ASCII and newline; all others are `<|unk|>`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unk|>"]
    printable = [character for character in string.printable if character.isprintable()] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(special + printable)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=max_positions,
        padding_side="right",
    )
