"""Two ranks are one island: the same result as one process with the same batch, and a word on whom they missed."""

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from diloco_ray.algorithm.codecs import get_codec
from diloco_ray.algorithm.fragments import partition
from diloco_ray.algorithm.outer_gradient import encode_outer_gradient_
from diloco_ray.config import RunConfig
from diloco_ray.document import replica_of
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.snapshot import restore
from diloco_ray.log.verify import verify
from diloco_ray.run import Run, open_run
from diloco_ray.simulation.in_process import train_in_process
from tests.island.gang_room import NUM_RANKS, on_ranks, train_all
from tests.island.gang_work import (
    SHAPES,
    decide_all,
    die_and_come_back,
    encode_on_ranks,
    lead_for_long,
    made_up,
    miss_each_other,
)

FLOAT32 = {"uplink": "float32", "downlink": "float32"}
INT4 = {"uplink": "int4", "downlink": "int4", "fragments": 3}

NOBODY_WAITS = {
    "closes": "quorum",
    "quorum": 1,
    "fragments": 2,
    "overlap": 2,
    "grace_share": 0.0,
    "launch_interval_s": 0,
}

# What the islands of a run are like, and how far the final parameters may be from those of one process, as a share of
# how far training has moved them. Two ranks add up the halves of a sum that one process adds up in one go, and AdamW
# makes more of that where a gradient is near 0; of four bits, rounding flips some to the next level.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({"sync": FLOAT32}, 1e-5),
    "sgd": ({"sync": FLOAT32, "inner": {"optimizer": "sgd", "learning_rate": 0.1}}, 1e-5),
    "int4": ({"sync": INT4}, 0.01),
    "two_islands": ({"islands": 2, "sync": {**FLOAT32, "fragments": 2}}, 1e-5),
    "overlap": ({"islands": 2, "sync": {**FLOAT32, "fragments": 3, "overlap": 2, "mixing": 0.5}}, 1e-5),
    "delayed": ({"sync": {**FLOAT32, "overlap": 6}}, 1e-5),
    "eager": ({"islands": 2, "sync": {**FLOAT32, "overlap": 6, "eager": True}}, 1e-5),
    "feedback": ({"sync": {**INT4, "uplink": "topk", "error_feedback": 0.95}}, 0.01),
    "parts": ({"sync": FLOAT32, "inner": {"accumulate": 2}}, 1e-5),
    "arrival": ({"sync": {**FLOAT32, "closes": "arrival"}, "outer": {"optimizer": "delayed_nesterov"}}, 1e-5),
    "quorum": ({"sync": {**FLOAT32, **NOBODY_WAITS}}, 1e-5),
    "present": ({"sync": {**FLOAT32, **NOBODY_WAITS, "anchor": "present"}}, 1e-5),
    "dropped": ({"islands": 2, "sync": FLOAT32, "experiment": {"drop_probability": 0.4}}, 1e-5),
}


def recipe(tiny: dict[str, Any], name: str, parallel: str | None, sections: dict[str, Any]) -> dict[str, Any]:
    """parallel: None for one process."""
    body = {**deepcopy(tiny), "name": f"{name}-{parallel or 'alone'}", "islands": 1}
    for section, value in sections.items():
        body[section] = {**body.get(section, {}), **value} if isinstance(value, dict) else value
    body["inner"] |= {"ranks": NUM_RANKS, "parallel": parallel} if parallel else {}
    return body


def final_parameters(run: Run, at: int | None = None) -> torch.Tensor:
    replica = replica_of(run.document)
    restore(run.store, RunLog.open(run.store), replica, at)
    return torch.cat([replica.parameters(fragment.index) for fragment in run.layout.fragments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Any]:
    """Every case by both ways of sharing, in one pair of processes; what each rank says about it, by the run's name."""
    tiny = module_recipe(corpus, tmp_path_factory.mktemp("gang"))
    bodies = [recipe(tiny, name, way, sections) for name, (sections, _) in CASES.items() for way in ("ddp", "fsdp")]
    for body in bodies:
        open_run(RunConfig.from_dict(body))  # not by both ranks at once
    answers = on_ranks(train_all, {"recipes": bodies}, tmp_path_factory.mktemp("ranks") / "all")
    assert None not in answers, answers
    by_name = {body["name"]: [found[number] for found in answers] for number, body in enumerate(bodies)}
    return {"tiny": tiny, "said": by_name}


def module_recipe(corpus: Path, folder: Path) -> dict[str, Any]:
    """As `tiny`; its embedding's 257 rows do not fall evenly on two ranks."""
    return {
        "name": "tiny",
        "seed": 7,
        "islands": 1,
        "rounds": 4,
        "data": {"corpus": str(corpus), "sequence_length": 32, "validation_fraction": 0.05},
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 63,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
            }
        },
        "inner": {"steps_per_round": 6, "batch_size": 4, "learning_rate": 3e-3},
        "evaluation": {"every_rounds": 9, "num_sequences": 4, "sample_tokens": 0},
        "storage": {"path": str(folder / "runs"), "snapshot_every_rounds": 2},
    }


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_what_one_process_gives(trained: dict[str, Any], name: str, way: str) -> None:
    sections, tolerance = CASES[name]
    said = trained["said"][f"{name}-{way}"]
    assert all("error" not in answer for answer in said), said
    assert said[0]["phase"] == "succeeded"
    run = open_run(RunConfig.from_dict(recipe(trained["tiny"], name, way, sections)))
    assert verify(run.store, replica_of).problems == ()
    alone = open_run(RunConfig.from_dict(recipe(trained["tiny"], name, None, sections)))
    train_in_process(alone)
    expected, began = final_parameters(alone), final_parameters(alone, 0)
    difference = (final_parameters(run) - expected).norm() / (expected - began).norm()
    assert difference < tolerance
    assert len(RunLog.open(run.store).records) == len(RunLog.open(alone.store).records)


