"""Prepared tokens, read: sequence i of a group is tokens i*T .. (i+1)*T - 1 of its token shards laid end to end.

So no sequence holds text of two groups. The sequences of a group are what other rooms call a data shard; its number is
the group's. Local files are mapped into memory; those elsewhere are copied once into a cache folder. A file's sha256 is
checked when it is first touched. This module does not know in which order sequences are trained on.
"""

from bisect import bisect_right
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
    """The groups of one split. Not shared between threads."""

    def __init__(self, name: str, manifest: Manifest, folder: Path):
        self.name = name
        self.groups = manifest.splits[name].groups
        self.num_tokens = manifest.splits[name].num_tokens
        self._group_starts = np.cumsum([0, *(group.num_tokens for group in self.groups)]).tolist()
        self._paths = [folder / shard for shard in manifest.splits[name].shards]
        self._entries = [manifest.files[path.name] for path in self._paths]
        self._dtype = np.dtype(manifest.dtype)
        sizes = [entry.num_bytes // self._dtype.itemsize for entry in self._entries]
        self._starts: list[int] = np.cumsum([0, *sizes]).tolist()
        self._open: dict[int, np.ndarray] = {}

    def describe(self, shard: int) -> str:
        """For people: "the train part", and which group of it where there are several."""
        group = f", group {shard} ({self.groups[shard].name})" if len(self.groups) > 1 else ""
        return f"the {self.name} part{group}"

    def shard_sizes(self, sequence_length: int) -> tuple[int, ...]:
        """num_sequences of every group."""
        return tuple(self.num_sequences(sequence_length, shard) for shard in range(len(self.groups)))

    def num_sequences(self, sequence_length: int, shard: int = 0) -> int:
        """Whole sequences of a group; its tail is dropped. DataError where there is not even one."""
        num_tokens = self.groups[shard].num_tokens
        number = num_tokens // sequence_length
        if not number:
            what = f"{self.describe(shard)} has {num_tokens} tokens, fewer than one sequence of {sequence_length}"
            remedy = "choose a shorter data.sequence_length, a larger data.validation_fraction, or more text"
            raise DataError(what, where="data.sequence_length", remedy=remedy)
        return number

    def sequences(self, indices: np.ndarray, sequence_length: int, shard: int = 0) -> np.ndarray:
        """(B, T) int64, the caller's own. IndexError for a number outside 0 .. num_sequences - 1 of the group."""
        number = self.num_sequences(sequence_length, shard)
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= number):
            raise IndexError(f"sequences {indices.min()}..{indices.max()} of {number} in {self.describe(shard)}")
        tokens_BT = np.empty((len(indices), sequence_length), np.int64)
        for row, index in zip(tokens_BT, indices.tolist()):
            self._read(self._group_starts[shard] + index * sequence_length, row)
        return tokens_BT

    def _read(self, start: int, row: np.ndarray) -> None:
        shard = bisect_right(self._starts, start) - 1
        filled = 0
        while filled < len(row):
            first = start + filled - self._starts[shard]
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
