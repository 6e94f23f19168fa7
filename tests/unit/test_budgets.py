"""Token buckets, the provider's quota, shares, spend, the retry quota, hedges."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.admission.buckets import ROUNDING, WAIT_MAX_S, Bucket
from service.core.admission.budgets import BURST_S, HEARD_MAX_S, Budget, ProviderQuota, Quota
from service.core.admission.hedges import HEDGED_SHARE, HEDGES_SAVED, Hedges
from service.core.admission.retry import RETRIES_PER_S, RETRIES_SAVED, RetryQuota
from service.core.admission.shares import EVEN_SHARE, share
from service.core.admission.spend import Spend
from service.core.messages import Partition

amounts = st.lists(st.floats(0.1, 50.0), min_size=1, max_size=60)


def played(bucket: Bucket, wanted: list[float], gaps: list[float]) -> list[tuple[float, float]]:
    """When each amount went, for a caller who waits as told; gaps of nothing between."""
    went, now_s = [], 0.0
    for amount, gap_s in zip(wanted, itertools.cycle(gaps or [0.0])):
        now_s += gap_s
        for _ in range(1000):
            wait_s = bucket.wait_s(now_s, amount)
            if wait_s == 0.0:
                break
            now_s += wait_s
        else:
            raise AssertionError("no progress")
        bucket.take(now_s, amount)
        went.append((now_s, amount))
    return went


@given(amounts, st.lists(st.floats(0.0, 5.0), max_size=20), st.floats(0.1, 20.0), st.floats(1, 20))
def test_never_over_the_rate_by_more_than_the_burst_and_one_call(
    wanted: list[float], gaps: list[float], rate: float, burst: float
) -> None:
    """In every stretch of time at most rate x time + burst goes out, and what one call larger than
    the burst exceeds it by; and everything goes out in the end."""
    went = played(Bucket.full(rate, burst), wanted, gaps)
    assert len(went) == len(wanted)
    overdraft = max(0.0, max(wanted) - burst)
    slack = burst * ROUNDING * len(went) + 1e-6
    for first in range(len(went)):
        used = 0.0
        for at_s, amount in went[first:]:
            used += amount
            assert used <= rate * (at_s - went[first][0]) + burst + overdraft + slack


def test_a_call_larger_than_the_bucket_goes_on_a_full_one_and_leaves_a_debt() -> None:
    """A hundred of a bucket of ten: at once, and then nothing until it is worked off."""
    bucket = Bucket.full(1.0, 10.0)
    assert bucket.wait_s(0, 100.0) == 0
    bucket.take(0, 100.0)
    assert bucket.level == -90
    assert bucket.wait_s(0, 1.0) == WAIT_MAX_S
    assert bucket.wait_s(91, 1.0) == 0
    assert bucket.wait_s(91, 10.0) == 9


def test_correction_works_off_too_little_and_gives_back_too_much() -> None:
    """Estimated ten and used thirty is a debt of twenty; used nothing, all comes back."""
    budget = Budget(600)
    budget.take(0, 10, 10)
    budget.correct(0, 10, 30)
    assert budget.wait_s(0, 1, 1) == pytest.approx(1.1, rel=1e-3)
    budget.correct(0, 30, 0)
    assert budget.wait_s(0, 20, 20) == 0


@given(st.lists(st.tuples(st.floats(0.05, 1.0), st.floats(0.1, 30.0)), min_size=1, max_size=30))
def test_a_share_that_changes_never_gives_more_than_all_of_it(
    shares: list[tuple[float, float]],
) -> None:
    """Two workers with parts that come to one never take more together than one alone might."""
    ours, theirs = Budget(600, smallest_burst=1), Budget(600, smallest_burst=1)
    now_s, taken = 0.0, 0
    for part, lasting_s in shares:
        ours.set_share(now_s, part)
        theirs.set_share(now_s, 1 - part)
        end_s = now_s + lasting_s
        while now_s < end_s:
            for budget in (ours, theirs):
                while budget.wait_s(now_s, 1, 1) == 0:
                    budget.take(now_s, 1, 1)
                    taken += 1
            now_s += 0.1
    # Each may have been full, with its whole burst, when its part became smaller.
    assert taken <= 10 * now_s + 2 * 10 * BURST_S + 2


def test_the_providers_bucket_is_followed_between_its_answers() -> None:
    """What was sent after the call that told is taken off; what fills up since is added."""
    quota = ProviderQuota()
    assert quota.wait_s(0, 1) == 0, "nothing is known"
    for n in range(10):
        quota.take(0.0 + n, 1)
    quota.heard(10.0, Quota(60, 6, 54.0), asked_at_s=4.0)
    assert quota.level == 1, "six, and five calls since"
    quota.take(10.0, 1)
    assert quota.wait_s(10.0, 1) == pytest.approx(1.0, rel=1e-3)
    assert quota.wait_s(11.0, 1) == 0
    quota.heard(11.0, Quota(60, 50, 10.0), asked_at_s=2.0)
    assert quota.level < 2, "older news than the last"


def test_a_provider_that_counts_more_than_we_do_is_found_out() -> None:
    """Some count the request's bytes and the whole answer: a few refusals with room left by our
    count show how much more it is; a refusal with room for many has another cause."""
    quota, refusals, now_s = ProviderQuota(), 0, 0.0
    remaining = 0.0
    for _ in range(200):
        now_s += 0.5
        remaining = min(30_000.0, remaining + 250.0)
        if quota.wait_s(now_s, 369) > 0:
            continue
        quota.take(now_s, 369)
        refused = remaining < 520
        remaining -= 0 if refused else 520
        refusals += refused
        told = Quota(30_000, remaining, (30_000 - remaining) / 500)
        quota.heard(now_s + 0.05, told, now_s, 369 if refused else None)
    assert refusals <= 5
    assert 520 / 369 <= quota.charge <= 1.05 * 520 / 369
    quota.heard(now_s + 1, Quota(30_000, 20_000, 20.0), now_s + 1, 369)
    assert quota.charge <= 1.05 * 520 / 369


def test_a_limit_that_comes_back_all_at_once_is_waited_for() -> None:
    """A reset that is no bucket's: nothing until then, everything afterwards."""
    quota = ProviderQuota()
    quota.take(0, 1)
    quota.heard(1.0, Quota(100, 0, 20.0), asked_at_s=0.0)
    assert quota.wait_s(1.0, 1) == 20
    assert quota.wait_s(15.0, 1) == 6
    assert quota.wait_s(21.0, 100) == 0


