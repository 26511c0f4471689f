"""What a response is worth: reward models, verifiers, combinations of them.

In: prompts, gold answers, responses.
Out: one finite number for each response; what is not is rejected by name.
Never imports: generation or training.
"""
