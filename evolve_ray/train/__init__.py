"""Training: objectives, forwards and trees of sequences, and the ranks of a Ray Train group with DeepSpeed ZeRO-3.

In: committed pairs and a model folder.
Out: reference log-probabilities and a committed Hugging Face checkpoint.
Never imports: stages, generation or selection.
"""