def test_what_the_provider_said_does_not_hold_for_ever() -> None:
    """A limit of a day does not stop everything until the day is over: it is asked again."""
    quota = ProviderQuota()
    quota.heard(0.0, Quota(200, 0, 86_400.0), asked_at_s=0.0)
    assert quota.wait_s(0.0, 1) == HEARD_MAX_S
    assert quota.wait_s(HEARD_MAX_S, 1) == 0


def part(number: int) -> Partition:
    return Partition("in", number)


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 10_000)), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_the_parts_of_all_workers_come_to_one(lags: list[int | None], workers: int) -> None:
    """However the lags are, known or not, and whoever holds what."""
    seen = {part(n): lag for n, lag in enumerate(lags)}
    held: list[set[Partition]] = [set() for _ in range(workers)]
    for n, partition in enumerate(seen):
        held[n % workers].add(partition)
    assert sum(share(each, seen) for each in held) == pytest.approx(1.0)


def test_a_lone_backlog_gets_nearly_all_and_the_idle_can_start() -> None:
    """All backlog on one of six: at least nine tenths for its holder, something for each other."""
    lags = {part(n): 5000 if n == 0 else 0 for n in range(6)}
    assert share({part(0), part(1)}, lags) > 0.9
    assert share({part(2), part(3)}, lags) == pytest.approx(EVEN_SHARE / 3)
    assert share({part(0)}, {}) == 1.0
    assert share(set(), lags) == 0.0


def test_spend_is_counted_over_an_hour_and_by_partitions() -> None:
    """Half of the partitions, half of the limit; what came with them, or went with others, counts
    for as long as it is of the hour."""
    spend = Spend(10.0)
    spend.set_share(0.5)
    spend.spent(0, 2.0)
    spend.carry(0, 1800, 2.5)
    assert spend.wait_s(1, 0) == 0
    spend.spent(2, 0.5)
    assert spend.wait_s(3, 0) > 0
    spend.carry(3, 600, -1.0)
    assert spend.wait_s(3, 0) == 0
    assert spend.last_hour_usd(3) == 4.0
    assert spend.last_hour_usd(1800 + 61) == 1.5
    spend.carry(4000, 4000, 99.0)
    assert spend.last_hour_usd(4000) == 0


def test_calls_under_way_count_with_the_mean_cost() -> None:
    """Fifty in flight do not pass the limit together."""
    spend = Spend(1.0)
    assert spend.wait_s(0, 0) == 0
    assert spend.wait_s(0, 1) > 0, "nobody knows yet what a call costs"
    spend.spent(0, 0.1)
    assert spend.wait_s(0, 8) == 0
    assert spend.wait_s(0, 9) > 0


def test_retries_are_no_more_than_successes_and_one_a_second() -> None:
    """However many wait, and the provider that is back forgives all."""
    quota, started, now_s = RetryQuota(), 0, 0.0
    for _ in range(600):
        started += (now := quota.available(now_s))
        quota.take(now)
        now_s += 1
    assert started == RETRIES_SAVED + 599 * RETRIES_PER_S
    for _ in range(30):
        quota.succeeded()
    assert quota.available(now_s) >= 30
    quota.take(quota.available(now_s))
    assert quota.wait_s(now_s) > 0
    quota.forgive()
    assert quota.available(now_s) == RETRIES_SAVED


def test_hedges_are_one_in_twenty() -> None:
    """And a few together at most."""
    hedges, made = Hedges(1.0), 0
    for _ in range(2000):
        hedges.called()
        if hedges.may():
            hedges.hedged()
            made += 1
    assert made <= 2000 * HEDGED_SHARE + 1
    for _ in range(1000):
        hedges.called()
    assert hedges.saved == HEDGES_SAVED
