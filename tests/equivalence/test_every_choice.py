"""Every combine and every codec, from a recipe to a verified run on the real engine."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diloco_ray.algorithm.codecs import CODEC_NAMES, DOWNLINK_CODEC_NAMES, get_codec
from diloco_ray.algorithm.combine import COMBINES
from diloco_ray.algorithm.settings import OuterSettings
from diloco_ray.config import RunConfig
from diloco_ray.document import replica_of
from diloco_ray.errors import ClusterError, ConfigError, RunMismatchError
from diloco_ray.log.record import Record
from diloco_ray.log.run_log import RunLog
from diloco_ray.log.verify import verify
from diloco_ray.run import Run, open_run
from diloco_ray.simulation.in_process import train_in_process


def train(tiny: dict[str, Any], *overrides: str) -> tuple[Run, tuple[Record, ...]]:
    run = open_run(RunConfig.from_dict(tiny, ["rounds=2", "inner.steps_per_round=4", *overrides]))
    assert train_in_process(run).state.phase == "succeeded"
    assert verify(run.store, replica_of).problems == ()
    records = tuple(RunLog.open(run.store).records[1:])
    assert [len(record.shares) for record in records] == [3, 3]
    return run, records


@pytest.mark.parametrize("name", COMBINES)
def test_a_recipe_names_its_combine_and_the_run_verifies(tiny: dict[str, Any], name: str) -> None:
    """The first outer step combines, byte for byte, what the islands of any such run send; here, in float32."""
    float32 = ("sync.uplink=float32", "sync.downlink=float32")
    run, records = train(tiny, "name=chosen", f"outer.combine={name}", *float32)
    _, by_default = train(tiny, "name=default", *float32)
    sent, sent_by_default = ([share.payload_sha256 for share in first.shares] for first in (records[0], by_default[0]))
    assert sent == sent_by_default
    assert (records[0].payload_sha256 == by_default[0].payload_sha256) == (name == "mean")
    assert run.document["identity"]["outer.combine"] == name


@pytest.mark.parametrize("uplink", CODEC_NAMES)
def test_every_codec_serves_both_ways_but_topk_only_up(tiny: dict[str, Any], uplink: str) -> None:
    downlink = uplink if uplink in DOWNLINK_CODEC_NAMES else "int8"
    run, records = train(tiny, f"sync.uplink={uplink}", f"sync.downlink={downlink}")
    num_up, num_down = (get_codec(name).num_bytes(run.layout.num_values) for name in (uplink, downlink))
    assert {record.codec for record in records} == {downlink}
    assert {share.payload_bytes for record in records for share in record.shares} == {num_up}
    for record in records:
        payload = torch.frombuffer(bytearray(RunLog.open(run.store).payload(record)), dtype=torch.uint8)
        assert payload.numel() == num_down


def test_topk_is_refused_as_downlink(tiny: dict[str, Any]) -> None:
    assert set(CODEC_NAMES) - set(DOWNLINK_CODEC_NAMES) == {"topk"}
    with pytest.raises(ConfigError, match=r"sync\.downlink=topk is no codec of the downlink"):
        RunConfig.from_dict(tiny, ["sync.downlink=topk"])


def test_another_combine_is_another_run(tiny: dict[str, Any], tmp_path: Path) -> None:
    train(tiny)
    with pytest.raises(RunMismatchError, match=r"outer\.combine: 'mean' -> 'median'"):
        open_run(RunConfig.from_dict(tiny, ["outer.combine=median"]))


@pytest.mark.parametrize("name", ["trimmed_mean", "median"])
def test_weights_that_would_not_count_are_refused(tiny: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"sync.weighting=tokens with outer.combine={name}"):
        RunConfig.from_dict(tiny, ["sync.weighting=tokens", f"outer.combine={name}"])
    assert RunConfig.from_dict(tiny, ["sync.weighting=tokens", "outer.combine=radial"]).outer.combine == "radial"


def test_numbers_that_follow_from_the_islands_stay_when_islands_change(tiny: dict[str, Any]) -> None:
    """A rate of 0.6 for two islands and a momentum at every second outer step, also after a resume with five."""
    chosen = ("outer.learning_rate=by_islands", "outer.optimizer=delayed_nesterov", "sync.closes=arrival")
    run = open_run(RunConfig.from_dict(tiny, ["islands=2", "rounds=2", *chosen]))
    train_in_process(run)
    run = open_run(RunConfig.from_dict(tiny, ["islands=[2, 5]", "rounds=6", *chosen]))
    expected = OuterSettings(learning_rate=0.6, optimizer="delayed_nesterov", arrivals=2)
    assert run.coordinator_job().outer == run.island_job().outer == expected
    assert train_in_process(run).state.phase == "succeeded"
    assert verify(run.store, replica_of).problems == ()
    assert replica_of(run.document).optimizer == expected.build()


def test_a_run_that_diverges_everywhere_fails_at_once_and_says_who_is_quarantined_and_why(tiny: dict[str, Any]) -> None:
    run = open_run(RunConfig.from_dict(tiny, ["inner.learning_rate=1e30", "inner.clip_norm=null"]))
    with pytest.raises(ClusterError, match=r"island-0\d is quarantined after 3 bad payloads in a row: \w+: ") as caught:
        train_in_process(run)
    assert caught.value.remedy
