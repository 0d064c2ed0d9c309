"""Islands that train on different text, through the whole engine."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from diloco_ray.config import RunConfig
from diloco_ray.data.batches import batches
from diloco_ray.data.shards import TokenShards
from diloco_ray.document import replica_of
from diloco_ray.errors import ConfigError, DataError
from diloco_ray.ids import island_name
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.verify import VerifyReport, verify
from diloco_ray.run import Run, open_run
from diloco_ray.simulation.in_process import train_in_process

LETTERS = {"low": "abcdef", "middle": "ghijkl", "high": "uvwxyz"}


@pytest.fixture
def labelled(tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Two languages that share no letter, one row in three of the second; two islands."""
    rng = random.Random(2)
    languages = ["low", "low", "high"] * 40
    rows = [{"text": "".join(rng.choices(LETTERS[name], k=60)), "language": name} for name in languages]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {**tiny["data"], "corpus": str(path), "shards": "label", "label_column": "language"}
    return {**tiny, "islands": 2, "data": data}


def trained(body: dict[str, Any], *overrides: str) -> Run:
    run = open_run(RunConfig.from_dict(body, overrides))
    assert train_in_process(run).state.phase == "succeeded"
    return run


def checked(run: Run) -> VerifyReport:
    return verify(run.store, replica_of)


def letters_of(run: Run, island: str) -> set[str]:
    """Of all text that the log says the island was trained on."""
    split = TokenShards.open(run.prepared_url).split("train")
    config, shares = run.config, [s for record in RunLog.open(run.store).records for s in record.shares]
    ranges = [piece for share in shares if share.island == island for piece in share.spent]
    assert ranges
    length, batch = config.data.sequence_length, config.inner.batch_size
    tokens = torch.cat(list(batches(split, ranges, batch, length, config.seed)))
    return set(bytes(tokens.flatten().tolist()).decode()) - {"\0"}


@pytest.mark.parametrize("shards", ["label", "cluster"])
def test_each_island_trains_on_the_text_of_its_own_group_only(labelled: dict[str, Any], shards: str) -> None:
    run = trained(labelled, f"data.shards={shards}", "data.clusters=2")
    assert len(run.document["shard_sizes"]) == 2
    found = [letters_of(run, island_name(number)) for number in (0, 1)]
    assert sorted(map(sorted, found)) == [sorted(LETTERS["low"]), sorted(LETTERS["high"])]
    epochs = {(p.shard, p.epoch) for r in RunLog.open(run.store).records for s in r.shares for p in s.spent}
    assert len(epochs) > len({shard for shard, _ in epochs}), "the small group was not gone through"
    report = checked(run)
    assert report.ok, report.problems


def test_islands_beyond_the_number_of_groups_share_them(labelled: dict[str, Any]) -> None:
    run = trained(labelled, "islands=3", "rounds=2")
    names = ["high", "low", "high"]  # groups in the order of their names
    assert [letters_of(run, island_name(number)) for number in range(3)] == [set(LETTERS[name]) for name in names]
    assert checked(run).ok


def test_more_groups_than_islands_are_refused(labelled: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"made 2 groups, more than the 1 islands there may be: .* on low"):
        open_run(RunConfig.from_dict(labelled, ["islands=1"]))
    with pytest.raises(ConfigError, match=r"data\.clusters=3 is more than the 2 islands"):
        RunConfig.from_dict(labelled, ["data.shards=cluster", "data.clusters=3"])


def test_a_group_smaller_than_a_batch_is_refused_by_its_name(labelled: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"group 0 \(high\) has \d+ sequences of 32, fewer than batch_size=800"):
        open_run(RunConfig.from_dict(labelled, ["inner.batch_size=800"]))
