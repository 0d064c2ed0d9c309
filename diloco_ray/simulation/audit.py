"""The auditor: sees every payload that is sent and every file that is written, and holds the run to its invariants.

Numbers are those of the design: I1 announced records last; I2 one commit per contribution; I3 what is accepted outlives
its island; I4 a chain without gaps; I5 fences do not fall, and who is fenced does not write; I6 a serial replay of the
contributions themselves, each with the weight that its lease gives it, gives the same bits; I7 no island's replica is
another one; I8 every leased token has one fate, and until then a holder; I9 no range twice in an epoch, none lost; I10
finite, and no longer than what was usual or is possible; I12 a contribution is measured from what the log says its base
is. I11 and I16 are the world's, but for this: a process ends by an error only where something went wrong with it.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import takewhile, zip_longest

import torch

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.outer_gradient import inspect_payload
from diloco_ray.algorithm.replica import Replica
from diloco_ray.coordination.data_ledger import DataLedger, Lease
from diloco_ray.coordination.messages import Contribution, DataRange, Share
from diloco_ray.coordination.state import Key, RunState
from diloco_ray.coordinator.job import CoordinatorJob
from diloco_ray.errors import CorruptionError, DeadlineError, DiLoCoError, FencedError, OvertakenError, StoreError
from diloco_ray.ids import sha256_hex
from diloco_ray.log.record import Record
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import load_snapshot
from diloco_ray.simulation.storage import IOCall
from diloco_ray.transport.protocol import Bytes


class BrokenInvariantError(BaseException):
    """What must never be. No handler of the product takes it for an error of its storage or its line."""


class Audit:
    """begun: a store with the run's beginning in it."""

    def __init__(self, job: CoordinatorJob, begun: RunStore):
        self._rules, self._combine = job.rules, job.outer.combine_function
        self._shard_sizes, self._sequence_length = job.shard_sizes, job.sequence_length
        self._uplink = get_codec(job.rules.uplink)
        self._replica = Replica(job.layout, job.outer.build(), get_codec(job.downlink))
        load_snapshot(begun, 0, self._replica)
        sizes = [fragment.num_values for fragment in job.layout.fragments]
        self._residuals = [torch.zeros(size) for size in sizes] if job.downlink_error_feedback else []
        self._bases = {(p, 0): self._replica.parameters(p).clone() for p in range(len(sizes))}
        self._sent: dict[str, Bytes] = {}
        self._claims: defaultdict[tuple[Key, str], set[tuple[str, int]]] = defaultdict(set)  # lease, steps, as sent
        self._leases: dict[str, Lease] = {}  # all that were ever outstanding
        self._longest: defaultdict[int, float] = defaultdict(float)  # norm accepted so far, by fragment
        self._committed_tokens = 0
        self._records: dict[int, Record] = {}
        self._keys: set[tuple[int, int, str]] = set()
        self._spent: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)  # by data shard: epoch and sequence
        self._fence_epoch = self._tail = self._tail_epoch = 0
        self._tail_sha256 = sha256_hex(begun.read("log/00000000.json"))
        self._ledger: DataLedger | None = None
        self._held: tuple[object, ...] = ()  # ledger, plans and inbox of the last look
        self._whole: dict[str, Key] = {}  # leases whose contributions are accepted to their end, by the last look
        self._whole_epoch = 0
        self.storage_had_trouble = False
        self.num_steps = 0

    def require(self, holds: bool, invariant: str, what: str) -> None:
        if not holds:
            raise BrokenInvariantError(f"{invariant}: {what}")

    # ---- islands ----

    def sent(self, contribution: Contribution, payload: Bytes) -> None:
        self._sent[sha256_hex(payload.data)] = payload.copy()
        c = contribution
        self._claims[c.key, c.payload_sha256].add((c.lease_id, c.inner_steps))

    def measured_from(self, fragment: int, version: int, base: torch.Tensor, name: str) -> None:
        """An island measures from these values and calls them this version (I12)."""
        known = self._bases.get((fragment, version))
        self.require(known is not None, "I12", f"{name} is at version {version} of fragment {fragment}, which is not")
        same = known is not None and torch.equal(known, base)
        self.require(same, "I12", f"the base of {name} is not version {version} of fragment {fragment}")

    # ---- processes ----

    def may_end(self, who: str, error: DiLoCoError) -> None:
        """A name that is another's, a peer away for too long, a storage in trouble: nothing else ends a process. Least
        of all a replica that finds itself unlike the record (I7): here nobody damages what is stored."""
        is_storage = isinstance(error, StoreError) and self.storage_had_trouble
        legitimate = is_storage or isinstance(error, FencedError | OvertakenError | DeadlineError)
        invariant = "I7" if isinstance(error, CorruptionError) else "I16"
        self.require(legitimate, invariant, f"{who} ended with {type(error).__name__}: {error.what}")

    # ---- storage ----

    def stored(self, call: IOCall, step_began_fenced: bool) -> None:
        """A storage call has happened. step_began_fenced: its writer was fenced when it began this outer step."""
        if (call.act, call.moment) != ("create", "after"):
            return
        if call.path.startswith("fences/"):
            self._fence_epoch = max(self._fence_epoch, int(call.path[7:15]))
        elif call.path.startswith("log/"):
            self._committed(bytes(call.data), call.path)
            self.require(not step_began_fenced, "I5", f"{call.path} was written by a coordinator that was fenced")

    @property
    def fence_epoch(self) -> int:
        """The newest that is taken."""
        return self._fence_epoch

    def _committed(self, data: bytes, path: str) -> None:
        record = Record.from_bytes(data, path)
        p, require = record.fragment, self.require
        require(record.index == self._tail + 1, "I4", f"record {record.index} follows {self._tail}")
        require(record.parent == self._tail_sha256, "I4", f"record {record.index} names another parent")
        require(record.version == self._replica.versions[p] + 1, "I4", f"version {record.version} of fragment {p}")
        require(record.fence_epoch <= self._fence_epoch, "I5", f"fence epoch {record.fence_epoch} was never taken")
        require(bool(record.shares), "I6", f"record {record.index} is a step that nobody contributed to")
        names = [(share.island, share.round) for share in record.shares]
        require(names == sorted(names), "I6", f"record {record.index}: its shares are not in island order")
        for share in record.shares:
            key = (p, share.round, share.island)
            require(key not in self._keys, "I2", f"{key} is committed twice")
            self._keys.add(key)
            lag = record.version - 1 - share.base_version
            in_time = share.round == record.version - 1 if self._rules.in_step else lag <= self._rules.max_staleness
            require(lag >= 0 and in_time, "I12", f"record {record.index} took in a stale contribution, {key}")
            if self._rules.in_step:
                allowed = 1 if self._rules.overlap >= self._rules.inner_steps_per_round else 0
                require(lag <= allowed, "I12", f"record {record.index}: {key} was measured {lag} outer steps ago")
            self._check_weight(record, share)
            self._spend(record.index, share.spent)
        self._replay(record)
        self._check_account(record.tokens, f"record {record.index}")
        self._committed_tokens += sum(share.tokens for share in record.shares)
        told, counted = record.tokens["committed"], self._committed_tokens
        require(told == counted, "I8", f"record {record.index}: committed {told}, by all shares {counted}")
        self._records[record.index] = record
        self._tail, self._tail_sha256, self._tail_epoch = record.index, sha256_hex(data), record.fence_epoch
        self.num_steps += 1

    def _check_weight(self, record: Record, share: Share) -> None:
        """By the lease that the contribution was sent under, never by what its island says of itself."""
        key, closes = (record.fragment, share.round, share.island), record.fragment == self._rules.num_fragments - 1
        claims = self._claims[key, share.payload_sha256]
        fitting = [(lease, steps) for lease_id, steps in claims if (lease := self._leases.get(lease_id))]
        weights = [self._weight(lease, steps) for lease, steps in fitting]
        right = any(math.isclose(share.weight, weight, rel_tol=1e-9) for weight in weights)
        wanted = " or ".join(f"{weight:g}" for weight in weights) or "none"
        self.require(right, "I6", f"record {record.index}: {key} weighs {share.weight:g}, by its lease {wanted}")
        spent = [lease.ranges if closes else () for lease, _ in fitting]
        tokens = self._num_tokens(share.spent)
        right = share.spent in spent and share.tokens == tokens
        self.require(right, "I8", f"record {record.index}: {key} spends {share.tokens} tokens, its lease has {tokens}")

    def _weight(self, lease: Lease, claimed_steps: int) -> float:
        tokens, rules = self._num_tokens(lease.ranges), self._rules
        given_steps = tokens // (rules.sequences_per_inner_step * self._sequence_length)
        steps = min(max(1, claimed_steps), given_steps)
        match rules.weighting:
            case "uniform":
                return 1.0
            case "tokens":
                return tokens
            case "tokens_squared_per_step":
                return (tokens * steps / given_steps) ** 2 / steps
            case "examples":
                return self._shard_sizes[lease.ranges[0].shard]

    def _num_tokens(self, ranges: tuple[DataRange, ...]) -> int:
        return sum(r.num_sequences for r in ranges) * self._sequence_length

    def _spend(self, index: int, ranges: tuple[DataRange, ...]) -> None:
        for r in ranges:
            places = {(r.epoch, place) for place in range(r.start, r.stop)}
            twice = places & self._spent[r.shard]
            self.require(not twice, "I9", f"record {index} spends sequences {sorted(twice)[:3]} once more")
            self._spent[r.shard] |= places

    def _replay(self, record: Record) -> None:
        """From what the islands sent, by another replica, in island order (I6)."""
        for share in record.shares:
            self.require(share.payload_sha256 in self._sent, "I6", f"record {record.index}: a payload nobody sent")
        payloads = [torch.from_numpy(self._sent[share.payload_sha256]) for share in record.shares]
        p, weights = record.fragment, [share.weight for share in record.shares]
        for share, payload in zip(record.shares, payloads):
            norm = inspect_payload(payload, self._replica.parameters(p).numel(), self._uplink)
            self.require(share.norm == norm, "I10", f"record {record.index}: norm {share.norm:g} of one of {norm:g}")
        residual = self._residuals[p] if self._residuals else None
        combined, digest = self._replica.outer_step(p, payloads, weights, self._uplink, self._combine, residual)
        same = sha256_hex(combined.numpy().data) == record.payload_sha256 and digest == record.state_digest
        self.require(same, "I6", f"record {record.index}: a serial replay of its contributions gives other bits")
        finite = bool(self._replica.parameters(p).isfinite().all())
        self.require(finite, "I10", f"record {record.index}: the parameters are not finite")
        self._bases[p, record.version] = self._replica.parameters(p).clone()

    # ---- coordinators ----

    def announced(self, record: Record) -> None:
        self.require(record.index <= self._tail, "I1", f"record {record.index} is announced and not in the log")
        same = self._records[record.index] == record
        self.require(same, "I1", f"record {record.index} is announced, and the log has another one")

    def looked_at(self, state: RunState, fence_epoch: int) -> None:
        """The state of a coordinator that is not fenced. One that an older coordinator has overtaken does not know yet
        what that one has spent; it stops at its next commit."""
        self.require(state.index <= self._tail, "I1", f"the state is at record {state.index} of {self._tail}")
        self._check_kept(state, fence_epoch)
        held = (state.ledger, state.plans, state.inbox)
        if any(now is not before for now, before in zip_longest(held, self._held)):
            self._check_held(state)
        self._held = held
        is_overtaken = state.index < self._tail and self._tail_epoch < fence_epoch
        if state.ledger is self._ledger or is_overtaken:
            return
        self._ledger = state.ledger
        self._check_account(state.ledger.account(), "the ledger")
        closing = state.stepping.get(state.closing_fragment, ())
        self._check_places(state.ledger, {r for key in closing for r in state.inbox[key].lease.ranges})

    def _check_kept(self, state: RunState, fence_epoch: int) -> None:
        """What is accepted to its end waits for its outer step, or is in it, while its coordinator lives (I3): but for
        what has overtaken an earlier contribution of its island, which goes with that one."""
        if fence_epoch == self._whole_epoch:
            for lease_id, key in self._whole.items():
                in_a_step = key in state.stepping.get(key[0], ()) or key in self._keys
                kept = in_a_step or lease_id in state.ledger.outstanding
                self.require(kept, "I3", f"{key} was accepted, and is neither waiting nor in an outer step")
        plans = [plan for plans in state.plans.values() for plan in takewhile(state.is_whole, plans)]
        self._whole = {plan.lease_id: (state.closing_fragment, plan.round, plan.island) for plan in plans}
        self._whole_epoch = fence_epoch

    def _check_held(self, state: RunState) -> None:
        """What is leased is in the hands of an island that is here, or in the inbox: nothing else would settle it (I8).
        What is accepted is no longer than so many times the longest before it, or than inner steps go (I10)."""
        holders = {plan.lease_id for name in state.alive for plan in state.plans.get(name, ())}
        holders |= {item.contribution.lease_id for item in state.inbox.values()}
        left = state.ledger.outstanding.keys() - holders
        self.require(not left, "I8", f"leases {sorted(left)[:3]} are outstanding, and nobody holds them")
        self._leases.update(state.ledger.outstanding)
        rules = self._rules
        for key, item in state.inbox.items():
            p, norm = key[0], item.norm or 0.0
            if norm > self._longest[p]:
                steps = max(1.0, item.inner_steps / rules.inner_steps_per_round)
                most = max(rules.max_norm_ratio * self._longest[p], steps * rules.longest[p]) or math.inf
                self.require(norm <= most, "I10", f"{key} is accepted with a norm of {norm:g}, of {most:g} at most")
                self._longest[p] = norm

    def _check_account(self, account: Mapping[str, int], where: str) -> None:
        fates = sum(count for name, count in account.items() if name != "leased")
        self.require(account["leased"] == fates, "I8", f"{where}: leased {account['leased']}, with a fate {fates}")

    def _check_places(self, ledger: DataLedger, in_a_step: set[DataRange]) -> None:
        """Every sequence before the cursor is spent, being spent, leased or free: exactly one of them (I9)."""
        held = [r for lease in ledger.outstanding.values() for r in lease.ranges]
        for shard, size in enumerate(ledger.shard_sizes):
            epoch, position = ledger.cursor(shard)
            places: list[tuple[int, int]] = []
            for r in [*held, *(r for r, _ in ledger.returned)]:
                places += [(r.epoch, place) for place in range(r.start, r.stop)] if r.shard == shard else []
            known = set(places)
            self.require(len(known) == len(places), "I9", f"data shard {shard}: a sequence is leased or free twice")
            being = {(r.epoch, x) for r in in_a_step if r.shard == shard for x in range(r.start, r.stop)}
            spent = self._spent[shard] | being
            doubled = known & spent
            self.require(not doubled, "I9", f"data shard {shard}: {sorted(doubled)[:3]} spent and to be spent again")
            lost = epoch * size + position - len(known | spent)
            self.require(lost == 0, "I9", f"data shard {shard}: {lost} sequences are neither spent, leased nor free")

    @property
    def num_contributions(self) -> int:
        return len(self._keys)
