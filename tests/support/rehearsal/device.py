"""`torch.cuda` of one device that is not there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

GIB = 2**30
PROPERTIES = SimpleNamespace(
    name="a GPU that is not there", total_memory=80 * GIB, major=9, minor=0,
    multi_processor_count=132, gcnArchName="",
)  # fmt: skip


def _gives(value: Any) -> Callable[..., Any]:
    return lambda *args, **options: value


def _context(*args: object) -> AbstractContextManager[None]:
    """`torch.cuda.device(...)` and `torch.cuda.stream(...)`."""
    return nullcontext()


class Event:
    """Always past."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    record = wait = synchronize = _gives(None)
    query = _gives(True)
    elapsed_time = _gives(0.0)


class Stream:
    """The only one."""

    device, device_index, device_type = torch.device("cuda", 0), 0, 1
    cuda_stream = stream_id = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = __exit__ = _gives(None)
    query = _gives(True)

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def __enter__(self) -> Stream:
        return self


NOTHING = (
    "_lazy_init", "init", "set_device", "set_stream", "synchronize", "empty_cache", "ipc_collect",
    "reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached",
    "manual_seed", "manual_seed_all", "seed", "set_rng_state", "set_rng_state_all",
)  # fmt: skip
"""What `torch.cuda` is told to do, and need not."""

ANSWERS = {
    "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
    "_get_device_index": 0, "is_bf16_supported": True, "is_current_stream_capturing": False,
    "get_device_name": PROPERTIES.name, "get_device_capability": (9, 0),
    "get_device_properties": PROPERTIES, "get_arch_list": ["sm_90"],
    "current_stream": Stream(), "default_stream": Stream(),
    "get_rng_state": torch.zeros(16, dtype=torch.uint8), "get_rng_state_all": [],
    "mem_get_info": (70 * GIB, 80 * GIB), "memory_stats": {},
    "memory_allocated": GIB, "max_memory_allocated": GIB, "memory_reserved": GIB,
    "max_memory_reserved": GIB, "memory_cached": GIB, "max_memory_cached": GIB,
}  # fmt: skip


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    made = torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device)
    return made.untyped_storage().copy_(storage)


def install() -> None:
    """For the rest of this process."""
    for name, answer in {**dict.fromkeys(NOTHING), **ANSWERS}.items():
        setattr(torch.cuda, name, _gives(answer))
    replaced: Any = torch
    replaced.cuda.Stream, replaced.cuda.Event = Stream, Event
    replaced.cuda.device = replaced.cuda.stream = _context
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _gives(None))
    replaced.version.cuda = "13.0"
    replaced.UntypedStorage.clone = _clone
    replaced.Tensor.record_stream = _gives(None)
    replaced.Tensor.pin_memory = lambda tensor, *args: tensor.clone()
