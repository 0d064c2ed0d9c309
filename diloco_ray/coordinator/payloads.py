"""Contributions' payloads: encoded bytes as they came, our own copy of them, and the look that decides on them."""

import math
from collections.abc import Container
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diloco_ray.algorithm.codecs import Codec
from diloco_ray.algorithm.outer_gradient import inspect_payload
from diloco_ray.coordination.messages import Contribution
from diloco_ray.ids import sha256_hex
from diloco_ray.transport.protocol import Bytes


class Payload:
    """What came may lie in an island's memory and die with it: `inspect` makes it ours."""

    def __init__(self, data: Bytes):
        self._data = data

    @property
    def tensor(self) -> Tensor:
        """(num_bytes,) uint8, ours; to be used once it is inspected."""
        return torch.from_numpy(self._data)

    def inspect(self, contribution: Contribution, num_values: int, codec: Codec) -> tuple[float, str]:
        """Copies the bytes; the norm of the outer gradient and what is wrong with it ("": nothing)."""
        if self._data.shape != (contribution.payload_bytes,) or self._data.dtype != np.uint8:
            arrived = f"{self._data.dtype} {self._data.shape}"
            return 0.0, f"form: {arrived}, announced were {contribution.payload_bytes} bytes"
        self._data = np.array(self._data)
        if sha256_hex(self._data.data) != contribution.payload_sha256:
            return 0.0, "digest: the payload is not what its header says"
        norm = inspect_payload(self.tensor, num_values, codec)
        return norm, "" if math.isfinite(norm) else f"values: the norm of the outer gradient is {norm}"


Name = tuple[Any, str]  # a contribution's key and its payload's digest


def name_of(contribution: Contribution) -> Name:
    return contribution.key, contribution.payload_sha256[:64]  # which may be anything until it is looked at


class Payloads:
    """Of the contributions that the coordinator has in hand, by name."""

    def __init__(self) -> None:
        self._held: dict[Name, Payload] = {}
        self._copied: dict[Name, Payload] = {}  # inspected, so ours; until the loop hears of it

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, name: Name) -> Payload:
        return self._held[name]

    def offer(self, name: Name, data: Bytes) -> None:
        self._held.setdefault(name, Payload(data))

    def copied(self, name: Name, payload: Payload) -> None:
        """Told by whoever inspected it, on any thread."""
        self._copied[name] = payload

    def hold_the_copy(self, name: Name) -> None:
        """It may have been sent again while it was inspected: what came last is not ours yet."""
        copied = self._copied.pop(name, None)
        if copied is not None and name in self._held:
            self._held[name] = copied

    def drop_but(self, wanted: Container[Name]) -> None:
        self._held = {name: payload for name, payload in self._held.items() if name in wanted}
