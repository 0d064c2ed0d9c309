"""The run log: the chain of records in a run store. It is the run; every model state is a replay of it.

    log/00000012.json              record 12, sealed, names the sha256 of record 11
    payloads/00000012-<sha>.bin    its encoded outer gradient
    fences/00000003.json           the third coordinator's right to write

One process appends. A commit is: payload object, then create-only record; whoever loses that create must stop.
A crash between the two leaves a payload that no record names, which nobody reads. Tensors are not known here.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from diloco_ray.errors import CorruptionError, FencedError, OvertakenError, StoreError
from diloco_ray.ids import sha256_hex
from diloco_ray.log.record import Record, payload_path, seal
from diloco_ray.log.run_store import Bytes, RunStore

RECORDS, FENCES = "log", "fences"
_NUM_RECORDS_AHEAD = 32  # a record is a few KB and a bucket answers in tens of milliseconds
_NUM_PAYLOADS_AHEAD = 3
MAX_DIGITS = 18  # of a number in a file's name: 8, and more only where somebody else has put a file there


class RunLog:
    """All records of a run, in memory (5 KB each with eight shares), and the one way to add one. Not thread safe."""

    def __init__(self, store: RunStore):
        """An empty log in this store; `open` reads what is there."""
        self.store = store
        self.records: list[Record] = []
        self._chain = Chain()

    @staticmethod
    def open(store: RunStore) -> "RunLog":
        """Reads and checks the whole chain. CorruptionError names the first file that is missing or does not fit."""
        log = RunLog(store)
        num_records = max(numbered(store, RECORDS), default=-1) + 1
        coming = read_ahead(store, map(record_path, range(num_records)), _NUM_RECORDS_AHEAD)
        for path, data in zip(map(record_path, range(num_records)), coming):
            if isinstance(data, StoreError):
                raise data
            record = Record.from_bytes(data, store.url_of(path))
            if problem := log._chain.problem(record):
                raise CorruptionError(problem, where=store.url_of(path), remedy="restore the file from a copy")
            log._add(record, sha256_hex(data))
        return log

    @property
    def tail(self) -> Record:
        """The newest record. StoreError while there is none."""
        if not self.records:
            raise StoreError("the log has no record yet", where=self.store.url_of(RECORDS))
        return self.records[-1]

    @property
    def tail_digest(self) -> str:
        """What the next record has to name as its parent; "" for the first."""
        return self._chain.digest or ""

    def append(self, record: Record, payload: Bytes = b"") -> None:
        """Commits. When it returns, the record is durable; after a StoreError it may be: the same call is made again.

        FencedError: a newer coordinator committed this index; stop. OvertakenError: an older one did; open it anew.
        ValueError: the record does not continue this log.
        """
        problem = self._chain.problem(record)
        if record.payload and sha256_hex(payload) != record.payload_sha256:
            problem = "payload_sha256 is not that of the payload"
        if problem:
            raise ValueError(f"record {record.index} cannot follow this log: {problem}")
        if record.payload:
            self.store.write(record.payload, payload)
        path, data = record_path(record.index), record.to_bytes()
        try:
            self.store.create(path, data)
        except FileExistsError:
            self._check_own_retry(path, data, record.fence_epoch)
        self._add(record, sha256_hex(data))

    def payload(self, record: Record) -> bytes:
        """The record's encoded outer gradient. StoreError when it is missing, CorruptionError when it is damaged."""
        return self._checked(record, self.store.read(record.payload))

    def steps(self, start: int, stop: int) -> Iterator[tuple[Record, bytes]]:
        """Records start .. stop - 1, which must be outer steps, with their payloads; raises as `payload` does."""
        records = self.records[start:stop]
        payloads = read_ahead(self.store, [record.payload for record in records], _NUM_PAYLOADS_AHEAD)
        for record, payload in zip(records, payloads):
            if isinstance(payload, StoreError):
                raise payload
            yield record, self._checked(record, payload)

    def _checked(self, record: Record, payload: bytes) -> bytes:
        check_sha256(payload, record.payload_sha256, self.store.url_of(record.payload))
        return payload

    def check_tail(self, fence_epoch: int) -> None:
        """Raises as `append` would, where somebody has committed what comes next."""
        path = record_path(self.tail.index + 1)
        stored = self.store.read_if_there(path)
        if stored is not None:
            self._give_way(path, stored, fence_epoch)

    def _check_own_retry(self, path: str, data: bytes, fence_epoch: int) -> None:
        """A put whose answer was lost is found again by its retry, and equal bytes are the same commit."""
        stored = self.store.read(path)
        if stored != data:
            self._give_way(path, stored, fence_epoch)

    def _give_way(self, path: str, stored: bytes, fence_epoch: int) -> None:
        where = self.store.url_of(path)
        winner = Record.from_bytes(stored, where)
        kind = FencedError if winner.fence_epoch > fence_epoch else OvertakenError
        raise kind(
            f"record {winner.index} was committed by the coordinator of fence epoch {winner.fence_epoch} "
            f"of run {winner.run_id}",
            where=where,
            remedy="let the other coordinator go on, or stop it and give the same command again",
        )

    def _add(self, record: Record, digest: str) -> None:
        self.records.append(record)
        self._chain.advance(record, digest)


