from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diloco_ray.data.batches import batches, epoch_order
from diloco_ray.data.prepare import prepare
from diloco_ray.data.settings import DataSettings
from diloco_ray.data.shards import TokenShards
from diloco_ray.errors import DataError


@dataclass(frozen=True)
class Positions:
    epoch: int
    start: int
    stop: int
    shard: int = 0


GOLDEN = [1, 0, 3, 7, 5, 4, 8, 9, 6, 2]


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 10))
def test_an_epoch_takes_every_sequence_once(num_sequences, seed, epoch):
    order = epoch_order(num_sequences, seed, epoch)[np.arange(num_sequences)]
    assert sorted(order.tolist()) == list(range(num_sequences))


def test_any_position_is_found_without_the_others():
    order = epoch_order(10**12, seed=3, epoch=4)
    positions = np.array([0, 10**12 - 1, 5 * 10**11])
    found = order[positions]
    assert found.dtype == np.int64
    assert ((found >= 0) & (found < 10**12)).all()
    assert [int(order[positions[i : i + 1]][0]) for i in range(3)] == found.tolist()


def test_the_order_is_written_down():
    """Golden: a changed order would make old runs train on other data than their log says."""
    assert epoch_order(10, seed=0, epoch=0)[np.arange(10)].tolist() == GOLDEN
    assert epoch_order(10, seed=0, epoch=1)[np.arange(10)].tolist() != GOLDEN
    assert epoch_order(10, seed=1, epoch=0)[np.arange(10)].tolist() != GOLDEN


def test_orders_look_shuffled():
    n = 5000
    first, second = (epoch_order(n, seed=0, epoch=epoch)[np.arange(n)] for epoch in (0, 1))
    line = np.arange(n)
    assert abs(np.corrcoef(first, line)[0, 1]) < 0.05
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert (np.abs(np.diff(first)) == 1).sum() < 10


@pytest.fixture(scope="module")
def split(corpus, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("prepared"))
    prepare(DataSettings(corpus=corpus), folder)
    return TokenShards.open(folder).split("train")


def test_batches_follow_the_ranges_across_epochs(split):
    n = split.num_sequences(64)
    ranges = [Positions(0, n - 5, n), Positions(1, 0, 9)]
    numbers = [*epoch_order(n, 7, 0)[np.arange(n - 5, n)], *epoch_order(n, 7, 1)[np.arange(9)]]
    expected = torch.from_numpy(split.sequences(np.array(numbers), 64))
    found = list(batches(split, ranges, batch_size=4, sequence_length=64, seed=7))
    assert [len(batch) for batch in found] == [4, 4, 4, 2]
    assert all(batch.dtype == torch.int64 for batch in found)
    assert torch.equal(torch.cat(found), expected)


@given(st.integers(0, 6))
def test_skipped_batches_are_the_first_ones(split, skip):
    ranges = [Positions(0, 3, 10), Positions(2, 0, 8)]
    whole = list(batches(split, ranges, 4, 32, seed=1))
    rest = list(batches(split, ranges, 4, 32, seed=1, skip=skip))
    assert len(rest) == max(0, len(whole) - skip)
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[skip:]))


def test_islands_with_neighbouring_ranges_share_no_sequence(split):
    n = split.num_sequences(32)
    halves = [batches(split, [Positions(0, a, b)], 8, 32, seed=1) for a, b in ((0, n // 2), (n // 2, n))]
    rows = [tuple(row.tolist()) for half in halves for batch in half for row in batch]
    everything = split.sequences(np.arange(n), 32)
    assert sorted(rows) == sorted(map(tuple, everything.tolist()))


def test_fewer_sequences_than_a_batch_are_refused_when_asked_not_when_read(split):
    with pytest.raises(DataError, match="fewer than batch_size=100000"):
        batches(split, [Positions(0, 0, 1)], 100_000, 64, seed=0)


# ---- data shards ----


@pytest.fixture(scope="module")
def two_shards(corpus, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("prepared"))
    prepare(DataSettings(corpus=corpus, shards="label", label_column="speaker"), folder)
    return TokenShards.open(folder).split("train")


def test_each_shard_has_an_order_of_its_own_and_shard_0_the_one_that_is_written_down():
    assert epoch_order(10, seed=0, epoch=0, shard=0)[np.arange(10)].tolist() == GOLDEN
    orders = {tuple(epoch_order(500, seed=0, epoch=1, shard=shard)[np.arange(500)]) for shard in range(5)}
    assert len(orders) == 5


def test_batches_read_the_shard_that_each_range_names(two_shards):
    sizes = two_shards.shard_sizes(64)
    ranges = [Positions(0, 2, 7, shard=1), Positions(1, 0, 4, shard=0)]
    found = torch.cat(list(batches(two_shards, ranges, 4, 64, seed=7)))
    ones = two_shards.sequences(epoch_order(sizes[1], 7, 0, 1)[np.arange(2, 7)], 64, 1)
    zeros = two_shards.sequences(epoch_order(sizes[0], 7, 1)[np.arange(4)], 64, 0)
    assert torch.equal(found, torch.from_numpy(np.concatenate([ones, zeros])))


def test_a_shard_smaller_than_a_batch_is_refused_by_its_name(two_shards):
    small, large = sorted(two_shards.shard_sizes(64))
    with pytest.raises(DataError, match=rf"group 1 \(B\) has {small} sequences of 64, fewer than batch_size={large}"):
        batches(two_shards, [Positions(0, 0, 1, shard=1)], large, 64, seed=0)
    assert list(batches(two_shards, [Positions(0, 0, 1, shard=0)], large, 64, seed=0))
