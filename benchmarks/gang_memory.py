"""What each rank of an island keeps in memory: one process, two ranks with DDP, two with FSDP2.

    python -m benchmarks.gang_memory

Each row trains the same model for two rounds, on the CPU over gloo; the coordinator is a process of its own, and its
snapshot comes as a mapped file, as it comes in shared memory on Ray. Counted are the float32 values that a rank holds
between two inner steps. Measured, a few hundred times a second, is by how much its own memory (RssAnon) has grown at
most since it was ready to begin: until model and replica are there, in the inner steps, and at the exchange.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from diloco_ray.config import RunConfig
from diloco_ray.ids import island_name
from diloco_ray.island.gang import Gang
from diloco_ray.island.gang_exchange import GangExchange
from diloco_ray.island.job import Identity
from diloco_ray.island.worker import Island
from diloco_ray.model.build import build_model
from diloco_ray.model.settings import ModelSettings
from diloco_ray.run import open_run
from diloco_ray.simulation.in_process import begin
from diloco_ray.transport.in_memory import InMemoryTransport
from diloco_ray.transport.protocol import SnapshotState

MIB = 2**20
WAYS: dict[str, dict[str, Any]] = {
    "one process": {"ranks": 1},
    "2 ranks, ddp": {"ranks": 2, "parallel": "ddp"},
    "2 ranks, fsdp": {"ranks": 2, "parallel": "fsdp"},
}


class Desk(BaseManager):
    """A coordinator in a process of its own, for one caller."""


class Office(InMemoryTransport):
    """What that caller speaks with."""

    def save_snapshot(self, folder: str) -> SnapshotState:
        """All but the arrays, which are files there: by fragment, parameters first."""
        state = super().snapshot()
        for p in range(len(state.versions)):
            for number, array in enumerate((state.parameters[p], *state.buffers[p])):
                np.save(f"{folder}/{p}-{number}.npy", array)
        return replace(state, parameters=(), buffers=tuple((np.empty(0),) * len(b) for b in state.buffers))


def open_office(body: Mapping[str, Any]) -> Office:
    return Office(begin(open_run(RunConfig.from_dict(body))))


Desk.register("open", open_office)


class Line:
    """To the office in another process; a snapshot is mapped, not copied."""

    def __init__(self, office: Any, folder: str):
        self._office, self._folder = office, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._office, name)

    def snapshot(self, first: bool = False) -> SnapshotState:
        state = self._office.save_snapshot(self._folder)
        found = [
            [np.load(f"{self._folder}/{p}-{number}.npy", mmap_mode="r") for number in range(1 + len(buffers))]
            for p, buffers in enumerate(state.buffers)
        ]
        parameters, buffers = tuple(arrays[0] for arrays in found), tuple(tuple(arrays[1:]) for arrays in found)
        return replace(state, parameters=parameters, buffers=buffers)


class Gauge:
    """How far this process's own memory has grown at most since it was made, and since it was last read."""

    def __init__(self) -> None:
        self._before = self._highest = own_memory()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self._highest = max(self._highest, own_memory())
            time.sleep(0.002)

    def read(self) -> int:
        highest, self._highest = self._highest, own_memory()
        return highest - self._before


