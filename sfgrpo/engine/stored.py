"""DeepSpeed's files of a checkpoint, read as data.

DeepSpeed reads them as pickles that may call anything. What it writes needs four classes of its
own beside tensors, numbers and text; nothing else is made when a file is read.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from sfgrpo.names import in_one_line

WRITTEN = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed 0.19.8 writes, at all stages together; none does anything when it is made."""


class Files(TorchCheckpointEngine):
    """How an engine of DeepSpeed writes and reads the files of a checkpoint."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file. OSError, naming it, where it cannot be: of a full disk PyTorch says no more
        than "unexpected pos 64 vs 0"."""
        try:
            super().save(state_dict, path)
        except RuntimeError as error:
            raise OSError(f"'{path}' cannot be written: {in_one_line(error)}") from error

    def load(self, path: str, map_location: Any = None, *, mapped: bool = False) -> Any:
        """What a file holds; UnpicklingError, naming the file, if it holds more than data.

        `mapped`, its tensors stay in the file until they are read.
        """
        with torch.serialization.safe_globals(WRITTEN):
            try:
                return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
            except pickle.UnpicklingError as error:
                found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                raise pickle.UnpicklingError(
                    f"'{path}' would call {', '.join(found) or 'code'}, which DeepSpeed does not "
                    "write into checkpoints: somebody has changed it, or another version of "
                    "DeepSpeed wrote it"
                ) from error
