"""Refinement: asks, the templates that word them, and the strategies that send them.

In: a prompt and earlier drafts.
Out: asks, and at the end all drafts of the prompt.
Never imports: an engine. A list of answers is enough to run a strategy.
"""
