"""Outer steps and rounds: what a step takes in, what it ends, and when a round is whole.

Islands that go in step (`closes: all`): a step is of one round; what comes later has expired. Otherwise a step takes
what has come, and what comes later enters the next. When it is taken is decided in `readiness`.
"""

from dataclasses import replace

from diloco_ray.coordination.admission import NORM_HISTORY
from diloco_ray.coordination.data_ledger import DataLedger
from diloco_ray.coordination.messages import CloseRound, Command, Committed, End, Share, TakeOuterStep
from diloco_ray.coordination.readiness import grace_ends_s, quorum_s, ready
from diloco_ray.coordination.state import Accepted, Key, RunState, with_settled, with_version, without

Step = tuple[RunState, list[Command]]


def close_fragments(state: RunState, now_s: float) -> Step:
    commands: list[Command] = []
    for fragment in range(state.rules.num_fragments):
        found = ready(state, fragment, now_s)
        if found:
            state, command = _close(state, fragment, *found, now_s)
            commands.append(command)
    return state, commands


def next_look_s(state: RunState) -> float | None:
    """When a step may be taken though nothing more happens: the end of a grace window, or of a launch interval."""
    times = [when for p in range(state.rules.num_fragments) if (when := grace_ends_s(state, p)) is not None]
    return min(times, default=None)


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
        pace=state.pace.launched(fragment, now_s, quorum_s(state, taken)),
    )
    return state, TakeOuterStep(fragment, _rounds_after(state), version, shares, ledger.account(), reason)


def _expire(state: RunState, ledger: DataLedger, round: int) -> DataLedger:
    """What is still leased for this round, or an earlier one, comes too late."""
    for plan in state.all_plans:
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
    told = {name: count - 1 for name, count in state.told.items() if count > 1}
    state = replace(state, ledger=ledger, round=done, plans=plans, offered=frozenset(), told=told)
    if not last:
        return state, [close]
    reason = f"{done} rounds done"
    return replace(state, phase="succeeded", reason=reason), [close, End("succeeded", reason)]
