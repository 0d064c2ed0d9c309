"""How the ranks of an island compute one inner step together: alone, DDP, or FSDP2 (`fully_shard`).

Each rank computes its rows of the island's batch. What the optimizer steps are plain tensors: under FSDP2 a rank's own
rows of each parameter, so that its state is no larger than they are.
"""

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diloco_ray.algorithm.fragments import Fragment
from diloco_ray.algorithm.spans import Holding, sharded_holding, whole_holding
from diloco_ray.data.manifest import Manifest
from diloco_ray.errors import ConfigError
from diloco_ray.island.job import IslandJob
from diloco_ray.model.build import build_model, build_outline, trainable_parameters


class Parallel(Protocol):
    """forward is what is called with a batch; tensors are the optimizer's, by the names that the layout has."""

    forward: nn.Module
    tensors: dict[str, Tensor]

    def rows(self, inputs_BT: Tensor) -> Tensor:
        """This rank's part of a batch; all parts are equally large."""
        ...

    def backward(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward pass of one part of a batch; after the last one gradients are the island's."""
        ...

    def clip_(self, parameters: Sequence[Tensor], limit: float) -> Tensor:
        """Has the gradients, scaled down to this norm, on the optimizer's parameters; returns the whole one's norm."""
        ...

    def mean(self, value: Tensor) -> Tensor:
        """Over the ranks."""
        ...

    def holding(self, fragment: Fragment, rank: int) -> Holding:
        """What that rank holds of a fragment."""
        ...


class Alone:
    """One process does it all."""

    def __init__(self, model: nn.Module):
        self.forward, self.tensors = model, trainable_parameters(model)

    def rows(self, inputs_BT: Tensor) -> Tensor:
        return inputs_BT

    def backward(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def clip_(self, parameters: Sequence[Tensor], limit: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, limit)

    def mean(self, value: Tensor) -> Tensor:
        return value

    def holding(self, fragment: Fragment, rank: int) -> Holding:
        return whole_holding(fragment)


class _Ranks:
    """What DDP and FSDP2 have in common. Both average gradients over the ranks in the backward pass."""

    rank: int
    size: int

    def rows(self, inputs_BT: Tensor) -> Tensor:
        num_rows = inputs_BT.shape[0]
        if num_rows % self.size:
            raise ConfigError(
                f"a batch of {num_rows} sequences cannot be dealt evenly to {self.size} ranks",
                where="inner.batch_size",
                remedy="choose inner.batch_size as a multiple of inner.ranks",
            )
        return inputs_BT.chunk(self.size)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size


class Ddp(_Ranks):
    """Every rank holds the whole model; `DistributedDataParallel` averages the gradients."""

    def __init__(self, model: nn.Module):
        from torch.nn.parallel import DistributedDataParallel

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.tensors = trainable_parameters(model)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # a new name, for something else
            # Buffers stay each rank's own, as they stay each island's own.
            self._wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        self.forward: nn.Module = self._wrapped

    def backward(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if is_last else self._wrapped.no_sync()

    def clip_(self, parameters: Sequence[Tensor], limit: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, limit)

    def holding(self, fragment: Fragment, rank: int) -> Holding:
        return whole_holding(fragment)


class Fsdp(_Ranks):
    """Each rank holds some rows of every parameter; a layer is whole only while it computes."""

    def __init__(self, model: nn.Module, device: torch.device):
        """model: its parameters may be without values (on the meta device); they get none here, but a place."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh(device.type, (self.size,))
        _check_shardable(model)
        units: list[Any] = [fully_shard(layer, mesh=mesh) for layer in _layers(model)]
        units.append(fully_shard(model, mesh=mesh))
        if device.type == "cpu":  # gloo knows no average
            for unit in units:
                unit.set_force_sum_reduction_for_comms(True)
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        self.forward = model
        self._sharded = trainable_parameters(model)
        with torch.no_grad():
            self.tensors = {name: cast(Any, shard).to_local().detach() for name, shard in self._sharded.items()}

    def backward(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are scattered after every part: one that waited for the last would be kept whole."""
        return contextlib.nullcontext()

    def clip_(self, parameters: Sequence[Tensor], limit: float) -> Tensor:
        for name, shard in self._sharded.items():
            gradient = cast(Any, shard.grad)
            self.tensors[name].grad = None if gradient is None else gradient.to_local().detach()
            shard.grad = None
        gradients = [tensor.grad for tensor in parameters if tensor.grad is not None]
        squared = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).square().sum()
        dist.all_reduce(squared)
        norm = squared.sqrt()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_ does it
        for gradient in gradients:
            gradient.mul_(factor)
        return norm

    def holding(self, fragment: Fragment, rank: int) -> Holding:
        return sharded_holding(fragment, rank, self.size)


def place_model(job: IslandJob, manifest: Manifest, num_ranks: int) -> Parallel:
    """The island's model where it trains. Under FSDP2 without values: those come from the log."""
    device = pick_device(job.inner.device)
    known: dict[str, Any] = {
        "seed": job.seed,
        "vocab_size": manifest.vocab_size,
        "eos_token_id": manifest.eos_token_id,
    }
    if num_ranks > 1 and job.inner.parallel == "fsdp":
        return Fsdp(build_outline(job.model, **known), device)
    model = build_model(job.model, **known).to(device)
    if job.inner.compile:
        model.compile()
    return Ddp(model) if num_ranks > 1 else Alone(model)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules: what is gathered, used and let go as one."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _layers(child)
    return found


def _check_shardable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.ndim:
            remedy = "give it one dimension, or set inner.parallel=ddp"
            raise ConfigError(f"{name} is a single number, which has no rows to share", where=name, remedy=remedy)
