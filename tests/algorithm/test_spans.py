"""Spans and shards: each value of a fragment is held, and stepped, where it should be; encoded parts are the whole."""

import pytest
import torch

from diloco_ray.algorithm.codecs import BLOCK_VALUES, CODEC_NAMES, get_codec
from diloco_ray.algorithm.fragments import Fragment, partition
from diloco_ray.algorithm.spans import (
    Holding,
    Span,
    cut_payload,
    even_spans,
    join_payloads,
    layout_of_spans,
    sharded_holding,
    whole_holding,
)

SHAPES = {"embedding": (257, 6), "one_row": (1, 5), "norm": (7,), "odd": (3, 11, 2), "head": (64, 9)}
SIZES = [1, 5, 255, 256, 257, 1023, 1024, 4097]


def fragment() -> Fragment:
    return partition(SHAPES).fragments[0]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("num_values", SIZES)
def test_spans_are_whole_blocks_that_cover_the_vector_about_evenly(num_values: int, num_ranks: int) -> None:
    spans = even_spans(num_values, num_ranks)
    assert len(spans) == num_ranks
    assert [spans[0].start, *(span.stop for span in spans)] == [*(span.start for span in spans), num_values]
    assert all(span.start % BLOCK_VALUES == 0 or span.start == num_values for span in spans)
    sizes = [span.num_values for span in spans]
    assert max(sizes) - min(sizes) < 2 * BLOCK_VALUES
    layout = partition({"all": (num_values,)})
    assert [layout_of_spans(layout, rank, num_ranks).num_values for rank in range(num_ranks)] == sizes


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("num_values", SIZES)
def test_encoded_spans_joined_are_the_encoded_vector_byte_for_byte_and_back(name: str, num_values: int) -> None:
    codec, values = get_codec(name), torch.randn(num_values, generator=torch.Generator().manual_seed(num_values))
    whole = torch.empty(codec.num_bytes(num_values), dtype=torch.uint8)
    codec.encode_(values, whole, 0, num_values)
    spans = even_spans(num_values, 3)
    parts = [torch.empty(codec.num_bytes(span.num_values), dtype=torch.uint8) for span in spans]
    for part, span in zip(parts, spans):
        if span.num_values:
            codec.encode_(span.of(values), part, 0, span.num_values)
    assert torch.equal(join_payloads(codec, parts, spans, num_values), whole)
    for part, span in zip(parts, spans):
        assert torch.equal(cut_payload(codec, whole, span, num_values), part)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_ranks_hold_the_rows_that_torchs_chunk_gives_them(num_ranks: int) -> None:
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    whole = torch.empty(fragment().num_values)
    fragment().gather_(tensors, whole)
    seen = torch.zeros_like(whole)
    for rank in range(num_ranks):
        holding = sharded_holding(fragment(), rank, num_ranks)
        chunks = {name: dict(enumerate(t.chunk(num_ranks))).get(rank, t[:0]) for name, t in tensors.items()}
        own = torch.empty(holding.fragment.num_values)
        holding.fragment.gather_(chunks, own)
        assert torch.equal(torch.cat([piece.of(whole) for piece in holding.pieces] or [whole[:0]]), own)
        for piece in holding.pieces:
            piece.of(seen).add_(1)
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_what_a_rank_holds_of_a_span_is_one_run_of_its_own_vector(num_ranks: int) -> None:
    whole = torch.randn(fragment().num_values)
    holdings = [sharded_holding(fragment(), rank, num_ranks) for rank in range(num_ranks)]
    for span in even_spans(whole.numel(), num_ranks):
        found = torch.full((span.num_values,), float("nan"))
        for holding in [*holdings]:
            own = torch.cat([piece.of(whole) for piece in holding.pieces] or [whole[:0]])
            run, pieces = holding.within(span)
            values = run.of(own)
            assert values.numel() == sum(piece.num_values for piece in pieces)
            for piece in pieces:
                piece.of(found).copy_(values[: piece.num_values])
                values = values[piece.num_values :]
        assert torch.equal(found, span.of(whole))


def test_a_rank_with_whole_tensors_holds_all_of_every_span() -> None:
    holding: Holding = whole_holding(fragment())
    assert holding.fragment is not None
    assert holding.within(Span(256, 1024)) == (Span(256, 1024), (Span(0, 768),))
