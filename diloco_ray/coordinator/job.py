"""What a coordinator is told, once."""

from dataclasses import dataclass

from diloco_ray.algorithm.fragments import Layout
from diloco_ray.algorithm.settings import OuterSettings
from diloco_ray.coordination.state import Rules


@dataclass(frozen=True)
class CoordinatorJob:
    """shard_sizes: sequences in one epoch of each data shard. expected: islands that a first round waits for."""

    rules: Rules
    layout: Layout
    outer: OuterSettings
    downlink: str
    downlink_error_feedback: bool
    shard_sizes: tuple[int, ...]
    sequence_length: int
    expected: tuple[str, ...]
    join_timeout_s: float
    keep_snapshots: int
