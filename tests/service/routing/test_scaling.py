"""How many servers there should be."""

import pytest

from service.routing.scaling import servers_wanted


@pytest.mark.parametrize(
    ("current", "queue_seconds", "loads", "wanted"),
    [
        (1, [3.0], [1.2], 2),
        (4, [2.0, 2.0, 1.0, 3.0], [1.0] * 4, 6),
        (2, [0.0, 1.5], [0.2, 1.0], 2),  # routing has to spread it first
        (2, [0.0, 0.0], [0.2, 0.2], 1),
        (2, [0.0, 0.0], [0.3, 0.3], 2),  # one would be too full
        (2, [0.0, 0.1], [0.0, 0.1], 2),  # somebody waits
        (1, [0.0], [0.0], 1),
        (3, [], [], 3),  # none has said anything
    ],
)
def test_servers_follow_the_time_that_requests_wait(
    current: int, queue_seconds: list[float], loads: list[float], wanted: int
) -> None:
    assert servers_wanted(current, queue_seconds, loads) == wanted
