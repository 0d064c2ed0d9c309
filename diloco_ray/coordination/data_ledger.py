"""The data ledger: who may train on which sequences, and the fate of every leased token.

    leased = committed + rejected + expired + rewound + outstanding            (invariant I8)

A range that was leased and not committed goes back into the pool and is leased again before any new data, so that a
finished epoch has every range exactly once (I9); its tokens count as leased a second time. An island that comes back
gets the very ranges it held, which makes a repeated round equal to the lost one.

The sequences lie in one data shard or several, each with epochs of its own: island m trains on shard m modulo their
number, and on no other.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from diloco_ray.coordination.messages import DataRange
from diloco_ray.ids import island_number

Fate = str  # "committed" | "rejected" | "expired" | "rewound"
FATES = ("committed", "rejected", "expired", "rewound")


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

    def adopt(self, lease_id: str, island: str, ranges: tuple[DataRange, ...]) -> "DataLedger | None":
        """Takes over a lease of an earlier coordinator life; None if any of its sequences is not free.

        Nor does anyone hold work of another shard than its own, or further ahead than the next epoch: what says so is
        not to move the cursor there.
        """
        if lease_id in self.outstanding:
            return None
        lease = Lease(lease_id, island, ranges, sum(r.num_sequences for r in ranges) * self.tokens_per_sequence)
        ledger = self
        for data_range in ranges:
            own = data_range.shard == self.shard_of(island)
            near = own and data_range.epoch <= ledger.cursor(data_range.shard)[0] + 1
            without = ledger._take_out(data_range) if near else None
            if without is None:
                return None
            ledger = without
        return ledger._hold(lease)

    def _take_out(self, wanted: DataRange) -> "DataLedger | None":
        if not 0 <= wanted.shard < len(self.shard_sizes):
            return None
        if not 0 <= wanted.start < wanted.stop <= self.shard_sizes[wanted.shard]:
            return None
        ledger = self
        if (wanted.epoch, wanted.stop) > ledger.cursor(wanted.shard):
            ledger = ledger._move_cursor(wanted.shard, wanted.epoch, wanted.stop)
        for item in ledger.returned:
            have, holder = item
            same = (have.shard, have.epoch) == (wanted.shard, wanted.epoch)
            if same and have.start <= wanted.start and wanted.stop <= have.stop:
                pieces = (replace(have, stop=wanted.start), replace(have, start=wanted.stop))
                kept = [(piece, holder) for piece in pieces if piece.num_sequences]
                others = [other for other in ledger.returned if other is not item]
                return replace(ledger, returned=tuple(sorted(others + kept)))
        return None

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
        still works on it joins again and has its lease adopted.
        """
        ledger = replace(
            self,
            leased=account["leased"],
            fates={**{fate: account[fate] for fate in FATES}, "expired": account["expired"] + account["outstanding"]},
        )
        for data_range in sorted(spent):
            without = ledger._take_out(data_range)
            if without is None:
                raise ValueError(f"{data_range} is committed twice")
            ledger = without
        return ledger
