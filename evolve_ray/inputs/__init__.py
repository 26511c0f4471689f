"""What a run starts from, checked before an engine starts: models, template, prompts, given pairs.

In: a `Config` and a run directory.
Out: a `Context` with committed prompts, or the faults of all inputs.
Never imports: stages: it prepares, it does not run.
"""
