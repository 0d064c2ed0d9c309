"""Combining: the contributions of several islands become the one outer gradient of a step.

Only the coordinator combines; replicas decode the result. So sums are allowed here, but they run in the order given,
which is island order, never that of arrival, and norms do not depend on the size of chunks or the number of threads.

A combine looks at the contributions as a whole where it must, and returns what writes one chunk of the result: no
decoded copy of a contribution is ever longer than a chunk. It does not know where a weight comes from, nor who was
left out. With one contribution each of them gives just that one (radial: but for rounding).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diloco_ray.algorithm.codecs import BLOCK_VALUES, CHUNK_VALUES, Codec
from diloco_ray.algorithm.fragments import Fragment, TensorSlot, is_embedding

# (start, out, scratch): the values of the combined vector from `start` on, written to out, (m,) float32; scratch is as
# long. start and m are as a codec wants them, and m is at most CHUNK_VALUES.
ChunkWriter = Callable[[int, Tensor, Tensor], None]

_SMALLEST_NORMAL = 2.0**-126  # a norm under it counts as 0: float32 cannot hold its inverse
_CANCELLED = 2.0**-20  # a mean of unit vectors that is shorter is the rounding of float32


@dataclass(frozen=True)
class Contributions:
    """Encoded outer gradients of one fragment, in island order. Weights are positive and their sum is finite."""

    payloads: Sequence[Tensor]
    weights: Sequence[float]
    codec: Codec
    num_values: int

    def __post_init__(self) -> None:
        weights, total = list(self.weights), sum(self.weights)
        positive = all(weight > 0 for weight in weights)  # NaN is not
        if not self.payloads or len(self.payloads) != len(weights) or not positive or total == math.inf:
            raise ValueError(f"{len(self.payloads)} contributions with weights {weights}: one positive weight each")

    def __len__(self) -> int:
        return len(self.payloads)

    @property
    def shares(self) -> list[float]:
        """Weights that sum to 1; that of a single contribution is exactly 1."""
        total = sum(self.weights)
        return [weight / total for weight in self.weights]

    def decode_(self, position: int, start: int, out: Tensor, factor: float = 1.0) -> None:
        self.codec.decode_(self.payloads[position], start, self.num_values, out, factor)

    def one_(self, position: int) -> ChunkWriter:
        """One of the contributions as it is."""

        def write_(start: int, out: Tensor, scratch: Tensor) -> None:
            self.decode_(position, start, out)

        return write_

    def sum_(self, factors: Sequence[float]) -> ChunkWriter:
        """sum_m factor_m delta_m."""

        def write_(start: int, out: Tensor, scratch: Tensor) -> None:
            for position, factor in enumerate(factors):
                self.decode_(position, start, scratch if position else out, factor)
                if position:
                    out.add_(scratch)

        return write_


Combine = Callable[[Contributions, Fragment], ChunkWriter]


def mean(contributions: Contributions, fragment: Fragment) -> ChunkWriter:
    """g = sum_m (w_m / sum_j w_j) delta_m.

    The averaging step of DiLoCo (arXiv 2311.08105, Algorithm 1), weighted where islands did unequal work.
    """
    return contributions.sum_(contributions.shares)


def clipped_mean(contributions: Contributions, fragment: Fragment) -> ChunkWriter:
    """g = sum_m (w_m / sum_j w_j) min(1, median_j ||delta_j|| / ||delta_m||) delta_m.

    The mean, after each contribution longer than the median (of the norms of the whole fragment, weights aside) was
    scaled down to it: no island moves the model further than an ordinary one, whichever way it points.
    """
    norms = _Norms(contributions.num_values)
    lengths = [norms.of(contributions.one_(m), 0, contributions.num_values) for m in range(len(contributions))]
    limit = statistics.median(lengths)
    clips = [1.0 if length <= limit else limit / length for length in lengths]
    return contributions.sum_([share * clip for share, clip in zip(contributions.shares, clips)])


def radial(contributions: Contributions, fragment: Fragment) -> ChunkWriter:
    """Radial-directional averaging of Decoupled DiLoCo (arXiv 2604.21428), for each tensor v of the fragment:

        g = (sum_m w_m ||v_m|| / sum_j w_j) dir(sum_m w_m dir(v_m)),    dir(x) = x / ||x||,  dir(0) = 0

    The mean of vectors that point different ways is shorter than they are; this keeps their mean length. Hence it
    wants a smaller outer learning rate than the mean, about half at toy size. Embeddings get the plain weighted mean.
    Directions that cancel but for the rounding of float32 give 0.
    """
    norms = _Norms(contributions.num_values)
    tensors = [(slot, *_radial_factors(contributions, slot, norms)) for slot in fragment.slots]

    def write_(start: int, out: Tensor, scratch: Tensor) -> None:
        stop = start + out.numel()
        here = [
            (slice(max(slot.offset, start) - start, min(slot.offset + slot.num_values, stop) - start), factors, length)
            for slot, factors, length in tensors
            if slot.offset < stop and slot.offset + slot.num_values > start
        ]
        for position in range(len(contributions)):
            values = scratch if position else out
            contributions.decode_(position, start, values)
            for part, factors, _ in here:
                values[part].mul_(factors[position])
            if position:
                out.add_(scratch)
        for part, _, length in here:
            out[part].mul_(length)

    return write_


def _radial_factors(contributions: Contributions, slot: TensorSlot, norms: "_Norms") -> tuple[list[float], float]:
    """f and l of one tensor, so that its g = l sum_m f_m v_m."""
    shares = contributions.shares
    if is_embedding(slot.name, slot.shape):
        return shares, 1.0
    stop = slot.offset + slot.num_values
    lengths = [norms.of(contributions.one_(position), slot.offset, stop) for position in range(len(contributions))]
    factors = [share / length if length >= _SMALLEST_NORMAL else 0.0 for share, length in zip(shares, lengths)]
    direction = norms.of(contributions.sum_(factors), slot.offset, stop)
    mean_length = sum(share * length for share, length in zip(shares, lengths))
    return factors, mean_length / direction if direction > _CANCELLED else 0.0


def trimmed_mean(contributions: Contributions, fragment: Fragment) -> ChunkWriter:
    """For each coordinate the mean without its largest and its smallest value (Yin et al., arXiv 1803.01498).

    Weights do not count. Fewer than three contributions leave nothing between the extremes: then it is `mean`.
    """
    num_between = len(contributions) - 2
    if num_between < 1:
        return mean(contributions, fragment)
    workspace = torch.empty(3, min(CHUNK_VALUES, contributions.num_values))

    def write_(start: int, out: Tensor, scratch: Tensor) -> None:
        smallest, largest, spare = workspace[:, : out.numel()]
        contributions.decode_(0, start, spare)
        contributions.decode_(1, start, scratch)
        torch.minimum(spare, scratch, out=smallest)
        torch.maximum(spare, scratch, out=largest)
        out.zero_()
        for position in range(2, len(contributions)):  # of the extremes and the next value, the middle one is added
            contributions.decode_(position, start, scratch)
            torch.maximum(smallest, scratch, out=spare)
            torch.minimum(smallest, scratch, out=smallest)
            torch.minimum(largest, spare, out=scratch)
            torch.maximum(largest, spare, out=largest)
            out.add_(scratch)
        out.div_(num_between)

    return write_


def median(contributions: Contributions, fragment: Fragment) -> ChunkWriter:
    """For each coordinate the median (arXiv 1803.01498); of an even number the mean of the middle two.

    Weights do not count. Only the smaller half of the values is kept, in order, a few blocks at a time so that it stays
    in cache: k^2 / 4 comparisons a coordinate, which for tens of islands is far faster than sorting each coordinate.
    """
    num_kept = len(contributions) // 2 + 1
    num_piece = max(16, CHUNK_VALUES // BLOCK_VALUES // num_kept) * BLOCK_VALUES
    workspace = torch.empty(num_kept + 2, min(num_piece, contributions.num_values))

    def write_(start: int, out: Tensor, scratch: Tensor) -> None:
        for first in range(0, out.numel(), num_piece):
            piece = out[first : first + num_piece]
            kept = _smallest(contributions, num_kept, start + first, list(workspace[:, : piece.numel()]))
            if len(contributions) % 2:
                piece.copy_(kept[-1])
            else:
                torch.mul(kept[-2], 0.5, out=piece)
                piece.add_(kept[-1].mul_(0.5))

    return write_


def _smallest(contributions: Contributions, num_kept: int, start: int, free: list[Tensor]) -> list[Tensor]:
    """The smallest num_kept values of each coordinate in rising order, in num_kept + 2 vectors that are free to use."""
    kept: list[Tensor] = []
    for position in range(len(contributions)):
        value = free.pop()
        contributions.decode_(position, start, value)
        for rank, row in enumerate(kept):
            smaller = free.pop()
            torch.minimum(row, value, out=smaller)
            torch.maximum(row, value, out=value)
            kept[rank] = smaller
            free.append(row)
        (kept if len(kept) < num_kept else free).append(value)
    return kept


class _Norms:
    """l2 norms in float64 of what a ChunkWriter writes."""

    def __init__(self, num_values: int):
        num_chunk = min(CHUNK_VALUES, num_values)
        self._num_values = num_values
        self._values, self._scratch = torch.empty(2, num_chunk)
        self._squares = torch.empty(num_chunk, dtype=torch.float64)

    def of(self, write_: ChunkWriter, first: int, stop: int) -> float:
        """The norm of the values first .. stop.

        Squares are added up within each block of the vector, then the blocks' sums at once in NumPy: neither sees how
        the vector was cut into chunks, nor how many threads there are.
        """
        sums: list[Tensor] = []
        end = min(-(-stop // BLOCK_VALUES) * BLOCK_VALUES, self._num_values)
        for start in range(first // BLOCK_VALUES * BLOCK_VALUES, end, CHUNK_VALUES):
            num_chunk = min(CHUNK_VALUES, end - start)
            values, squares = self._values[:num_chunk], self._squares[:num_chunk]
            write_(start, values, self._scratch[:num_chunk])
            values[: max(0, first - start)] = 0.0
            values[stop - start :] = 0.0
            squares.copy_(values).square_()
            num_whole = num_chunk // BLOCK_VALUES * BLOCK_VALUES
            sums.append(squares[:num_whole].view(-1, BLOCK_VALUES).sum(1))
            sums.append(squares[num_whole:].sum(0, keepdim=True))
        return math.sqrt(np.concatenate([part.numpy() for part in sums]).sum()) if sums else 0.0


COMBINES: dict[str, Combine] = {
    combine.__name__: combine for combine in (mean, radial, clipped_mean, trimmed_mean, median)
}
