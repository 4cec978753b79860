"""How fast an endpoint is asked: slots held against what limits allow, on a clock of the test's own."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from novelret.label.judges.pace import Pace, retry_after


def sent(pace, now, seconds, tokens=0):
    """How many requests go out until then, sent by somebody who is always ready."""
    count, clock = 0, now
    while True:
        clock = max(clock, pace.slot(clock, tokens))
        if clock >= now + seconds:
            return count
        count += 1


def test_requests_per_minute_are_spread_evenly():
    assert sent(Pace(rpm=3000), 100.0, 60.0) in (3000, 3001)
    assert sent(Pace(rpm=3000), 100.0, 1.0) in (50, 51)
    assert Pace().slot(5.0, 10) == 5.0


def test_tokens_per_minute_count_where_they_are_the_narrower_limit():
    assert sent(Pace(rpm=3000, tpm=60_000), 0.0, 60.0, tokens=100) in (600, 601)
    assert sent(Pace(rpm=600, tpm=600_000), 0.0, 60.0, tokens=100) in (600, 601)


def test_a_late_sender_catches_up_a_little_and_saves_nothing_for_long():
    pace = Pace(rpm=600)
    assert pace.slot(10.0, 0) == 10.0
    assert [pace.slot(10.25, 0) for _ in range(4)] == pytest.approx([10.1, 10.2, 10.3, 10.4])
    # After a pause of a minute there is no minute's worth to burn.
    assert sent(pace, 70.0, 1.0) <= 10 + 3


def test_silence_holds_for_all_and_is_not_begun_anew_by_those_under_way():
    pace = Pace()
    pace.refuse(10.0, 2.0)
    pace.refuse(10.3, 2.0)
    assert pace.slot(10.4, 0) == 12.0
    pace.refuse(10.5, 30.0)  # a longer one holds
    assert pace.slot(12.5, 0) == 40.0
    pace.refuse(41.0, 1.0)
    assert pace.slot(41.2, 0) == 42.0


def test_refusals_without_a_time_narrow_what_is_under_way_until_answers_widen_it():
    pace = Pace(widest=32)
    for sent in (1.0, 1.0, 1.1):  # the last two were under way when the first was refused
        pace.narrow(sent, 1.2)
    assert (pace.width, pace.refusals) == (16, 1)
    pace.narrow(1.3, 1.4)
    assert (pace.width, pace.refusals) == (8, 2)
    for n in range(10):
        pace.narrow(2.0 + n, 2.5 + n)
    assert pace.width == 1
    pace.widen()
    assert (pace.width, pace.refusals) == (2, 0)
    for _ in range(3_000):
        pace.widen()
    assert pace.width == 32


def test_limits_are_learnt_unless_given():
    told = {"x-ratelimit-limit-requests": "120", "x-ratelimit-limit-tokens": "5000"}
    pace = Pace(rpm=60)
    pace.learn(told)
    assert (pace.rpm, pace.tpm) == (60, 5000)
    pace.learn({"x-ratelimit-limit-tokens": "none of it", "x-ratelimit-limit-requests": "-1"})
    assert (pace.rpm, pace.tpm) == (60, 5000)


def test_retry_after():
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after": "3", "retry-after-ms": "250"}) == 0.25
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < retry_after({"retry-after": date}) <= 30
    for wrong in ("Wed, 21 Oct 2015 07:28:00 GMT", "", "soon", "nan", "inf", "-1"):
        assert retry_after({"retry-after": wrong}) is None
