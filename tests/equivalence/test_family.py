"""The presets are one engine: where their numbers coincide, so do their bits; and each trains, ends and verifies."""

from typing import Any

import pytest
import torch

from diloco_ray.document import replica_of
from diloco_ray.log.verify import verify
from diloco_ray.observe.events import of_kind, read_events
from tests.equivalence.test_identities import FLOAT32, digests, final_parameters, records, train

pytestmark = pytest.mark.usefixtures("one_thread")


def preset(tiny: dict[str, Any], name: str, run_name: str = "", **sections: Any) -> Any:
    sync = {"preset": name, **sections.pop("sync", {})}
    return train(tiny, run_name or name, sync=sync, **sections)


# ---- where the numbers coincide ----


def test_streaming_one_fragment_without_overlap_is_diloco(tiny: dict[str, Any]) -> None:
    diloco = train(tiny, "diloco", sync=FLOAT32)
    alone = {**FLOAT32, "fragments": 1, "partition": "sequential", "overlap": 0, "mixing": 0.0}
    streaming = preset(tiny, "streaming", sync=alone, outer={"learning_rate": 0.7})
    assert digests(streaming) == digests(diloco)


def test_fragments_sent_together_without_overlap_are_diloco(tiny: dict[str, Any]) -> None:
    diloco = train(tiny, "diloco", sync=FLOAT32)
    together = {
        **FLOAT32,
        "fragments": 3,
        "partition": "sequential",
        "overlap": 0,
        "mixing": 0.0,
        "offsets": "together",
    }
    streaming = preset(tiny, "streaming", sync=together, outer={"learning_rate": 0.7})
    assert torch.equal(final_parameters(streaming), final_parameters(diloco))


def test_decoupled_with_one_fragment_and_everybody_in_the_quorum_is_diloco(tiny: dict[str, Any]) -> None:
    diloco = train(tiny, "diloco", sync=FLOAT32)
    alone = {**FLOAT32, "fragments": 1, "partition": "sequential", "overlap": 0, "quorum": 3, "weighting": "uniform"}
    decoupled = preset(tiny, "decoupled", sync=alone, outer={"combine": "mean"})
    assert digests(decoupled) == digests(diloco)


def test_eager_with_one_island_is_undelayed(tiny: dict[str, Any]) -> None:
    """Up to rounding: one's own replica is kept as the global one and an offset. The log lags by a round, so the
    islands are compared: what was sent in each round is what an island that does not wait for anybody sends."""
    rounds = {"islands": 1, "rounds": 4, "inner": {"schedule": "constant"}}
    undelayed = train(tiny, "undelayed", sync=FLOAT32, **rounds)
    eager = preset(tiny, "eager", sync=FLOAT32, **rounds)
    delayed = preset(tiny, "delayed", sync=FLOAT32, **rounds)
    expected = final_parameters(undelayed)
    torch.testing.assert_close(final_parameters(eager), expected, rtol=0.0, atol=1e-5)
    assert (final_parameters(delayed) - expected).abs().max() > 1e-3


def test_one_delayed_nesterov_step_a_round_is_nesterov(tiny: dict[str, Any]) -> None:
    diloco = train(tiny, "diloco", sync=FLOAT32)
    other = train(tiny, "other", sync=FLOAT32, outer={"optimizer": "delayed_nesterov", "arrivals": 1})
    torch.testing.assert_close(final_parameters(other), final_parameters(diloco), rtol=0.0, atol=1e-6)


# ---- every preset, to the end ----

SPEEDS = {"experiment": {"speeds": [1.0, 0.5]}}
FAMILY: list[tuple[str, dict[str, Any]]] = [
    ("diloco", {}),
    ("fedavg", {}),
    ("streaming", {"sync": {"fragments": 2, "overlap": 2}}),
    ("streaming", {"sync": {"fragments": 2, "overlap": 5, "offsets": "together"}}),
    ("streaming", {"sync": {"fragments": 4, "partition": "balanced", "overlap": 6, "mixing": 0.25}}),
    ("delayed", {}),
    ("delayed", {"sync": {"fragments": 3}}),
    ("eager", {}),
    ("eager", {"sync": {"fragments": 2}}),
    ("async", SPEEDS),
    ("decoupled", {"sync": {"fragments": 4}}),
    ("decoupled", {"sync": {"fragments": 4}, **SPEEDS}),
    ("decoupled", {"sync": {"fragments": 4, "anchor": "present"}, **SPEEDS}),
    ("data_parallel", {"rounds": 1}),
    ("diloco", {"experiment": {"drop_probability": 0.5}}),
    ("diloco", {"experiment": {"drop_probability": 0.5}, "sync": {"fragments": 2, "overlap": 2}}),
    ("diloco", {"experiment": {"islands_by_round": "ramp_up"}}),
    ("diloco", {"sync": {"uplink": "topk", "error_feedback": 0.95}}),
    ("diloco", {"sync": {"uplink": "int4", "downlink": "int4", "downlink_error_feedback": True}}),
    ("streaming", {"sync": {"partition": "balanced", "error_feedback": 1.0, "downlink_error_feedback": True}}),
]


@pytest.mark.parametrize(("name", "sections"), FAMILY)
def test_it_trains_and_verifies_and_repeats_itself(tiny: dict[str, Any], name: str, sections: dict[str, Any]) -> None:
    first = preset(tiny, name, "first", **sections)
    report = verify(first.store, replica_of)
    assert report.problems == ()
    losses = [event["loss"] for event in of_kind(read_events(first.store), "evaluation")]
    assert losses[-1] < losses[0] - 0.1
    account = records(first)[-1].tokens
    inner, config = first.config.inner, first.config
    tokens = config.rounds * inner.steps_per_round * inner.batch_size * config.data.sequence_length
    if not config.experiment.drop_probability and config.experiment.islands_by_round == "constant":
        assert 3 * tokens <= account["committed"] < 3 * tokens + 3 * tokens / config.rounds
    second = preset(tiny, name, "second", **sections)
    assert digests(second) == digests(first)


@pytest.mark.parametrize(
    "sections",
    [
        {"sync": {"uplink": "topk", "error_feedback": 0.95}},
        {"sync": {"uplink": "int4", "downlink": "int4", "downlink_error_feedback": True, "error_feedback": 1.0}},
        {"inner": {"optimizer": "muon"}},
    ],
)
def test_what_an_island_and_the_coordinator_keep_outlives_them(tiny: dict[str, Any], sections: dict[str, Any]) -> None:
    sections = {**sections, "inner": {"schedule": "constant", **sections.get("inner", {})}}
    whole = train(tiny, "whole", **sections)
    for stop_after in (1, 3):
        name = f"stopped-{stop_after}"
        train(tiny, name, **sections, rounds=stop_after)
        assert digests(train(tiny, name, **sections)) == digests(whole)


def test_statistics_of_outer_gradients_are_in_the_events(tiny: dict[str, Any]) -> None:
    run = train(tiny, "statistics", outer={"statistics": True})
    for event in of_kind(read_events(run.store), "outer_step"):
        assert len(event["norms"]) == len(event["islands"]) == len(event["cosines"]) == 3
        assert all(norm > 0 for norm in event["norms"])
        assert all(0.0 < cosine < 1.0 for cosine in event["cosines"])
