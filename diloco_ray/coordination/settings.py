"""How islands and coordinator agree: what a recipe says under `sync`, and under `experiment` what disturbs them.

A preset (`diloco_ray.presets`) is a name for some of these numbers; nothing below a recipe reads the name.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from diloco_ray.settings import Number, Settings

Preset = Literal["diloco", "fedavg", "streaming", "delayed", "eager", "async", "decoupled", "data_parallel"]
Closes = Literal["all", "quorum", "arrival"]
Weighting = Literal["uniform", "tokens", "tokens_squared_per_step", "examples"]


class SyncSettings(Settings):
    """Exchange and patience. Codec defaults: int8 both ways, within 0.1 % of float32 (docs/results)."""

    preset: Preset = Field("diloco", description="name of the algorithm: a few of the fields here at once")
    uplink: str = Field("int8", description="codec of the islands' outer gradients")
    downlink: str = Field("int8", description="codec of the combined outer gradient, which is what the log keeps")
    error_feedback: Number | None = Field(
        None, gt=0, le=1, description="beta: share of what the uplink's codec lost that the next round sends again"
    )
    downlink_error_feedback: bool = Field(False, description="what the downlink's codec lost joins the next outer step")
    fragments: int = Field(1, ge=1, description="parts of the model that take outer steps of their own")
    partition: Literal["sequential", "strided", "balanced"] = Field(
        "sequential", description="how tensors are put into fragments: runs of them | layers in turn | equal sizes"
    )
    offsets: Literal["spread", "together"] = Field(
        "spread", description="when in a round fragments are sent: evenly over it, the last at its end | all at its end"
    )
    overlap: int = Field(0, ge=0, description="tau: inner steps from sending a fragment to merging its outer step")
    mixing: Number = Field(0.0, ge=0, le=1, description="alpha: share of the island's own values kept at a merge")
    eager: bool = Field(False, description="an island takes its own part of the next outer step at once")
    closes: Closes = Field(
        "all", description="an outer step is taken when all live islands are in | a quorum is | one arrives"
    )
    weighting: Weighting = Field("uniform", description="of a contribution when combined")
    anchor: Literal["base", "present"] = Field(
        "base", description="what an outer gradient is measured from when the fragment has moved on meanwhile"
    )
    quorum: int | None = Field(
        None, ge=1, description="contributions that start the grace window (default: islands' min; 1 if closes=quorum)"
    )
    grace_s: Number = Field(600.0, gt=0, description="how long late islands are waited for once the quorum is in")
    grace_share: Number = Field(
        0.9, ge=0, le=1, description="gamma: of the slack that the overlap leaves, how much the grace window may take"
    )
    launch_interval_s: Number | None = Field(
        None, ge=0, description="least time between outer steps of one fragment (default: a round's, as measured)"
    )
    max_staleness: int = Field(64, ge=0, description="outer steps of its fragment that a contribution may lag behind")
    heartbeat_every_s: Number = Field(2.0, gt=0)
    heartbeat_timeout_s: Number = Field(60.0, gt=0, description="silence after which an island counts as lost")
    join_timeout_s: Number = Field(120.0, gt=0, description="wait for expected islands at a start before going without")
    waiting_timeout_s: Number = Field(1800.0, gt=0, description="wait with fewer than the least islands before failing")
    stall_timeout_s: Number = Field(1800.0, gt=0, description="an island whose inner loop stands still ends itself")
    coordinator_timeout_s: Number = Field(600.0, gt=0, description="how long an island waits for a silent coordinator")
    poll_s: Number = Field(
        1.0, gt=0, description="where islands meet the coordinator in the run store: longest pause between two looks"
    )
    max_norm_ratio: Number = Field(100.0, gt=1, description="an outer gradient this much above the median is refused")
    max_inbox_bytes: int = Field(
        2 * 1024**3, ge=0, description="of contributions that the coordinator holds; what no next step needs then waits"
    )

    @field_validator("overlap", mode="before")
    @classmethod
    def _is_a_number(cls, value: Any) -> Any:
        if value == "H":
            raise ValueError("H stands for the number of inner steps in a round; write inner.steps_per_round's number")
        return value

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> "SyncSettings":
        if self.heartbeat_timeout_s < 2 * self.heartbeat_every_s:
            least = 2 * self.heartbeat_every_s
            raise ValueError(
                f"heartbeat_timeout_s={self.heartbeat_timeout_s:g} is under two beats of heartbeat_every_s="
                f"{self.heartbeat_every_s:g}; choose at least {least:g}"
            )
        if self.closes == "arrival" and self.fragments > 1:
            raise ValueError(
                f"closes=arrival with fragments={self.fragments}: every arrival steps the whole model; "
                "choose sync.fragments=1, or sync.closes=quorum with outer.optimizer=nesterov"
            )
        if self.closes == "arrival" and self.quorum is not None:
            why = "every contribution is a step of its own, so a quorum means nothing"
            raise ValueError(f"closes=arrival with quorum={self.quorum}: {why}; leave sync.quorum at null")
        return self


class ExperimentSettings(Settings):
    """What the papers disturbed on purpose (arXiv 2311.08105, section 3): nothing, unless a recipe says so."""

    drop_probability: Number = Field(0.0, ge=0, lt=1, description="that an island's contribution is lost; it trains on")
    speeds: tuple[Annotated[Number, Field(gt=0, le=1)], ...] = Field(
        (),
        strict=False,
        description="of island 0, 1, ..: 0.25 takes four times as long for a step; 1 where none is given",
    )
    islands_by_round: Literal["constant", "doubling", "halving", "ramp_up", "ramp_down"] = Field(
        "constant",
        description="how many of the islands train: all | half, then all | all, then half | from one | to one",
    )
