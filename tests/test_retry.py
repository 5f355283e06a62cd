"""The one policy for retries: what is tried again, how long is waited, and what is said at the end."""

import random

import pytest
from botocore.exceptions import NoCredentialsError

from csflow.errors import TRANSIENT, ErrorCode, ImageError, WrongUse
from csflow.inputs import objects
from csflow.inputs.objects import ObjectStore

DEADLINE_S = 600.0


class Clock:
    """Time that passes only where somebody waits, or as `seconds_an_attempt`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr("time.sleep", self.wait)
        # The longest pause there may be, in place of a random one up to it.
        monkeypatch.setattr(random, "uniform", lambda shortest, longest: longest)

    def wait(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Failing:
    """An attempt that fails with these errors in turn, then succeeds; it takes some seconds each time."""

    def __init__(self, clock: Clock, errors: list[Exception], seconds: float = 0.0) -> None:
        self.clock = clock
        self.errors = errors
        self.seconds = seconds
        self.lefts: list[float] = []

    def __call__(self, left_s: float) -> str:
        self.lefts.append(left_s)
        self.clock.now += self.seconds
        if self.errors:
            raise self.errors.pop(0)
        return "content"


def retried(attempt: Failing) -> str:
    return ObjectStore({}, DEADLINE_S).retried(attempt)


RETRIED = [ErrorCode.THROTTLED, ErrorCode.TIMEOUT, ErrorCode.CONNECTION, ErrorCode.SERVER_ERROR]


@pytest.mark.parametrize("code", RETRIED)
def test_what_may_pass_within_minutes_is_tried_again(clock: Clock, code: ErrorCode) -> None:
    attempt = Failing(clock, [ImageError(code, "for now")] * 3)
    assert retried(attempt) == "content"
    assert len(attempt.lefts) == 4


def test_an_answer_that_does_not_come_in_time_is_waited_for_again(clock: Clock) -> None:
    assert retried(Failing(clock, [TimeoutError()])) == "content"


@pytest.mark.parametrize("code", sorted(set(ErrorCode) - set(RETRIED)))
def test_what_stays_or_takes_a_person_is_tried_once(clock: Clock, code: ErrorCode) -> None:
    attempt = Failing(clock, [ImageError(code, "for good")])
    with pytest.raises(ImageError) as raised:
        retried(attempt)
    assert raised.value.code == code
    assert (len(attempt.lefts), clock.pauses) == (1, [])
    assert set(RETRIED) < TRANSIENT


def test_pauses_double_from_a_fifth_of_a_second_to_twenty(clock: Clock) -> None:
    retried(Failing(clock, [TimeoutError()] * 9))
    assert clock.pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20.0, 20.0]


def test_readers_that_failed_together_do_not_come_back_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(random, "uniform", random.Random(0).uniform)
    for _ in range(50):
        retried(Failing(clock, [TimeoutError()] * 2))
    first, second = clock.pauses[::2], clock.pauses[1::2]
    for pauses, longest in ((first, 0.2), (second, 0.4)):
        assert 0 <= min(pauses) < 0.1 * longest < 0.9 * longest < max(pauses) <= longest


def test_no_attempt_begins_behind_the_deadline(clock: Clock) -> None:
    attempt = Failing(clock, [ImageError(ErrorCode.THROTTLED, f"{n}") for n in range(1000)])
    with pytest.raises(ImageError, match="throttled") as raised:
        retried(attempt)
    waited = clock.now - 1000
    # The next pause would have ended behind it; the error is the last one.
    assert DEADLINE_S - 20 <= waited <= DEADLINE_S
    assert raised.value.message == str(len(attempt.lefts) - 1)
    assert attempt.lefts == sorted(attempt.lefts, reverse=True)


def test_an_attempt_is_told_the_time_that_is_left_but_never_too_little_to_succeed(clock: Clock) -> None:
    attempt = Failing(clock, [TimeoutError()] * 3, seconds=199.0)
    retried(attempt)
    assert attempt.lefts == pytest.approx([600, 400.8, 201.4, objects.SHORTEST_ATTEMPT_S])


def test_wrong_use_and_missing_credentials_end_the_run_at_once(clock: Clock) -> None:
    with pytest.raises(WrongUse, match="unknown scheme"):
        retried(Failing(clock, [WrongUse("unknown scheme")]))
    with pytest.raises(
        WrongUse, match=r"no credentials for S3 \(NoCredentialsError\); set AWS_ACCESS_KEY_ID"
    ):
        retried(Failing(clock, [NoCredentialsError()]))
    assert clock.pauses == []
