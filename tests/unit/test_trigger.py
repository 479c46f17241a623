"""When a draft is trained again, and how many steps fit into a time."""

import pytest

from eagle3_ds.train.trigger import FallingAcceptance, steps_in


def test_nothing_is_said_before_the_window_is_full():
    trigger = FallingAcceptance(window=100, low=2.0, high=2.5)
    assert not trigger.observe(99, 0) and trigger.acceptance_length is None
    assert trigger.observe(1, 0) and trigger.acceptance_length == 1.0


def test_training_begins_below_low_and_ends_at_high():
    trigger = FallingAcceptance(window=10, low=2.0, high=2.5)
    # Accepted in ten rounds: acceptance lengths 2.2, 2.0, 1.9, 2.0, 2.4, 2.5, 2.0, 1.9
    said = [trigger.observe(10, accepted) for accepted in (12, 10, 9, 10, 14, 15, 10, 9)]
    assert said == [False, False, True, True, True, False, False, True]


def test_the_window_moves_by_rounds_and_not_by_calls():
    trigger = FallingAcceptance(window=100, low=2.0, high=2.5)
    trigger.observe(100, 200)
    trigger.observe(50, 0)
    assert trigger.acceptance_length == pytest.approx(1 + 200 / 150), "the oldest is still needed"
    trigger.observe(50, 0)
    assert trigger.acceptance_length == 1.0 and trigger.is_wanted
    trigger.observe(0, 0)
    assert trigger.acceptance_length == 1.0


def test_after_a_new_draft_the_old_counts_are_forgotten_and_the_answer_stays():
    trigger = FallingAcceptance(window=10, low=2.0, high=2.5)
    assert trigger.observe(10, 0)
    trigger.forget()
    assert trigger.acceptance_length is None
    assert trigger.observe(9, 18), "no window yet"
    assert not trigger.observe(1, 2)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((0, 2, 3), "window is 0"), ((9, 3, 3), "low is 3 and high is 3"), ((9, 0.5, 3), "low is 0.5")],
)
def test_numbers_that_make_no_trigger_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        FallingAcceptance(*numbers)


@pytest.mark.parametrize("counts", [(-5, 0), (5, -1), (0, 3)])
def test_counts_that_cannot_be_are_refused(counts):
    with pytest.raises(ValueError, match="since the last call"):
        FallingAcceptance(10, 2, 3).observe(*counts)


def test_the_slowest_step_says_how_many_fit():
    assert steps_in(10, [1.0, 3.0, 2.0], 99) == 3
    assert steps_in(10, [1.0, 3.0, 2.0], 2) == 2
    assert steps_in(2.9, [3.0], 99) == 0
    assert steps_in(-1, [0.1], 99) == 0 and steps_in(10, [], 99) == 0
