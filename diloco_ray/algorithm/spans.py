"""A fragment's vector among the ranks of one island: who holds which of its values in the model, who steps which.

    held      by the model: all of them, or a rank's rows of each tensor (FSDP2: dim 0 in chunks of ceil(rows / ranks))
    span      one run of whole codec blocks for each rank, about equally long: what it encodes and steps

Encoded spans laid side by side are, byte for byte, the encoded vector, because a codec's blocks do not depend on each
other and no block lies in two spans. This module does not know how values travel.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diloco_ray.algorithm.codecs import BLOCK_VALUES, Codec
from diloco_ray.algorithm.fragments import Fragment, Layout, TensorSlot


@dataclass(frozen=True)
class Span:
    """Values start .. stop - 1 of a vector."""

    start: int
    stop: int

    @property
    def num_values(self) -> int:
        return self.stop - self.start

    def of(self, values: Tensor) -> Tensor:
        """The view into the vector."""
        return values[self.start : self.stop]


def even_spans(num_values: int, num_ranks: int) -> tuple[Span, ...]:
    """One for each rank; those of a short vector may be empty."""
    num_blocks = -(-num_values // BLOCK_VALUES)
    bounds = [min(num_values, rank * num_blocks // num_ranks * BLOCK_VALUES) for rank in range(num_ranks)]
    return tuple(Span(start, stop) for start, stop in zip(bounds, [*bounds[1:], num_values]))


def layout_of_spans(layout: Layout, rank: int, num_ranks: int) -> Layout:
    """One nameless tensor for each fragment: this rank's span of it."""
    sizes = [even_spans(fragment.num_values, num_ranks)[rank].num_values for fragment in layout.fragments]
    return Layout(tuple(Fragment(p, (TensorSlot("", (size,), 0, size),)) for p, size in enumerate(sizes)))


@dataclass(frozen=True)
class Holding:
    """What one rank holds of a fragment: its tensors' values end to end, and where these lie in the fragment."""

    fragment: Fragment  # of this rank's tensors
    pieces: tuple[Span, ...]  # in the whole fragment's vector, ascending

    def within(self, span: Span) -> tuple[Span, tuple[Span, ...]]:
        """Of what lies in the span: the run of it in this rank's vector, and its pieces in the span's."""
        first = sum(max(0, min(piece.stop, span.start) - piece.start) for piece in self.pieces)
        cut = [Span(max(piece.start, span.start), min(piece.stop, span.stop)) for piece in self.pieces]
        inside = tuple(Span(p.start - span.start, p.stop - span.start) for p in cut if p.start < p.stop)
        return Span(first, first + sum(piece.num_values for piece in inside)), inside


def whole_holding(fragment: Fragment) -> Holding:
    """Of a rank that holds every tensor whole."""
    return Holding(fragment, (Span(0, fragment.num_values),))


def gather_span_(fragment: Fragment, tensors: Mapping[str, Tensor], span: Span, values: Tensor) -> None:
    """Copies what of whole tensors lies in the span into values, (span.num_values,) float32 on the CPU."""
    for slot in fragment.slots:
        first, last = max(slot.offset, span.start), min(slot.offset + slot.num_values, span.stop)
        if first < last:
            theirs = slot.tensor_in(tensors).reshape(-1)[first - slot.offset : last - slot.offset]
            values[first - span.start : last - span.start].copy_(theirs)


def sharded_holding(fragment: Fragment, rank: int, num_ranks: int) -> Holding:
    """Of a rank that holds the rank-th chunk of every tensor's rows; a tensor of few rows may leave it none."""
    slots: list[TensorSlot] = []
    pieces: list[Span] = []
    offset = 0
    for slot in fragment.slots:
        row_values, chunk = math.prod(slot.shape[1:]), -(-slot.shape[0] // num_ranks)
        first, last = min(rank * chunk, slot.shape[0]), min((rank + 1) * chunk, slot.shape[0])
        num_values = (last - first) * row_values
        slots.append(TensorSlot(slot.name, (last - first, *slot.shape[1:]), offset, num_values))
        offset += num_values
        start = slot.offset + first * row_values
        pieces += [Span(start, start + num_values)] if num_values else []
    return Holding(Fragment(fragment.index, tuple(slots)), tuple(pieces))


def cut_payload(codec: Codec, payload: Tensor, span: Span, num_values: int) -> Tensor:
    """The payload of the span alone, a new (num_bytes(span.num_values),) uint8, from that of the whole vector."""
    return torch.cat(codec.sections(payload, span.start, span.num_values, num_values))


def join_payloads(codec: Codec, parts: Sequence[Tensor], spans: Sequence[Span], num_values: int) -> Tensor:
    """The payload of the whole vector from those of its spans."""
    payload = torch.empty(codec.num_bytes(num_values), dtype=torch.uint8)
    for part, span in zip(parts, spans, strict=True):
        mine = codec.sections(part, 0, span.num_values, span.num_values)
        for target, source in zip(codec.sections(payload, span.start, span.num_values, num_values), mine, strict=True):
            target.copy_(source)
    return payload
