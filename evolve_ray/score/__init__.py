"""Scores of responses: reward models, verifiers, and combinations of them.

In: prompts, gold answers, responses.
Out: one finite score for each response; a response without one becomes a rejected row.
Never imports: generation or training.
"""
