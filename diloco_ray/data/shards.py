"""Prepared tokens, read: sequence i of a split is tokens i*T .. (i+1)*T - 1 of its shards laid end to end.

Local shards are mapped into memory; those elsewhere are copied once into a cache folder. A shard's sha256 is checked
when it is first touched. This module does not know in which order sequences are trained on.
"""

from pathlib import Path

import numpy as np

from diloco_ray.data.manifest import TOKENIZER, Manifest, PreparedFolder, open_manifest
from diloco_ray.errors import CorruptionError, DataError
from diloco_ray.ids import sha256_hex


class TokenShards:
    """One prepared folder, at hand locally."""

    def __init__(self, manifest: Manifest, folder: Path):
        self.manifest = manifest
        self.tokenizer_path = folder / TOKENIZER.rstrip("/")
        self._folder = folder

    @staticmethod
    def open(path: str, *, cache: str = "~/.cache/diloco_ray/data") -> "TokenShards":
        """DataError where nothing was prepared; CorruptionError naming a file that is not as the manifest says.

        Where path is not local, its files are copied under `cache`, in a folder named after the manifest's digest.
        """
        folder = PreparedFolder(path)
        manifest = open_manifest(folder)
        if folder.is_local:
            return TokenShards(manifest, Path(folder.root))
        local = PreparedFolder(f"{cache}/{manifest.digest[:16]}")
        _copy(folder, local, manifest)
        return TokenShards(manifest, Path(local.root))

    def split(self, name: str) -> "TokenSplit":
        """name: train or validation."""
        return TokenSplit(name, self.manifest, self._folder)


class TokenSplit:
    """The shards of one split. Not shared between threads."""

    def __init__(self, name: str, manifest: Manifest, folder: Path):
        self.name = name
        self.num_tokens = manifest.splits[name].num_tokens
        self._paths = [folder / shard for shard in manifest.splits[name].shards]
        self._entries = [manifest.files[path.name] for path in self._paths]
        self._dtype = np.dtype(manifest.dtype)
        sizes = [entry.num_bytes // self._dtype.itemsize for entry in self._entries]
        self._starts = np.cumsum([0, *sizes])
        self._open: dict[int, np.ndarray] = {}

    def num_sequences(self, sequence_length: int) -> int:
        """Whole sequences; the tail is dropped. DataError where there is not even one."""
        number = self.num_tokens // sequence_length
        if not number:
            what = f"the {self.name} part has {self.num_tokens} tokens, fewer than one sequence of {sequence_length}"
            remedy = "choose a shorter data.sequence_length, a larger data.validation_fraction, or more text"
            raise DataError(what, where="data.sequence_length", remedy=remedy)
        return number

    def sequences(self, indices: np.ndarray, sequence_length: int) -> np.ndarray:
        """(B, T) int64, the caller's own. IndexError for a number outside 0 .. num_sequences - 1."""
        number = self.num_sequences(sequence_length)
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= number):
            raise IndexError(f"sequences {indices.min()}..{indices.max()} of {number} in {self.name}")
        tokens_BT = np.empty((len(indices), sequence_length), np.int64)
        for row, index in zip(tokens_BT, indices.tolist()):
            self._read(index * sequence_length, row)
        return tokens_BT

    def _read(self, start: int, row: np.ndarray) -> None:
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        filled = 0
        while filled < len(row):
            first = start + filled - int(self._starts[shard])
            piece = self._shard(shard)[first : first + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._open:
            tokens = np.memmap(self._paths[number], self._dtype, mode="r")
            if sha256_hex(tokens.data.cast("B")) != self._entries[number].sha256:
                raise _damaged(str(self._paths[number]))
            self._open[number] = tokens
        return self._open[number]


def _copy(remote: PreparedFolder, local: PreparedFolder, manifest: Manifest) -> None:
    sizes = local.sizes()
    for name, entry in manifest.files.items():
        if sizes.get(name) == entry.num_bytes:
            continue
        data = remote.read(name)
        if data is None or sha256_hex(data) != entry.sha256:
            raise _damaged(remote.url_of(name))
        local.write(name, data)


def _damaged(where: str) -> CorruptionError:
    remedy = "restore the file, or delete the folder and prepare again"
    return CorruptionError("the bytes are not those that were prepared", where=where, remedy=remedy)
