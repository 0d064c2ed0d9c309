"""One rank's part of the global model: its span of every fragment, replayed, subtracted from, encoded.

Together the ranks of a gang hold one replica and one base. What a replica does alone takes all of them here, in the
same order: loading a snapshot, replaying a record, encoding an outer gradient. Values go from those who hold them in
their model to those whose span they lie in, and back; both ways each value travels once.
"""

from collections.abc import Mapping, Sequence

import torch
import xxhash
from torch import Tensor

from diloco_ray.algorithm.codecs import CHUNK_VALUES, get_codec
from diloco_ray.algorithm.outer_gradient import OuterGradientStats, encode_outer_gradient_
from diloco_ray.algorithm.replica import Replica, StateDigest
from diloco_ray.algorithm.spans import (
    Holding,
    Span,
    cut_payload,
    even_spans,
    gather_span_,
    join_payloads,
    layout_of_spans,
)
from diloco_ray.island.gang import Gang
from diloco_ray.island.job import IslandJob
from diloco_ray.transport.protocol import Bytes, SnapshotState


class Part:
    """What this rank has of each fragment p: base[p], residuals[p], both (span.num_values,) float32, and its replica's.

    holdings[p][r]: what rank r's model holds of fragment p.
    """

    def __init__(self, job: IslandJob, gang: Gang, holdings: Sequence[Sequence[Holding]]):
        self._job, self._gang, self._holdings = job, gang, holdings
        self._uplink, self._downlink = get_codec(job.sync.uplink), get_codec(job.sync.downlink)
        layout = layout_of_spans(job.layout, gang.rank, gang.size)
        self.replica = Replica(layout, job.outer.build(), self._downlink)
        self.spans = [even_spans(fragment.num_values, gang.size) for fragment in job.layout.fragments]
        self.base = [torch.empty(fragment.num_values) for fragment in layout.fragments]
        feedback = job.sync.error_feedback is not None
        self.residuals = [torch.zeros_like(base) for base in self.base] if feedback else []

    # ---- the model's values ----

    def gather(self, p: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """This rank's span of the fragment as the model has it, (span.num_values,) float32 on the CPU."""
        own, span = self._holdings[p][self._gang.rank], self._own_span(p)
        gathered = torch.empty(span.num_values)
        if all(holding.fragment.num_values == self._num_values(p) for holding in self._holdings[p]):
            gather_span_(own.fragment, tensors, span, gathered)
            return gathered
        values = torch.empty(own.fragment.num_values)
        own.fragment.gather_(tensors, values)
        incoming = [torch.empty(holding.within(span)[0].num_values) for holding in self._holdings[p]]
        self._gang.swap([own.within(theirs)[0].of(values) for theirs in self.spans[p]], incoming, "outer gradient")
        for holding, theirs in zip(self._holdings[p], incoming):
            _copy_pieces(holding.within(span)[1], theirs, gathered, to_pieces=True)
        return gathered

    def spread(self, p: int, values: Tensor) -> Tensor:
        """From each rank's span of the fragment what this rank's model holds of it, end to end, float32 on the CPU."""
        own, span = self._holdings[p][self._gang.rank], self._own_span(p)
        outgoing: list[Tensor] = []
        for holding in self._holdings[p]:
            theirs = torch.empty(holding.within(span)[0].num_values)
            _copy_pieces(holding.within(span)[1], theirs, values, to_pieces=False)
            outgoing.append(theirs)
        held = torch.empty(own.fragment.num_values)
        self._gang.swap(outgoing, [own.within(theirs)[0].of(held) for theirs in self.spans[p]], "merge")
        return held

    # ---- what a replica and an outbox do ----

    def load(self, state: SnapshotState | None) -> None:
        """From the snapshot that rank 0 has."""
        versions = self._gang.decide(lambda: list(state.versions) if state else [], "snapshot")
        for p, version in enumerate(versions):
            nothing = [None for _ in ("parameters", *self.replica.optimizer.buffer_names)]
            arrays = [state.parameters[p], *state.buffers[p]] if state else nothing
            parameters, *buffers = [self._own_part(p, array) for array in arrays]
            self.replica.load_(p, version, parameters, buffers)

    def _own_part(self, p: int, array: Bytes | None) -> Tensor:
        def cut(rank: int) -> Tensor:
            assert array is not None
            return torch.from_numpy(array[self.spans[p][rank].start : self.spans[p][rank].stop].copy())

        mine = torch.empty(self._own_span(p).num_values)
        self._gang.scatter(cut, mine, "snapshot")
        return mine

    def step(self, p: int, payload: Tensor | None) -> StateDigest | None:
        """Replays one record, whose payload rank 0 has; there, returns the digest of the whole fragment's new state."""
        mine = torch.empty(self._downlink.num_bytes(self._own_span(p).num_values), dtype=torch.uint8)

        def cut(rank: int) -> Tensor:
            assert payload is not None
            return cut_payload(self._downlink, payload, self.spans[p][rank], self._num_values(p))

        self._gang.scatter(cut, mine, "outer step")
        self.replica.apply(p, mine)
        return self._digest(p)

    def fetch(self, p: int) -> Tensor:
        """This rank's span of the global parameters as the new base: ours to add to."""
        return self.base[p].copy_(self.replica.parameters(p))

    def encode(self, p: int, values: Tensor, base: Tensor) -> tuple[Tensor, Tensor | None, OuterGradientStats]:
        """Q(base - island) of this rank's span; on rank 0 the whole fragment's payload and statistics too."""
        feedback = self._job.sync.error_feedback
        mine = torch.empty(self._uplink.num_bytes(values.numel()), dtype=torch.uint8)
        held_back = {"residual": self.residuals[p], "decay": feedback} if feedback is not None else {}
        stats = encode_outer_gradient_(base, values, self._uplink, mine, **held_back)
        sizes = [self._uplink.num_bytes(span.num_values) for span in self.spans[p]]
        parts = self._gang.gather(mine, sizes, "payload")
        sums = torch.tensor([stats.squared_norm, stats.squared_sum, stats.squared_error], dtype=torch.float64)
        everyones = self._gang.gather(sums, [3] * self._gang.size, "norms")
        if not self._gang.leads:
            return mine, None, stats
        whole = join_payloads(self._uplink, parts, self.spans[p], self._num_values(p))
        return mine, whole, OuterGradientStats(*torch.stack(everyones).sum(0).tolist())

    def _digest(self, p: int) -> StateDigest | None:
        """A hash takes its bytes in order: rank after rank sends rank 0 its values, a chunk at a time."""
        parameters = self._hash(p, [self.replica.parameters(p)])
        optimizer = self._hash(p, self.replica.buffers(p))
        return StateDigest(parameters, optimizer) if self._gang.leads else None

    def _hash(self, p: int, vectors: Sequence[Tensor]) -> str:
        found, empty = xxhash.xxh3_128(), torch.empty(0)
        for vector in vectors:
            for rank, span in enumerate(self.spans[p]):
                for start in range(0, span.num_values, CHUNK_VALUES):
                    stop = min(start + CHUNK_VALUES, span.num_values)
                    outgoing, incoming = [empty] * self._gang.size, [empty] * self._gang.size
                    if self._gang.rank == rank:
                        outgoing[0] = vector[start:stop]
                    if self._gang.leads:
                        incoming[rank] = torch.empty(stop - start)
                    self._gang.swap(outgoing, incoming, "digest")
                    if self._gang.leads:
                        found.update(incoming[rank].numpy().data)
        return found.hexdigest()

    def _num_values(self, p: int) -> int:
        return self._job.layout.fragments[p].num_values

    def _own_span(self, p: int) -> Span:
        return self.spans[p][self._gang.rank]


def _copy_pieces(pieces: Sequence[Span], values: Tensor, vector: Tensor, *, to_pieces: bool) -> None:
    """Between values, laid end to end, and the places of the pieces in a vector."""
    first = 0
    for piece in pieces:
        run = values[first : first + piece.num_values]
        piece.of(vector).copy_(run) if to_pieces else run.copy_(piece.of(vector))
        first += piece.num_values
