"""Verify: the proof, from the stored files alone, that a run is what its log says.

Every seal, digest and link of the chain is checked, every outer step is replayed bit for bit, every snapshot is
compared with the replay at its index, and every number that no replay touches is held against the account. Damage
becomes a problem that names its file; after a damaged record or payload, replay goes on from the next sound snapshot.
What a recipe is, only the caller knows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diloco_ray.algorithm.replica import Replica
from diloco_ray.errors import CorruptionError, DiLoCoError, StoreError
from diloco_ray.ids import sha256_hex
from diloco_ray.log.account import Account, Terms
from diloco_ray.log.record import Record, model_digest, unseal
from diloco_ray.log.run_log import FENCES, RECORDS, Chain, check_sha256, fence_path, numbered, read_ahead, record_path
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import list_snapshots, load_snapshot, manifest_path, read_fragment, read_manifest, replay

RUN_FILE = "run.json"
_NUM_RECORDS_AHEAD, _NUM_PAYLOADS_AHEAD = 32, 3


@dataclass(frozen=True)
class VerifyReport:
    """Records first_replayed .. last_index were replayed (0 when none was); digest: the parameters they end in.

    digest is "" unless the replay reached the last record; tokens are that record's. num_records counts those that are
    there, num_snapshots the complete.
    """

    run_id: str
    num_records: int
    num_outer_steps: int
    num_snapshots: int
    first_replayed: int
    last_index: int
    digest: str
    tokens: dict[str, int]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    store: RunStore,
    replica_factory: Callable[[dict[str, Any]], Replica],
    on_progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Checks the whole run. replica_factory: a new replica, of any content, for the body of run.json.

    on_progress(records replayed, records in all). Never raises for damage; StoreError when the store cannot be listed.
    """
    problems: list[str] = []
    run = _read_run(store, problems)
    # In this order a run that goes on meanwhile is whole: every snapshot has its record, every record its fence.
    snapshots, indices = list_snapshots(store), numbered(store, RECORDS)
    records = _read_records(store, run, indices, _check_fences(store, run, problems), problems)
    walk = _Replay(store, _replicas(store, run, replica_factory, problems), problems)
    walk.check_all(records, snapshots, on_progress)
    sound = [record for record in records.values() if record is not None]
    return VerifyReport(
        run_id=str(run["run_id"]) if run else sound[0].run_id if sound else "",
        num_records=len(records),
        num_outer_steps=sum(record.kind == "outer_step" for record in sound),
        num_snapshots=len(snapshots),
        first_replayed=walk.first_replayed,
        last_index=max(records, default=-1),
        digest=walk.final_digest(),
        tokens=sound[-1].tokens if sound else {},
        problems=tuple(problems),
    )


def _read_run(store: RunStore, problems: list[str]) -> dict[str, Any] | None:
    try:
        run = unseal(store.read(RUN_FILE), store.url_of(RUN_FILE))
    except DiLoCoError as error:
        problems.append(_line(error))
        return None
    if not isinstance(run.get("run_id"), str):
        problems.append(f"{store.url_of(RUN_FILE)}: it has no run_id")
        return None
    return run


def _check_fences(store: RunStore, run: dict[str, Any] | None, problems: list[str]) -> int:
    """The number of fence epochs: 1 .. n without a gap, or a later coordinator would take a lower one."""
    epochs = numbered(store, FENCES)
    problems.extend(_missing(store, fence_path, epochs, 1))
    for epoch in epochs:
        path = fence_path(epoch)
        try:
            body = unseal(store.read(path), store.url_of(path))
        except DiLoCoError as error:
            problems.append(_line(error))
            continue
        if body.get("epoch") != epoch or (run is not None and body.get("run_id") != run["run_id"]):
            problems.append(f"{store.url_of(path)}: it is of epoch {body.get('epoch')} of run {body.get('run_id')}")
    return max(epochs, default=0)


def _missing(store: RunStore, path_of: Callable[[int], str], numbers: Sequence[int], first: int) -> Iterator[str]:
    """One problem for each gap among these, ascending, however wide: a name that is far off costs nothing."""
    for number in numbers:
        if number > first:
            more = f", nor is any of the next {number - first - 1}" if number - first > 1 else ""
            yield f"{store.url_of(path_of(first))}: it is not there{more}, though {path_of(number)} is"
        first = number + 1


def _read_records(
    store: RunStore, run: dict[str, Any] | None, indices: Sequence[int], epochs: int, problems: list[str]
) -> dict[int, Record | None]:
    """Those that are there, None where one is damaged; what they say is checked on the way."""
    if not indices:
        problems.append(f"{store.url_of(RECORDS)}: there is no record")
    problems.extend(_missing(store, record_path, indices, 0))
    paths = [record_path(index) for index in indices]
    chain, account = Chain(), Account(_terms(store, run, problems))
    records: dict[int, Record | None] = {}
    for index, path, data in zip(indices, paths, read_ahead(store, paths, _NUM_RECORDS_AHEAD)):
        where = store.url_of(path)
        if index > chain.num_records:
            chain.skip(index)
            account.complete = False
        try:
            if isinstance(data, StoreError):
                raise data
            record = Record.from_bytes(data, where)
            if record.index != index:
                raise CorruptionError(f"it is record {record.index}", where=where)
        except DiLoCoError as error:
            problems.append(_line(error))
            records[index] = None
            chain.skip(index + 1)
            account.complete = False
            continue
        found = [chain.problem(record), *account.problems(record)]
        if run is not None and record.run_id != run["run_id"]:
            found.append(f"run_id is {record.run_id!r}, that of {RUN_FILE} is {run['run_id']!r}")
        if record.fence_epoch > epochs:
            found.append(f"fence epoch {record.fence_epoch} has no file in {FENCES}")
        problems.extend(f"{where}: {problem}" for problem in found if problem)
        records[index] = record
        chain.advance(record, sha256_hex(data))
    return records


