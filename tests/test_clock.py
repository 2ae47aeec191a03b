"""What the clock counts, and what it says of the cap."""

import pytest

from slowrun.clock import Clock


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """A clock whose time stands still but for `after`."""
    clock = Clock()
    monkeypatch.setattr(clock, "now", lambda: clock.time_s, raising=False)
    clock.time_s = 1000.0
    return clock


def after(clock: Clock, seconds: float) -> Clock:
    clock.time_s += seconds
    return clock


def test_it_counts_from_its_start_and_nothing_before(clock):
    after(clock, 50).start()
    assert clock.running and clock.train_time_s == 0.0
    assert [after(clock, seconds).lap() for seconds in (3, 1, 2)] == [3.0, 1.0, 2.0]
    assert clock.train_time_s == 6.0 and list(clock.recent_s) == [3.0, 1.0, 2.0]


def test_a_pause_is_not_counted(clock):
    clock.start()
    after(clock, 2).lap()
    clock.stop()
    assert not clock.running
    after(clock, 3600)
    clock.stop()  # once more: no effect
    clock.start()
    assert after(clock, 3).lap() == 3.0 and clock.train_time_s == 5.0


def test_what_a_script_does_between_two_calls_is_counted(clock):
    """Also what is done after a step and before the clock stops. It is no step, so it does not enter their median."""
    clock.start()
    after(clock, 2).lap()
    after(clock, 7).stop()
    assert clock.train_time_s == 9.0 and list(clock.recent_s) == [2.0]
    after(clock, 100).start()
    after(clock, 1).start()  # of a running clock: no effect
    after(clock, 1).lap()
    assert clock.train_time_s == 11.0 and list(clock.recent_s) == [2.0, 2.0]


def test_the_time_of_a_step_is_the_median_of_the_last_five(clock):
    assert clock.step_s == 0.0
    clock.start()
    for seconds in (90, 1, 2, 3, 4, 50):
        after(clock, seconds).lap()
    assert clock.step_s == 3.0 and len(clock.recent_s) == 5


def test_the_cap(clock):
    """A step that would end on the cap is taken, one that would end past it is not; steps under way count."""
    clock.start()
    assert not clock.next_step_exceeds(0.5, steps_in_flight=0)  # no step is timed yet
    for _ in range(4):
        after(clock, 2).lap()
    assert not clock.next_step_exceeds(10.0, steps_in_flight=0)
    assert clock.next_step_exceeds(9.999, steps_in_flight=0)
    assert clock.next_step_exceeds(11.999, steps_in_flight=1) and not clock.next_step_exceeds(12.0, steps_in_flight=1)
    assert not clock.next_step_exceeds(0.0, steps_in_flight=9)  # 0: there is no cap
    after(clock, 5).stop()
    assert clock.next_step_exceeds(14.999, steps_in_flight=0)  # what was no step counts too


def test_real_time_goes_on():
    clock = Clock()
    clock.start()
    assert clock.lap() >= 0.0 and clock.lap() >= 0.0 and clock.train_time_s == sum(clock.recent_s)
