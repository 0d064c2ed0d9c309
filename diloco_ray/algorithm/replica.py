"""A replica: a holder of the global model, which is nothing but the replay of the log of outer steps.

    global model at version v  =  fold(outer_step, snapshot, log[.. v])

Coordinator, islands, joiners and `verify` each hold one. Two replicas that were given the same bytes hold the same
bits, on any machine and with any number of threads, because every operation on the way is a single, correctly rounded
float32 one. A replica does not know files, records or who contributed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from diloco_ray.algorithm.codecs import CHUNK_VALUES, Codec
from diloco_ray.algorithm.combine import ChunkWriter, Combine, Contributions, mean
from diloco_ray.algorithm.fragments import Layout
from diloco_ray.algorithm.outer_optimizer import OuterOptimizer
from diloco_ray.errors import ConfigError


@dataclass(frozen=True)
class StateDigest:
    """xxh3_128 hex of a fragment's state: its parameters, and its optimizer buffers one after the other.

    Taken over the little-endian float32 bytes; it finds errors of machines, it does not stop a forger.
    """

    parameters: str
    optimizer: str


class Replica:
    """Parameters and outer optimizer state of every fragment: 8 bytes a value with one buffer. Not thread safe."""

    def __init__(self, layout: Layout, optimizer: OuterOptimizer, downlink: Codec):
        """All zeros at version 0; `downlink` is the codec of the records that `apply` replays.

        ConfigError when this machine does not have the memory.
        """
        self.layout = layout
        self.optimizer = optimizer
        self.downlink = downlink
        self.versions = [0 for _ in layout.fragments]
        sizes = [fragment.num_values for fragment in layout.fragments]
        try:
            self._parameters = [torch.zeros(size) for size in sizes]
            self._buffers = [tuple(torch.zeros(size) for _ in optimizer.buffer_names) for size in sizes]
        except RuntimeError as error:  # torch's own for memory that it is not given
            num_bytes = 4 * sum(sizes) * (1 + len(optimizer.buffer_names))
            raise ConfigError(
                f"a replica of {sum(sizes):,} values takes {num_bytes / 1e9:,.1f} GB, which this machine does not have",
                where="the run's layout",
                remedy="take a machine with more memory; if the model is not so large, run.json is damaged",
            ) from error

    def parameters(self, fragment: int) -> Tensor:
        """The fragment's parameters, (num_values,) float32: the replica's own memory, to be read only."""
        return self._parameters[fragment]

    def buffers(self, fragment: int) -> tuple[Tensor, ...]:
        """The optimizer's buffers in the order of its buffer_names, each (num_values,) float32, to be read only."""
        return self._buffers[fragment]

    def load_(self, fragment: int, version: int, parameters: Tensor, buffers: Sequence[Tensor]) -> None:
        """Copies in one fragment's state as a snapshot holds it; ValueError, and no change, if it does not fit."""
        targets, sources = (self._parameters[fragment], *self._buffers[fragment]), (parameters, *buffers)
        if [t.shape for t in targets] != [s.shape for s in sources]:
            raise ValueError(
                f"fragment {fragment} has {[tuple(t.shape) for t in targets]}, not {[tuple(s.shape) for s in sources]}"
            )
        for target, source in zip(targets, sources):
            target.copy_(source)
        self.versions[fragment] = version

    def load_from_(self, tensors: Mapping[str, Tensor]) -> None:
        """Version 0 of every fragment from an initialised model, with zero buffers."""
        for fragment in self.layout.fragments:
            fragment.gather_(tensors, self._parameters[fragment.index])
            for buffer in self._buffers[fragment.index]:
                buffer.zero_()
            self.versions[fragment.index] = 0

    def write_to_(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the global parameters into a model's tensors, in place."""
        for fragment in self.layout.fragments:
            fragment.scatter_(self._parameters[fragment.index], tensors)

    def apply(self, fragment: int, payload: Tensor) -> StateDigest:
        """Replays one record: the outer step along the gradient that `payload`, uint8, holds. The version grows by 1.

        ValueError, and nothing changed, for a payload of another length.
        """
        self._check_payload(fragment, payload, self.downlink)
        return self._step(fragment, payload)

    def outer_step(
        self,
        fragment: int,
        payloads: Sequence[Tensor],
        weights: Sequence[float],
        uplink: Codec,
        combine: Combine = mean,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, StateDigest]:
        """The coordinator's step: combines the payloads, given in island order, and takes the step along the result.

        Returns the combined outer gradient as the downlink encodes it, a new (num_bytes,) uint8, and the digest of the
        new state. The step follows the *decoded* bytes: `apply` of them on another replica gives the same bits.
        ValueError, and nothing changed, without contributions: no gradient, no step, no decay of the momentum.

        With a residual e, (num_values,) float32, changed in place and zero at first, what the downlink leaves out of
        the combined gradient g is made up for by later steps: Q(e + g) is the record, and e <- e + g - Q(e + g). Other
        replicas need no such memory.
        """
        for payload in payloads:
            self._check_payload(fragment, payload, uplink)
        num_values = self._parameters[fragment].numel()
        if residual is not None and residual.shape != (num_values,):
            raise ValueError(f"fragment {fragment} has {num_values} values, its residual {tuple(residual.shape)}")
        write_ = combine(Contributions(payloads, weights, uplink, num_values), self.layout.fragments[fragment])
        combined = torch.empty(self.downlink.num_bytes(num_values), dtype=torch.uint8)

        def combine_(start: int, g: Tensor, scratch: Tensor) -> None:
            write_(start, g, scratch)
            if residual is not None:
                g.add_(residual[start : start + g.numel()])
            self.downlink.encode_(g, combined, start, num_values)
            if residual is not None:
                self.downlink.decode_(combined, start, num_values, scratch)
                torch.sub(g, scratch, out=residual[start : start + g.numel()])

        return combined, self._step(fragment, combined, combine_)

    def digest(self, fragment: int) -> StateDigest:
        """The digest of the fragment's present state."""
        optimizer = xxhash.xxh3_128()
        for buffer in self._buffers[fragment]:
            optimizer.update(buffer.numpy().data)
        return StateDigest(xxhash.xxh3_128(self._parameters[fragment].numpy().data).hexdigest(), optimizer.hexdigest())

    def _step(self, fragment: int, payload: Tensor, combine_: ChunkWriter | None = None) -> StateDigest:
        """One pass over chunks that stay in cache: write the payload if need be, decode, step, digest."""
        parameters, buffers = self._parameters[fragment], self._buffers[fragment]
        num_values, step = parameters.numel(), self.versions[fragment] + 1
        g, scratch = torch.empty(2, min(CHUNK_VALUES, num_values)).unbind()
        parameters_hash, optimizer_hash = xxhash.xxh3_128(), xxhash.xxh3_128()
        for start in range(0, num_values, CHUNK_VALUES):
            here = slice(start, min(start + CHUNK_VALUES, num_values))
            g, scratch = g[: here.stop - start], scratch[: here.stop - start]
            if combine_ is not None:
                combine_(start, g, scratch)
            self.downlink.decode_(payload, start, num_values, g)
            self.optimizer.step_(parameters[here], g, tuple(buffer[here] for buffer in buffers), step, scratch)
            parameters_hash.update(parameters[here].numpy().data)
            for buffer in buffers[:1]:
                optimizer_hash.update(buffer[here].numpy().data)
        for buffer in buffers[1:]:  # a hash takes its bytes in order: the first buffer while in cache, the others after
            optimizer_hash.update(buffer.numpy().data)
        self.versions[fragment] = step
        return StateDigest(parameters_hash.hexdigest(), optimizer_hash.hexdigest())

    def _check_payload(self, fragment: int, payload: Tensor, codec: Codec) -> None:
        expected = codec.num_bytes(self._parameters[fragment].numel())
        if payload.dtype != torch.uint8 or payload.shape != (expected,):
            raise ValueError(
                f"fragment {fragment}: a {codec.name} payload is uint8 of {expected} bytes, "
                f"this one is {payload.dtype} of shape {tuple(payload.shape)}"
            )
