"""The data ledger: every sequence in one place, every token with one fate."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_world import check_account, check_cover

from diloco_ray.coordination.data_ledger import DataLedger
from diloco_ray.coordination.messages import DataRange

TOKENS = 8


def ledger(num_sequences: int = 10, prefix: str = "1") -> DataLedger:
    return DataLedger(num_sequences, TOKENS, prefix)


# ---- lease and settle ----


def test_new_data_is_leased_in_order_with_ids_of_this_coordinators_life():
    one, first = ledger(prefix="7").lease("a", 4)
    two, second = one.lease("b", 4)
    assert (first.id, second.id) == ("7.1", "7.2")
    assert (first.ranges, second.ranges) == ((DataRange(0, 0, 4),), (DataRange(0, 4, 8),))
    assert first.num_tokens == 4 * TOKENS
    assert two.account()["outstanding"] == 8 * TOKENS


def test_a_lease_may_span_epochs():
    one, lease = ledger().lease("a", 25)
    assert lease.ranges == (DataRange(0, 0, 10), DataRange(1, 0, 10), DataRange(2, 0, 5))
    assert one.cursor == (2, 5)


def test_the_last_sequence_of_an_epoch_moves_the_cursor_to_the_next():
    assert ledger().lease("a", 10)[0].cursor == (1, 0)


def test_committed_data_is_spent_and_any_other_fate_gives_it_back():
    one, lease = ledger().lease("a", 4)
    assert one.settle(lease.id, "committed").returned == ()
    for fate in ("rejected", "expired", "rewound"):
        back = one.settle(lease.id, fate)
        assert back.returned == ((DataRange(0, 0, 4), "a"),)
        assert back.account()[fate] == 4 * TOKENS


def test_settling_twice_counts_once():
    one, lease = ledger().lease("a", 4)
    once = one.settle(lease.id, "expired")
    assert once.settle(lease.id, "committed") is once


def test_returned_data_goes_first_to_its_last_holder_then_to_others_before_any_new_data():
    one, a = ledger().lease("a", 3)
    one, b = one.lease("b", 3)
    one = one.settle(a.id, "expired").settle(b.id, "expired")
    assert one.lease("b", 3)[1].ranges == (DataRange(0, 3, 6),)
    assert one.lease("c", 3)[1].ranges == (DataRange(0, 0, 3),)
    assert one.lease("b", 8)[1].ranges == (DataRange(0, 3, 6), DataRange(0, 0, 3), DataRange(0, 6, 8))


def test_what_is_left_of_a_returned_range_keeps_its_holder():
    one, a = ledger().lease("a", 4)
    one, lease = one.settle(a.id, "expired").lease("b", 1)
    assert lease.ranges == (DataRange(0, 0, 1),)
    assert one.returned == ((DataRange(0, 1, 4), "a"),)


# ---- adopt ----


def test_a_lease_of_an_earlier_life_is_adopted_where_its_data_is_free():
    after = ledger(prefix="2").adopt("1.2", "b", (DataRange(0, 4, 8),))
    assert after is not None
    assert after.cursor == (0, 8)
    assert after.returned == ((DataRange(0, 0, 4), ""),)
    assert after.outstanding["1.2"].island == "b"


def test_a_lease_across_an_epochs_end_is_adopted():
    after = ledger(prefix="2").adopt("1.3", "c", (DataRange(0, 8, 10), DataRange(1, 0, 2)))
    assert after is not None
    assert after.cursor == (1, 2)
    assert after.returned == ((DataRange(0, 0, 8), ""),)


@pytest.mark.parametrize(
    "ranges",
    [
        (DataRange(0, 2, 6),),  # half of it is leased
        (DataRange(0, 4, 6), DataRange(0, 5, 7)),  # twice the same
        (DataRange(0, 8, 12),),  # past the epoch's end
        (DataRange(0, 6, 6),),
        (DataRange(0, -2, 2),),
        (DataRange(-1, 0, 4),),
        (DataRange(10**12, 0, 4),),
    ],
)
def test_a_lease_whose_data_is_not_free_is_not_adopted(ranges: tuple[DataRange, ...]):
    one, _ = ledger().lease("a", 4)
    assert one.adopt("0.1", "b", ranges) is None


def test_a_lease_that_is_outstanding_is_not_adopted_again():
    one, lease = ledger().lease("a", 4)
    assert one.adopt(lease.id, "a", (DataRange(0, 4, 8),)) is None


# ---- recovered ----


def test_a_recovered_ledger_has_what_the_log_spent_and_leases_the_gaps_first():
    one, a = ledger().lease("a", 4)
    one, b = one.lease("b", 4)
    one = one.settle(b.id, "committed")
    after = ledger(prefix="2").recovered(b.ranges, one.account())
    assert after.account() == {**one.account(), "expired": a.num_tokens, "outstanding": 0}
    assert after.lease("c", 4)[1].ranges == a.ranges


def test_a_log_that_spends_a_range_twice_is_refused():
    with pytest.raises(ValueError, match="committed twice"):
        ledger().recovered([DataRange(0, 0, 4), DataRange(0, 2, 6)], ledger().account())


def test_a_log_that_left_out_a_whole_epoch_is_recovered():
    after = ledger().recovered([DataRange(2, 0, 5)], ledger().account())
    assert [r for r, _ in after.returned] == [DataRange(0, 0, 10), DataRange(1, 0, 10)]


# ---- properties ----

verbs = st.sampled_from(
    ["lease", "lease", "committed", "committed", "rejected", "expired", "rewound", "adopt", "restart"]
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    num_sequences=st.integers(1, 12),
    story=st.lists(st.tuples(verbs, st.sampled_from("abc"), st.integers(0, 9)), max_size=40),
)
def test_every_sequence_is_in_one_place_and_the_account_adds_up_in_any_story(
    num_sequences: int, story: list[tuple[str, str, int]]
):
    life, now, before, spent = 1, ledger(num_sequences), ledger(num_sequences), []
    for verb, island, number in story:
        open_leases = sorted(now.outstanding)
        picked = now.outstanding[open_leases[number % len(open_leases)]] if open_leases else None
        if verb == "lease":
            now, lease = now.lease(island, number + 1)
            assert sum(r.num_sequences for r in lease.ranges) == number + 1
        elif verb == "restart":
            life, before = life + 1, now
            now = ledger(num_sequences, str(life)).recovered(spent, now.account())
        elif verb == "adopt":
            for lease in before.outstanding.values():
                now = now.adopt(lease.id, lease.island, lease.ranges) or now
        elif picked:
            now = now.settle(picked.id, verb)
            spent += picked.ranges if verb == "committed" else ()
        check_account(now.account())
        check_cover(now, spent)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(num_sequences=st.integers(1, 12), size=st.integers(1, 5), kept=st.lists(st.booleans(), min_size=1, max_size=30))
def test_a_finished_epoch_has_every_sequence_once_whatever_was_given_back(
    num_sequences: int, size: int, kept: list[bool]
):
    now, spent = ledger(num_sequences), []
    while now.cursor[0] < 2 or now.returned:
        now, lease = now.lease("a", size)
        keep = kept.pop() if kept else True
        now = now.settle(lease.id, "committed" if keep else "expired")
        spent += [(r.epoch, s) for r in lease.ranges for s in range(r.start, r.stop) if keep]
    finished = sorted(item for item in spent if item[0] < 2)
    assert finished == [(epoch, s) for epoch in range(2) for s in range(num_sequences)]
