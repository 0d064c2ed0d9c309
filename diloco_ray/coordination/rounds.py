"""Outer steps and rounds: when a step is taken and with which contributions, and when a round is whole.

Islands that go in step (`closes: all`): a step is of one round and waits for every island at work on it, or for the
grace window; what comes later has expired. Otherwise a step takes what has come, and what comes later enters the next:
`arrival` takes each contribution by itself; `quorum` waits for so many, then for a window that adapts to the pace.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from diloco_ray.coordination import membership
from diloco_ray.coordination.admission import NORM_HISTORY
from diloco_ray.coordination.data_ledger import DataLedger
from diloco_ray.coordination.messages import CloseRound, Command, Committed, End, InnerPlan, Share, TakeOuterStep
from diloco_ray.coordination.state import Accepted, Key, RunState, ended, with_settled, with_version, without

Step = tuple[RunState, list[Command]]
Ready = tuple[str, tuple[Key, ...]]  # why, and what the step is made of


# ---- when an outer step is taken ----


def close_fragments(state: RunState, now_s: float) -> Step:
    commands: list[Command] = []
    for fragment in range(state.rules.num_fragments):
        ready = _ready(state, fragment, now_s)
        if ready:
            state, command = _close(state, fragment, *ready, now_s)
            commands.append(command)
    return state, commands


def next_look_s(state: RunState) -> float | None:
    """When a step may be taken though nothing more happens: the end of a grace window, or of a launch interval."""
    times = [when for p in range(state.rules.num_fragments) if (when := _grace_ends_s(state, p)) is not None]
    return min(times, default=None)


def _ready(state: RunState, fragment: int, now_s: float) -> Ready | None:
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
    ends_s = _grace_ends_s(state, fragment)
    if ends_s is not None and now_s >= ends_s:
        late = ", ".join(awaited)
        reason = f"{len(accepted)} of {len(accepted) + len(awaited)} in; {late} overran {rules.grace_s:g} s"
        return reason, tuple(accepted)
    return None


def _ready_with_quorum(state: RunState, fragment: int, accepted: dict[Key, Accepted], now_s: float) -> Ready | None:
    islands, present = {key[2] for key in accepted}, _present(state)
    ends_s = _grace_ends_s(state, fragment)
    if ends_s is None or now_s < _held_until_s(state, fragment):
        return None
    if islands.issuperset(present):
        return f"all {len(islands)} live islands in", tuple(accepted)
    if now_s >= ends_s and not _being_inspected(state, fragment):
        return f"{len(islands)} of {len(present)} in", tuple(accepted)
    return None


def _quorum_s(state: RunState, taken: list[Accepted]) -> float:
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
        for plan in _plans(state)
        if plan.round == version
        and plan.island not in contributed
        and membership.is_current(state.members, plan.island, plan.incarnation)
    ]


def _silent(state: RunState, round: int) -> list[str]:
    """Islands whose contribution to this round is dropped."""
    return [plan.island for plan in _plans(state) if plan.first_round <= round < plan.round]


def _plans(state: RunState) -> list[InnerPlan]:
    return [plan for plans in state.plans.values() for plan in plans]


def _grace_ends_s(state: RunState, fragment: int) -> float | None:
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


# ---- what an outer step takes in ----


def _close(
    state: RunState, fragment: int, reason: str, keys: tuple[Key, ...], now_s: float
) -> tuple[RunState, TakeOuterStep]:
    """Fixes who is in. A lease is spent with its last fragment; where islands go in step, the late lose theirs."""
    closing = fragment == state.closing_fragment
    version = state.versions[fragment]
    taken = [state.inbox[key] for key in keys]
    shares = tuple(
        Share(
            island=item.contribution.island,
            incarnation=item.contribution.incarnation,
            round=item.contribution.round,
            base_version=item.contribution.base_version,
            weight=_weight(state, item),
            tokens=item.lease.num_tokens if closing else 0,
            spent=item.lease.ranges if closing else (),
            payload_sha256=item.contribution.payload_sha256,
            payload_bytes=item.contribution.payload_bytes,
            norm=item.norm or 0.0,
        )
        for item in taken
    )
    ledger, plans = state.ledger, state.plans
    if closing:
        spent = {item.lease.id for item in taken}
        for lease_id in sorted(spent):
            ledger = ledger.settle(lease_id, "committed")
        if state.rules.in_step:
            ledger = _expire(state, ledger, version)
        else:
            plans = {name: tuple(p for p in mine if p.lease_id not in spent) for name, mine in plans.items()}
    state = replace(
        state,
        ledger=ledger,
        plans=plans,
        stepping={**state.stepping, fragment: keys},
        pace=state.pace.launched(fragment, now_s, _quorum_s(state, taken)),
    )
    return state, TakeOuterStep(fragment, _rounds_after(state), version, shares, ledger.account(), reason)


def _expire(state: RunState, ledger: DataLedger, round: int) -> DataLedger:
    """What is still leased for this round, or an earlier one, comes too late."""
    for plan in _plans(state):
        if plan.round <= round:
            ledger = ledger.settle(plan.lease_id, "expired")
    return ledger


def _weight(state: RunState, item: Accepted) -> float:
    """By the lease: an island's own word only makes it lighter. tokens^2 / steps is Decoupled DiLoCo's (2604.21428)."""
    lease = item.lease
    steps = min(max(1, item.contribution.inner_steps), item.inner_steps)
    tokens = lease.num_tokens * steps / item.inner_steps
    match state.rules.weighting:
        case "uniform":
            return 1.0
        case "tokens":
            return float(lease.num_tokens)
        case "tokens_squared_per_step":
            return tokens * (tokens / steps)
        case "examples":
            return float(state.ledger.shard_sizes[state.ledger.shard_of(lease.island)])


def _rounds_after(state: RunState) -> int:
    """Rounds that are whole once the steps under way are committed.

    Where islands do not go in step a round is counted by its tokens: as many as all islands take in H inner steps.
    """
    if state.rules.in_step:
        return min(version + (p in state.stepping) for p, version in enumerate(state.versions))
    per_round = state.rules.max_islands * state.rules.sequences_per_round * state.ledger.tokens_per_sequence
    return min(state.rules.num_rounds, state.ledger.account()["committed"] // per_round)


# ---- what a committed step changes ----


def committed(state: RunState, event: Committed) -> Step:
    fragment, base = event.fragment, event.version - 1
    if fragment not in state.stepping or base != state.versions[fragment]:
        return state, []
    keys = state.stepping[fragment]
    taken = [state.inbox[key] for key in keys]
    members = dict(state.members)
    for _, _, name in keys:
        members[name] = replace(members[name], strikes=0)
    settled = state.settled
    for item in taken:
        c = item.contribution
        settled = with_settled(settled, fragment, c.island, c.round, c.payload_sha256)
    norms = (*state.norms.get(fragment, ()), *(item.norm or 0.0 for item in taken))[-NORM_HISTORY:]
    state = replace(
        state,
        index=event.index,
        versions=with_version(state.versions, fragment, event.version),
        members=members,
        settled=settled,
        stepping=without(state.stepping, fragment),
        sent_back=frozenset(key for key in state.sent_back if key[0] != fragment),
        inbox={
            key: item
            for key, item in state.inbox.items()
            if key not in keys and not (state.rules.in_step and key[0] == fragment and key[1] <= base)
        },
        norms={**state.norms, fragment: norms},
        pace=state.pace.committed(fragment, event.now_s),
    )
    done = _rounds_after(state) if fragment == state.closing_fragment else state.round
    return _close_round(state, done, len({key[2] for key in keys})) if done > state.round else (state, [])


def _close_round(state: RunState, done: int, applied: int) -> Step:
    rules = state.rules
    last = done == rules.num_rounds
    close = CloseRound(
        round=done,
        index=state.index,
        alive=len(state.alive),
        contributed=len(state.offered),
        applied=applied,
        snapshot=last or done // rules.snapshot_every_rounds > state.round // rules.snapshot_every_rounds,
    )
    ledger, plans = state.ledger, state.plans
    if rules.in_step:
        ledger = _expire(state, ledger, done - 1)  # those given out after the closing fragment was
        plans = {name: tuple(plan for plan in mine if plan.round >= done) for name, mine in plans.items()}
    state = replace(state, ledger=ledger, round=done, plans=plans, offered=frozenset())
    if not last:
        return state, [close]
    reason = f"{done} rounds done"
    return replace(state, phase="succeeded", reason=reason), [close, End("succeeded", reason)]
