"""Two ranks of one island as processes of their own, without Ray: gloo, and a coordinator in rank 0."""

import json
import multiprocessing
import os
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diloco_ray.config import RunConfig
from diloco_ray.ids import island_name
from diloco_ray.island.gang import Gang
from diloco_ray.island.job import Identity
from diloco_ray.island.worker import Island
from diloco_ray.run import open_run
from diloco_ray.simulation.in_process import begin
from diloco_ray.transport.in_memory import InMemoryTransport

NUM_RANKS = 2
PATIENCE_S = 30.0

Work = Callable[[Gang, dict[str, Any]], Any]  # what a rank does; JSON in and out


def on_ranks(work: Work, arguments: Mapping[str, Any], folder: Path, timeout_s: float = PATIENCE_S) -> list[Any]:
    """What each rank returned; {"error": text} where it raised, None where it ended without a word."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.island.gang_work", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
    )
    processes = [
        context.Process(target=_rank, args=(rank, work, dict(arguments), str(folder), timeout_s))
        for rank in range(NUM_RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        if process.is_alive():
            process.kill()
    answers = [folder / f"answer-{rank}.json" for rank in range(NUM_RANKS)]
    return [json.loads(path.read_text()) if path.exists() else None for path in answers]


def _rank(rank: int, work: Work, arguments: dict[str, Any], folder: str, timeout_s: float) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=timeout_s)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=NUM_RANKS, timeout=patience
    )
    try:
        answer = work(Gang(island_name(0), timeout_s), arguments)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    Path(folder, f"answer-{rank}.json").write_text(json.dumps(answer))
    os._exit(0)  # a group whose other rank has gone is not taken apart in peace


def train_all(gang: Gang, arguments: dict[str, Any]) -> list[Any]:
    """Trains each recipe to its end: its first island is this gang, the others live in rank 0, alone."""
    return [train(gang, body) for body in arguments["recipes"]]


def train(gang: Gang, body: dict[str, Any]) -> dict[str, Any]:
    try:
        run = open_run(RunConfig.from_dict(body))
        job = run.island_job()
        if not gang.leads:
            member = Island(job, identity(0), None, gang=gang)
            member.start()
            for _ in member.live():
                pass
            return {"bytes": held_bytes(member)}
        coordinator = begin(run)
        transport = InMemoryTransport(coordinator)
        alone = replace(job, inner=job.inner.model_copy(update={"ranks": 1}))
        islands = [Island(job, identity(0), transport, gang=gang)]
        islands += [Island(alone, identity(n), transport) for n in range(1, run.config.max_islands)]
        live_in_turn(islands)
        return {"phase": coordinator.state.phase, "bytes": held_bytes(islands[0])}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def live_in_turn(islands: list[Island]) -> None:
    for island in islands:
        island.start()
    lives = [island.live() for island in islands]
    while lives:
        lives = [life for life in lives if next(life, None) is not None]


def identity(number: int) -> Identity:
    return Identity(island_name(number), uuid.uuid4().hex, os.getpid(), "here")


def held_bytes(island: Island) -> dict[str, int]:
    """What this rank holds in float32 of the model, its optimizer and the exchange, by name."""
    part: Any = island.link.part  # type: ignore[union-attr]
    fragments = range(len(island.job.layout.fragments))
    state = [value for entries in island._optimizer.state.values() for value in entries.values()]  # type: ignore
    return {
        "parameters": num_bytes(island._tensors.values()),
        "optimizer": num_bytes(value for value in state if isinstance(value, torch.Tensor) and value.ndim),
        "replica": num_bytes(t for p in fragments for t in (part.replica.parameters(p), *part.replica.buffers(p))),
        "base": num_bytes(part.base),
    }


def num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
