"""Checks that a run is what it claims: every hash, every row, and the way from a training pair back to its prompt.

In: a run directory.
Out: findings for people, with the command that repairs the run.
Never imports: an engine, a trainer, or anything that writes into a run.
"""
