"""How islands and coordinator agree: what a recipe says under `sync`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Closes = Literal["all", "quorum", "arrival"]
Weighting = Literal["uniform", "tokens", "tokens_squared_per_step", "examples"]


class SyncSettings(BaseModel):
    """Exchange and patience. Codec defaults: int8 both ways, within 0.1 % of float32 (docs/results)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uplink: str = Field("int8", description="codec of the islands' outer gradients")
    downlink: str = Field("int8", description="codec of the combined outer gradient, which is what the log keeps")
    fragments: int = Field(1, ge=1, description="parts of the model that take outer steps of their own")
    weighting: Literal["uniform", "tokens"] = Field("uniform", description="of a contribution when combined")
    quorum: int | None = Field(
        None, ge=1, description="contributions that start the grace window (default: islands' min)"
    )
    grace_s: float = Field(600.0, gt=0, description="how long late islands are waited for once the quorum is in")
    heartbeat_every_s: float = Field(2.0, gt=0)
    heartbeat_timeout_s: float = Field(60.0, gt=0, description="silence after which an island counts as lost")
    join_timeout_s: float = Field(120.0, gt=0, description="wait for expected islands at a start before going without")
    waiting_timeout_s: float = Field(1800.0, gt=0, description="wait with fewer than the least islands before failing")
    stall_timeout_s: float = Field(1800.0, gt=0, description="an island whose inner loop stands still ends itself")
    coordinator_timeout_s: float = Field(600.0, gt=0, description="how long an island waits for a silent coordinator")
    max_norm_ratio: float = Field(100.0, gt=1, description="an outer gradient this much above the median is refused")
