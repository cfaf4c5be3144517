"""The page of all options, in Markdown, made from their declarations."""

from collections.abc import Sequence

from service.options.parser import GROUPS, Declared

HEAD = """\
# Options

`python -m service --help-table` prints this page. An option is set on the command line, by its environment variable
or in a TOML file that `--config` names; the first of these that has it wins. In the file it has the same name without
the dashes in front, and `_` may stand for `-`:

```toml
model = "Qwen/Qwen3-0.6B"
adapter-bytes = "2G"                           # or 2147483648
max_running = 32
open-metrics = true
allow-source = ["s3://bucket/team-a", "hf://org"]
```

A size in bytes may have the unit K, M or G, powers of 1024. A list is the option repeated on the command line; in a
variable its items are separated by commas. A switch that is on is turned off by `--no-` before its name. `GET /config`
tells what is in force, and where each value comes from.
"""


def page(options: Sequence[Declared]) -> str:
    """The page, with a table for each group."""
    parts = [HEAD]
    for group in GROUPS:
        parts.append(f"\n## {group}\n\n| option | variable | default | unit | meaning |\n|---|---|---|---|---|\n")
        parts += (_row(option) for option in options if option.option.group == group)
    return "".join(parts)


def _row(option: Declared) -> str:
    names = ", ".join(f"`--{name}`" for name in option.names)
    variables = ", ".join(f"`{name}`" for name in option.variables)
    cells = (names, variables, option.default_text, option.unit, option.option.help)
    return "".join(f"| {cell} " for cell in (each.replace("|", r"\|") for each in cells)) + "|\n"
