"""What something costs in memory: Python's and numpy's, torch's, and the process's as the system counts it."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

RESIDENT_NOISE_BYTES = 100_000_000  # what a process may take beside: under a tenth of the sizes that are claimed


@dataclass
class Cost:
    """Peaks while it was measured. traced: what Python and numpy held at once. tensor: the largest that torch made,
    touched or not, on this thread. resident: beyond what the process had; None where the system does not say."""

    traced_bytes: int = 0
    tensor_bytes: int = 0
    resident_bytes: int | None = None

    def assert_at_most(self, num_bytes: int) -> None:
        assert max(self.traced_bytes, self.tensor_bytes) < num_bytes, f"it costs the memory that it claims: {self}"
        assert (self.resident_bytes or 0) < RESIDENT_NOISE_BYTES, f"it costs the memory that it claims: {self}"


@contextmanager
def measured() -> Iterator[Cost]:
    cost, began = Cost(), _peak_resident(reset=True)
    tracemalloc.start()
    try:
        with _Tensors(cost):
            yield cost
        cost.traced_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    ended = _peak_resident()
    cost.resident_bytes = None if began is None or ended is None else ended - began


class _Tensors(TorchFunctionMode):
    """Hears of every call of torch; what it returns and what is no part of an argument was made by it."""

    def __init__(self, cost: Cost):
        super().__init__()
        self._cost = cost

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage.data_ptr() for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        sizes = [storage.nbytes() for storage in _storages(out) if storage.data_ptr() not in known]
        self._cost.tensor_bytes = max(self._cost.tensor_bytes, *sizes, 0)
        return out


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _peak_resident(reset: bool = False) -> int | None:
    """Of this process since the last reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
