"""The outer gradient: how far one island moved in a round, encoded; and the look at a received one before it counts.

The summand of the averaging step of DiLoCo (arXiv 2311.08105, Algorithm 1), the papers' pseudo-gradient:

    delta_m = base - island        (old minus new, so the outer optimizer *descends* it)

It does not know how many inner steps were taken, nor who admits the result. The norms are reports, which no replica
replays: float32 within a chunk, float64 from chunk to chunk.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diloco_ray.algorithm.codecs import CHUNK_VALUES, Codec


@dataclass(frozen=True)
class OuterGradientStats:
    """norm: l2 norm of delta before encoding. relative_error: |delta - decoded| / |delta|, 0 for a zero delta."""

    norm: float
    relative_error: float


def encode_outer_gradient_(base: Tensor, island: Tensor, codec: Codec, payload: Tensor) -> OuterGradientStats:
    """Writes base - island, both (num_values,) float32 and left as they were, into payload, chunk by chunk."""
    num_values = base.numel()
    delta, decoded = torch.empty(2, min(num_values, CHUNK_VALUES))
    squared_norm = squared_error = 0.0
    for start in range(0, num_values, CHUNK_VALUES):
        here = slice(start, min(start + CHUNK_VALUES, num_values))
        delta, decoded = delta[: here.stop - start], decoded[: here.stop - start]
        torch.sub(base[here], island[here], out=delta)
        codec.encode_(delta, payload, start, num_values)
        codec.decode_(payload, start, num_values, decoded)
        squared_norm += _squared_norm(delta)
        squared_error += _squared_norm(decoded.sub_(delta))
    return OuterGradientStats(
        norm=math.sqrt(squared_norm), relative_error=math.sqrt(squared_error / squared_norm) if squared_norm else 0.0
    )


def inspect_payload(payload: Tensor, num_values: int, codec: Codec) -> float:
    """The l2 norm of the decoded vector; inf or nan when any value in it is not finite (or its square overflows)."""
    decoded = torch.empty(min(num_values, CHUNK_VALUES))
    squared_norm = 0.0
    for start in range(0, num_values, CHUNK_VALUES):
        decoded = decoded[: min(CHUNK_VALUES, num_values - start)]
        codec.decode_(payload, start, num_values, decoded)
        squared_norm += _squared_norm(decoded)
    return math.sqrt(squared_norm)


def _squared_norm(values: Tensor) -> float:
    return float(torch.dot(values, values))
