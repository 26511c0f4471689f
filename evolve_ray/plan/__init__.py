"""What a run would take, without starting anything: stages, tokens, hours, disk, GPU memory.

In: a `Config`, a model's config.json, a cluster.
Out: the text of `--plan`, and what does not fit with a way out that was tried.
Never imports: anything that loads a model.
"""
