"""Figures: what an evaluation says by round, with intervals; drift; whether a run goes on.

In: rows of drafts and scores.
Out: plain numbers and decisions; pure functions.
Never imports: stages, engines, or the run directory.
"""