def test_under_fsdp_a_rank_holds_its_share_of_everything(trained: dict[str, Any]) -> None:
    """Of parameters and optimizer by rows, of replica and base by blocks of 256: within a tenth of the half."""
    whole = open_run(RunConfig.from_dict(recipe(trained["tiny"], "plain", "ddp", CASES["plain"][0]))).layout.num_values
    for answer in trained["said"]["plain-fsdp"]:
        held = {name: num_bytes / (4 * whole) for name, num_bytes in answer["bytes"].items()}
        assert held == pytest.approx({"parameters": 0.5, "optimizer": 1.0, "replica": 1.0, "base": 0.5}, rel=0.1)
    for answer in trained["said"]["plain-ddp"]:
        held = {name: num_bytes / (4 * whole) for name, num_bytes in answer["bytes"].items()}
        assert held == pytest.approx({"parameters": 1.0, "optimizer": 2.0, "replica": 1.0, "base": 0.5}, rel=0.1)


# ---- one exchange, without a model ----


def test_two_ranks_encode_the_bytes_of_the_whole(tmp_path: Path) -> None:
    codecs = ["float32", "int8", "int4", "topk"]
    answers = on_ranks(encode_on_ranks, {"codecs": codecs}, tmp_path / "ranks")
    base, tensors = made_up()
    island = torch.empty(base.numel())
    partition(SHAPES).fragments[0].gather_(tensors, island)
    for name in codecs:
        codec = get_codec(name)
        payload = torch.empty(codec.num_bytes(base.numel()), dtype=torch.uint8)
        stats = encode_outer_gradient_(base, island, codec, payload)
        for way in ("whole", "sharded"):
            bytes_of_all, norm = answers[0][f"{name}-{way}"]
            assert bytes_of_all == payload.tolist()
            assert norm == pytest.approx(stats.norm, rel=1e-6)


# ---- ranks that are missed ----


@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_a_rank_that_ends_or_hangs_is_named_by_the_one_that_waits(tmp_path: Path, how: str) -> None:
    answers = on_ranks(miss_each_other, {"how": how, "sleep_s": 10}, tmp_path / "ranks", timeout_s=5.0)
    assert "RankLostError: rank 0 of 2 waited" in answers[0]["error"]
    assert "for rank 1 (plan)" in answers[0]["error"]
    assert "cluster.rank_timeout_s is 5" in answers[0]["error"]


def test_rank_0_may_be_busy_for_longer_than_the_others_would_wait_for_a_word_of_it(tmp_path: Path) -> None:
    answers = on_ranks(lead_for_long, {"sleep_s": 7}, tmp_path / "ranks", timeout_s=5.0)
    elsewhere = "RankLostError: another rank of this island has failed: "
    assert answers[0] == ["DataError: no text is left", "PreemptedError: ", "DeadlineError: no hello for 1 s"]
    assert answers[1] == [f"{elsewhere}no text is left", "PreemptedError: ", f"{elsewhere}no hello for 1 s"]


def test_what_rank_0_decides_and_what_any_rank_meets_reaches_all(tmp_path: Path) -> None:
    first, second = on_ranks(decide_all, {}, tmp_path / "ranks")
    assert first[:2] == second[:2] == [[0, 200, 300, 5000], [True, False]]
    assert first[2] == ["DataError: no text is left", "PreemptedError: "]
    assert second[2] == ["RankLostError: another rank of this island has failed: no text is left", "PreemptedError: "]


@pytest.mark.parametrize(("way", "forgets"), [("fsdp", False), ("ddp", True)])
def test_a_lost_rank_costs_the_open_round_and_the_same_ranks_go_on_bit_for_bit(
    trained: dict[str, Any], tmp_path: Path, way: str, forgets: bool
) -> None:
    """Unless one of them has lost its checkpoint: then all begin with a fresh optimizer, and agree."""
    body = {**recipe(trained["tiny"], "plain", way, CASES["plain"][0]), "name": f"lost-{way}"}
    run = open_run(RunConfig.from_dict(body))
    answers = on_ranks(die_and_come_back, {"recipe": body, "dies": True}, tmp_path / "first")
    assert "for rank 1" in answers[0]["error"] or "Connection" in answers[0]["error"]
    assert answers[1] is None
    assert [record.round for record in RunLog.open(run.store).records] == [0, 1, 2]
    if forgets:
        shutil.rmtree(Path(run.store.url) / "islands" / "island-00" / f"{way}-rank-1-of-2")
    answers = on_ranks(die_and_come_back, {"recipe": body, "dies": False}, tmp_path / "second")
    assert answers[0]["phase"] == "succeeded"
    whole = open_run(RunConfig.from_dict(recipe(trained["tiny"], "plain", way, CASES["plain"][0])))
    assert torch.equal(final_parameters(run), final_parameters(whole)) != forgets
    assert verify(run.store, replica_of).problems == ()