class Chain:
    """What the next record has to be, given those before it: the one rule for append, open and verify."""

    def __init__(self):
        self.num_records = 0
        self.digest: str | None = ""  # of the last record; None when that one is damaged
        self._last: Record | None = None
        self._versions: dict[int, int] = {}
        self._whole = True

    def problem(self, record: Record) -> str:
        """How the record breaks the chain; "" if it does not."""
        first = self.num_records == 0
        wanted: dict[str, object] = {
            "index": self.num_records,
            "kind": "init" if first else "outer_step",
            "payload": "" if first else payload_path(record.index, record.payload_sha256),
        }
        version = self._versions.get(record.fragment, 0 if self._whole else None)
        if version is not None:
            wanted["version"] = 0 if first else version + 1
        if self.digest is not None:
            wanted["parent"] = self.digest
        if self._last is not None:
            wanted["run_id"] = self._last.run_id
        found = {name: getattr(record, name) for name in wanted}
        wrong = [f"{name} is {found[name]!r}, not {value!r}" for name, value in wanted.items() if found[name] != value]
        if self._last is not None and record.fence_epoch < self._last.fence_epoch:
            wrong.append(f"fence epoch falls from {self._last.fence_epoch} to {record.fence_epoch}")
        return "; ".join(wrong)

    def advance(self, record: Record, digest: str) -> None:
        self.num_records += 1
        self._last, self.digest = record, digest
        self._versions[record.fragment] = record.version

    def skip(self, index: int) -> None:
        """On to this index, past records that are damaged or missing, of which nothing is known."""
        self.num_records = index
        self.digest, self._versions, self._whole = None, {}, False


def check_fence(store: RunStore, epoch: int) -> None:
    """FencedError once a newer coordinator has taken a fence. Between this look and a commit, the create decides."""
    epochs = numbered(store, FENCES)
    if epoch not in epochs:
        raise StoreError(
            f"the fence of epoch {epoch} is gone: somebody has deleted or replaced the run's folder",
            where=store.url_of(FENCES),
            remedy="restore the folder from a copy; a folder that lacks what it had is not written to",
        )
    newest = max(epochs)
    if newest > epoch:
        raise FencedError(
            f"a newer coordinator (fence epoch {newest}) writes this run; this one has {epoch}",
            where=store.url,
            remedy="let the newer one go on; this one can simply end",
        )


def take_fence(store: RunStore, run_id: str, holder: str, above: int = 0) -> int:
    """A fence epoch above all before it, for one coordinator life. holder: who it is, for people.

    CorruptionError where a file that no coordinator wrote leaves no number above it.
    """
    epoch = above
    while True:
        # A name already taken is passed over even by a store whose listing lags.
        epoch = max([epoch, *numbered(store, FENCES)]) + 1
        if len(str(epoch)) > MAX_DIGITS:
            raise CorruptionError(
                "no run has had so many coordinators, and there is no number above it",
                where=store.url_of(fence_path(epoch - 1)),
                remedy="delete this file: no coordinator has written it",
            )
        try:
            store.create(fence_path(epoch), seal({"epoch": epoch, "run_id": run_id, "holder": holder}))
        except FileExistsError:
            continue
        return epoch


def record_path(index: int) -> str:
    return f"{RECORDS}/{index:08d}.json"


def fence_path(epoch: int) -> str:
    return f"{FENCES}/{epoch:08d}.json"


def numbered(store: RunStore, folder: str) -> list[int]:
    """The numbers of the sealed files in a folder, ascending; other files are ignored."""
    found = [re.fullmatch(rf"([0-9]{{8}}|[1-9][0-9]{{8,{MAX_DIGITS - 1}}})\.json", name) for name in store.list(folder)]
    return sorted(int(match[1]) for match in found if match)


def check_sha256(data: bytes, sha256: str, where: str) -> None:
    """CorruptionError, naming `where`, unless the data has this digest."""
    if sha256_hex(data) != sha256:
        raise CorruptionError(
            f"its {len(data)} bytes have sha256 {sha256_hex(data)[:12]}.., not {sha256[:12]}..",
            where=where,
            remedy="restore the file from a copy of the run store",
        )


def read_ahead(store: RunStore, paths: Iterable[str], num_ahead: int) -> Iterator[bytes | StoreError]:
    """The files in this order, the next num_ahead of them on their way; an error stands in the place of its file."""

    def read(path: str) -> bytes | StoreError:
        try:
            return store.read(path)
        except StoreError as error:
            return error

    if not store.reads_ahead:
        yield from map(read, paths)
        return
    pool = ThreadPoolExecutor(num_ahead)
    coming: deque[Future[bytes | StoreError]] = deque()
    try:
        for path in paths:
            coming.append(pool.submit(read, path))
            if len(coming) > num_ahead:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        # Without a wait: the garbage collector may be what ends this, in a thread that holds a lock of `threading`.
        pool.shutdown(wait=False, cancel_futures=True)
