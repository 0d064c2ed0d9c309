"""Fragments: the model as a few flat float32 vectors, each the unit of one outer step.

Streaming DiLoCo (arXiv 2501.18512, Algorithm 2) cuts the model into P fragments that are synchronised in turn;
DiLoCo (arXiv 2311.08105) is the case P = 1. A fragment lists its tensors by name, so that a vector means the same
on every machine whatever the device and dtype of its model. It does not know when a fragment is synchronised.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from diloco_ray.errors import ConfigError, CorruptionError, RunMismatchError
from diloco_ray.ids import canonical_json, sha256_hex

_MAX_VALUES = 2**60  # no machine holds so many, and torch cannot count their bytes
_LAYER = re.compile(r"(?:[^.]*\.)*?\d+(?=\.|$)")  # the shortest beginning of a name that ends in a number


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


def is_embedding(name: str, shape: tuple[int, ...]) -> bool:
    """Two-dimensional, and its name says that it maps tokens to vectors or back (wte, wpe: GPT-2's names)."""
    return len(shape) == 2 and any(part in name for part in ("embed", "wte", "wpe", "lm_head"))


@dataclass(frozen=True)
class Fragment:
    """Some of the model's tensors, laid end to end."""

    index: int
    slots: tuple[TensorSlot, ...]

    @property
    def num_values(self) -> int:
        return sum(slot.num_values for slot in self.slots)

    def gather_(self, tensors: Mapping[str, Tensor], flat: Tensor, *, non_blocking: bool = False) -> None:
        """Copies the tensors (any device, any float dtype) into flat, (num_values,) float32 on the CPU."""
        for slot in self.slots:
            slot.of(flat).copy_(slot.tensor_in(tensors), non_blocking=non_blocking)

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
        slots = [[dict(vars(slot)) for slot in fragment.slots] for fragment in self.fragments]
        return {"fragments": [{"index": f.index, "slots": mine} for f, mine in zip(self.fragments, slots)]}

    @staticmethod
    def from_dict(body: Mapping[str, Any]) -> "Layout":
        """The inverse of to_dict, also after a way through JSON. CorruptionError for what to_dict never gives."""
        try:
            layout = Layout(tuple(_fragment_from(fragment) for fragment in body["fragments"]))
            in_order = [f.index for f in layout.fragments] == [*range(len(layout.fragments))]
            if in_order and 0 < layout.num_values < _MAX_VALUES:
                return layout
            problem: object = f"{layout.num_values} values in fragments {[f.index for f in layout.fragments]}"
        except (KeyError, TypeError, ValueError) as error:
            problem = repr(error)
        raise CorruptionError(
            f"no layout of a model: {problem}",
            where="the layout's fragments",
            remedy="restore the file that it was read from, run.json or a snapshot, from a copy of the run store",
        )

    def digest(self) -> str:
        """sha256 hex of the canonical JSON of to_dict()."""
        return sha256_hex(canonical_json(self.to_dict()))


def _fragment_from(body: Mapping[str, Any]) -> Fragment:
    slots = tuple(TensorSlot(s["name"], tuple(s["shape"]), s["offset"], s["num_values"]) for s in body["slots"])
    offsets = accumulate((slot.num_values for slot in slots), initial=0)
    for slot, offset in zip(slots, offsets):
        if (slot.offset, slot.num_values) != (offset, math.prod(slot.shape)) or min(slot.shape, default=0) < 0:
            raise ValueError(f"{slot} does not lie at {offset} of its fragment with the values of its shape")
    return Fragment(body["index"], slots)


def partition(
    shapes: Mapping[str, tuple[int, ...]],
    num_fragments: int = 1,
    how: Literal["sequential", "strided", "balanced"] = "sequential",
) -> Layout:
    """Cuts the tensors, given in model order, into num_fragments; within a fragment they keep that order.

    sequential: contiguous runs of about equal numbers of values. strided: fragment 0 is what lies outside the layers
    (embeddings, final norm, head), and layer i is in fragment 1 + i mod (P - 1), after Streaming DiLoCo (arXiv
    2501.18512). balanced: each tensor, the largest first, to the fragment with the fewest values so far,
    after Decoupled DiLoCo (arXiv 2604.21428). One fragment is the whole model in model order, whichever way.

    What lies outside the layers is often the largest fragment. As fragment 0 it is sent first, with the rest of the
    round to travel in, and not last, when the round ends with it.

    Raises ConfigError when a fragment would be empty: more fragments than tensors, or strided and fewer than P - 1
    layers or nothing outside them.
    """
    if not 1 <= num_fragments <= len(shapes):
        raise ConfigError(
            f"num_fragments={num_fragments}, but the model has {len(shapes)} tensors and no fragment may be empty",
            where="num_fragments",
            remedy=f"choose 1 to {len(shapes)}" if shapes else "use a model with trainable parameters",
        )
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    match how:
        case "sequential":
            groups = _sequential(sizes, num_fragments)
        case "strided":
            groups = _strided(sizes, num_fragments)
        case "balanced":
            groups = _balanced(sizes, num_fragments)
    fragments: list[Fragment] = []
    for index, names in enumerate(groups):
        offsets = accumulate((sizes[name] for name in names), initial=0)
        slots = (TensorSlot(name, tuple(shapes[name]), offset, sizes[name]) for name, offset in zip(names, offsets))
        fragments.append(Fragment(index, tuple(slots)))
    return Layout(tuple(fragments))


def _sequential(sizes: Mapping[str, int], num_fragments: int) -> list[list[str]]:
    """Each run grows while that brings it nearer to its fair share of what is left; every later one keeps a tensor."""
    names, left = list(sizes), sum(sizes.values())
    groups: list[list[str]] = []
    first = 0
    for runs_left in range(num_fragments, 0, -1):
        fair_share, stop, size = left / runs_left, first + 1, sizes[names[first]]
        while len(names) - stop >= runs_left and abs(size + sizes[names[stop]] - fair_share) <= abs(size - fair_share):
            size += sizes[names[stop]]
            stop += 1
        groups.append(names[first:stop])
        first, left = stop, left - size
    return groups


def _strided(sizes: Mapping[str, int], num_fragments: int) -> list[list[str]]:
    """A layer is a module whose name ends in the first number of its tensors' names, such as model.layers.3."""
    if num_fragments == 1:
        return [list(sizes)]
    layer_of = {name: match[0] for name in sizes if (match := _LAYER.match(name))}
    order = {layer: position for position, layer in enumerate(dict.fromkeys(layer_of.values()))}
    if len(order) < num_fragments - 1 or len(layer_of) == len(sizes):
        raise ConfigError(
            f"num_fragments={num_fragments} strided needs {num_fragments - 1} layers or more, such as model.layers.0, "
            f"and tensors outside them; this model has {len(order)} layers and {len(sizes) - len(layer_of)} tensors "
            "outside them",
            where="num_fragments",
            remedy=(f"choose 1 to {len(order) + 1}, or " if order and len(layer_of) < len(sizes) else "choose 1, or ")
            + "another partition: sequential or balanced",
        )
    groups: list[list[str]] = [[] for _ in range(num_fragments)]
    for name in sizes:
        groups[1 + order[layer_of[name]] % (num_fragments - 1) if name in layer_of else 0].append(name)
    return groups


def _balanced(sizes: Mapping[str, int], num_fragments: int) -> list[list[str]]:
    """Greedy bin packing. Ties go to the earlier tensor, to the fragment with fewer tensors, to the lower index."""
    members: list[set[str]] = [set() for _ in range(num_fragments)]
    loads = [0] * num_fragments
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        lightest = min(range(num_fragments), key=lambda index: (loads[index], len(members[index])))
        members[lightest].add(name)
        loads[lightest] += sizes[name]
    return [[name for name in sizes if name in group] for group in members]