def recipe(folder: Path, way: Mapping[str, Any], layers: int, width: int) -> dict[str, Any]:
    llama = {"model_type": "llama", "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "max_position_embeddings": 64}
    return {
        "name": "memory-" + "-".join(str(value) for value in way.values()),
        "islands": 1,
        "rounds": 2,
        "data": {"corpus": "stdlib", "sequence_length": 32},
        "model": {"config": {**llama, **heads}},
        "inner": {"steps_per_round": 2, "batch_size": 2, **way},
        "sync": {"fragments": 4, "uplink": "int4", "downlink": "int4"},
        "storage": {"path": str(folder)},
    }


def live(rank: int, size: int, body: dict[str, Any], meeting: str, desk: Any, answers: Any) -> None:
    """The life of one rank, and what it held."""
    torch.set_num_threads(1)
    gang = None
    if size > 1:
        patience = timedelta(minutes=5)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=patience)
        gang = Gang(island_name(0), patience.total_seconds())
    job = open_run(RunConfig.from_dict(body)).island_job()
    import_everything()
    gauge, marks = Gauge(), {"start": 0, "steps": 0, "exchange": 0}
    identity = Identity(island_name(0), uuid.uuid4().hex, os.getpid(), "here")
    line: Any = Line(desk, os.path.dirname(meeting)) if rank == 0 else None
    island = Island(job, identity, line, gang=gang)
    island.start()
    marks["start"] = gauge.read()
    for moment in island.live():
        after = "steps" if moment == "step" else "exchange"
        marks[after] = max(marks[after], gauge.read())
        if moment == "wait":
            time.sleep(0.001)
    marks["exchange"] = max(marks["exchange"], gauge.read())
    answers.put((rank, {"values": job.layout.num_values, **held_by(island), **marks}))
    answers.close()
    answers.join_thread()
    os._exit(0)


def held_by(island: Island) -> dict[str, int]:
    """Bytes, by what they are for. Gradients are as large as the parameters while they are there."""
    exchange: Any = island.link
    replica = exchange.part.replica if isinstance(exchange, GangExchange) else exchange._follower.replica
    fragments = range(len(island.job.layout.fragments))
    state = [value for entries in island._optimizer.state.values() for value in entries.values()]  # type: ignore[union-attr]
    return {
        "parameters": num_bytes(island._tensors.values()),
        "optimizer": num_bytes(value for value in state if isinstance(value, Tensor)),
        "replica": num_bytes(t for p in fragments for t in (replica.parameters(p), *replica.buffers(p))),
        "base": num_bytes(exchange.base),
        "outbox": 0 if isinstance(exchange, GangExchange) else num_bytes(exchange._outbox._values),
    }


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def own_memory() -> int:
    """Bytes that are this process's alone, neither shared nor mapped from a file."""
    (line,) = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def import_everything() -> None:
    """By a step of a small model, so that what libraries take is there before anything is measured."""
    llama = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    settings = ModelSettings(config={**llama, "num_attention_heads": 1})
    model = build_model(settings, seed=0, vocab_size=257, eos_token_id=256)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = torch.zeros(1, 8, dtype=torch.int64)
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()


def measure(body: dict[str, Any], folder: Path) -> list[dict[str, int]]:
    """What each rank held."""
    open_run(RunConfig.from_dict(body))
    context, size = multiprocessing.get_context("spawn"), int(body["inner"]["ranks"])
    with Desk(ctx=context) as manager:
        desk: Any = manager.open(body)  # type: ignore[attr-defined]
        answers = context.Queue()
        room = folder / f"room-{body['name']}"
        room.mkdir()
        meeting = str(room / "meeting")
        ranks = [context.Process(target=live, args=(r, size, body, meeting, desk, answers)) for r in range(size)]
        for rank in ranks:
            rank.start()
        found = dict(answers.get(timeout=600) for _ in ranks)
        for rank in ranks:
            rank.join(timeout=60)
    return [found[rank] for rank in range(size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    kinds = ("parameters", "optimizer", "replica", "base", "outbox", "start", "steps", "exchange")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)  # what is freed is given back, and not measured
    table = Table("MiB", "rank", *kinds)
    rows: dict[str, list[dict[str, int]]] = {}
    with tempfile.TemporaryDirectory(prefix="gang-memory-") as folder:
        for name, way in WAYS.items():
            rows[name] = measure(recipe(Path(folder), way, given.layers, given.width), Path(folder))
            for rank, held in enumerate(rows[name]):
                table.add_row(name, str(rank), *(f"{held[kind] / MIB:.0f}" for kind in kinds))
    values = rows["one process"][0]["values"]
    Console(width=120).print(f"{values:,} values, {4 * values / MIB:.0f} MiB in float32", table)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
