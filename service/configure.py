"""Settings, with the files of their model: from the command line, or from a program that embeds the service."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from runtime.output.progress import bar_class
from service.default_model import ensure_default_model
from service.logs import say, shows_bars
from service.settings import Arguments, Settings, read_program

DEFAULT_NAME = "smollm2-135m-instruct"
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja"]


def settings_for(model: str | Path | None = None, **options: Any) -> Settings:
    """The settings of a service in another program, for `service.app.create_app`; a model that is an id is fetched.

    `model` is a directory, an id on the Hugging Face hub, or None for the embedded model. The other options are those
    of docs/options.md by their names, with `_` for `-`; no command line, no variable and no file is read. Raises
    ValueError with a sentence for an option that is unknown or bad, and DefaultModelMissing.
    """
    return configure(read_program({"model": model, **options}))


def configure(arguments: Arguments) -> Settings:
    """The settings, after the model's files were fetched. Raises ValueError with a sentence, DefaultModelMissing."""
    model = arguments.model
    if model is None:
        return arguments.settings(ensure_default_model(arguments.user_cache), DEFAULT_NAME)
    if Path(model).is_dir():
        return arguments.settings(Path(model), Path(model).resolve().name)
    if Path(model).is_absolute() or model.startswith("."):
        raise ValueError(f"the model directory {model} does not exist")
    say(f"fetching {model} from the Hugging Face hub, unless the cache has it")
    try:
        bars = bar_class(bars=shows_bars())
        directory = snapshot_download(model, allow_patterns=MODEL_FILES, tqdm_class=bars)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} is not a directory, and cannot be fetched from the hub: {error}") from None
    return arguments.settings(Path(directory), model)
