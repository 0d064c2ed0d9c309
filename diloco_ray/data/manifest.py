"""A folder of prepared data: token shards, the tokenizer, and manifest.json, which is written last and names them all.

    manifest.json                 sealed: its own sha256 inside, and the size and sha256 of every other file
    train-00000.bin, ...          little-endian unsigned tokens, nothing else; train-<group>-00000.bin of several groups
    validation-00000.bin, ...
    tokenizer/                    Hugging Face files
    centres.bin                   of shards=cluster: what a document's features are nearest to is its group

The folder may lie on any fsspec path. This module does not know how tokens are made or used.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from diloco_ray.errors import CorruptionError, DataError, StoreError
from diloco_ray.ids import canonical_json, sha256_hex

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer/"


@dataclass(frozen=True)
class StoredFile:
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Group:
    """Documents that belong together. num_tokens includes one end-of-document token per document; token shards are in
    order and end between documents. Name: "all", a label, or a cluster's."""

    name: str
    num_documents: int = 0
    num_tokens: int = 0
    shards: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Its groups, by number. Validation is one group; so is train, unless the settings make more of it."""

    groups: tuple[Group, ...]

    @property
    def num_documents(self) -> int:
        return sum(group.num_documents for group in self.groups)

    @property
    def num_tokens(self) -> int:
        return sum(group.num_tokens for group in self.groups)

    @property
    def shards(self) -> tuple[str, ...]:
        """Group after group."""
        return tuple(shard for group in self.groups for shard in group.shards)

    @staticmethod
    def from_dict(body: Mapping[str, Any]) -> "Split":
        """The inverse of asdict after JSON. KeyError or TypeError for anything else."""
        return Split(tuple(Group(**{**group, "shards": tuple(group["shards"])}) for group in body["groups"]))


@dataclass(frozen=True)
class Manifest:
    """What was prepared, from what. `settings` is DataSettings.content(); `dtype` is numpy's name, as in "<u2"."""

    settings: Mapping[str, Any]
    corpus: Mapping[str, Any]
    tokenizer_digest: str
    vocab_size: int
    eos_token_id: int
    dtype: str
    splits: Mapping[str, Split]
    files: Mapping[str, StoredFile]

    @property
    def num_tokens(self) -> dict[str, int]:
        return {name: split.num_tokens for name, split in self.splits.items()}

    @property
    def digest(self) -> str:
        """sha256 of the bytes of manifest.json: equal digests mean equal data."""
        return sha256_hex(self.to_bytes())

    def to_bytes(self) -> bytes:
        return seal(asdict(self))

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "Manifest":
        """CorruptionError if the bytes are not those of a manifest; `where` names the file."""
        body = unseal(data, where)
        try:
            body["splits"] = {name: Split.from_dict(split) for name, split in body["splits"].items()}
            body["files"] = {name: StoredFile(**entry) for name, entry in body["files"].items()}
            return Manifest(**body)
        except (KeyError, TypeError) as error:
            remedy = "prepare the data again in a new folder"
            raise CorruptionError(f"manifest of another format: {error}", where=where, remedy=remedy) from error


def seal(body: Mapping[str, Any]) -> bytes:
    """Canonical JSON of the body and of its own sha256, one line."""
    return canonical_json({**body, "sha256": sha256_hex(canonical_json(body))}) + b"\n"


def unseal(data: bytes, where: str) -> dict[str, Any]:
    try:
        body = json.loads(data)
        body.pop("sha256")
        if seal(body) == data:
            return body
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    remedy = "restore the file, or delete the folder and prepare again"
    raise CorruptionError("the file is not what was written", where=where, remedy=remedy)


class PreparedFolder:
    """Named files under one path. Writes are atomic: a name has the whole content or is not there."""

    def __init__(self, url: str):
        try:
            # A listing cache would hide what another process has just written.
            self._fs, self.root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            remedy = "check the address, and that the package for this kind of storage is installed"
            raise StoreError(f"no such storage: {error}", where=url, remedy=remedy) from error
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.url = self.root if self.is_local else self._fs.unstrip_protocol(self.root)

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def local_path(self, name: str) -> Path:
        """Only where is_local."""
        return Path(self.root) / name

    def read(self, name: str) -> bytes | None:
        """None where there is no such file."""
        with self._problems(name):
            try:
                return self._fs.cat_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> StoredFile:
        with self._problems(name):
            if self.is_local:
                _write_local(self.local_path(name), data)
            else:
                self._fs.pipe_file(f"{self.root}/{name}", data)
        return StoredFile(len(data), sha256_hex(data))

    def delete(self, name: str) -> None:
        """Nothing happens where there is no such file."""
        with self._problems(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self.root}/{name}")

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by name."""
        with self._problems(""):
            try:
                found = self._fs.find(self.root, detail=True)
            except FileNotFoundError:
                return {}
        entries = found if isinstance(found, dict) else {}
        return {path[len(self.root) :].lstrip("/"): int(entry["size"] or 0) for path, entry in entries.items()}

    def manifest(self) -> Manifest | None:
        """None where nothing was finished. CorruptionError for a bad seal, a missing file or another size."""
        data = self.read(MANIFEST)
        if data is None:
            return None
        manifest = Manifest.from_bytes(data, self.url_of(MANIFEST))
        sizes = self.sizes()
        for name, entry in manifest.files.items():
            if sizes.get(name) != entry.num_bytes:
                problem = "is missing" if name not in sizes else f"has {sizes[name]} bytes, not {entry.num_bytes}"
                remedy = f"restore the file, or delete {self.url} and prepare again"
                raise CorruptionError(f"{name} {problem}", where=self.url_of(name), remedy=remedy)
        return manifest

    @contextlib.contextmanager
    def _problems(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every storage package has kinds of its own
            remedy = "check that the folder can be reached, read and written, and that there is room"
            raise StoreError(f"{type(error).__name__}: {error}", where=self.url_of(name), remedy=remedy) from error


def open_manifest(folder: PreparedFolder) -> Manifest:
    """DataError where the folder holds no finished data."""
    manifest = folder.manifest()
    if manifest is None:
        raise DataError("no prepared data here", where=folder.url, remedy="prepare it first, or name another folder")
    return manifest


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would shut other users of a shared folder out
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
