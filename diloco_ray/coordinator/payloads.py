"""Contributions' payloads: encoded bytes as they came, our own copy of them, and the look that decides on them."""

import math

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
