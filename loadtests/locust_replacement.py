"""Locust users who chat with adapters, and one who replaces the most popular of them again and again.

`locust -f loadtests/locust_replacement.py --headless --users 9 --run-time 60s --models a,b --host
http://127.0.0.1:8000`. The options are those of loadtests/locustfile.py and --model-directory. Each upload is an entry
of the kind PUT.
"""

from locust import between, task

from loadtests import locustfile
from loadtests.uploading_user import UploadingUser


class ReplacementChatUser(locustfile.ChatUser):
    """Chats with what is replaced meanwhile."""


class ReplacingUser(UploadingUser):
    """Gives the first of --models other weights under its old name, durably."""

    fixed_count = 1
    wait_time = between(0.5, 1.0)

    @task
    def replace(self) -> None:
        self.put(self.environment.parsed_options.models.split(",")[0], ephemeral=False)
