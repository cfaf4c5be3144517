"""A Locust user who uploads adapters."""

import itertools
from typing import Any

from loadtests.locustfile import HOOKS, StreamingUser
from loadtests.random_adapter import adapter_file, number_file
from loadtests.server_process import find_model


def add_model(parser: Any, **_: Any) -> None:
    parser.add_argument(
        "--model-directory", env_var="LOAD_MODEL_DIRECTORY", default=None, help="of the served model, for its shapes"
    )


HOOKS.init_command_line_parser.add_listener(add_model)


class UploadingUser(StreamingUser):
    """Has random weights for adapters; each upload is an entry of the kind PUT."""

    abstract = True
    uploads = itertools.count(1)

    def on_start(self) -> None:
        super().on_start()
        self.file = adapter_file(find_model(self.environment.parsed_options.model_directory).config, 0)

    def put(self, name: str, *, ephemeral: bool) -> bool:
        """Upload weights that no earlier upload had, and return whether the server took them."""
        number_file(self.file, next(self.uploads))
        headers = {"Content-Type": "application/vnd.safetensors"}
        path = f"/adapters/{name}?ephemeral={str(ephemeral).lower()}"
        return bool(self.client.put(path, data=bytes(self.file), headers=headers, name=name).ok)
