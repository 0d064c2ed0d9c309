"""The special cases that DiLoCo must have, on the real engine: its coordinator, log, islands, data and model.

The other side of each identity is written out here in plain torch. Its batches are the engine's own: those of the data
ranges that the log says were spent.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diloco_ray.config import RunConfig
from diloco_ray.coordination.messages import Share
from diloco_ray.data.batches import batches
from diloco_ray.data.shards import TokenShards
from diloco_ray.document import replica_of
from diloco_ray.log.record import Record
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.snapshot import restore
from diloco_ray.log.verify import verify
from diloco_ray.model.build import build_model
from diloco_ray.run import Run, open_run
from diloco_ray.simulation.in_process import train_in_process

FLOAT32 = {"uplink": "float32", "downlink": "float32"}
PLAIN_SGD = {"optimizer": "sgd", "learning_rate": 0.2, "weight_decay": 0.0, "clip_norm": None, "schedule": "constant"}
# An outer gradient is a difference that was rounded, so theta - (theta - island) is the island's value to a bit or two;
# the parameters near 1, of the norms, have bits of 1.2e-7.
SGD_TOLERANCE = {"rtol": 0.0, "atol": 1e-6}
# AdamW, whose step does not shrink with its gradient, makes a little more of them over 24 steps.
ADAMW_TOLERANCE = {"rtol": 0.0, "atol": 5e-6}
MOVED = 1e-3  # what training changes is far above either


pytestmark = pytest.mark.usefixtures("one_thread")


def train(body: Mapping[str, Any], name: str, **sections: Any) -> Run:
    """Trains (or goes on with) the run `name`; a section given as a mapping is merged into the recipe's."""
    merged = {**deepcopy(dict(body)), "name": name}
    for section, value in sections.items():
        merged[section] = {**merged.get(section, {}), **value} if isinstance(value, dict) else value
    run = open_run(RunConfig.from_dict(merged))
    coordinator = train_in_process(run)
    assert coordinator.state.phase == "succeeded"
    return run


# ---- what the engine did ----


def records(run: Run) -> tuple[Record, ...]:
    return tuple(RunLog.open(run.store).records[1:])


def final_parameters(run: Run) -> Tensor:
    """One flat vector, in the order of named_parameters."""
    replica = replica_of(run.document)
    restore(run.store, RunLog.open(run.store), replica)
    return torch.cat([replica.parameters(fragment.index) for fragment in run.layout.fragments])


def contents(run: Run) -> list[tuple[bytes, bytes]]:
    """Records and payloads, byte for byte, but for the run id and the chain's digests, which hold it."""
    log = RunLog.open(run.store)
    return [(replace(r, run_id="", parent="").to_bytes(), log.payload(r)) for r in log.records[1:]]


def digests(run: Run) -> list[tuple[str, str]]:
    return [(record.parameters_digest, record.optimizer_digest) for record in records(run)]


# ---- the other side, in plain torch ----


def initial_model(run: Run) -> nn.Module:
    manifest = TokenShards.open(run.prepared_url).manifest
    return build_model(
        run.config.model,
        seed=run.config.seed,
        vocab_size=manifest.vocab_size,
        eos_token_id=manifest.eos_token_id,
    )


def batches_of(run: Run, share: Share) -> list[Tensor]:
    split = TokenShards.open(run.prepared_url).split("train")
    inner, data = run.config.inner, run.config.data
    found = list(batches(split, share.spent, inner.batch_size, data.sequence_length, run.config.seed))
    assert len(found) == inner.steps_per_round
    return found


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def set_parameters(model: nn.Module, values: Tensor) -> None:
    with torch.no_grad():
        for parameter, part in zip(model.parameters(), values.split([p.numel() for p in model.parameters()])):
            parameter.copy_(part.view(parameter.shape))


def adamw(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    inner = run.config.inner
    return torch.optim.AdamW(
        model.parameters(), inner.learning_rate, inner.betas, inner.epsilon, inner.weight_decay, fused=True
    )


def take_steps(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor], first: int) -> None:
    """The plain training loop, with the usual cosine to 5 % of the peak and gradients clipped to 1."""
    total = run.config.rounds * run.config.inner.steps_per_round
    for step, batch in enumerate(data, start=first):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / total))
            group["lr"] = run.config.inner.learning_rate * (0.05 + 0.95 * cosine)
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def diloco_by_hand(run: Run, outer_step: Callable[[Tensor, list[Tensor]], Tensor]) -> Tensor:
    """Algorithm 1 (arXiv 2311.08105): islands train alone, outer_step makes the next theta from theta and them all."""
    theta = flat(initial_model(run))
    models = {share.island: initial_model(run) for share in records(run)[0].shares}
    optimizers = {island: adamw(run, model) for island, model in models.items()}
    for record in records(run):
        for share in record.shares:
            model = models[share.island]
            set_parameters(model, theta)
            first = share.round * run.config.inner.steps_per_round
            take_steps(run, model, optimizers[share.island], batches_of(run, share), first)
        theta = outer_step(theta, [flat(model) for model in models.values()])
    return theta


