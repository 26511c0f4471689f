"""Selection of preference pairs: pure functions of the scored drafts of one prompt.

In: a prompt and its drafts with scores.
Out: pairs, and a rejected row with a reason for each draft that is in no pair.
Never imports: engines, models, or the run directory.
"""
