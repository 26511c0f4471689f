"""Shows what a recipe would do with its data, before anything is paid for: no Ray, no engine, no GPU.

In: a recipe.
Out: what the data was taken for, what is asked in each round, which tokens are trained, lengths, and warnings.
Never imports: stages, or anything that starts an engine.
"""
