"""A tiny run with all its files, written the way a coordinator writes them."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.fragments import Layout, partition
from diloco_ray.algorithm.outer_optimizer import Nesterov
from diloco_ray.algorithm.replica import Replica
from diloco_ray.coordination.messages import DataRange, Share
from diloco_ray.ids import sha256_hex
from diloco_ray.log.record import Record, model_digest, payload_path, seal
from diloco_ray.log.run_log import RunLog, take_fence
from diloco_ray.log.run_store import RunStore
from diloco_ray.log.snapshot import save_snapshot

RUN_ID = "0" * 32
SHAPES = {"embed": (20, 16), "w": (16, 16), "head": (16, 20)}
ISLANDS = ("island-00", "island-01")
NUM_SEQUENCES = 4  # that an island spends in a round, 8 tokens each
SHARD_SIZE = 100


def new_replica(run: dict[str, Any]) -> Replica:
    return Replica(Layout.from_dict(run["layout"]), Nesterov(**run["outer"]), get_codec(run["downlink"]))


@dataclass
class ToyRun:
    """A coordinator's part without islands: what they sent is drawn from the record's index."""

    store: RunStore
    num_fragments: int = 2
    uplink: str = "int4"
    log: RunLog = field(init=False)
    replica: Replica = field(init=False)
    fence_epoch: int = field(init=False)

    def start(self, *, run_id: str = RUN_ID) -> "ToyRun":
        layout = partition(SHAPES, self.num_fragments)
        outer = {"learning_rate": 0.7, "momentum": 0.9}
        run = {"run_id": run_id, "layout": layout.to_dict(), "outer": outer, "downlink": "int8"}
        inner = {"steps_per_round": 2, "batch_size": NUM_SEQUENCES // 2}
        config = {"data": {"sequence_length": 8}, "inner": inner, "sync": {"closes": "all"}}
        run = {**run, "config": config, "shard_sizes": [SHARD_SIZE]}
        self.store.write("run.json", seal(run))
        self.replica = new_replica(run)
        generator = torch.Generator().manual_seed(7)
        self.replica.load_from_({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})
        self.fence_epoch = take_fence(self.store, run_id, "toy")
        self.log = RunLog.open(self.store)
        digest = model_digest([self.replica.digest(p) for p in range(self.num_fragments)])
        zeros = dict.fromkeys(("leased", "committed", "rejected", "expired", "rewound", "outstanding"), 0)
        init = Record(
            index=0,
            parent="",
            run_id=run_id,
            fence_epoch=self.fence_epoch,
            kind="init",
            fragment=0,
            version=0,
            round=0,
            codec="int8",
            payload="",
            payload_sha256="",
            shares=(),
            parameters_digest=digest.parameters,
            optimizer_digest=digest.optimizer,
            tokens=zeros,
        )
        self.log.append(init)
        self.snapshot()
        return self

    def next_step(self) -> tuple[Record, bytes]:
        """The record that follows, as the replica's own step gives it, and its payload; not committed."""
        tail = self.log.tail
        index = tail.index + 1
        fragment = (index - 1) % self.num_fragments
        closing = fragment == self.num_fragments - 1
        round_ = (index - 1) // self.num_fragments
        num_values = self.replica.layout.fragments[fragment].num_values
        codec = get_codec(self.uplink)
        generator = torch.Generator().manual_seed(index)
        shares: list[Share] = []
        payloads: list[torch.Tensor] = []
        for number, island in enumerate(ISLANDS):
            delta = torch.randn(num_values, generator=generator) * 0.01
            payload = torch.empty(codec.num_bytes(num_values), dtype=torch.uint8)
            codec.encode_(delta, payload, 0, num_values)
            payloads.append(payload)
            start = (round_ * len(ISLANDS) + number) * NUM_SEQUENCES
            shares.append(
                Share(
                    island=island,
                    incarnation=1,
                    round=round_,
                    base_version=round_,
                    weight=32.0 if number else 32,  # callers mix them
                    tokens=NUM_SEQUENCES * 8 if closing else 0,
                    spent=(DataRange(0, 0, start, start + NUM_SEQUENCES),) if closing else (),
                    payload_sha256=sha256_hex(payload.numpy().data),
                    payload_bytes=payload.numel(),
                    norm=float(delta.norm()),
                )
            )
        combined, digest = self.replica.outer_step(fragment, payloads, [s.weight for s in shares], codec)
        data = combined.numpy().tobytes()
        committed = tail.tokens["committed"] + sum(share.tokens for share in shares)
        record = replace(
            tail,
            index=index,
            parent=self.log.tail_digest,
            fence_epoch=self.fence_epoch,
            kind="outer_step",
            fragment=fragment,
            version=self.replica.versions[fragment],
            round=index // self.num_fragments,
            payload=payload_path(index, sha256_hex(data)),
            payload_sha256=sha256_hex(data),
            shares=tuple(shares),
            parameters_digest=digest.parameters,
            optimizer_digest=digest.optimizer,
            tokens={**tail.tokens, "leased": committed, "committed": committed},
        )
        return record, data

    def take_steps(self, num_steps: int, *, snapshot_every: int = 0) -> "ToyRun":
        for _ in range(num_steps):
            self.log.append(*self.next_step())
            if snapshot_every and self.log.tail.index % snapshot_every == 0:
                self.snapshot()
        return self

    def snapshot(self) -> None:
        save_snapshot(self.store, self.log.tail.index, self.replica, self.log.tail_digest)

    def bits(self) -> list[bytes]:
        return bits(self.replica)


def bits(replica: Replica) -> list[bytes]:
    """All that a replica holds, for comparing bit for bit."""
    tensors = [t for p in range(len(replica.versions)) for t in (replica.parameters(p), *replica.buffers(p))]
    return [str(replica.versions).encode(), *(tensor.numpy().tobytes() for tensor in tensors)]


def all_files(store: RunStore, folder: str = "") -> list[str]:
    """Every file of the run, by walking."""
    found: list[str] = []
    for name in store.list(folder):
        path = f"{folder}/{name}" if folder else name
        found += all_files(store, path) or [path]
    return found
