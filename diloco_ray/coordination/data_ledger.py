"""The data ledger: who may train on which sequences, and the fate of every leased token.

    leased = committed + rejected + expired + rewound + outstanding            (invariant I8)

A range that was leased and not committed goes back into the pool and is leased again before any new data, so that a
finished epoch has every range exactly once (I9); its tokens count as leased a second time. An island that comes back
gets the very ranges it held, which makes a repeated round equal to the lost one.

The sequences lie in one data shard or several, each with epochs of its own: island m trains on shard m modulo their
number, and on no other.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from diloco_ray.coordination.messages import DataRange
from diloco_ray.errors import CorruptionError
from diloco_ray.ids import island_number

Fate = str  # "committed" | "rejected" | "expired" | "rewound"
FATES = ("committed", "rejected", "expired", "rewound")
MAX_RANGES = 256  # of an adopted lease, besides one for each epoch in it; honest ones have a few
MAX_PIECES = 4000  # leased out and given back: a lease that would cut the data finer than that is not adopted
_LEASE_ID = re.compile(r"(0|[1-9][0-9]{0,17})\.([1-9][0-9]{0,17})")


Place = tuple[int, int]  # epoch and position


@dataclass(frozen=True)
class Lease:
    id: str
    island: str
    ranges: tuple[DataRange, ...]
    num_tokens: int


@dataclass(frozen=True)
class DataLedger:
    shard_sizes: tuple[int, ...]  # sequences in one epoch of each data shard
    tokens_per_sequence: int
    prefix: str  # makes lease ids unique across coordinator lives
    cursors: Mapping[int, Place] = field(default_factory=dict[int, Place])  # by shard: the first place never leased
    returned: tuple[tuple[DataRange, str], ...] = ()  # ranges to lease again, with their last holder, in data order
    outstanding: Mapping[str, Lease] = field(default_factory=dict[str, Lease])
    num_leases: int = 0
    leased: int = 0
    fates: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(FATES, 0))

    def account(self) -> dict[str, int]:
        """Tokens by fate, with `leased` and `outstanding`."""
        return {"leased": self.leased, **self.fates, "outstanding": self._outstanding_tokens()}

    def _outstanding_tokens(self) -> int:
        return sum(lease.num_tokens for lease in self.outstanding.values())

    def shard_of(self, island: str) -> int:
        """The data shard that an island trains on."""
        num_shards = len(self.shard_sizes)
        return island_number(island) % num_shards if num_shards > 1 else 0

    def cursor(self, shard: int = 0) -> Place:
        """The first place of the shard that was never leased."""
        return self.cursors.get(shard, (0, 0))

    def lease(self, island: str, num_sequences: int, shard: int = 0) -> tuple["DataLedger", Lease]:
        """Leases sequences of a shard: first what this island held before, then other returned ranges, then new."""
        here = [item for item in self.returned if item[0].shard == shard]
        mine = [item for item in here if item[1] == island]
        others = [item for item in here if item[1] != island]
        taken: list[DataRange] = []
        rest = [item for item in self.returned if item[0].shard != shard]
        missing = num_sequences
        for data_range, holder in mine + others:
            part = min(missing, data_range.num_sequences)
            cut = data_range.start + part
            if part:
                taken.append(replace(data_range, stop=cut))
            if cut < data_range.stop:
                rest.append((replace(data_range, start=cut), holder))
            missing -= part
        size = self.shard_sizes[shard]
        epoch, position = self.cursor(shard)
        while missing:
            part = min(missing, size - position)
            taken.append(DataRange(shard, epoch, position, position + part))
            missing, position = missing - part, position + part
            if position == size:
                epoch, position = epoch + 1, 0
        cursors = {**self.cursors, shard: (epoch, position)}
        ledger = replace(self, cursors=cursors, returned=tuple(sorted(rest)), num_leases=self.num_leases + 1)
        lease = Lease(
            f"{self.prefix}.{ledger.num_leases}", island, tuple(taken), num_sequences * self.tokens_per_sequence
        )
        return ledger._hold(lease), lease

    def _hold(self, lease: Lease) -> "DataLedger":
        return replace(self, outstanding={**self.outstanding, lease.id: lease}, leased=self.leased + lease.num_tokens)

    def adopt(
        self, lease_id: str, island: str, ranges: tuple[DataRange, ...], num_ahead: int = 0
    ) -> "DataLedger | None":
        """Takes over a lease that its island was given before; None if any of its sequences is not free.

        Nor if it cannot have been given: under an id that is still to come, which the next lease would have as well;
        on another shard than its island's; further ahead than the next epoch, and than the num_ahead sequences that
        may have been given out before it, where what says so is not to move the cursor; in crumbs.
        """
        shard, wanted = self.shard_of(island), sorted(ranges)
        size, (reach, position) = self.shard_sizes[shard], self.cursor(shard)
        furthest = reach * size + position + num_ahead
        for data_range in wanted:
            if data_range.shard != shard or not self._is_place(data_range):
                return None
            if data_range.epoch > reach + 1 and data_range.epoch * size + data_range.start > furthest:
                return None
            reach = max(reach, data_range.epoch + (data_range.stop == size))
        num_sequences = sum(data_range.num_sequences for data_range in wanted)
        if not 0 < len(wanted) <= MAX_RANGES + num_sequences // size:
            return None
        if lease_id in self.outstanding or not self._was_given(lease_id):
            return None
        ledger, taken = self._without(wanted)
        if taken is not None:
            return None
        ledger = ledger._hold(Lease(lease_id, island, ranges, num_sequences * self.tokens_per_sequence))
        return ledger if ledger._num_pieces() <= MAX_PIECES else None

    def _was_given(self, lease_id: str) -> bool:
        """By this coordinator life, or perhaps by an earlier one."""
        parts = _LEASE_ID.fullmatch(lease_id)
        return parts is not None and (int(parts[1]), int(parts[2])) <= (int(self.prefix), self.num_leases)

    def _num_pieces(self) -> int:
        return len(self.returned) + sum(len(lease.ranges) for lease in self.outstanding.values())

    def _is_place(self, wanted: DataRange) -> bool:
        shard = wanted.shard
        return 0 <= shard < len(self.shard_sizes) and 0 <= wanted.start < wanted.stop <= self.shard_sizes[shard]

    def _without(self, wanted: Sequence[DataRange]) -> tuple["DataLedger", DataRange | None]:
        """The ledger without these, given in order; and the first of them that is not free, which ends it."""
        ledger = self
        for last in {data_range.shard: data_range for data_range in wanted if self._is_place(data_range)}.values():
            if (last.epoch, last.stop) > ledger.cursor(last.shard):
                ledger = ledger._move_cursor(last.shard, last.epoch, last.stop)
        free = iter(ledger.returned)
        kept: list[tuple[DataRange, str]] = []
        item: tuple[DataRange, str] | None = next(free, None)
        for want in wanted:
            while item and (item[0].shard, item[0].epoch, item[0].stop) <= (want.shard, want.epoch, want.start):
                kept.append(item)
                item = next(free, None)
            if item is None or not self._is_place(want):
                return self, want
            have, holder = item
            same = (have.shard, have.epoch) == (want.shard, want.epoch)
            if not (same and have.start <= want.start and want.stop <= have.stop):
                return self, want
            if have.start < want.start:
                kept.append((replace(have, stop=want.start), holder))
            item = (replace(have, start=want.stop), holder) if want.stop < have.stop else next(free, None)
        return replace(ledger, returned=(*kept, *([item] if item else []), *free)), None

    def _move_cursor(self, shard: int, epoch: int, position: int) -> "DataLedger":
        """Everything between the shard's cursor and the new place becomes free to lease."""
        size = self.shard_sizes[shard]
        freed: list[tuple[DataRange, str]] = []
        at_epoch, at = self.cursor(shard)
        while (at_epoch, at) < (epoch, position):
            stop = position if at_epoch == epoch else size
            if stop > at:
                freed.append((DataRange(shard, at_epoch, at, stop), ""))
            at_epoch, at = (at_epoch + 1, 0) if at_epoch < epoch else (epoch, position)
        if position == size:
            at_epoch, at = epoch + 1, 0
        cursors = {**self.cursors, shard: (at_epoch, at)}
        return replace(self, cursors=cursors, returned=tuple(sorted([*self.returned, *freed])))

    def settle(self, lease_id: str, fate: Fate) -> "DataLedger":
        """Ends a lease. Any fate but `committed` gives the ranges back. An unknown lease changes nothing."""
        lease = self.outstanding.get(lease_id)
        if lease is None:
            return self
        rest = {key: value for key, value in self.outstanding.items() if key != lease_id}
        back = () if fate == "committed" else tuple((data_range, lease.island) for data_range in lease.ranges)
        return replace(
            self,
            outstanding=rest,
            returned=tuple(sorted([*self.returned, *back])),
            fates={**self.fates, fate: self.fates[fate] + lease.num_tokens},
        )

    def recovered(self, spent: Iterable[DataRange], account: Mapping[str, int]) -> "DataLedger":
        """The ledger after replaying a log: `spent` is all that its records committed, `account` the last one's totals.

        What was outstanding at the last record is unknown to a new coordinator: it has expired until an island that
        still works on it joins again and has its lease adopted. CorruptionError where a place is spent twice.
        """
        ledger = replace(
            self,
            leased=account["leased"],
            fates={**{fate: account[fate] for fate in FATES}, "expired": account["expired"] + account["outstanding"]},
        )
        ledger, twice = ledger._without(sorted(spent))
        if twice is not None:
            raise CorruptionError(
                f"{twice} is committed twice, or no place of its shard",
                where="log",
                remedy="`diloco-ray verify RUN` names the record; restore the log from a copy of the run's folder",
            )
        return ledger
