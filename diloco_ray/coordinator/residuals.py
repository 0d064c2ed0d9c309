"""What the downlink's codec has left out of the combined outer gradients so far: error feedback's durable half.

    residuals/002-00000012-<sha>...      of fragment 2, after record 12, whose payload has this sha256

Replicas need none of it, so it is not in the log. It is written before the record that it belongs to; a coordinator
that is restarted goes on with the one of each fragment's newest record, bit for bit.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from diloco_ray.algorithm.fragments import Layout
from diloco_ray.log.record import Record
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import load_tensors, save_tensors

FOLDER = "residuals"
_FILE = re.compile(r"([0-9]{3,})-([0-9]{8,})-[0-9a-f]{12}(?:-[0-9a-f]{12}\.safetensors|\.json)")


class Residuals:
    """One (num_values,) float32 for each fragment, zero before its first outer step."""

    def __init__(self, store: RunStore, layout: Layout, records: Sequence[Record]):
        """CorruptionError or StoreError where that of a fragment's newest record is damaged or missing."""
        self._store = store
        self._of = [torch.zeros(fragment.num_values) for fragment in layout.fragments]
        self._saved: dict[int, list[str]] = {}
        for record in {record.fragment: record for record in records}.values():
            path = _path(record.fragment, record.index, record.payload_sha256)
            tensors, _ = load_tensors(store, path)
            self._of[record.fragment].copy_(tensors["residual"])
            self._saved[record.fragment] = [path]
            self._forget_before(record)

    def of(self, fragment: int) -> Tensor:
        return self._of[fragment]

    def save(self, fragment: int, index: int, payload_sha256: str) -> None:
        """Before record `index` is committed; the one before it stays until the next time."""
        path = _path(fragment, index, payload_sha256)
        save_tensors(self._store, path, {"residual": self._of[fragment]}, {})
        saved = [*self._saved.get(fragment, []), path]
        for old in saved[:-2]:
            self._delete(old)
        self._saved[fragment] = saved[-2:]

    def _forget_before(self, record: Record) -> None:
        """What earlier lives have left of this fragment. What is saved for a later record may yet be committed."""
        for name in self._store.list(FOLDER):
            found = _FILE.fullmatch(name)  # other files are nobody's business here
            if not found or f"{FOLDER}/{name}".startswith(self._saved[record.fragment][0]):
                continue
            if int(found[1]) == record.fragment and int(found[2]) <= record.index:
                self._store.delete(f"{FOLDER}/{name}")

    def _delete(self, path: str) -> None:
        self._store.delete(f"{path}.json")
        for name in self._store.list(FOLDER):
            if name.startswith(f"{path.removeprefix(f'{FOLDER}/')}-"):
                self._store.delete(f"{FOLDER}/{name}")


def _path(fragment: int, index: int, payload_sha256: str) -> str:
    return f"{FOLDER}/{fragment:03d}-{index:08d}-{payload_sha256[:12]}"
