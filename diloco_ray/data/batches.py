"""The order in which sequences are trained on, found by arithmetic: no state, nothing to save, nothing to replay.

Each data shard has epochs of its own. An epoch's order is a bijection of 0 .. n - 1 keyed by (seed, shard, epoch): a
Feistel network over the next even power of two, walked along its cycle until it lands below n (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002).
This module does not know who trains on what; ranges of positions come from outside.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from diloco_ray.data.shards import TokenSplit
from diloco_ray.errors import DataError

NUM_ROUNDS = 8


class Range(Protocol):
    """Positions start .. stop - 1 of one epoch's order of one data shard."""

    @property
    def shard(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class EpochOrder:
    """order[positions] -> sequence numbers; both (m,) integers in 0 .. num_sequences - 1."""

    def __init__(self, num_sequences: int, keys: np.ndarray):
        self.num_sequences = num_sequences
        self._keys = keys  # (NUM_ROUNDS,) uint64
        self._half_bits = np.uint64(max(1, ((num_sequences - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        values = self._permute(np.asarray(positions).astype(np.uint64))
        while (outside := values >= self.num_sequences).any():
            values[outside] = self._permute(values[outside])
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._half_bits) | right


def epoch_order(num_sequences: int, seed: int, epoch: int, shard: int = 0) -> EpochOrder:
    """The order of one epoch: a function of these four numbers alone."""
    key = f"{seed}/{shard}/{epoch}" if shard else f"{seed}/{epoch}"
    digest = hashlib.sha256(key.encode()).digest()
    first = np.uint64(int.from_bytes(digest[:8], "little"))
    keys = _mix(first + np.arange(1, NUM_ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return EpochOrder(num_sequences, keys)


def batches(
    split: TokenSplit, ranges: Sequence[Range], batch_size: int, sequence_length: int, seed: int, *, skip: int = 0
) -> Iterator[torch.Tensor]:
    """inputs_BT (int64, the caller's own) over the ranges laid end to end, from batch number `skip` on.

    Only the last batch may be smaller. DataError where a range's shard has fewer sequences than one batch.
    """
    for shard in sorted({piece.shard for piece in ranges}):
        check_fills_a_batch(split, shard, batch_size, sequence_length)
    return _batches(split, ranges, batch_size, sequence_length, seed, skip)


def check_fills_a_batch(split: TokenSplit, shard: int, batch_size: int, sequence_length: int) -> None:
    """DataError, naming the shard, where it has fewer sequences than one batch."""
    num_sequences = split.num_sequences(sequence_length, shard)
    if num_sequences < batch_size:
        what = f"{split.describe(shard)} has {num_sequences} sequences of {sequence_length}, fewer than {batch_size=}"
        remedy = "choose a smaller batch_size, a shorter data.sequence_length, or more text"
        raise DataError(what, where="data.sequence_length", remedy=remedy)


def _batches(
    split: TokenSplit, ranges: Sequence[Range], batch_size: int, sequence_length: int, seed: int, skip: int
) -> Iterator[torch.Tensor]:
    starts = np.cumsum([0, *(piece.stop - piece.start for piece in ranges)]).tolist()
    numbers = [_numbers(split, piece, sequence_length, seed) for piece in ranges]
    for first in range(skip * batch_size, starts[-1], batch_size):
        last = min(first + batch_size, starts[-1])
        parts = [
            split.sequences(mine[max(first, start) - start : last - start], sequence_length, piece.shard)
            for piece, mine, start, stop in zip(ranges, numbers, starts, starts[1:])
            if start < last and first < stop
        ]
        yield torch.from_numpy(np.concatenate(parts))


def _numbers(split: TokenSplit, piece: Range, sequence_length: int, seed: int) -> np.ndarray:
    """(m,) int64: the range's sequences, in the order of its epoch."""
    order = epoch_order(split.num_sequences(sequence_length, piece.shard), seed, piece.epoch, piece.shard)
    return order[np.arange(piece.start, piece.stop)]


def _mix(values: np.ndarray) -> np.ndarray:
    """Scatters the bits of uint64 values (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
