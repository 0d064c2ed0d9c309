"""The outer gradient: how far one island moved in a round, encoded; and the look at a received one before it counts.

The summand of the averaging step of DiLoCo (arXiv 2311.08105, Algorithm 1), the papers' pseudo-gradient:

    delta_m = base - island        (old minus new, so the outer optimizer *descends* it)

It does not know how many inner steps were taken, nor who admits the result. The norms are reports, which no replica
replays: float32 within a chunk, float64 from chunk to chunk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from diloco_ray.algorithm.codecs import BLOCK_VALUES, CHUNK_VALUES, Codec


@dataclass(frozen=True)
class OuterGradientStats:
    """Squared l2 norms, which add up over the parts of a vector: of delta, of e, and of e - Q(e).

    e is what was to be sent: delta, or with error feedback delta and what was held back before. Q(e) is what is
    decoded.
    """

    squared_norm: float
    squared_sum: float
    squared_error: float

    @property
    def norm(self) -> float:
        """|delta|."""
        return math.sqrt(self.squared_norm)

    @property
    def relative_error(self) -> float:
        """|e - Q(e)| / |e|, 0 for nothing."""
        return math.sqrt(self.squared_error / self.squared_sum) if self.squared_sum else 0.0


def encode_outer_gradient_(
    base: Tensor, island: Tensor, codec: Codec, payload: Tensor, residual: Tensor | None = None, decay: float = 1.0
) -> OuterGradientStats:
    """Writes base - island, both (num_values,) float32 and left as they were, into payload, chunk by chunk.

    With a residual e, (num_values,) float32, changed in place and zero at first, this is the error feedback of
    SparseLoCo (arXiv 2508.15706), with decay beta: what the codec leaves out now is sent later.

        e <- beta e + delta,   send Q(e),   e <- e - Q(e)

    Q(e) has then left the residual whether it arrives or not: after a refusal the caller puts the former e back.
    """
    num_values = base.numel()
    delta, decoded = torch.empty(2, min(num_values, CHUNK_VALUES)).unbind()
    squared_norm = squared_sum = squared_error = 0.0
    for start in range(0, num_values, CHUNK_VALUES):
        here = slice(start, min(start + CHUNK_VALUES, num_values))
        delta, decoded = delta[: here.stop - start], decoded[: here.stop - start]
        torch.sub(base[here], island[here], out=delta)
        moved = _squared_norm(delta)
        total = delta if residual is None else residual[here].mul_(decay).add_(delta)
        squared_norm += moved
        squared_sum += moved if residual is None else _squared_norm(total)
        codec.encode_(total, payload, start, num_values)
        codec.decode_(payload, start, num_values, decoded)
        squared_error += _squared_norm(total.sub_(decoded))
    return OuterGradientStats(squared_norm, squared_sum, squared_error)


def inspect_payload(payload: Tensor, num_values: int, codec: Codec) -> float:
    """The l2 norm of the decoded vector; inf or nan when any value in it is not finite (or its square overflows)."""
    decoded = torch.empty(min(num_values, CHUNK_VALUES))
    squared_norm = 0.0
    for start in range(0, num_values, CHUNK_VALUES):
        decoded = decoded[: min(CHUNK_VALUES, num_values - start)]
        codec.decode_(payload, start, num_values, decoded)
        squared_norm += _squared_norm(decoded)
    return math.sqrt(squared_norm)


def pairwise_cosines(payloads: Sequence[Tensor], codec: Codec, num_values: int) -> list[float]:
    """cos(d_i, d_j) = d_i . d_j / |d_i| |d_j| of decoded contributions, for the events; 0 where one of the two is zero.

    In the order (0, 1), (0, 2), .. (1, 2), .. of their places. Products and sums in float64, some blocks of all
    contributions at a time.
    """
    num_piece = max(16, CHUNK_VALUES // BLOCK_VALUES // max(1, len(payloads))) * BLOCK_VALUES
    products = torch.zeros(len(payloads), len(payloads), dtype=torch.float64)
    for start in range(0, num_values, num_piece):
        decoded = torch.empty(len(payloads), min(num_piece, num_values - start))
        for payload, row in zip(payloads, decoded):
            codec.decode_(payload, start, num_values, row)
        piece = decoded.double()
        products += piece @ piece.T
    norms = [math.sqrt(float(square)) for square in products.diagonal()]
    return [
        float(products[i, j]) / (norms[i] * norms[j]) if norms[i] and norms[j] else 0.0
        for i, j in combinations(range(len(payloads)), 2)
    ]


def _squared_norm(values: Tensor) -> float:
    return float(torch.dot(values, values))
