"""Which model to work with, and what is remembered for a model: the user's config file.

The file is TOML, `gridprune/config.toml` in $XDG_CONFIG_HOME or ~/.config. Its key `model` names the model where
nothing else does; a table `[models."NAME"]` holds the settings of one model. Nothing here needs torch.
"""

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gridprune_cli.cache.files import write_atomic
from gridprune_cli.errors import BadInput, GridpruneError

VARIABLE = "GRIDPRUNE_MODEL"

_LINE = re.compile(r"^model[ \t]*=.*(\n|\Z)", re.MULTILINE)


@dataclass(frozen=True)
class ModelChoice:
    """A model, and what chose it: `model`, the variable, or the config file's path. None and `default`: nothing."""

    model: str | None
    origin: str

    def blame(self, error: GridpruneError) -> GridpruneError:
        """The error, which names the variable or the file instead of the setting where that chose the model."""
        if error.field != "model" or self.origin in ("model", "default"):
            return error
        setting = f"{self.origin}: model" if os.path.isabs(self.origin) else self.origin
        return type(error)(error.reason, place=f"{setting} {error.value}")


def choose_model(named: str | None = None) -> ModelChoice:
    """The model in force. `named` is what the option `model` or its variable says, which arrive as one.

    Raises BadInput, naming the config file, where that decides and can't be read.
    """
    variable = os.environ.get(VARIABLE)
    if named is not None:
        return ModelChoice(named, VARIABLE if named == variable else "model")
    if variable:
        return ModelChoice(variable, VARIABLE)
    path = config_path()
    model = _parse(path, _read(path)).get("model")
    if model is None:
        return ModelChoice(None, "default")
    if not isinstance(model, str) or not model.strip():
        reason = f"model = {model!r} names no model; set one with `gridprune models default NAME`"
        raise BadInput(reason, place=str(path))
    return ModelChoice(model, str(path))


def remember_model(model: str | None) -> Path:
    """Writes the model into the config file, or takes it out where it is None, and gives the file's path.

    What else the file holds stays, comments too. Raises BadInput where it can't be read or changed, GridpruneError
    where it can't be written.
    """
    line = "" if model is None else f"model = {json.dumps(model, ensure_ascii=False)}\n"

    def change(text: str) -> str:
        changed, lines = _LINE.subn(lambda _: line, text, count=1)
        return changed if lines else line + text  # first of all: behind a table's head it would be the table's

    return _rewrite(change, lambda settings: _with(settings, "model", model), "model")


def model_settings(key: str) -> dict[str, Any]:
    """What the config file holds for a model, by its `vlm.checkpoint.model_key`; nothing where it has no table.

    Raises BadInput, naming the config file, where that can't be read.
    """
    path = config_path()
    models = _parse(path, _read(path)).get("models", {})
    settings = models.get(key, {}) if isinstance(models, dict) else None
    if not isinstance(settings, dict):
        raise BadInput('models holds no tables; write them as [models."NAME"]', place=str(path))
    return settings


def remember_settings(key: str, settings: Mapping[str, str | int] | None) -> Path:
    """Writes the table of a model into the config file in place of the one before, or takes it out where it is None.

    Errors, and what stays, as with `remember_model`.
    """
    head = f"[models.{json.dumps(key, ensure_ascii=False)}]"
    # to its last line NAME = VALUE; what is written between its lines goes with them
    of_model = re.compile(rf"^{re.escape(head)}[ \t]*(?:#.*)?\n?(?:(?:#.*\n)*[A-Za-z_].*\n?)*", re.MULTILINE)
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in (settings or {}).items()]
    table = "" if settings is None else "".join([f"{head}\n", *lines])

    def change(text: str) -> str:
        changed, tables = of_model.subn(lambda _: table, text, count=1)
        if tables or not table:
            return changed
        return text + ("\n" if text and not text.endswith("\n") else "") + table

    def expect(before: dict[str, Any]) -> dict[str, Any]:
        models = before.get("models")
        models = _with(models if isinstance(models, dict) else {}, key, None if settings is None else dict(settings))
        return _with(before, "models", models or None)

    return _rewrite(change, expect, f"settings of {key}")


def _with(settings: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The settings with one of them changed; without it for None."""
    others = {other: old for other, old in settings.items() if other != name}
    return others if value is None else others | {name: value}


def _rewrite(change: Callable[[str], str], expect: Callable[[dict[str, Any]], dict[str, Any]], subject: str) -> Path:
    """Changes the config file's text, at once and whole, and gives its path.

    The new text must say what `expect` makes of the settings before. Raises BadInput where the file can't be read, or
    its `subject` not be changed, GridpruneError where it can't be written.
    """
    path = config_path()
    if not path.is_absolute():
        reason = "there is no home folder for the config; set this variable to a folder"
        raise BadInput(reason, place="XDG_CONFIG_HOME")
    text = _read(path)
    expected = expect(_parse(path, text))
    changed = change(text)
    try:
        data, as_expected = changed.encode(), tomllib.loads(changed) == expected
    except ValueError:
        as_expected = False
    if not as_expected:
        reason = f"its {subject} can't be changed without harm to the rest; change it with an editor"
        raise BadInput(reason, place=str(path))
    if changed == text:
        return path
    target = Path(os.path.realpath(path))  # not the link that leads there
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        reason = f"can't be made ({fault.strerror}); check XDG_CONFIG_HOME"
        raise GridpruneError(reason, place=str(target.parent)) from fault
    write_atomic(target, data, sync=True)
    return path


def config_path() -> Path:
    """gridprune/config.toml in $XDG_CONFIG_HOME, else in ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):  # the XDG specification says to ignore a relative one
        base = os.path.expanduser("~/.config")
    return Path(base, "gridprune", "config.toml")


def _read(path: Path) -> str:
    """The file's text; none where there is no file."""
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "no UTF-8"
        raise BadInput(f"can't be read ({reason}); mend it, or remove it", place=str(path)) from fault


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as fault:
        raise BadInput(f"no TOML ({fault}); mend it, or remove it", place=str(path)) from fault