def _terms(store: RunStore, run: dict[str, Any] | None, problems: list[str]) -> Terms | None:
    if run is None:
        return None
    try:
        return Terms.of(run, store.url_of(RUN_FILE))
    except CorruptionError as error:
        problems.append(_line(error))
        return None


def _replicas(
    store: RunStore,
    run: dict[str, Any] | None,
    replica_factory: Callable[[dict[str, Any]], Replica],
    problems: list[str],
) -> tuple[Replica, Replica] | None:
    """One that follows the log and one for what the snapshots hold; None when run.json gives none."""
    if run is None:
        return None
    try:
        return replica_factory(run), replica_factory(run)
    except (DiLoCoError, ValueError, TypeError, KeyError) as error:
        problems.append(f"{store.url_of(RUN_FILE)}: no replica can be built from it: {error!r}")
        return None


class _Replay:
    """The walk along the log with a replica that stands at the last record, or nowhere after damage."""

    def __init__(self, store: RunStore, replicas: tuple[Replica, Replica] | None, problems: list[str]):
        self.store, self.replicas, self.problems = store, replicas, problems
        self.stands = False
        self.first_replayed = 0

    def check_all(
        self,
        records: dict[int, Record | None],
        snapshots: list[int],
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        """Every payload and snapshot in log order."""
        if 0 not in snapshots:
            self.problems.append(f"{self.store.url_of(manifest_path(0))}: the first snapshot is missing")
        steps = [record for record in records.values() if record and record.payload]
        payloads = read_ahead(self.store, [record.payload for record in steps], _NUM_PAYLOADS_AHEAD)
        last = max(records, default=-1)
        indices = sorted({*records, *(index for index in snapshots if index < last)})
        for place, index in enumerate(indices):
            record = records.get(index)
            self.stands = self.stands and indices[place - 1] == index - 1
            self._step(record, next(payloads) if record and record.payload else None)
            if index in snapshots and self.store.exists(manifest_path(index)):  # else pruned meanwhile
                self._compare(index, record)
            if on_progress is not None:
                on_progress(place + 1, len(indices))
        for index in snapshots:
            if index > last:
                self.problems.append(f"{self.store.url_of(manifest_path(index))}: the log ends before it")
        if self.stands and self.replicas is not None:  # a value that is not finite once is never finite again
            state = [self.replicas[0].parameters(p) for p in range(len(self.replicas[0].versions))]
            if not all(bool(parameters.isfinite().all()) for parameters in state):
                where = self.store.url_of(record_path(last))
                self.problems.append(f"{where}: the parameters after it are not finite")

    def final_digest(self) -> str:
        if self.replicas is None or not self.stands:
            return ""
        replica = self.replicas[0]
        return model_digest([replica.digest(fragment.index) for fragment in replica.layout.fragments]).parameters

    def _step(self, record: Record | None, payload: bytes | StoreError | None) -> None:
        """Replays one record where the replica stands right before it; otherwise only the payload is checked."""
        stood, self.stands = self.stands, False
        if record is None or payload is None:
            return
        try:
            if isinstance(payload, StoreError):
                raise payload
            check_sha256(payload, record.payload_sha256, self.store.url_of(record.payload))
            if stood and self.replicas is not None:
                replay(record, payload, self.replicas[0], self.store.url_of(record_path(record.index)))
                self.stands = True
                self.first_replayed = self.first_replayed or record.index
        except DiLoCoError as error:
            self.problems.append(_line(error))

    def _compare(self, index: int, record: Record | None) -> None:
        """A snapshot must be of its record and equal the replay; where there is none, replay goes on from it."""
        where = self.store.url_of(manifest_path(index))
        try:
            if self.replicas is None:
                manifest = read_manifest(self.store, index)
                for fragment in range(len(manifest.versions)):
                    read_fragment(self.store, manifest, fragment)
                found = manifest.record
            else:
                found = load_snapshot(self.store, index, self.replicas[1])
        except DiLoCoError as error:
            self.problems.append(_line(error))
            return
        if record is None:
            return
        if found != record.digest():
            self.problems.append(f"{where}: it is not of record {index} of this log")
            return
        if self.replicas is None:
            return
        replayed, stored = self.replicas
        fragments = [fragment.index for fragment in stored.layout.fragments]
        digests = [stored.digest(fragment) for fragment in fragments]
        own = [model_digest(digests)] if record.kind == "init" else digests[record.fragment : record.fragment + 1]
        if own != [record.state_digest]:
            self.problems.append(f"{where}: the tensors do not have the digest of record {index}")
        elif not self.stands:
            self.replicas, self.stands = (stored, replayed), True
        elif stored.versions != replayed.versions or digests != [replayed.digest(p) for p in fragments]:
            self.problems.append(f"{where}: the tensors differ from the replay of the log")


def _line(error: DiLoCoError) -> str:
    return f"{error.where}: {error.what}"
