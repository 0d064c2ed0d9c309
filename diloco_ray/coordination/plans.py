"""Plans: who gets which work, and how long too few islands are waited for.

Leases are given in island order, so that the same members get the same data again.
"""

from dataclasses import replace

from diloco_ray.coordination import membership
from diloco_ray.coordination.experiments import is_dropped
from diloco_ray.coordination.messages import Command, End, InnerPlan, Note
from diloco_ray.coordination.state import Key, RunState, ended, updated, without

Step = tuple[RunState, list[Command]]


def hand_out_work(state: RunState, now_s: float) -> Step:
    """Gives work to the idle, and where communication overlaps with training, the next work to those at work."""
    if ended(state) or membership.names(state.members, "expected"):
        return state, []
    if state.rules.in_step:
        state, commands = _open_round(state, now_s)
        state = _break_silence(state)
    else:
        state, commands = _go_on(state)
    return _look_ahead(state), commands


def _open_round(state: RunState, now_s: float) -> Step:
    """All of the idle when a round begins, joiners only where the open round lacks islands.

    A joiner that has waited long enough for the open round to close gets work as well: who is at work may be hung.
    """
    rules = state.rules
    here = taking_part(state, state.round)
    room = max(0, rules.islands_in(state.round) - len(here))
    idle = [name for name in state.alive if not state.plans.get(name)][:room]
    if not here and len(idle) < _least(state):
        return state, []
    if state.opened == state.round and len(here) >= _least(state):
        idle = [name for name in idle if now_s - state.members[name].joined_s > rules.waiting_timeout_s]
    phase = "training" if state.phase == "gathering" else state.phase
    state = updated(state, phase=phase, opened=state.round)
    if not idle:
        return state, []
    return issue_plans(state, idle), [Note(f"round {state.round + 1}: {', '.join(idle)} at work")]


def taking_part(state: RunState, round: int) -> list[str]:
    """Islands with work for this round, done or not."""
    return [name for name, plans in state.plans.items() if any(p.first_round <= round <= p.round for p in plans)]


def _least(state: RunState) -> int:
    return min(state.rules.min_islands, state.rules.islands_in(state.round))


def _break_silence(state: RunState) -> RunState:
    """Where chance drops some of a round's contributions and the others are lost, one of the silent speaks."""
    plans = state.all_plans
    silent = [name for name in state.alive if any(p.island == name and p.first_round <= state.round for p in plans)]
    if not silent or any(plan.round == state.round for plan in plans):
        return state
    state = revoke(state, silent[0], "expired", all_of_it=True)
    return _issue(state, silent[0], state.round, may_drop=False)


def _go_on(state: RunState) -> Step:
    """Islands that do not wait for each other have work as soon as they are idle."""
    if state.phase == "gathering" and len(state.alive) < state.rules.min_islands:
        return state, []
    state = replace(state, phase="training") if state.phase == "gathering" else state
    idle = [name for name in state.alive if not state.open_plans(name)]
    return issue_plans(state, idle), []


def _look_ahead(state: RunState) -> RunState:
    if not state.rules.overlap:
        return state
    return issue_plans(state, [name for name in state.alive if len(state.open_plans(name)) == 1])


def issue_plans(state: RunState, islands: list[str]) -> RunState:
    """One more plan for each of these, unless the run has no more rounds for it.

    Those whose own data came back are served first, or others would be given it.
    """
    holders = {holder for _, holder in state.ledger.returned}
    for island in sorted(islands, key=lambda island: (island not in holders, island)):
        first = _next_round(state, island)
        if not state.rules.in_step or (
            first < state.rules.num_rounds and len(taking_part(state, first)) < state.rules.islands_in(first)
        ):
            state = _issue(state, island, first)
    return state


def _next_round(state: RunState, island: str) -> int:
    if not state.rules.in_step:
        return state.num_plans.get(island, 0)
    plans = state.plans.get(island, ())
    return plans[-1].round + 1 if plans else state.round


def _issue(state: RunState, island: str, first: int, *, may_drop: bool = True) -> RunState:
    rules = state.rules
    round = first
    while may_drop and round + 1 < rules.num_rounds and is_dropped(rules, island, round):
        round += 1
    steps = rules.inner_steps_per_round
    if rules.steps_by_speed:
        steps = state.pace.inner_steps(island, steps)
    silent = (round - first) * steps
    num_sequences = (silent + steps) * rules.sequences_per_inner_step
    begun = _steps_taken(state, island) if not rules.in_step else first * rules.inner_steps_per_round
    ledger, lease = state.ledger.lease(island, num_sequences, state.ledger.shard_of(island))
    plan = InnerPlan(
        island=island,
        incarnation=state.members[island].incarnation,
        lease_id=lease.id,
        round=round,
        base_index=state.index,
        inner_steps=silent + steps,
        silent_steps=silent,
        first_inner_step=begun,
        num_islands=min(len(state.alive), rules.islands_in(round)),
        ranges=lease.ranges,
    )
    plans = {**state.plans, island: (*state.plans.get(island, ()), plan)}
    return replace(state, ledger=ledger, plans=plans, num_plans={**state.num_plans, island: round + 1})


