"""What the papers disturb on purpose: contributions lost by chance, and islands that come and go by a schedule."""

import hashlib

from diloco_ray.coordination.state import Rules
from diloco_ray.ids import island_name


def is_dropped(rules: Rules, island: str, round: int) -> bool:
    """The experiment of DiLoCo (arXiv 2311.08105, "Asynchronous communication"): a contribution is lost by chance.

    Drawn from the seed. Where chance takes all of a round, the one with the best luck is kept.
    """
    if not rules.drop_probability:
        return False
    luck = {name: _luck(rules.drop_seed, name, round) for name in map(island_name, range(rules.max_islands))}
    mine = luck.get(island, 1.0)
    return mine < rules.drop_probability and mine < max(luck.values())


def islands_by_round(schedule: str, num_islands: int, num_rounds: int) -> tuple[int, ...]:
    """The compute schedules of DiLoCo (arXiv 2311.08105, "Adaptive compute pool"): how many islands train, by round."""
    half = max(1, num_islands // 2)
    rounds = range(num_rounds)
    match schedule:
        case "doubling":
            return tuple(half if 2 * round < num_rounds else num_islands for round in rounds)
        case "halving":
            return tuple(num_islands if 2 * round < num_rounds else half for round in rounds)
        case "ramp_up":
            return tuple(1 + round * num_islands // num_rounds for round in rounds)
        case "ramp_down":
            return tuple(num_islands - round * num_islands // num_rounds for round in rounds)
        case _:
            return ()


def _luck(seed: int, island: str, round: int) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}/drop/{island}/{round}".encode()).digest()[:6], "little") / 2**48
