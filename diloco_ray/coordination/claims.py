"""Claims: the work that an island says it holds, when it says hello to a coordinator that does not know of it.

Its word is all that there is, for a restarted coordinator has only the log. So nothing is taken up that an honest
island could not hold: whatever a hello says, no sequence has two places, and no lease another's id.
"""

from dataclasses import replace

from diloco_ray.coordination import membership
from diloco_ray.coordination.experiments import is_dropped
from diloco_ray.coordination.messages import Command, InnerPlan, Note
from diloco_ray.coordination.plans import Step, taking_part
from diloco_ray.coordination.state import RunState, ended

MAX_HELD = 256  # plans of one hello that are looked at: in step there are a few, else rounds that wait for a quorum


def take_up(state: RunState, island: str, held: tuple[InnerPlan, ...]) -> Step:
    """An island that outlived the coordinator goes on with its work if nobody else has got its data.

    Work that was given since, and that the island has yet to hear of, replaces what it holds. Work that follows on work
    that is void is void as well: nobody would do the rounds between.
    """
    leases, commands = {plan.lease_id for plan in held}, list[Command]()
    known = {plan.lease_id for plan in state.plans.get(island, ())}
    others = {plan.lease_id for name, plans in state.plans.items() if name != island for plan in plans}
    others |= {item.contribution.lease_id for key, item in state.inbox.items() if key[2] != island}
    replaced = any(plan.lease_id not in leases for plan in state.open_plans(island))
    # In step each island has two plans at most; out of step what lies further ahead in a small shard is done again.
    num_ahead = 2 * state.rules.max_islands * state.rules.sequences_per_round
    for plan in held[:MAX_HELD]:
        if plan.lease_id in known:
            continue
        known.add(plan.lease_id)
        fits = not replaced and plan.lease_id not in others and _could_hold(state, island, plan)
        ledger = state.ledger.adopt(plan.lease_id, island, plan.ranges, num_ahead) if fits else None
        if ledger is None:
            commands.append(Note(f"{island}: work on round {plan.round + 1} is void; it gets a new plan"))
            continue
        plans = {**state.plans, island: (*state.plans.get(island, ()), plan)}
        num_plans = {**state.num_plans, island: plan.round + 1}
        state = replace(state, ledger=ledger, plans=plans, num_plans=num_plans)
        commands.append(Note(f"{island} goes on with its work on round {plan.round + 1}"))
    if len(held) > MAX_HELD:
        commands.append(Note(f"{island} holds {len(held):,} plans; those after the first {MAX_HELD:,} are void"))
    return state, commands


def _could_hold(state: RunState, island: str, held: InnerPlan) -> bool:
    """Whether it is the island's next work, and such as it would be given, but for its data and its lease."""
    rules, mine = state.rules, state.plans.get(island, ())
    following, steps = state.num_plans.get(island, 0), held.inner_steps - held.silent_steps
    if rules.in_step:
        following = mine[-1].round + 1 if mine else state.round
    return (
        not ended(state)
        and held.island == island
        and membership.is_current(state.members, island, held.incarnation)
        and 0 <= held.silent_steps < held.inner_steps
        and 1 <= steps <= rules.inner_steps_per_round
        and (rules.steps_by_speed or steps == rules.inner_steps_per_round)
        and 0 <= held.first_round <= following <= held.round
        and held.silent_steps == (held.round - held.first_round) * steps
        and all(is_dropped(rules, island, round) for round in range(held.first_round, held.round))
        and (not rules.in_step or held.round < rules.num_rounds)
        and (not rules.in_step or len(taking_part(state, held.round)) < rules.islands_in(held.round))
        and sum(r.num_sequences for r in held.ranges) == held.inner_steps * rules.sequences_per_inner_step
    )
