"""Figures of an evaluation by round, with intervals; drift; whether a run continues.

In: rows of drafts and scores.
Out: plain numbers and decisions, from pure functions.
Never imports: stages, engines, or the run directory.
"""
