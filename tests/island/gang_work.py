"""What the ranks of tests/island/test_gang.py do, each in a process of its own."""

import os
import time
from dataclasses import replace
from typing import Any

import torch

from diloco_ray.algorithm.fragments import partition
from diloco_ray.algorithm.spans import sharded_holding, whole_holding
from diloco_ray.coordination.messages import InnerPlan
from diloco_ray.errors import DataError
from diloco_ray.island.gang import Gang
from diloco_ray.island.job import PreemptedError
from diloco_ray.island.part import Part
from diloco_ray.island.worker import Island
from tests.island.exchange_room import island_job
from tests.island.gang_room import NUM_RANKS, train
from tests.small_run import small_job

SHAPES = {"embedding": (257, 6), "one_row": (1, 5), "norm": (7,), "head": (64, 9)}


def encode_on_ranks(gang: Gang, arguments: dict[str, Any]) -> dict[str, Any]:
    """Encodes a made-up outer gradient by both ways of holding it; on rank 0 the whole payloads, by way and codec."""
    layout = partition(SHAPES)
    fragment = layout.fragments[0]
    found: dict[str, Any] = {}
    for codec in arguments["codecs"]:
        whole_base, tensors = made_up()
        job = replace(island_job(small_job(), uplink=codec), layout=layout)
        for way in ("whole", "sharded"):
            holdings = [
                whole_holding(fragment) if way == "whole" else sharded_holding(fragment, rank, gang.size)
                for rank in range(gang.size)
            ]
            own = {
                slot.name: shard_of(tensors[slot.name], slot.shape[0], gang.rank) if way == "sharded" else t
                for slot, t in zip(holdings[gang.rank].fragment.slots, tensors.values())
            }
            part = Part(job, gang, [holdings])
            values = part.gather(0, own)
            _, payload, stats = part.encode(0, values, part.spans[0][gang.rank].of(whole_base))
            found[f"{codec}-{way}"] = [payload.tolist() if payload is not None else None, stats.norm]
            spread = part.spread(0, values)
            mine = torch.empty(holdings[gang.rank].fragment.num_values)
            holdings[gang.rank].fragment.gather_(own, mine)
            assert torch.equal(spread, mine)
    return found


def made_up() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return torch.randn(partition(SHAPES).num_values, generator=generator), tensors


def shard_of(tensor: torch.Tensor, num_rows: int, rank: int) -> torch.Tensor:
    first = rank * -(-tensor.shape[0] // NUM_RANKS)
    return tensor[first : first + num_rows]


def miss_each_other(gang: Gang, arguments: dict[str, Any]) -> Any:
    gang.decide(lambda: "there", "hello")  # a rank is through with making the group before the others are
    if gang.rank == 1:
        if arguments["how"] == "ends":
            os._exit(9)
        time.sleep(arguments["sleep_s"])
    return gang.decide(lambda: "never", "plan")


def lead_for_long(gang: Gang, arguments: dict[str, Any]) -> Any:
    """Rank 0 is busy for longer than the others would wait for a word of it, then fails."""
    gang.lead_alone(lambda: time.sleep(arguments["sleep_s"]), "snapshot", 60.0)

    def fails() -> None:
        raise DataError("no text is left")

    errors: list[str] = []
    told = (lambda: None, lambda: PreemptedError() if gang.rank else None)
    for act, within_s, trouble in (
        (fails, 60.0, told[0]),
        (lambda: time.sleep(60), 60.0, told[1]),
        (lambda: time.sleep(60), 1.0, told[0]),
    ):
        try:
            gang.lead_alone(act, "hello", within_s, trouble)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return errors


def decide_all(gang: Gang, arguments: dict[str, Any]) -> Any:
    """Values of every size, then an error on rank 0, then one on rank 1."""
    values = [gang.decide(lambda n=n: "x" * n, "test") for n in (0, 200, 300, 5000)]
    equal = [gang.all_equal(value, "test") for value in ([3, None], gang.rank)]

    def fails() -> None:
        raise DataError("no text is left")

    errors: list[str] = []
    for make, trouble in ((fails, None), (lambda: 1, PreemptedError() if gang.rank else None)):
        try:
            gang.decide(make, "test", trouble)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return [[len(value) for value in values], equal, errors]


def die_and_come_back(gang: Gang, arguments: dict[str, Any]) -> Any:
    """In the first life rank 1 dies in the middle of a round."""
    if arguments["dies"] and gang.rank == 1:
        finish = Island._finish

        def dies(self: Island, plan: InnerPlan, num_steps: int) -> None:
            if plan.round == 2:
                os._exit(9)
            finish(self, plan, num_steps)

        Island._finish = dies  # type: ignore[method-assign]
    return train(gang, arguments["recipe"])
