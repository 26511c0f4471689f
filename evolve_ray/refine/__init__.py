"""What is asked of the model, and in which words: asks, templates, strategies.

In: a prompt and earlier drafts.
Out: asks; at the end all drafts of the prompt.
Never imports: an engine: a list of answers is enough to run a strategy.
"""
