"""Small chat templates with the traits of those that people bring."""

TURNS = "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}{%- endfor -%}"
ASK = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
PLAIN = TURNS + ASK
# The answer of an earlier turn is shown without its thinking and trimmed; without thinking the template writes an empty one.
HIDDEN = """\
{%- for m in messages -%}
{%- set text = m['content'].split('</think>')[-1] | trim if m['role'] == 'assistant' else m['content'] -%}
{%- set hidden = '<think>\\n\\n</think>\\n\\n' if loop.last and m['role'] == 'assistant' else '' -%}
{{- '<|im_start|>' + m['role'] + '\\n' + hidden + text + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
OPENED = TURNS + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
CHANNELS = """\
{%- for m in messages -%}
{%- set channel = '<|channel|>final' if m['role'] == 'assistant' else '' -%}
{%- set end = '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' -%}
{{- '<|start|>' + m['role'] + channel + '<|message|>' + m['content'] + end -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""
DATED = "{{- 'Today is ' + strftime_now('%d %b %Y') + '.\\n' -}}" + PLAIN
LINE_BEFORE_END = TURNS.replace("'<|im_end|>", "'\\n<|im_end|>") + ASK