def _steps_taken(state: RunState, island: str) -> int:
    """What the schedule runs on: the steps committed, as an island's mean, and those that this island has in hand."""
    per_step = state.rules.sequences_per_inner_step * state.ledger.tokens_per_sequence
    in_hand = sum(lease.num_tokens for lease in state.ledger.outstanding.values() if lease.island == island)
    return state.ledger.account()["committed"] // (state.rules.max_islands * per_step) + in_hand // per_step


def revoke(state: RunState, island: str, fate: str, *, all_of_it: bool = False) -> RunState:
    """Ends the island's plans, but for those whose closing contribution is already accepted.

    One that overtook the contribution to an earlier plan goes with that plan: rounds are done in their order.
    all_of_it: those as well, unless an outer step under way has taken them in.
    """
    mine, unfinished = state.plans.get(island, ()), state.open_plans(island)
    inspecting = {key for key, item in state.inbox.items() if key[2] == island and item.norm is None}
    state = replace(state, inbox=without(state.inbox, *inspecting))
    if not unfinished and not all_of_it:
        return state
    begin = 0 if all_of_it else mine.index(unfinished[0])
    leases = {plan.lease_id for plan in mine[begin:]}
    gone = {key for key in _unspent(state, leases) if all_of_it or key[0] == state.closing_fragment}
    ledger = state.ledger
    for plan in mine[begin:]:
        ledger = ledger.settle(plan.lease_id, fate)
    return replace(
        state,
        ledger=ledger,
        inbox=without(state.inbox, *gone),
        plans={**state.plans, island: mine[:begin]},
        num_plans={**state.num_plans, island: mine[begin].first_round},
    )


def void(state: RunState, island: str, fate: str) -> RunState:
    """Ends the island's unfinished plans, and drops what it has contributed under them."""
    unfinished = {plan.lease_id for plan in state.open_plans(island)}
    return revoke(replace(state, inbox=without(state.inbox, *_unspent(state, unfinished))), island, fate)


def _unspent(state: RunState, leases: set[str]) -> list[Key]:
    """Contributions under these leases, but for what an outer step under way has taken in."""
    stepping = {key for keys in state.stepping.values() for key in keys}
    return [key for key, item in state.inbox.items() if item.contribution.lease_id in leases and key not in stepping]


# ---- too few islands ----


def watch_the_wait(state: RunState, now_s: float) -> Step:
    """A run with too few islands says so, waits, and fails when the wait has run out (invariant I11), or at once where
    nobody can come back."""
    if ended(state):
        return state, []
    rules, num_alive = state.rules, len(state.alive)
    if num_alive >= rules.min_islands or state.stepping:
        back = state.phase == "waiting" and num_alive >= rules.min_islands
        expected = membership.names(state.members, "expected")
        reason = f"waiting for {', '.join(expected)} to join" if expected else ""
        state = updated(state, waiting_since_s=None, phase="training" if back else state.phase, reason=reason)
        return state, [Note(f"{num_alive} islands alive again")] if back else []
    barred = membership.names(state.members, "quarantined")
    if rules.max_islands - len(barred) < rules.min_islands:
        why = "; ".join(membership.why_not(state.members, name) for name in barred)
        reason = f"too few islands are left for at least {rules.min_islands} of {rules.max_islands}: {why}"
        return replace(state, phase="failed", reason=reason), [End("failed", reason)]
    reason = f"{num_alive} of at least {rules.min_islands} islands alive; waiting up to {rules.waiting_timeout_s:g} s"
    if state.waiting_since_s is None:
        phase = "gathering" if state.phase == "gathering" else "waiting"
        return replace(state, waiting_since_s=now_s, phase=phase, reason=reason), [Note(reason)]
    if now_s - state.waiting_since_s > rules.waiting_timeout_s:
        gone = [membership.whereabouts(m) for m in state.members.values() if m.standing != "alive"]
        reason = f"{num_alive} of at least {rules.min_islands} islands alive after {rules.waiting_timeout_s:g} s"
        reason += f"; missing: {', '.join(gone) or 'none ever joined'}"
        return replace(state, phase="failed", reason=reason), [End("failed", reason)]
    return updated(state, reason=reason), []
