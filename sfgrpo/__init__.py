"""Reinforcement learning of flow-matching generators with stepwise credit.

Importing this package imports nothing heavy: `sfgrpo.ops` needs PyTorch alone, the trainer
(`sfgrpo.train`) needs the `train` extra.
"""

__version__ = "0.1.0"
