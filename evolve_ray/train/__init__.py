"""Training: objectives, forwards over trees of sequences, and the ranks of a Ray Train worker group with DeepSpeed ZeRO-3.

In: committed pairs and a model folder.
Out: committed reference log-probabilities and a committed Hugging Face checkpoint.
Never imports: stages, generation or selection.
"""
