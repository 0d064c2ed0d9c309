"""Rounds: who gets which work, when an outer step is taken, when a round is whole, how long too few are waited for."""

from dataclasses import replace

from diloco_ray.coordination import membership
from diloco_ray.coordination.admission import NORM_HISTORY, ready_to_step
from diloco_ray.coordination.messages import CloseRound, Command, Committed, End, InnerPlan, Note, Share, TakeOuterStep
from diloco_ray.coordination.state import Rules, RunState, ended, of_other_fragments, with_version

Step = tuple[RunState, list[Command]]


def has_contributed(state: RunState, island: str) -> bool:
    return island in state.accepted(state.closing_fragment)


def sequences_per_round(rules: Rules) -> int:
    """Of one island."""
    return rules.inner_steps_per_round * rules.sequences_per_inner_step


def issue_plans(state: RunState, islands: list[str]) -> RunState:
    """Leases in island order, so that the same members get the same data in every replay.

    Those whose own data came back are served first, or others would be given it.
    """
    steps = state.rules.inner_steps_per_round
    holders = {holder for _, holder in state.ledger.returned}
    for island in sorted(islands, key=lambda island: (island not in holders, island)):
        shard = state.ledger.shard_of(island)
        ledger, lease = state.ledger.lease(island, sequences_per_round(state.rules), shard)
        plan = InnerPlan(
            island=island,
            incarnation=state.members[island].incarnation,
            lease_id=lease.id,
            round=state.round,
            base_index=state.index,
            base_version=state.round,
            inner_steps=steps,
            first_inner_step=state.round * steps,
            ranges=lease.ranges,
        )
        state = replace(state, ledger=ledger, plans={**state.plans, island: plan})
    return state


def open_round(state: RunState, now_s: float) -> Step:
    """Gives work to the idle: all of them when no round is open, joiners only where the open round lacks islands.

    A joiner that has waited long enough for the open round to close gets work as well: who is at work may be hung.
    """
    if ended(state) or membership.names(state.members, "expected"):
        return state, []
    idle = [name for name in state.alive if name not in state.plans and not has_contributed(state, name)]
    taking_part = {name for name in state.alive if name in state.plans}
    taking_part |= set(state.accepted(state.closing_fragment))
    if not taking_part and len(state.alive) < state.rules.min_islands:
        return state, []
    short = len(taking_part) < state.rules.min_islands
    if state.phase != "gathering" and taking_part and not short:
        idle = [name for name in idle if now_s - state.members[name].joined_s > state.rules.waiting_timeout_s]
    state = replace(state, phase="training") if state.phase == "gathering" else state
    if not idle:
        return state, []
    return issue_plans(state, idle), [Note(f"round {state.round + 1}: {', '.join(idle)} at work")]


def close_fragments(state: RunState, now_s: float) -> Step:
    commands: list[Command] = []
    for fragment in range(state.rules.num_fragments):
        reason = ready_to_step(state, fragment, now_s)
        if reason:
            state, command = _close(state, fragment, reason)
            commands.append(command)
    return state, commands


def _close(state: RunState, fragment: int, reason: str) -> tuple[RunState, TakeOuterStep]:
    """Fixes who is in. The lease of each is spent with its last fragment; those who are late lose theirs."""
    closing = fragment == state.closing_fragment
    version = state.versions[fragment]
    accepted = state.accepted(fragment)
    shares = tuple(
        Share(
            island=island,
            incarnation=item.contribution.incarnation,
            base_version=version,
            weight=1.0 if state.rules.weighting == "uniform" else float(item.lease.num_tokens),
            tokens=item.lease.num_tokens if closing else 0,
            spent=item.lease.ranges if closing else (),
            payload_sha256=item.contribution.payload_sha256,
            payload_bytes=item.contribution.payload_bytes,
            norm=item.norm or 0.0,
        )
        for island, item in accepted.items()
    )
    ledger = state.ledger
    if closing:
        for item in accepted.values():
            ledger = ledger.settle(item.lease.id, "committed")
        for plan in state.plans.values():
            ledger = ledger.settle(plan.lease_id, "expired")
    state = replace(state, ledger=ledger, stepping=state.stepping | {fragment})
    return state, TakeOuterStep(fragment, state.round, version, shares, ledger.account(), reason)


def committed(state: RunState, event: Committed) -> Step:
    fragment, base = event.fragment, event.version - 1
    if fragment not in state.stepping or base != state.versions[fragment]:
        return state, []
    contributed = state.accepted(fragment)
    digests = {(fragment, base, name): item.contribution.payload_sha256 for name, item in contributed.items()}
    members = dict(state.members)
    for name in contributed:
        members[name] = replace(members[name], strikes=0)
    state = replace(
        state,
        index=event.index,
        versions=with_version(state.versions, fragment, event.version),
        members=members,
        settled={**of_other_fragments(state.settled, fragment), **digests},
        stepping=state.stepping - {fragment},
        inbox={key: item for key, item in state.inbox.items() if key[:2] != (fragment, base)},
        norms=(*state.norms, *(item.norm or 0.0 for item in contributed.values()))[-NORM_HISTORY:],
    )
    if min(state.versions) == state.round:
        return state, []
    return _close_round(state, len(contributed))


def _close_round(state: RunState, applied: int) -> Step:
    done, rules = state.round + 1, state.rules
    last = done >= rules.num_rounds
    close = CloseRound(
        round=done,
        index=state.index,
        alive=len(state.alive),
        contributed=len(state.offered),
        applied=applied,
        snapshot=last or done % rules.snapshot_every_rounds == 0,
    )
    ledger = state.ledger
    for plan in state.plans.values():  # only those given out after the closing fragment was
        ledger = ledger.settle(plan.lease_id, "expired")
    state = replace(state, ledger=ledger, round=done, plans={}, offered=frozenset())
    if not last:
        return state, [close]
    reason = f"{done} rounds done"
    return replace(state, phase="succeeded", reason=reason), [close, End("succeeded", reason)]


def watch_the_wait(state: RunState, now_s: float) -> Step:
    """A run with too few islands says so, waits, and fails when the wait has run out (invariant I11)."""
    if ended(state):
        return state, []
    rules, num_alive = state.rules, len(state.alive)
    if num_alive >= rules.min_islands or state.stepping:
        back = state.phase == "waiting" and num_alive >= rules.min_islands
        expected = membership.names(state.members, "expected")
        reason = f"waiting for {', '.join(expected)} to join" if expected else ""
        state = replace(state, waiting_since_s=None, phase="training" if back else state.phase, reason=reason)
        return state, [Note(f"{num_alive} islands alive again")] if back else []
    if state.waiting_since_s is None:
        reason = (
            f"{num_alive} of at least {rules.min_islands} islands alive; waiting up to {rules.waiting_timeout_s:g} s"
        )
        if state.phase == "gathering":
            return replace(state, waiting_since_s=now_s, reason=reason), []
        return replace(state, waiting_since_s=now_s, phase="waiting", reason=reason), [Note(reason)]
    if now_s - state.waiting_since_s > rules.waiting_timeout_s:
        gone = [membership.whereabouts(m) for m in state.members.values() if m.standing != "alive"]
        reason = f"{num_alive} of at least {rules.min_islands} islands alive after {rules.waiting_timeout_s:g} s"
        reason += f"; missing: {', '.join(gone) or 'none ever joined'}"
        return replace(state, phase="failed", reason=reason), [End("failed", reason)]
    return state, []
