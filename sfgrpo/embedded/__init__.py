"""Small Stable Diffusion 3 models that train on two CPU cores: data, prompts, weights, judges."""
