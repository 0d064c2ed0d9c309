"""The account: what the numbers of a record must be, given those before it and what its run counts in.

A seal and a replay prove bytes and parameters. Who was in a step, which data it was made of, how many rounds are whole
and where every token went are numbers that no replay touches: a later coordinator begins from them all the same.
Tensors, payloads and files are not known here.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AliasPath, BaseModel, ConfigDict, Field, TypeAdapter

from diloco_ray.coordination.messages import DataRange, Share
from diloco_ray.coordination.settings import Closes
from diloco_ray.ids import island_number
from diloco_ray.log.record import Record, checked

_FATES = ("committed", "rejected", "expired", "rewound", "outstanding")
_NEVER_FALLS = ("leased", "committed", "rejected", "expired", "rewound")
_Positive = Annotated[int, Field(ge=1)]


class Terms(BaseModel):
    """What a run counts in: the fields of its run.json that no resumed run may change."""

    model_config = ConfigDict(strict=True, frozen=True)

    shard_sizes: Annotated[tuple[_Positive, ...], Field(min_length=1)]  # sequences in one epoch of each data shard
    fragments: Annotated[tuple[Any, ...], Field(min_length=1, validation_alias=AliasPath("layout", "fragments"))]
    tokens_per_sequence: _Positive = Field(validation_alias=AliasPath("config", "data", "sequence_length"))
    steps_per_round: _Positive = Field(validation_alias=AliasPath("config", "inner", "steps_per_round"))
    sequences_per_step: _Positive = Field(validation_alias=AliasPath("config", "inner", "batch_size"))
    closes: Closes = Field(validation_alias=AliasPath("config", "sync", "closes"))

    @staticmethod
    def of(run: dict[str, Any], where: str) -> "Terms":
        """Of the body of run.json. CorruptionError, naming `where`, when it does not have them."""
        remedy = "restore the file from a copy of the run store"
        return checked(_TERMS, run, where, "not what its records count in", remedy)

    @property
    def in_step(self) -> bool:
        return self.closes == "all"

    @property
    def tokens_per_round(self) -> int:
        """Of one island."""
        return self.steps_per_round * self.sequences_per_step * self.tokens_per_sequence

    @property
    def num_fragments(self) -> int:
        return len(self.fragments)


_TERMS = TypeAdapter(Terms)


@dataclass
class _Islands:
    """How many islands a coordinator life may have had, where rounds are counted by their tokens:

        round = min(num_rounds, committed // (islands * tokens_per_round))

    Their number may differ from life to life, and so may num_rounds, which only the last record of a life reaches.
    """

    round: int = 0
    least: int = 1
    most: int | None = None
    least_if_not_last: int = 1

    def problems(self, record: Record, terms: Terms) -> Iterator[str]:
        committed, each = record.tokens.get("committed", 0), terms.tokens_per_round
        if record.round < self.round:
            yield f"round is {record.round}, and was {self.round} before"
            return
        self.round = record.round
        self.least = max(self.least, self.least_if_not_last)
        self.least_if_not_last = committed // ((record.round + 1) * each) + 1
        if record.round:
            most = committed // (record.round * each)
            self.most = most if self.most is None else min(self.most, most)
        if self.most is not None and self.most < self.least:
            yield (
                f"round is {record.round}: with {committed} tokens committed, {each} by each island in a round, "
                f"no number of islands makes that of it, and of the records before it"
            )
            self.least, self.most, self.least_if_not_last = 1, None, 1


@dataclass
class Account:
    """Where tokens and data ranges went, record by record (invariants I2, I6, I8, I9); without terms less is known."""

    terms: Terms | None
    complete: bool = True  # no record was skipped
    committed: int = 0
    spent: defaultdict[tuple[int, int], list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    keys: dict[tuple[int, int, str], int] = field(default_factory=dict[tuple[int, int, str], int])
    versions: dict[int, int] = field(default_factory=dict[int, int])
    last: Record | None = None
    leased_before: int = 0  # by the coordinator lives before the present one
    islands: _Islands = field(default_factory=_Islands)

    def problems(self, record: Record) -> Iterator[str]:
        if self.last is not None and self.last.fence_epoch != record.fence_epoch:
            self.leased_before, self.islands = self.last.tokens.get("leased", 0), _Islands()
        yield from self._of_tokens(record)
        yield from self._of_life(record)
        for share in record.shares:
            yield from self._of_share(record, share)
        if self.complete and record.tokens.get("committed") != self.committed:
            yield f"{record.tokens.get('committed')} tokens committed, but the shares so far add up to {self.committed}"
        self.versions[record.fragment] = record.version
        if self.terms is not None:
            yield from self._of_round(record, self.terms)
        self.last = record

    def _of_tokens(self, record: Record) -> Iterator[str]:
        tokens, before = record.tokens, self.last.tokens if self.last else {}
        if set(tokens) != {"leased", *_FATES}:
            yield f"tokens has {', '.join(sorted(tokens))}"
        elif tokens["leased"] != sum(tokens[fate] for fate in _FATES):
            parts = " + ".join(f"{tokens[fate]} {fate}" for fate in _FATES)
            yield f"{tokens['leased']} tokens leased are not {parts}"
        for name, count in tokens.items():
            if count < 0:
                yield f"{count} tokens {name}"
            elif name in _NEVER_FALLS and count < before.get(name, 0):
                yield f"tokens {name} fall from {before[name]} to {count}"

    def _of_life(self, record: Record) -> Iterator[str]:
        """What a record of its kind always has."""
        first = record.kind == "init"
        if record.fence_epoch < (0 if first else 1):
            yield f"fence epoch {record.fence_epoch} is nobody's"
        if first == bool(record.shares):
            yield "the run begins with shares" if first else "an outer step that nobody has a share in"
        names = [(share.island, share.round) for share in record.shares]
        if names != sorted(names):
            yield "the shares are not in island order"

    def _of_share(self, record: Record, share: Share) -> Iterator[str]:
        self.committed += share.tokens
        key = (record.fragment, share.round, share.island)
        if (earlier := self.keys.setdefault(key, record.index)) != record.index or share.base_version >= record.version:
            yield (
                f"{share.island} in its round {share.round + 1} on version {share.base_version} of fragment "
                f"{record.fragment}: committed before in record {earlier}, or from a base that was still to come"
            )
        least = {"incarnation": 1, "round": 0, "base_version": 0, "tokens": 0, "norm": 0}
        for name, at_least in least.items():
            if not getattr(share, name) >= at_least:
                yield f"{share.island} has {name} {getattr(share, name)}"
        if not share.weight > 0:
            yield f"{share.island} has weight {share.weight}"
        if self.terms is not None:
            yield from self._of_data(record, share, self.terms)
        for piece in share.spent:
            if not 0 <= piece.start < piece.stop:
                yield f"{share.island} spent sequences {piece.start}..{piece.stop}"
                continue
            taken = self.spent[piece.shard, piece.epoch]
            place = bisect_left(taken, (piece.start, piece.stop, -1))
            for start, stop, index in taken[max(0, place - 1) : place + 1]:
                if start < piece.stop and piece.start < stop:
                    yield (
                        f"sequences {piece.start}..{piece.stop} of epoch {piece.epoch} of shard {piece.shard} "
                        f"({share.island}) overlap {start}..{stop} of record {index}"
                    )
            insort(taken, (piece.start, piece.stop, record.index))

    def _of_data(self, record: Record, share: Share, terms: Terms) -> Iterator[str]:
        """A lease is spent whole, however much of its work was done, and with the last fragment of its round."""
        num_sequences = sum(piece.num_sequences for piece in share.spent)
        if share.tokens != num_sequences * terms.tokens_per_sequence:
            each = f"{num_sequences} sequences of {terms.tokens_per_sequence}"
            yield f"{share.island} has {share.tokens} tokens, but spent {each}"
        closing = record.fragment == terms.num_fragments - 1
        if closing != bool(share.spent):
            what = "no data, but fragment {} closes a round" if closing else "data, but fragment {} closes no round"
            yield f"{share.island} spent {what.format(record.fragment)}"
        shard = island_number(share.island) % len(terms.shard_sizes)
        size = terms.shard_sizes[shard]
        for piece in share.spent:
            where = f"{piece.start}..{piece.stop} of epoch {piece.epoch} of shard {piece.shard}"
            if piece.shard != shard or piece.stop > size or piece.epoch < 0:
                yield f"{share.island} spent sequences {where}, but trains on the {size} of shard {shard}"
            elif piece.epoch * size + piece.stop > self._reach(record, piece, size):
                yield f"{share.island} spent sequences {where}, which were not leased out yet"

    def _reach(self, record: Record, piece: DataRange, size: int) -> int:
        """How far leases can have come in a shard. New ones are given without a gap; one that outlived its coordinator
        can be taken up with a gap of less than two epochs before each of its ranges, and so can a false claim."""
        leased = record.tokens.get("leased", 0)
        taken_up = leased - self.leased_before if record.fence_epoch > 1 else 0
        per_sequence = self.terms.tokens_per_sequence if self.terms else 1
        return leased // per_sequence + 2 * size * (1 + max(0, taken_up) // per_sequence)

    def _of_round(self, record: Record, terms: Terms) -> Iterator[str]:
        """How many rounds are whole: by versions where islands go in step, else by the tokens committed."""
        if not terms.in_step:
            yield from self.islands.problems(record, terms)
            return
        whole = min(self.versions.get(fragment, 0) for fragment in range(terms.num_fragments))
        if self.complete and record.round != whole:
            yield f"round is {record.round}, but {whole} are whole with it"
        for share in record.shares:
            if share.round != record.version - 1:
                yield f"{share.island} in its round {share.round + 1} is in the step of round {record.version}"
