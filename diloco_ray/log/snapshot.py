"""Snapshots: the global model at one log index, so that nobody has to replay a run from its beginning.

    snapshots/00000010/fragment-000.safetensors     "parameters" and each optimizer buffer by name, flat float32
    snapshots/00000010/manifest.json                sealed, written last: without it there is no snapshot

A snapshot is a cache of the log: it can be deleted (but the first) and made again. safetensors loads a flipped bit in
silence, so every file's sha256 is in the manifest. An island's own checkpoint is stored here too, as tensors with
sealed metadata. Nothing is ever unpickled.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from diloco_ray.algorithm.replica import Replica, StateDigest
from diloco_ray.errors import ConfigError, CorruptionError, RunMismatchError, StoreError
from diloco_ray.ids import canonical_json, sha256_hex
from diloco_ray.log.record import STRICT, Record, seal, unseal_as
from diloco_ray.log.run_log import RunLog, check_sha256, record_path
from diloco_ray.log.run_store import RunStore

SNAPSHOTS = "snapshots"
DELETE = "delete this snapshot; if it is the first, restore its files from a copy of the run store"
LISTINGS = 8  # by one reader; after so many it takes what is left, at worst the first, which is never pruned


@dataclass(frozen=True)
class Manifest:
    """record: digest of the log record whose state this is. files: sha256 by name. The tuples are per fragment."""

    index: int
    record: str
    versions: tuple[int, ...]
    layout: dict[str, Any]
    files: dict[str, str]
    digests: tuple[StateDigest, ...]

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class _Checkpoint:
    file: str
    file_sha256: str
    meta: dict[str, Any]

    __pydantic_config__ = STRICT


_MANIFEST, _CHECKPOINT = TypeAdapter(Manifest), TypeAdapter(_Checkpoint)


def save_snapshot(store: RunStore, index: int, replica: Replica, record_digest: str) -> None:
    """Stores the replica's state, which must be that after the record of this index and digest."""
    files: dict[str, str] = {}
    for fragment in replica.layout.fragments:
        buffers = zip(replica.optimizer.buffer_names, replica.buffers(fragment.index))
        data = save({"parameters": replica.parameters(fragment.index), **dict(buffers)})
        name = fragment_file(fragment.index)
        store.write(f"{_folder(index)}/{name}", data)
        files[name] = sha256_hex(data)
    digests = tuple(replica.digest(fragment.index) for fragment in replica.layout.fragments)
    manifest = Manifest(index, record_digest, tuple(replica.versions), replica.layout.to_dict(), files, digests)
    store.write(manifest_path(index), seal({**vars(manifest), "digests": [vars(digest) for digest in digests]}))


def list_snapshots(store: RunStore) -> list[int]:
    """Log indices of the complete snapshots, ascending."""
    return [index for index in _folders(store) if store.exists(manifest_path(index))]


def newest_snapshot_at_or_before(store: RunStore, index: int) -> int | None:
    return max((found for found in list_snapshots(store) if found <= index), default=None)


def read_manifest(store: RunStore, index: int) -> Manifest:
    """StoreError when it is missing, CorruptionError when it is damaged."""
    where = store.url_of(manifest_path(index))
    manifest = unseal_as(_MANIFEST, store.read(manifest_path(index)), where)
    if manifest.index != index:
        raise CorruptionError(f"it is of snapshot {manifest.index}", where=where, remedy=DELETE)
    fragments = manifest.layout.get("fragments")
    numbers = {len(manifest.versions), len(manifest.digests), len(manifest.files)}
    if not isinstance(fragments, list) or numbers != {len(cast(list[Any], fragments))}:
        found = f"{len(manifest.versions)} versions, {len(manifest.digests)} digests and {len(manifest.files)} files"
        raise CorruptionError(f"it has {found}, not one for each fragment of its layout", where=where, remedy=DELETE)
    return manifest


def read_fragment(store: RunStore, manifest: Manifest, fragment: int) -> dict[str, Tensor]:
    """One fragment's tensors by name, checked against the manifest; errors as of `read_manifest`."""
    name = fragment_file(fragment)
    path = f"{_folder(manifest.index)}/{name}"
    data = store.read(path)
    check_sha256(data, manifest.files.get(name, ""), store.url_of(path))
    return _tensors(data, store.url_of(path))


def load_snapshot(store: RunStore, index: int, replica: Replica) -> str:
    """Fills the replica and returns the digest of the record that the state belongs to.

    CorruptionError or StoreError names the damaged or missing file, RunMismatchError says that the snapshot is of
    another model or outer optimizer. After an error the replica's content is undefined.
    """
    manifest = read_manifest(store, index)
    where = store.url_of(manifest_path(index))
    if sha256_hex(canonical_json(manifest.layout)) != replica.layout.digest():
        raise RunMismatchError("this snapshot has other tensors or fragments than the model", where=where)
    for fragment, version, digest in zip(replica.layout.fragments, manifest.versions, manifest.digests, strict=True):
        tensors = read_fragment(store, manifest, fragment.index)
        names = ("parameters", *replica.optimizer.buffer_names)
        if set(tensors) != set(names):
            found, wanted = ", ".join(sorted(tensors)), ", ".join(sorted(names))
            raise RunMismatchError(f"fragment {fragment.index} has {found}; the optimizer needs {wanted}", where=where)
        file = store.url_of(f"{_folder(index)}/{fragment_file(fragment.index)}")
        try:
            replica.load_(fragment.index, version, tensors["parameters"], [tensors[name] for name in names[1:]])
        except ValueError as error:
            raise CorruptionError(str(error), where=file, remedy=DELETE) from error
        if replica.digest(fragment.index) != digest:
            raise CorruptionError("the tensors do not have the digest of the manifest", where=file)
    return manifest.record


