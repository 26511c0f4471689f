"""The tiny world: a sorting task, a base model with a latent skill, and a reward model, made in minutes without a GPU.

In: a seed and sizes.
Out: model folders and JSONL files, made once and kept beside the run.
Never imports: the loop that uses it.
"""
