"""The tiny world: a sorting task, a base model with a latent skill and a reward model, made in minutes without a GPU."""
