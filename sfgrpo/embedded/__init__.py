"""A small Stable Diffusion 3 that trains on two CPU cores, with its data, prompts and judges."""
