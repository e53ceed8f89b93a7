"""Errors and notices of the library as users of the command line read them: with options in place of settings."""

import inspect
import re
from functools import cache
from typing import Any, get_args

from gridprune_cli.cli import options
from gridprune_cli.errors import BadInput, GridpruneError

_names_of_methods: frozenset[str] | None = None
_SETTING = re.compile(r"`([a-z][a-z_]*)(?:=([^`]*))?`")

# settings whose options are called otherwise, or are not in a group
_OTHERS = {
    "template": "--prompt-template",
    "revision": "OWNER/NAME@REVISION",
    "cache_limit": "--cache-limit",
    "max_held": "--max-held",
    "shape": "--shape",
    "layers": "--layers",
    "server": "--server",
    "no_server": "--no-server",
    "api_key": "--api-key",
    "with_prefix": "--with-prefix",
    "to": "--to",
    "output": "--output",
    "images": "IMAGE",
    "image": "IMAGE",
    "question": "QUESTION",
}


def describe(error: GridpruneError) -> str:
    """The line about an error: its place, the option at fault with its value, and the reason.

    `keep=1.5: must be ...` is `--keep 1.5: must be ...`, and settings in backticks in the reason are options, too.
    """
    option = "" if error.field is None else _option(error.field, error.value)
    return ": ".join(filter(None, (error.place, option, with_options(error.reason))))


def error_fields(error: GridpruneError) -> dict[str, str]:
    """What a line of JSON says about an error."""
    kind = BadInput if isinstance(error, BadInput) else GridpruneError  # their subclasses are nobody else's concern
    return {"error": describe(error), "error_type": kind.__name__}


def with_options(text: str) -> str:
    """A text of the library with settings in backticks, as `relevance=words`, written as options.

    What else stands in backticks, such as a command, stays.
    """

    def replace(match: re.Match[str]) -> str:
        name, value = match.groups()
        known = name in _flags() or (value is not None and name in _method_options())
        return _option(name, value) if known else match[0]

    return _SETTING.sub(replace, text)


def _option(name: str, value: Any) -> str:
    """An option of the command line, with its value; options of methods have none of their own."""
    flags = _flags()
    if name not in flags and name in _method_options():
        return f"--method-option {name}" if value is None else f"--method-option {name}={value}"
    flag = flags.get(name) or "--" + name.replace("_", "-")
    return flag if value is None or value is True else f"{flag} {value}"


@cache
def _flags() -> dict[str, str]:
    """The options of the groups by the names of their settings."""
    flags = dict(_OTHERS)
    for group in options.GROUPS:
        for name, parameter in inspect.signature(group).parameters.items():
            (option,) = get_args(parameter.annotation)[1:]
            flags[name] = next(iter(option.param_decls or ()), "--" + name.replace("_", "-"))
    return flags


def set_method_options(names: frozenset[str] | None) -> None:
    """The names of options of methods, where a server told them: to find them here would import torch."""
    global _names_of_methods
    _names_of_methods = names


def _method_options() -> frozenset[str]:
    return _import_method_options() if _names_of_methods is None else _names_of_methods


@cache
def _import_method_options() -> frozenset[str]:
    from dataclasses import fields

    from gridprune_cli.pruning.methods import METHODS  # imports torch, so only where a name is no other setting's

    return frozenset(option.name for method in METHODS.values() for option in fields(method))
