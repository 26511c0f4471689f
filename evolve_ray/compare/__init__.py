"""Compares models on the same prompts with the same seeds, and runs probes that separate refinement skill from luck.

In: model folders or run directories, a recipe, prompts.
Out: evaluation.json, evaluation.html and tables on the terminal.
Never imports: a trainer.
"""
