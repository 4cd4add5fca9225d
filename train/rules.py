"""Rules that single out parameters by their names, such as `txt/Encoder_0/.*/bias=0.1`."""

from __future__ import annotations

import re
from typing import Any

import jax

from lit_fast.errors import UserError


def names_of(tree: Any) -> list[str]:
    """The leaves' names, the keys of the path joined by slashes."""
    return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def as_tree(values: dict[str, Any], tree: Any) -> Any:
    """The tree with each leaf replaced by the value of its name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[_name(path)], tree)


def scales(key: str, rules: tuple[str, ...], names: list[str], default: float) -> dict[str, float]:
    """The factor of each name: of the first rule whose regex matches all of the name, else the default.

    A rule is `REGEX=FACTOR`, or `REGEX`, which means the factor 1.

    Raises:
      UserError: a rule is malformed or matches no name; `key` is the config key to blame.
    """
    parsed = [_parse(key, rule) for rule in rules]
    for rule, (pattern, _) in zip(rules, parsed, strict=True):
        if not any(pattern.fullmatch(n) for n in names):
            raise UserError(f"{key}: {rule!r} matches no parameter; they are {', '.join(_examples(names))}")
    return {n: next((f for p, f in parsed if p.fullmatch(n)), default) for n in names}


def _parse(key: str, rule: str) -> tuple[re.Pattern[str], float]:
    regex, equals, factor = rule.rpartition("=")
    try:
        return re.compile(regex if equals else rule), float(factor) if equals else 1.0
    except (re.error, ValueError) as error:
        raise UserError(f"{key}: {rule!r} is not of the form REGEX=FACTOR: {error}") from None


def _examples(names: list[str]) -> list[str]:
    return names if len(names) < 8 else [*names[:3], "...", *names[-3:]]


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)
