"""Read a configuration from TOML and `--section.key value`, and write it as TOML."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from lit_fast.config import Config, check_values, flatten
from lit_fast.errors import UserError

# Keys of earlier versions, and what to do instead.
REMOVED = {
    "text.kept_parts": "text.keep says what is kept, and by itself chooses what the device has room for",
}


def load_config(path: Path | str, overrides: Sequence[str] = (), ignored: Collection[str] = ()) -> Config:
    """Read a TOML file and apply `--section.key value` overrides; `ignored` keys may stand in it.

    Raises:
      UserError: unreadable file, unknown key (the nearest known one is named), wrong type or value.
    """
    known = flatten(Config())
    given = _pairs(overrides, known)
    try:
        values = flatten_toml(tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"config {path} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from None
    values = {key: value for key, value in values.items() if key not in ignored}
    for key in values:
        _check_known(key, known, f"in {path}")
    for key, text in given:
        values[key] = _parse(key, text, known[key])
    return build_config(values, f"in {path}")


def build_config(values: dict[str, Any], where: str) -> Config:
    """The config of values by dotted name; `where` they stand is for messages.

    Raises:
      UserError: unknown key, wrong type or value.
    """
    known = flatten(Config())
    for key in values:
        _check_known(key, known, where)
    config = _build(Config, "", values)
    if config.examples > 0 and config.stream.global_batch > 0:
        config = dataclasses.replace(config, steps=max(1, config.examples // config.stream.global_batch))
    check_values(config, flatten(config))
    return config


def flatten_toml(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """All values of a parsed TOML file by dotted name, whether they are keys of a config or not."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= flatten_toml(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML, every field in it."""
    sections: dict[str, list[str]] = {}
    for key, value in flatten(config).items():
        section, _, name = key.rpartition(".")
        # JSON's strings, numbers, booleans and lists of them are TOML's, once DEL is escaped as well.
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        sections.setdefault(section, []).append(f"{name} = {text}")
    parts = [(f"[{section}]\n" if section else "") + "\n".join(lines) for section, lines in sections.items()]
    return "\n\n".join(parts) + "\n"


def _pairs(arguments: Sequence[str], known: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"unexpected argument {flag!r}; overrides are written --section.key value")
        key, equals, text = flag[2:].partition("=")
        _check_known(key, known, "on the command line")
        if not equals:
            if not rest:
                raise UserError(f"{flag} needs a value")
            text = rest.pop(0)
        pairs.append((key, text))
    return pairs


def _check_known(key: str, known: dict[str, Any], where: str) -> None:
    if key in known:
        return
    if key in REMOVED:
        raise UserError(f"config key {key} {where} is no more; leave it out: {REMOVED[key]}")
    # The last part alone often tells what was meant: "learning_rate" for "optimizer.learning_rate".
    near = difflib.get_close_matches(key, known, 1, 0.5)
    near = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]] or near
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown config key {key!r} {where}{hint}")


def _parse(key: str, text: str, default: Any) -> Any:
    """A command-line value in the type of the field's default; lists are separated by commas."""
    if isinstance(default, str):
        return text
    if isinstance(default, tuple):
        return [part for part in text.split(",") if part]
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key} must be true or false, not {text!r}")
        return text.lower() == "true"
    try:
        return int(text.replace("_", "")) if isinstance(default, int) else float(text)
    except (ValueError, OverflowError):
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise UserError(f"{key} must be {kind}, not {text!r}") from None


def _build(cls: type, prefix: str, values: dict[str, Any]) -> Any:
    hints = get_type_hints(cls)
    out: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        key, hint = prefix + f.name, hints[f.name]
        if dataclasses.is_dataclass(hint):
            out[f.name] = _build(hint, key + ".", values)  # type: ignore[arg-type]
        elif key in values:
            out[f.name] = _typed(key, values[key], hint)
    return cls(**out)


def _typed(key: str, value: Any, hint: Any) -> Any:
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if (
        isinstance(value, list)
        and all(isinstance(v, str) for v in value)
        and hint not in (int, float, bool, str)
    ):
        return tuple(value)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    raise UserError(f"config key {key} must be {names.get(hint, 'a list of strings')}, not {value!r}")
