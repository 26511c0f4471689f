"""Preference pairs: pure functions of one prompt's scored drafts.

In: a prompt and its drafts with scores.
Out: pairs, and a reason for each draft that is in none.
Never imports: engines, models, or the run directory.
"""
