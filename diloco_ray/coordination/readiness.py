"""When an outer step is taken, and with which contributions.

Islands that go in step (`closes: all`): a step is of one round and waits for every island at work on it, or for the
grace window. Otherwise a step takes what has come: `arrival` takes each contribution by itself; `quorum` waits for so
many, then for a window that adapts to the pace.
"""

import math
from collections.abc import Iterable

from diloco_ray.coordination import membership
from diloco_ray.coordination.state import Accepted, Key, RunState, ended

Ready = tuple[str, tuple[Key, ...]]  # why, and what the step is made of


def ready(state: RunState, fragment: int, now_s: float) -> Ready | None:
    if ended(state) or fragment in state.stepping:
        return None
    accepted = state.accepted(fragment)
    if not accepted:
        return None
    match state.rules.closes:
        case "all":
            return _ready_in_step(state, fragment, accepted, now_s)
        case "arrival":
            first = min(accepted, key=lambda key: (accepted[key].accepted_s, key))
            return f"{first[2]} is in", (first,)
        case "quorum":
            return _ready_with_quorum(state, fragment, accepted, now_s)


def _ready_in_step(state: RunState, fragment: int, accepted: dict[Key, Accepted], now_s: float) -> Ready | None:
    version, rules = state.versions[fragment], state.rules
    if fragment == state.closing_fragment and min(state.versions[:fragment], default=version + 1) <= version:
        return None  # it ends every lease: what is still open then could be contributed to by nobody
    # Islands that worked on this round before a coordinator restart are expected back: wait for them too.
    awaited = [*_awaited(state, fragment), *membership.names(state.members, "expected")]
    least = min(rules.min_islands, rules.islands_in(version))
    if len(accepted) + len(_silent(state, version)) < max(1, least) or _being_inspected(state, fragment):
        return None
    if not awaited:
        return f"all {len(accepted)} live islands in", tuple(accepted)
    ends_s = grace_ends_s(state, fragment)
    if ends_s is not None and now_s >= ends_s:
        late = ", ".join(awaited)
        reason = f"{len(accepted)} of {len(accepted) + len(awaited)} in; {late} overran {rules.grace_s:g} s"
        return reason, tuple(accepted)
    return None


def _ready_with_quorum(state: RunState, fragment: int, accepted: dict[Key, Accepted], now_s: float) -> Ready | None:
    islands, present = {key[2] for key in accepted}, _present(state)
    ends_s = grace_ends_s(state, fragment)
    if ends_s is None and _stands_still(state):
        return f"{len(islands)} of {len(present)} in; the others wait for steps of other fragments", tuple(accepted)
    if ends_s is None or now_s < _held_until_s(state, fragment):
        return None
    if islands.issuperset(present):
        return f"all {len(islands)} live islands in", tuple(accepted)
    if now_s >= ends_s and not _being_inspected(state, fragment):
        return f"{len(islands)} of {len(present)} in", tuple(accepted)
    return None


def _stands_still(state: RunState) -> bool:
    """Whether each island here waits for the step of the fragment that it sent last, and none of these has its quorum.

    Without overlap, islands at different places of their rounds would wait for each other for ever. Fragments are
    looked at in their order, so those that are behind go on until all are at one fragment, at the latest at the last.
    """
    fragments = range(state.rules.num_fragments)
    if state.rules.overlap or state.stepping or any(grace_ends_s(state, p) is not None for p in fragments):
        return False
    held, items = {plan.lease_id for plan in state.all_plans}, state.inbox.values()
    sent = [item for item in items if item.norm is not None and held & {item.contribution.lease_id, item.again}]
    return {item.contribution.island for item in sent}.issuperset(_present(state))


def quorum_s(state: RunState, taken: list[Accepted]) -> float:
    """From the first contribution to the one that made the quorum."""
    times = _arrivals_s(taken)
    return times[min(_quorum(state), len(times)) - 1] - times[0]


def _quorum(state: RunState) -> int:
    rules = state.rules
    return rules.quorum if rules.in_step else min(rules.quorum, max(1, len(_present(state))))


def _present(state: RunState) -> tuple[str, ...]:
    """The living, and those that worked on before a coordinator restart: they are expected back."""
    return (*state.alive, *membership.names(state.members, "expected"))


def _arrivals_s(items: Iterable[Accepted]) -> list[float]:
    """When each island was first in, earliest first."""
    first_s: dict[str, float] = {}
    for item in items:
        name = item.contribution.island
        first_s[name] = min(item.accepted_s, first_s.get(name, item.accepted_s))
    return sorted(first_s.values())


def _being_inspected(state: RunState, fragment: int) -> bool:
    return any(key[0] == fragment and item.norm is None for key, item in state.inbox.items())


def _awaited(state: RunState, fragment: int) -> list[str]:
    """Islands at work on the fragment's round that have not contributed to it."""
    version = state.versions[fragment]
    contributed = {key[2] for key in state.accepted(fragment)}
    return [
        plan.island
        for plan in state.all_plans
        if plan.round == version
        and plan.island not in contributed
        and membership.is_current(state.members, plan.island, plan.incarnation)
    ]


def _silent(state: RunState, round: int) -> list[str]:
    """Islands whose contribution to this round is dropped."""
    return [plan.island for plan in state.all_plans if plan.first_round <= round < plan.round]


def grace_ends_s(state: RunState, fragment: int) -> float | None:
    """None: the quorum is not in, so the window has not begun."""
    rules, accepted = state.rules, state.accepted(fragment)
    if rules.closes == "arrival" or not accepted:
        return None
    times, quorum = _arrivals_s(accepted.values()), _quorum(state)
    if rules.in_step:
        quorum = max(1, quorum - len(_silent(state, state.versions[fragment])))
    if len(times) < quorum:
        return None
    quorum_since_s = times[quorum - 1]
    if rules.in_step:
        return quorum_since_s + rules.grace_s
    grace_s = state.pace.grace_s(rules.overlap, rules.grace_share, rules.grace_s)
    return max(quorum_since_s + grace_s, _held_until_s(state, fragment))


def _held_until_s(state: RunState, fragment: int) -> float:
    """Steps of one fragment are a round apart, or on a fast network each island's arrival would be a step."""
    interval_s = state.rules.launch_interval_s
    if interval_s is None:
        interval_s = state.rules.inner_steps_per_round * state.pace.fastest_step_s
    return state.pace.launched_s.get(fragment, -math.inf) + interval_s
