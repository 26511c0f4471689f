"""Selection of preference pairs and rows of turns: pure functions of the scored drafts of one prompt, or of all rows.

In: a prompt and its drafts with scores.
Out: pairs or rows of turns, and a rejected row with a reason for each draft that is in none.
Never imports: engines, models, or the run directory.
"""
