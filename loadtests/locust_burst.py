"""Locust users who all chat at once, wait for the next burst, and chat at once again.

`locust -f loadtests/locust_burst.py --headless --users 16 --run-time 60s --host http://127.0.0.1:8000`. The options are
those of loadtests/locustfile.py and --burst-seconds.
"""

import time
from typing import Any

from loadtests import locustfile


def add_period(parser: Any, **_: Any) -> None:
    parser.add_argument(
        "--burst-seconds", env_var="LOAD_BURST_SECONDS", type=float, default=4.0, help="from one burst to the next"
    )


locustfile.HOOKS.init_command_line_parser.add_listener(add_period)


class BurstUser(locustfile.ChatUser):
    """All of them wait for the same moments of the clock."""

    def wait_time(self) -> float:
        period: float = self.environment.parsed_options.burst_seconds
        return period - time.time() % period
