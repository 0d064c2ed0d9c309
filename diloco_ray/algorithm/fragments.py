"""Fragments: the model as a few flat float32 vectors, each the unit of one outer step.

Streaming DiLoCo (arXiv 2501.18512, Algorithm 2) cuts the model into P fragments that are synchronised in turn;
DiLoCo (arXiv 2311.08105) is the case P = 1. A fragment lists its tensors by name, so that a vector means the same
on every machine whatever the device and dtype of its model. It does not know when a fragment is synchronised.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from diloco_ray.errors import ConfigError, RunMismatchError
from diloco_ray.ids import canonical_json, sha256_hex


@dataclass(frozen=True)
class TensorSlot:
    """The place of one tensor: values offset .. offset + num_values of its fragment's vector, in row-major order."""

    name: str
    shape: tuple[int, ...]
    offset: int
    num_values: int

    def of(self, flat: Tensor) -> Tensor:
        """The view of this tensor's shape into the fragment's vector."""
        return flat[self.offset : self.offset + self.num_values].view(self.shape)

    def tensor_in(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """This slot's tensor; RunMismatchError when the model has none of this name and shape."""
        tensor = tensors.get(self.name)
        if tensor is None or tuple(tensor.shape) != self.shape:
            found = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise RunMismatchError(
                f"tensor {self.name!r}: the run's layout has shape {self.shape}, this model has {found}",
                remedy="build the model from the run's own model settings",
            )
        return tensor.detach()


@dataclass(frozen=True)
class Fragment:
    """Some of the model's tensors, laid end to end."""

    index: int
    slots: tuple[TensorSlot, ...]

    @property
    def num_values(self) -> int:
        return sum(slot.num_values for slot in self.slots)

    def gather_(self, tensors: Mapping[str, Tensor], flat: Tensor) -> None:
        """Copies the tensors (any device, any float dtype) into flat, (num_values,) float32 on the CPU."""
        for slot in self.slots:
            slot.of(flat).copy_(slot.tensor_in(tensors))

    def scatter_(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Copies flat, (num_values,) float32, into the tensors in place, rounded to their dtype; autograd sees nothing.

        All slots are looked up before the first one is written: a model that does not fit is left as it was.
        """
        targets = [slot.tensor_in(tensors) for slot in self.slots]
        with torch.no_grad():
            for slot, target in zip(self.slots, targets):
                target.copy_(slot.of(flat))


@dataclass(frozen=True)
class Layout:
    """All fragments of one model. Two machines with equal digests mean the same by a flat vector."""

    fragments: tuple[Fragment, ...]

    @property
    def num_values(self) -> int:
        return sum(fragment.num_values for fragment in self.fragments)

    def to_dict(self) -> dict[str, Any]:
        """JSON: {"fragments": [{"index", "slots": [{"name", "shape", "offset", "num_values"}]}]}."""
        return asdict(self)

    @staticmethod
    def from_dict(body: Mapping[str, Any]) -> "Layout":
        """The inverse of to_dict, also after a way through JSON."""
        return Layout(tuple(_fragment_from(fragment) for fragment in body["fragments"]))

    def digest(self) -> str:
        """sha256 hex of the canonical JSON of to_dict()."""
        return sha256_hex(canonical_json(self.to_dict()))


def _fragment_from(body: Mapping[str, Any]) -> Fragment:
    slots = (TensorSlot(s["name"], tuple(s["shape"]), s["offset"], s["num_values"]) for s in body["slots"])
    return Fragment(body["index"], tuple(slots))


def partition(shapes: Mapping[str, tuple[int, ...]], num_fragments: int = 1) -> Layout:
    """Cuts the tensors, in the order given, into num_fragments contiguous runs of about equal numbers of values.

    Each run grows while that brings it nearer to its fair share of what is left, and leaves one tensor for every run
    to come. Raises ConfigError when there are fewer tensors than fragments.
    """
    if not 1 <= num_fragments <= len(shapes):
        raise ConfigError(
            f"num_fragments={num_fragments}, but the model has {len(shapes)} tensors and no fragment may be empty",
            where="num_fragments",
            remedy=f"choose 1 to {len(shapes)}" if shapes else "use a model with trainable parameters",
        )
    names, sizes = list(shapes), [math.prod(shape) for shape in shapes.values()]
    fragments: list[Fragment] = []
    first = 0
    for index in range(num_fragments):
        runs_left = num_fragments - index
        fair_share = sum(sizes[first:]) / runs_left
        stop, size = first + 1, sizes[first]
        while len(sizes) - stop >= runs_left and abs(size + sizes[stop] - fair_share) <= abs(size - fair_share):
            size += sizes[stop]
            stop += 1
        run = slice(first, stop)
        placed = zip(names[run], accumulate(sizes[run], initial=0), sizes[run])
        slots = tuple(TensorSlot(name, tuple(shapes[name]), offset, size) for name, offset, size in placed)
        fragments.append(Fragment(index, slots))
        first = stop
    return Layout(tuple(fragments))
