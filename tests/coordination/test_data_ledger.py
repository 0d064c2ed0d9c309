"""The data ledger: every sequence in one place, every token with one fate."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_world import check_account, check_cover

from diloco_ray.coordination.data_ledger import FATES, MAX_PIECES, MAX_RANGES, DataLedger, Lease
from diloco_ray.coordination.messages import DataRange
from diloco_ray.errors import CorruptionError
from diloco_ray.ids import island_name

TOKENS = 8


def ledger(*shard_sizes: int, prefix: str = "1") -> DataLedger:
    return DataLedger(shard_sizes or (10,), TOKENS, prefix)


# ---- lease and settle ----


def test_new_data_is_leased_in_order_with_ids_of_this_coordinators_life():
    one, first = ledger(prefix="7").lease("a", 4)
    two, second = one.lease("b", 4)
    assert (first.id, second.id) == ("7.1", "7.2")
    assert (first.ranges, second.ranges) == ((DataRange(0, 0, 0, 4),), (DataRange(0, 0, 4, 8),))
    assert first.num_tokens == 4 * TOKENS
    assert two.account()["outstanding"] == 8 * TOKENS


def test_a_lease_may_span_epochs():
    one, lease = ledger().lease("a", 25)
    assert lease.ranges == (DataRange(0, 0, 0, 10), DataRange(0, 1, 0, 10), DataRange(0, 2, 0, 5))
    assert one.cursor() == (2, 5)


def test_the_last_sequence_of_an_epoch_moves_the_cursor_to_the_next():
    assert ledger().lease("a", 10)[0].cursor() == (1, 0)


def test_committed_data_is_spent_and_any_other_fate_gives_it_back():
    one, lease = ledger().lease("a", 4)
    assert one.settle(lease.id, "committed").returned == ()
    for fate in ("rejected", "expired", "rewound"):
        back = one.settle(lease.id, fate)
        assert back.returned == ((DataRange(0, 0, 0, 4), "a"),)
        assert back.account()[fate] == 4 * TOKENS


def test_settling_twice_counts_once():
    one, lease = ledger().lease("a", 4)
    once = one.settle(lease.id, "expired")
    assert once.settle(lease.id, "committed") is once


def test_returned_data_goes_first_to_its_last_holder_then_to_others_before_any_new_data():
    one, a = ledger().lease("a", 3)
    one, b = one.lease("b", 3)
    one = one.settle(a.id, "expired").settle(b.id, "expired")
    assert one.lease("b", 3)[1].ranges == (DataRange(0, 0, 3, 6),)
    assert one.lease("c", 3)[1].ranges == (DataRange(0, 0, 0, 3),)
    assert one.lease("b", 8)[1].ranges == (DataRange(0, 0, 3, 6), DataRange(0, 0, 0, 3), DataRange(0, 0, 6, 8))


def test_what_is_left_of_a_returned_range_keeps_its_holder():
    one, a = ledger().lease("a", 4)
    one, lease = one.settle(a.id, "expired").lease("b", 1)
    assert lease.ranges == (DataRange(0, 0, 0, 1),)
    assert one.returned == ((DataRange(0, 0, 1, 4), "a"),)


# ---- adopt ----


def test_a_lease_of_an_earlier_life_is_adopted_where_its_data_is_free():
    after = ledger(prefix="2").adopt("1.2", "b", (DataRange(0, 0, 4, 8),))
    assert after is not None
    assert after.cursor() == (0, 8)
    assert after.returned == ((DataRange(0, 0, 0, 4), ""),)
    assert after.outstanding["1.2"].island == "b"


def test_a_lease_across_an_epochs_end_is_adopted():
    after = ledger(prefix="2").adopt("1.3", "c", (DataRange(0, 0, 8, 10), DataRange(0, 1, 0, 2)))
    assert after is not None
    assert after.cursor() == (1, 2)
    assert after.returned == ((DataRange(0, 0, 0, 8), ""),)


@pytest.mark.parametrize(
    "ranges",
    [
        (DataRange(0, 0, 2, 6),),  # half of it is leased
        (DataRange(0, 0, 4, 6), DataRange(0, 0, 5, 7)),  # twice the same
        (DataRange(0, 0, 8, 12),),  # past the epoch's end
        (DataRange(0, 0, 6, 6),),
        (DataRange(0, 0, -2, 2),),
        (DataRange(0, -1, 0, 4),),
        (DataRange(0, 10**12, 0, 4),),
        (DataRange(1, 0, 0, 4),),  # a shard that is not there
        (DataRange(-1, 0, 4, 8),),
    ],
)
def test_a_lease_whose_data_is_not_free_is_not_adopted(ranges: tuple[DataRange, ...]):
    one, _ = ledger().lease("a", 4)
    assert one.adopt("0.1", "b", ranges) is None


def test_a_lease_that_is_outstanding_is_not_adopted_again():
    one, lease = ledger().lease("a", 4)
    assert one.adopt(lease.id, "a", (DataRange(0, 0, 4, 8),)) is None


@pytest.mark.parametrize(
    "lease_id",
    [
        "",
        "1",
        "junk",
        "1.2",
        "1.999999999999999999",
        "2.1",
        "1.-1",
        "-1.1",
        "0.0",
        "0.01",
        "0.1\n",
        "0.1 ",
        "٠.1",
        "0.1.1",
        "0." + "9" * 5000,
    ],
)
def test_a_lease_under_an_id_that_was_not_given_yet_or_never_could_be_is_not_adopted(lease_id: str):
    """Of these, 1.2 is the one that the ledger gives next."""
    one, _ = ledger().lease("a", 4)
    assert one.adopt(lease_id, "b", (DataRange(0, 0, 4, 8),)) is None


def test_a_lease_of_this_life_is_adopted_again_once_it_has_ended():
    one, lease = ledger().lease("a", 4)
    after = one.settle(lease.id, "expired").adopt(lease.id, "a", lease.ranges)
    assert after is not None
    assert after.outstanding == {lease.id: lease}


def test_a_lease_in_more_ranges_than_any_lease_has_is_not_adopted():
    crumbs = [DataRange(0, 0, 2 * number, 2 * number + 1) for number in range(MAX_RANGES + 1)]
    assert ledger(10_000).adopt("0.1", "a", tuple(crumbs)) is None
    assert ledger(10_000).adopt("0.1", "a", tuple(crumbs[1:])) is not None
    assert ledger(10_000).adopt("0.1", "a", ()) is None


def test_a_lease_of_more_epochs_than_that_is_adopted():
    epochs = tuple(DataRange(0, epoch, 0, 2) for epoch in range(2 * MAX_RANGES))
    assert ledger(2).adopt("0.1", "a", epochs) is not None


def test_no_number_of_adopted_leases_cuts_the_data_into_more_pieces_than_so_many():
    now, adopted = ledger(10**6), 0
    for number in range(1, 100):
        begin = 1000 * number
        crumbs = tuple(DataRange(0, 0, begin + 2 * k, begin + 2 * k + 1) for k in range(MAX_RANGES))
        after = now.adopt(f"0.{number}", "a", crumbs)
        adopted += after is not None
        now = (after or now).settle(f"0.{number}", "expired")
    assert 5 < adopted < 20
    assert MAX_PIECES - 2 * MAX_RANGES < len(now.returned) <= MAX_PIECES


# ---- recovered ----


def test_a_recovered_ledger_has_what_the_log_spent_and_leases_the_gaps_first():
    one, a = ledger().lease("a", 4)
    one, b = one.lease("b", 4)
    one = one.settle(b.id, "committed")
    after = ledger(prefix="2").recovered(b.ranges, one.account())
    assert after.account() == {**one.account(), "expired": a.num_tokens, "outstanding": 0}
    assert after.lease("c", 4)[1].ranges == a.ranges


def test_a_log_that_spends_a_range_twice_is_refused():
    with pytest.raises(CorruptionError, match="committed twice"):
        ledger().recovered([DataRange(0, 0, 0, 4), DataRange(0, 0, 2, 6)], ledger().account())


def test_a_log_that_left_out_a_whole_epoch_is_recovered():
    after = ledger().recovered([DataRange(0, 2, 0, 5)], ledger().account())
    assert [r for r, _ in after.returned] == [DataRange(0, 0, 0, 10), DataRange(0, 1, 0, 10)]


# ---- several data shards ----


def test_an_island_trains_on_the_shard_of_its_number_modulo_theirs():
    names = [island_name(number) for number in range(7)]
    assert [ledger(4, 5, 6).shard_of(name) for name in names] == [0, 1, 2, 0, 1, 2, 0]
    assert {ledger().shard_of(name) for name in [*names, "any name"]} == {0}


def test_each_shard_has_a_cursor_and_epochs_of_its_own():
    one, first = ledger(3, 10).lease("island-00", 4, 0)
    one, second = one.lease("island-01", 4, 1)
    assert first.ranges == (DataRange(0, 0, 0, 3), DataRange(0, 1, 0, 1))
    assert second.ranges == (DataRange(1, 0, 0, 4),)
    assert (one.cursor(0), one.cursor(1)) == ((1, 1), (0, 4))


def test_returned_data_stays_in_its_shard():
    one, first = ledger(10, 10).lease("island-00", 4, 0)
    one = one.settle(first.id, "expired")
    one, other = one.lease("island-01", 4, 1)
    assert other.ranges == (DataRange(1, 0, 0, 4),)
    assert one.returned == ((DataRange(0, 0, 0, 4), "island-00"),)
    assert one.lease("island-02", 6, 0)[1].ranges == (DataRange(0, 0, 0, 4), DataRange(0, 0, 4, 6))


def test_a_lease_is_adopted_on_the_islands_own_shard_only():
    one = ledger(10, 10, prefix="2")
    assert one.adopt("1.1", "island-00", (DataRange(1, 0, 0, 4),)) is None
    after = one.adopt("1.1", "island-03", (DataRange(1, 0, 4, 8),))
    assert after is not None
    assert (after.cursor(0), after.cursor(1)) == ((0, 0), (0, 8))
    assert after.returned == ((DataRange(1, 0, 0, 4), ""),)


# ---- properties ----

verbs = st.sampled_from(
    ["lease", "lease", "committed", "committed", "rejected", "expired", "rewound", "adopt", "restart"]
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shard_sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    story=st.lists(st.tuples(verbs, st.integers(0, 3), st.integers(0, 9)), max_size=40),
)
def test_every_sequence_is_in_one_place_and_the_account_adds_up_in_any_story(
    shard_sizes: list[int], story: list[tuple[str, int, int]]
):
    life, now, before, spent = 1, ledger(*shard_sizes), ledger(*shard_sizes), []
    for verb, island, number in story:
        name = island_name(island)
        open_leases = sorted(now.outstanding)
        picked = now.outstanding[open_leases[number % len(open_leases)]] if open_leases else None
        if verb == "lease":
            now, lease = now.lease(name, number + 1, now.shard_of(name))
            assert sum(r.num_sequences for r in lease.ranges) == number + 1
            assert {r.shard for r in lease.ranges} == {island % len(shard_sizes)}
        elif verb == "restart":
            life, before = life + 1, now
            now = ledger(*shard_sizes, prefix=str(life)).recovered(spent, now.account())
        elif verb == "adopt":
            for lease in before.outstanding.values():
                now = now.adopt(lease.id, lease.island, lease.ranges) or now
        elif picked:
            now = now.settle(picked.id, verb)
            spent += picked.ranges if verb == "committed" else ()
        check_account(now.account())
        check_cover(now, spent)


lease_ids = st.builds("{}.{}".format, st.integers(0, 4), st.integers(0, 9)) | st.text("0123.-x", max_size=5)
any_ranges = st.lists(
    st.builds(
        lambda shard, epoch, start, length: DataRange(shard, epoch, start, start + length),
        st.integers(0, 1),
        st.sampled_from([0, 0, 0, 0, 1, 1, 2, -1, 10**15]),
        st.integers(-1, 12),
        st.integers(-1, 6),
    ),
    max_size=3,
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    shard_sizes=st.sampled_from([(12,), (3,), (10, 5)]),
    story=st.lists(
        st.tuples(st.sampled_from(["lease", *FATES]), st.integers(0, 3), st.integers(0, 9))
        | st.tuples(st.just("claim"), st.integers(0, 3), lease_ids, any_ranges),
        max_size=30,
    ),
)
def test_no_claim_whatsoever_doubles_a_sequence_or_takes_the_place_of_a_lease(
    shard_sizes: tuple[int, ...], story: list[tuple[Any, ...]]
):
    """Who says hello may claim to hold anything."""
    now, spent, held = ledger(*shard_sizes, prefix="3"), [], dict[str, Lease]()
    for verb, island, *rest in story:
        name = island_name(island)
        if verb == "lease":
            now, lease = now.lease(name, rest[0] + 1, now.shard_of(name))
            assert lease.id not in held
            held[lease.id] = lease
        elif verb == "claim":
            lease_id, ranges = rest
            now = now.adopt(lease_id, name, tuple(ranges)) or now
            if lease_id not in held and lease_id in now.outstanding:
                held[lease_id] = Lease(lease_id, name, tuple(ranges), sum(r.num_sequences for r in ranges) * TOKENS)
        elif held:
            picked = held.pop(sorted(held)[rest[0] % len(held)])
            now = now.settle(picked.id, verb)
            spent += picked.ranges if verb == "committed" else ()
        assert now.outstanding == held
        check_account(now.account())
        check_cover(now, spent)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shard_sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    size=st.integers(1, 5),
    kept=st.lists(st.booleans(), min_size=1, max_size=30),
)
def test_a_finished_epoch_has_every_sequence_once_whatever_was_given_back(
    shard_sizes: list[int], size: int, kept: list[bool]
):
    now, spent, shards = ledger(*shard_sizes), [], range(len(shard_sizes))
    while now.returned or min(now.cursor(shard)[0] for shard in shards) < 2:
        for shard in shards:
            now, lease = now.lease(island_name(shard), size, shard)
            keep = kept.pop() if kept else True
            now = now.settle(lease.id, "committed" if keep else "expired")
            spent += [(r.shard, r.epoch, s) for r in lease.ranges for s in range(r.start, r.stop) if keep]
    finished = sorted(item for item in spent if item[1] < 2)
    assert finished == [(shard, epoch, s) for shard in shards for epoch in (0, 1) for s in range(shard_sizes[shard])]


def test_an_island_with_a_name_of_its_own_has_a_shard_too_and_always_the_same() -> None:
    names = [island_name(0), "eu-1", "eu-2", "us", "island-x", "7"]
    shards = [ledger(10, 10, 10).shard_of(name) for name in names]
    assert shards == [0, 2, 0, 1, 0, 2]


def test_where_a_round_takes_several_epochs_leases_come_back_in_any_order():
    """A shard smaller than what islands have in hand: the last lease to be given may be the first to be claimed."""
    given, leases = ledger(3), []
    for number in range(6):
        given, lease = given.lease(f"island-{number:02d}", 4)
        leases.append(lease)
    after = ledger(3, prefix="2")
    for lease in reversed(leases):
        adopted = after.adopt(lease.id, lease.island, lease.ranges, num_ahead=24)
        assert adopted is not None, lease
        after = adopted
    assert after.cursor() == given.cursor()
    assert after.returned == ()
    assert ledger(3, prefix="2").adopt(leases[-1].id, "island-05", leases[-1].ranges, num_ahead=4) is None


@pytest.mark.parametrize("spent", [(DataRange(0, 0, 8, 12),), (DataRange(0, -1, 0, 4),), (DataRange(1, 0, 0, 4),)])
def test_a_log_that_spends_what_is_no_place_is_damage(spent: tuple[DataRange, ...]):
    account = {"leased": 8, "committed": 8, "rejected": 0, "expired": 0, "rewound": 0, "outstanding": 0}
    with pytest.raises(CorruptionError, match="is committed twice, or no place of its shard") as caught:
        ledger().recovered(spent, account)
    assert "diloco-ray verify" in caught.value.remedy