def assert_close_and_moved(run: Run, expected: Tensor, tolerance: Mapping[str, float]) -> None:
    torch.testing.assert_close(final_parameters(run), expected, **tolerance)
    assert (expected - flat(initial_model(run))).abs().max() > MOVED


# ---- special cases of the algorithm ----


def test_one_island_with_outer_sgd_of_rate_1_is_plain_training(tiny: dict[str, Any]) -> None:
    run = train(tiny, "one", islands=1, sync=FLOAT32, outer={"optimizer": "sgd", "learning_rate": 1.0})
    model = initial_model(run)
    optimizer = adamw(run, model)
    for record in records(run):
        (share,) = record.shares
        take_steps(run, model, optimizer, batches_of(run, share), share.round * run.config.inner.steps_per_round)
    assert_close_and_moved(run, flat(model), ADAMW_TOLERANCE)


def test_one_inner_step_of_sgd_on_every_island_is_data_parallel_sgd(tiny: dict[str, Any]) -> None:
    run = train(
        tiny,
        "data-parallel",
        rounds=12,
        sync=FLOAT32,
        inner={**PLAIN_SGD, "steps_per_round": 1},
        outer={"optimizer": "sgd", "learning_rate": 1.0},
    )
    model = initial_model(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=PLAIN_SGD["learning_rate"])
    for record in records(run):
        data = [batch for share in record.shares for batch in batches_of(run, share)]
        assert len(data) == 3
        for batch in data:  # backward adds up: the gradient's mean over the islands' batches
            (model(input_ids=batch, labels=batch).loss / len(data)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close_and_moved(run, flat(model), SGD_TOLERANCE)


def test_outer_sgd_of_rate_1_is_the_average_of_separately_trained_islands(tiny: dict[str, Any]) -> None:
    run = train(tiny, "fedavg", sync=FLOAT32, outer={"optimizer": "sgd", "learning_rate": 1.0})
    averaged = diloco_by_hand(run, lambda theta, islands: torch.stack(islands).mean(0))
    assert_close_and_moved(run, averaged, ADAMW_TOLERANCE)


def test_outer_nesterov_is_torchs_sgd_on_the_mean_outer_gradient(tiny: dict[str, Any]) -> None:
    run = train(tiny, "nesterov", sync=FLOAT32, outer={"learning_rate": 0.7, "momentum": 0.9})
    outer = nn.Parameter(flat(initial_model(run)))
    optimizer = torch.optim.SGD([outer], lr=0.7, momentum=0.9, nesterov=True)

    def step(theta: Tensor, islands: list[Tensor]) -> Tensor:
        outer.grad = torch.stack([theta - island for island in islands]).mean(0)
        optimizer.step()
        return outer.detach().clone()

    assert run.config.rounds > 2
    assert_close_and_moved(run, diloco_by_hand(run, step), ADAMW_TOLERANCE)


def test_outer_nesterov_on_the_logged_gradients_is_torchs_sgd(tiny: dict[str, Any]) -> None:
    """The outer step by itself, with quantised gradients: here nothing can hide behind the inner loop."""
    run = train(tiny, "logged", outer={"learning_rate": 0.7, "momentum": 0.9})
    log, replica = RunLog.open(run.store), replica_of(run.document)
    outer = nn.Parameter(flat(initial_model(run)))
    optimizer = torch.optim.SGD([outer], lr=0.7, momentum=0.9, nesterov=True)
    for record in log.records[1:]:
        payload = torch.frombuffer(bytearray(log.payload(record)), dtype=torch.uint8)
        outer.grad = torch.empty_like(outer)
        replica.downlink.decode_(payload, 0, outer.numel(), outer.grad)
        optimizer.step()
    assert_close_and_moved(run, outer.detach(), SGD_TOLERANCE)


def test_islands_weighted_by_their_equal_tokens_are_weighted_uniformly(tiny: dict[str, Any]) -> None:
    uniform = train(tiny, "uniform", sync={"weighting": "uniform"})
    tokens = train(tiny, "tokens", sync={"weighting": "tokens"})
    assert digests(tokens) == digests(uniform)


# ---- the same run, cut or stopped otherwise ----


def test_three_fragments_in_float32_give_the_bits_of_one(tiny: dict[str, Any]) -> None:
    whole = train(tiny, "whole", sync=FLOAT32)
    cut = train(tiny, "cut", sync={**FLOAT32, "fragments": 3, "offsets": "together"})
    assert len(records(cut)) == 3 * len(records(whole))
    assert torch.equal(final_parameters(cut), final_parameters(whole))


def test_a_run_with_the_same_seed_writes_the_same_bytes_but_for_its_run_id(tiny: dict[str, Any]) -> None:
    first, second = train(tiny, "first"), train(tiny, "second")
    assert first.run_id != second.run_id
    assert contents(first) == contents(second)


def test_another_seed_gives_another_model(tiny: dict[str, Any]) -> None:
    first, second = train(tiny, "first"), train(tiny, "second", seed=8)
    assert (final_parameters(first) - final_parameters(second)).abs().max() > MOVED


@pytest.mark.parametrize("fragments", [1, 3])
def test_a_run_taken_up_again_after_any_round_ends_with_the_same_bits(tiny: dict[str, Any], fragments: int) -> None:
    """Fewer rounds would bend the cosine, hence a constant rate; the inner AdamW state comes from the checkpoints."""
    sections: dict[str, Any] = {
        "inner": {"schedule": "constant"},
        "sync": {"fragments": fragments, "offsets": "together"},
    }
    whole = train(tiny, "whole", **sections)
    for stop_after in (1, 2, 3):
        name = f"stopped-{stop_after}"
        train(tiny, name, **sections, rounds=stop_after)
        resumed = train(tiny, name, **sections)
        assert digests(resumed) == digests(whole)
        assert verify(resumed.store, replica_of).problems == ()
        assert {record.fence_epoch for record in records(resumed)} == {1, 2}


def test_a_finished_run_taken_up_again_is_finished(tiny: dict[str, Any]) -> None:
    first = train(tiny, "finished")
    before = contents(first)
    again = train(tiny, "finished")
    assert contents(again) == before


def test_a_finished_run_can_be_given_one_more_island_and_more_rounds(tiny: dict[str, Any]) -> None:
    train(tiny, "growing", islands=2, rounds=2)
    grown = train(tiny, "growing", islands=3, rounds=4)
    assert [len(record.shares) for record in records(grown)] == [2, 2, 3, 3]
    assert verify(grown.store, replica_of).problems == ()


def test_an_island_that_lost_its_checkpoints_goes_on_with_a_joiners_ramp(tiny: dict[str, Any]) -> None:
    """With SGD, which has no state, the ramp is all that the loss changes: lr (i + 1) / 4 for its first 4 steps."""
    sections = {
        "islands": 1,
        "sync": FLOAT32,
        "inner": {**PLAIN_SGD, "joiner_ramp_steps": 4},
        "outer": {"optimizer": "sgd", "learning_rate": 1.0},
    }
    stopped = train(tiny, "lost", **sections, rounds=2)
    shutil.rmtree(Path(stopped.store.url) / "islands")
    run = train(tiny, "lost", **sections)
    model = initial_model(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=PLAIN_SGD["learning_rate"])
    for record in records(run):
        for own_step, batch in enumerate(batches_of(run, record.shares[0])):
            ramp = (own_step + 1) / 4 if record.shares[0].round == 2 and own_step < 4 else 1.0
            optimizer.param_groups[0]["lr"] = PLAIN_SGD["learning_rate"] * ramp
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close_and_moved(run, flat(model), SGD_TOLERANCE)


def test_a_run_that_lost_all_checkpoints_still_ends_and_verifies(tiny: dict[str, Any]) -> None:
    sections = {"inner": {"schedule": "constant"}}
    whole = train(tiny, "whole", **sections)
    stopped = train(tiny, "bare", **sections, rounds=2)
    shutil.rmtree(Path(stopped.store.url) / "islands")
    bare = train(tiny, "bare", **sections)
    assert digests(bare)[:2] == digests(whole)[:2]
    assert digests(bare)[2:] != digests(whole)[2:]
    assert verify(bare.store, replica_of).problems == ()


def test_runs_that_share_a_folder_for_checkpoints_do_not_share_checkpoints(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    sections = {"inner": {"schedule": "constant", "checkpoints": str(tmp_path / "fast-disk")}}
    train(tiny, "stopped", **sections, rounds=2)
    whole = train(tiny, "whole", **sections)
    assert digests(train(tiny, "stopped", **sections)) == digests(whole)
