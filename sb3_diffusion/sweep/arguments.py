"""Algorithms and their hyperparameters as a command line names them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from sb3_diffusion import ALGORITHMS, OfflineAlgorithm

# Constructor arguments that are no hyperparameters.
_OTHER_ARGUMENTS = {"env", "dataset", "seed", "device", "_init_setup_model"}


def algorithm_name(name: str) -> str:
    """
    :param name: in any spelling: dtql, DiffusionQL, diffusion-ql
    :return: key of ``ALGORITHMS``
    :raises ValueError: if there is none of that name
    """

    def plain(text: str) -> str:
        return text.lower().replace("_", "").replace("-", "")

    known = {plain(key): key for key in ALGORITHMS}
    if plain(name) not in known:
        raise ValueError(f"There is no algorithm {name!r}; there are: {', '.join(sorted(ALGORITHMS))}.")
    return known[plain(name)]


def is_name(text: str) -> bool:
    """:return: whether this may name a hyperparameter, or as ``policy_kwargs.net_arch`` an entry of one"""
    return all(part.isidentifier() for part in text.split("."))


def read_value(name: str, text: str) -> Any:
    """
    :param name: of the hyperparameter
    :param text: a Python literal, or else plain text
    :return: its value
    :raises ValueError: if it is neither, but code
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        if any(bracket in text for bracket in "([{"):
            raise ValueError(f"`{name}`: expected a Python literal such as {{'net_arch': [32]}}, got {text!r}.") from None
        return text


def read_values(texts: Sequence[str]) -> dict[str, list[Any]]:
    """
    Read hyperparameters with one or several values each.

    :param texts: ``name=value,value,...``; values are Python literals, or else plain text
    :return: values by name
    :raises ValueError: if a text has no name, a name comes twice, or a value is neither
    """
    params: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if not is_name(name) or not values or name in params:
            raise ValueError(f"Hyperparameters are written as name=value,value,... and each name once: got {text!r}.")
        try:
            params[name] = list(ast.literal_eval(f"[{values}]"))
        except (ValueError, SyntaxError, TypeError):
            params[name] = [read_value(name, value) for value in values.split(",")]
    return params


def check_names(algorithm: type[OfflineAlgorithm], names: Iterable[str]) -> None:
    """
    :param algorithm: class
    :param names: of hyperparameters; with a dot, of an entry of one that is a dict
    :raises ValueError: if the constructor has no such argument
    """
    known = sorted(set(inspect.signature(algorithm).parameters) - _OTHER_ARGUMENTS)
    for name in names:
        outer, dot, _ = name.partition(".")
        if outer not in known:
            near = get_close_matches(outer, known)
            which = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}."
            raise ValueError(f"{algorithm.__name__} has no hyperparameter {outer!r}; {which}")
        if dot and not outer.endswith("_kwargs"):
            raise ValueError(
                f"{name!r} would be an entry of `{outer}`, which is no dict: expected policy_kwargs.net_arch, say."
            )


def with_changes(arguments: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param arguments: of a constructor
    :param changes: values by name, which win; ``policy_kwargs.net_arch`` means an entry of ``policy_kwargs``
    :return: both together
    """
    changed = dict(arguments)
    for name, value in changes.items():
        outer, dot, inner = name.partition(".")
        changed[outer] = with_changes(changed.get(outer) or {}, {inner: value}) if dot else value
    return changed
