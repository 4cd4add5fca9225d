"""The configuration as text: TOML, recipes, flags and the reference page."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from lit_fast.config import UNLOCKED_DEFAULTS, Config, flatten, sections, settings
from lit_fast.config_check import validate
from lit_fast.errors import UserError, first_line, unreadable
from lit_fast.storage.files import exists, is_directory, read_bytes
from lit_fast.storage.paths import StrPath, name
from lit_fast.utils.output import result

# Old keys and their new names.
RENAMED = {
    "text.parts": "text.microbatches",
    "stream.streams": "stream.shuffle_streams",
    "stream.window_blocks": "stream.shuffle_window_blocks",
    "log.wandb": "log.report_to",
}
_TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    tuple: "a list of strings",
}


def load_config(location: StrPath, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration and apply overrides.

    Args:
      location: a TOML file, or the name of a packaged recipe; a file takes precedence.
      overrides: `--section.key value` or `--section.key=value`; lists are separated by commas.

    Raises:
      UserError: unreadable file, unknown key (the nearest known one is named), wrong type or value.
    """
    given = _parse_flags(overrides)
    is_toml = exists(location) and not is_directory(location)  # `coco` may be a directory and a recipe
    values = read_toml(location) if is_toml else _read_recipe(str(location))
    return build_config(values | given, f"in {location}")


def recipes() -> list[str]:
    """Return the names of the packaged recipes."""
    files = (resources.files("lit_fast") / "configs").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def _read_recipe(recipe: str) -> dict[str, Any]:
    known = recipes()
    if recipe not in known:
        near = difflib.get_close_matches(name(recipe).removesuffix(".toml"), known, 1, 0.5)
        action = f"give a TOML file or the name of a recipe: {', '.join(known)}"
        if near:
            action = f"did you mean {near[0]}? give a TOML file or a recipe that lit-fast train --help lists"
        problem = "is a directory" if exists(recipe) else "does not exist"
        raise UserError(f"config {recipe} {problem}; {action}")
    file = resources.files("lit_fast") / "configs" / f"{recipe}.toml"
    return flatten_toml(tomllib.loads(file.read_bytes().decode()))


def read_toml(location: StrPath) -> dict[str, Any]:
    """Return the values of a TOML file by dotted name; keys may be unknown.

    Raises:
      UserError: the file cannot be read or is not TOML.
    """
    try:
        return flatten_toml(tomllib.loads(read_bytes(location).decode()))
    except OSError as error:
        raise unreadable(f"config {location}", error) from None
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise UserError(f"config {location} is not TOML ({first_line(error)}); fix it") from None


def flatten_toml(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by dotted name."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= flatten_toml(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def build_config(values: Mapping[str, Any], where: str) -> Config:
    """Build a configuration from values by dotted name.

    Args:
      where: source of the values, for error messages.

    Raises:
      UserError: unknown key, wrong type or value.
    """
    if values.get("image.train") == "unlocked":
        values = {key: list(rules) for key, rules in UNLOCKED_DEFAULTS.items()} | dict(values)
    given: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in values.items():
        _check_known(key, where)
        section, _, field = key.rpartition(".")
        given[section][field] = _typed(key, value)
    nested = {section: cls(**given[section]) for section, cls in sections().items() if section}
    config = Config(**given[""], **nested)
    if config.examples > 0 and config.stream.global_batch > 0:
        config = dataclasses.replace(config, steps=max(1, config.examples // config.stream.global_batch))
    validate(config)
    return config


def to_toml(config: Config) -> str:
    """Return the resolved configuration as TOML, with every key."""
    lines: dict[str, list[str]] = defaultdict(list)
    for key, value in flatten(config).items():
        section, _, field = key.rpartition(".")
        lines[section].append(f"{field} = {_toml_value(value)}")
    tables = [f"[{section}]\n" * bool(section) + "\n".join(fields) for section, fields in lines.items()]
    return "\n\n".join(tables) + "\n"


def _toml_value(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists of them are TOML's, once DEL is escaped as well.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _parse_flags(arguments: Sequence[str]) -> dict[str, Any]:
    values = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"unexpected argument {flag!r}; write overrides as --section.key value")
        key, equals, text = flag[2:].partition("=")
        key = key.replace("-", "_")
        _check_known(key, "on the command line")
        if not equals and not rest:
            raise UserError(f"{flag} needs a value")
        values[key] = _parse_value(key, text if equals else rest.pop(0))
    return values


def _check_known(key: str, where: str) -> None:
    known = settings()
    if key in known:
        return
    if key in RENAMED:
        raise UserError(f"config key {key} {where} was renamed; write {RENAMED[key]}")
    # The last part alone often identifies the key: "learning_rate" for "optimizer.learning_rate".
    near = difflib.get_close_matches(key, known, 1, 0.5)
    near = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]] or near
    hint = f"; did you mean {near[0]}?" if near else "; lit-fast train --help lists all keys"
    raise UserError(f"unknown config key {key!r} {where}{hint}")


def _parse_value(key: str, text: str) -> Any:
    """Convert the value of a flag to the type of its key."""
    kind: Any = type(settings()[key].default)
    if kind is tuple:
        return [part for part in text.split(",") if part]
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return int(text.replace("_", "")) if kind is int else kind(text)
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"config key {key} must be {_TYPES[kind]}, not {text!r}") from None


def _typed(key: str, value: Any) -> Any:
    """Convert a parsed value to the type of its key; floats accept whole numbers."""
    kind = type(settings()[key].default)
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if kind is not tuple and type(value) is kind:
        return value
    raise UserError(f"config key {key} must be {_TYPES[kind]}, not {value!r}")


def describe(key: str) -> tuple[str, str, str, str]:
    """Return the type, the default as TOML, the choices and the description of a key."""
    field = settings()[key]
    kind = type(field.default)
    return (
        "list of str" if kind is tuple else kind.__name__,
        _toml_value(field.default),
        ", ".join(field.metadata["choices"]),
        field.metadata["help"],
    )


def reference() -> str:
    """Return docs/configuration.md: every key with type, default, choices and description."""
    parts = [
        "# Configuration\n\n"
        "A TOML file describes a run. `lit-fast train CONFIG --workdir W` takes the path of a file or the name of a "
        f"packaged recipe: {', '.join(f'`{recipe}`' for recipe in recipes())}. Every key is also a flag, "
        "`--section.key value`; hyphens may replace underscores, and lists are separated by commas.\n\n"
        "This page is generated: `python -m lit_fast.config_io > docs/configuration.md`."
    ]
    for section, cls in sections().items():
        rows = ["| key | type | default | description |", "|---|---|---|---|"]
        for key, field in settings().items():
            if key.rpartition(".")[0] == section:
                kind, default, choices, text = describe(key)
                text += f". One of {choices}" if choices else ""
                cells = f"`{field.name}`", kind, f"`{default}`", text
                rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        title = f"[{section}]" if section else "Keys without a section"
        parts.append(f"## {title}\n\n{inspect.getdoc(cls)}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    result(reference().rstrip())
