"""Locust users who each train: upload an adapter that lives in memory only, sample from it, and upload the next one.

`locust -f loadtests/locust_training.py --headless --users 4 --run-time 60s --host http://127.0.0.1:8000`. The options
are those of loadtests/locustfile.py, --samples and --model-directory. Each upload is an entry of the kind PUT. The
weights are random: `python -m loadtests.training_loop` trains in earnest.
"""

from typing import Any

from locust import task

from loadtests.locustfile import HOOKS
from loadtests.uploading_user import UploadingUser


def add_samples(parser: Any, **_: Any) -> None:
    parser.add_argument("--samples", env_var="LOAD_SAMPLES", type=int, default=4, help="answers after each upload")


HOOKS.init_command_line_parser.add_listener(add_samples)


class TrainingUser(UploadingUser):
    def on_start(self) -> None:
        super().on_start()
        self.name = f"training-{next(self.numbers)}"

    def on_stop(self) -> None:
        self.client.delete(f"/adapters/{self.name}", name="the end")

    @task
    def step(self) -> None:
        settings = self.environment.parsed_options
        if self.put(self.name, ephemeral=True):
            for _ in range(settings.samples):
                self.stream(self.name, self.question(), settings.max_tokens)
