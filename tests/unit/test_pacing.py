"""A duty behind the feed gives way to receiving at full rate, and keeps up with every rate that leaves room."""

import pytest

from archiver.worker.pacing import KEEPING_UP, YIELDING, Pace

SPEED = 1_000.0  # changes per second that the duty can process
PAGE = 500


class Simulation:
    """A duty that processes pages of a feed."""

    def __init__(self) -> None:
        self.pace, self.now, self.newest, self.processed, self.working = Pace(), 0.0, 0.0, 0.0, 0.0

    @property
    def behind(self) -> float:
        return self.newest - self.processed

    def run(self, seconds: float, arriving: float) -> float:
        """Let changes arrive at this rate for some seconds; return the share of the time that the duty worked."""
        began, worked = self.now, self.working
        while self.now < began + seconds:
            page = min(PAGE, self.behind)
            took = max(page / SPEED, 0.001)
            self._pass(took, arriving)
            self.processed += page
            self.working += took if page else 0
            pause = self.pace.pause(int(self.newest), int(page), took, self.now)
            self._pass(pause or (0.0 if self.behind >= PAGE else 0.1), arriving)
        return (self.working - worked) / (self.now - began)

    def _pass(self, seconds: float, arriving: float) -> None:
        self.now += seconds
        self.newest += seconds * arriving


def test_at_full_rate_a_duty_works_a_tenth_of_the_time() -> None:
    assert Simulation().run(120, arriving=5 * SPEED) == pytest.approx(YIELDING, rel=0.2)


def test_after_a_burst_it_catches_up_without_pauses() -> None:
    simulation = Simulation()
    simulation.run(60, arriving=5 * SPEED)
    burst = simulation.behind
    simulation.run(burst / SPEED * 1.2, arriving=0.0)
    assert simulation.behind == 0


@pytest.mark.parametrize("share", [0.05, 0.2, 0.9 * KEEPING_UP])
def test_at_a_rate_that_leaves_room_it_keeps_up_even_after_a_burst(share: float) -> None:
    simulation = Simulation()
    simulation.run(30, arriving=5 * SPEED)
    simulation.run(30 * 5 / (1 - share) * 1.5, arriving=share * SPEED)
    assert simulation.behind < PAGE
