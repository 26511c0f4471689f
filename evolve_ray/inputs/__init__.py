"""The inputs of a run, checked before an engine starts: models, template, prompts, preference triples.

In: a `Config` and a run directory.
Out: a `Context` with committed prompts, or one error that names the faults of all inputs.
Never imports: stages; this room prepares a run, it does not run it.
"""
