"""Is a run what it says: every hash, every row, and the way from a training pair back to its prompt.

In: a run directory.
Out: findings for people, with the command that repairs.
Never imports: an engine, a trainer, or anything that writes into a run.
"""
