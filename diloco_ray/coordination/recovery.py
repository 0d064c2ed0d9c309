"""The first state of a coordinator's life: a fold over the log, then a wait for those who outlived its predecessor."""

from collections.abc import Iterable
from dataclasses import replace

from diloco_ray.coordination.admission import NORM_HISTORY
from diloco_ray.coordination.membership import Member
from diloco_ray.coordination.messages import DataRange, TakeOuterStep
from diloco_ray.coordination.state import RunState, with_settled, with_version


def recover(state: RunState, steps: Iterable[TakeOuterStep]) -> RunState:
    """Folds the log's outer steps, oldest first, into a fresh state: the decisions' half of a replay."""
    spent: list[DataRange] = []
    last: TakeOuterStep | None = None
    for last in steps:
        fragment = last.fragment
        members = {s.island: Member(s.island, "absent", s.incarnation) for s in last.shares}
        settled = state.settled
        for share in last.shares:
            settled = with_settled(settled, fragment, share.island, share.round, share.payload_sha256)
        norms = (*state.norms.get(fragment, ()), *(share.norm for share in last.shares))[-NORM_HISTORY:]
        state = replace(
            state,
            index=state.index + 1,
            round=last.round,
            versions=with_version(state.versions, fragment, last.base_version + 1),
            settled=settled,
            num_plans={name: round + 1 for (p, name), (round, _) in settled.items() if p == state.closing_fragment},
            members=dict(sorted({**state.members, **members}.items())),
            norms={**state.norms, fragment: norms},
        )
        spent += [data_range for share in last.shares for data_range in share.spent]
    if last is None:
        return state
    state = replace(state, ledger=state.ledger.recovered(spent, last.tokens))
    if state.round >= state.rules.num_rounds:
        return replace(state, phase="succeeded", reason=f"{state.round} rounds done")
    return state


def expect(state: RunState, islands: Iterable[str], *, now_s: float, within_s: float) -> RunState:
    """No round opens or closes before these islands have joined or their time has run out."""
    members = dict(state.members)
    for name in islands:
        known = members.get(name, Member(name, "expected"))
        members[name] = replace(known, standing="expected", deadline_s=now_s + within_s)
    return replace(state, members=dict(sorted(members.items())))
