"""Estimates what a run needs, without starting anything: stages, tokens, hours, disk, GPU memory.

In: a `Config`, a model's config.json, a cluster.
Out: the text of `--plan`, and for what does not fit a change of the recipe that was checked.
Never imports: anything that loads a model.
"""
