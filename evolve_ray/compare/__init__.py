"""Models side by side: the same prompts and seeds for all, and probes that tell refinement skill from luck.

In: model folders or runs, a recipe, prompts.
Out: evaluation.json, evaluation.html and tables.
Never imports: a trainer.
"""