def load_newest(
    store: RunStore, listed: Callable[[], Sequence[int]], replica: Replica, digest_of: Callable[[int], str]
) -> int:
    """Fills the replica from the newest usable snapshot; returns which. digest_of: of the record of an index.

    listed: which there are now, ascending. It is asked again after each that is of no use: to a slow reader newer ones
    may have come meanwhile, and the older ones of its list are gone. Errors as of `load_snapshot`, of the first tried.
    """
    indices, useless = listed(), set[int]()
    first_error: CorruptionError | StoreError | None = None
    while left := [index for index in indices if index not in useless]:
        index = left[-1]
        try:
            if load_snapshot(store, index, replica) == digest_of(index):
                return index
            what, where = f"the snapshot is not of record {index} of this log", store.url_of(manifest_path(index))
            raise CorruptionError(what, where=where)
        except (CorruptionError, StoreError) as error:  # damaged, or pruned while it was read
            first_error = first_error or error
        useless.add(index)
        if len(useless) < LISTINGS:
            indices = listed()
    raise first_error or StoreError("there is no snapshot", where=store.url_of(SNAPSHOTS))


def prune_snapshots(store: RunStore, keep: int) -> None:
    """Leaves the newest `keep` snapshots and always snapshot 0, from which `verify` replays the whole run.

    Each manifest goes first, so that a snapshot is whole or absent. What an interrupted save or prune left goes too.
    """
    complete = list_snapshots(store)
    kept = {0, *complete[max(0, len(complete) - keep) :]}
    for index in _folders(store):
        if index not in kept and complete and index <= complete[-1]:
            store.delete(manifest_path(index))
            store.delete_folder(_folder(index))


def restore(store: RunStore, log: RunLog, replica: Replica, at: int | None = None) -> int:
    """Brings the replica to record `at` (default: the tail): newest usable snapshot, then replay. Returns the index.

    A damaged snapshot is passed over for an older one. CorruptionError names the file that stops the replay.
    """
    last = log.tail.index if at is None else at
    if not 0 <= last <= log.tail.index:
        remedy = f"choose 0 to {log.tail.index}"
        raise ConfigError(f"the log has no record {last}", where=store.url_of("log"), remedy=remedy)
    index = load_newest(
        store,
        lambda: [index for index in list_snapshots(store) if index <= last],
        replica,
        lambda index: log.records[index].digest(),
    )
    for record, payload in log.steps(index + 1, last + 1):
        replay(record, payload, replica, store.url_of(record_path(record.index)))
    return last


def replay(record: Record, payload: bytes, replica: Replica, where: str) -> None:
    """Applies one record. CorruptionError, naming `where`, if it does not fit or its digests are not reached."""
    if record.codec != replica.downlink.name:
        what = f"record {record.index} is encoded as {record.codec}, this run replays {replica.downlink.name}"
        raise RunMismatchError(what, where=where)
    if not 0 <= record.fragment < len(replica.versions) or replica.versions[record.fragment] + 1 != record.version:
        what = f"record {record.index} is version {record.version} of fragment {record.fragment}"
        raise CorruptionError(f"{what}; the replica stands at versions {replica.versions}", where=where)
    try:
        digest = replica.apply(record.fragment, torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    except ValueError as error:
        raise CorruptionError(f"record {record.index}: {error}", where=where) from error
    if digest != record.state_digest:
        raise CorruptionError(
            f"replaying record {record.index} gave {digest}, not {record.state_digest}",
            where=where,
            remedy="run `diloco-ray verify` on the run; compare this machine's torch version with the coordinator's",
        )


def save_tensors(store: RunStore, path: str, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Replaces the checkpoint `path` by these tensors (any device and dtype) and this JSON.

    <path>-<sha>.safetensors is written first and <path>.json, sealed, names it: a crash at any point leaves the old
    checkpoint or the new one. One writer for a path.
    """
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    folder, stem = PurePosixPath(path).parent, PurePosixPath(path).name
    file = f"{stem}-{sha256_hex(data)[:12]}.safetensors"
    store.write(str(folder / file), data)
    store.write(f"{path}.json", seal(vars(_Checkpoint(file, sha256_hex(data), meta))))
    for name in store.list("" if str(folder) == "." else str(folder)):
        if name != file and re.fullmatch(re.escape(stem) + r"-[0-9a-f]{12}\.safetensors", name):
            store.delete(str(folder / name))


def load_tensors(store: RunStore, path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the metadata. StoreError when missing, CorruptionError when damaged."""
    checkpoint = unseal_as(_CHECKPOINT, store.read(f"{path}.json"), store.url_of(f"{path}.json"))
    file = str(PurePosixPath(path).parent / checkpoint.file)
    data = store.read(file)
    check_sha256(data, checkpoint.file_sha256, store.url_of(file))
    return _tensors(data, store.url_of(file)), checkpoint.meta


def manifest_path(index: int) -> str:
    return f"{_folder(index)}/manifest.json"


def fragment_file(fragment: int) -> str:
    return f"fragment-{fragment:03d}.safetensors"


def _folder(index: int) -> str:
    return f"{SNAPSHOTS}/{index:08d}"


def _folders(store: RunStore) -> list[int]:
    return [int(name) for name in store.list(SNAPSHOTS) if re.fullmatch(r"\d{8}", name)]


def _tensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return load(data)
    except SafetensorError as error:
        raise CorruptionError(f"not a safetensors file: {error}", where=where) from error
