"""`gridprune env`: what is in force, and where each setting comes from."""

import inspect
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gridprune_cli.cli import options
from gridprune_cli.cli.output import emit_json, table


def env(
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> None:
    """Print the settings in force and where each came from, versions, and device and dtype with the reason.

    A variable sets each of them, too, as `GRIDPRUNE_KEEP` and `GRIDPRUNE_CACHE_DIR`.
    """
    from gridprune_cli.cache import store
    from gridprune_cli.config import choose_model
    from gridprune_cli.vlm.checkpoint import EMBEDDED
    from gridprune_cli.vlm.placement import place

    choice = choose_model()
    model = choice.model or EMBEDDED
    placed = place(_setting("DEVICE", "auto")[0], _setting("DTYPE", "auto")[0], model)
    root = str(store.open_store(cache_dir).root)
    settings = [
        ("model", model, choice.origin),
        ("relevance", *_of_model(model, "relevance", *_setting("RELEVANCE", _default(options.pipeline, "relevance")))),
        ("relevance-depth", *_of_model(model, "relevance_depth", "half of the layers", "default")),
        ("relevance-sign", *_of_model(model, "relevance_sign", "as published", "default")),
        ("keep", *_setting("KEEP", _default(options.pruning, "keep"))),
        ("method", *_setting("METHOD", _default(options.pruning, "method"))),
        ("plc", *_setting("PLC", _default(options.pruning, "plc"))),
        ("max-new-tokens", *_setting("MAX_NEW_TOKENS", _default(options.generation, "max_new_tokens"))),
        ("cache-dir", root, _origin_of_root(cache_dir)),
        ("cache-limit", *_setting("CACHE_LIMIT", store.DEFAULT_LIMIT)),
        ("cache-dtype", *_setting("CACHE_DTYPE", _default(options.pipeline, "cache_dtype"))),
        ("device", placed.device, f"{_setting('DEVICE', '')[1]}: {placed.device_reason}"),
        ("dtype", str(placed.dtype).removeprefix("torch."), f"{_setting('DTYPE', '')[1]}: {placed.dtype_reason}"),
        ("quantize", *_setting("QUANTIZE", "none")),
        ("server", *_server()),
        ("api-key", "set" if os.environ.get("GRIDPRUNE_API_KEY") else "none", _setting("API_KEY", "")[1]),
        ("python", platform.python_version(), "version"),
    ]
    settings += [(name, version(name), "version") for name in ("gridprune", "torch", "transformers", "safetensors")]
    if json:
        emit_json({name: {"value": value, "from": origin} for name, value, origin in settings})
    else:
        table(("setting", "value", "from"), settings)


def _setting(name: str, default: str) -> tuple[str, str]:
    """The value in force, and where it comes from. An empty variable is one that is not set."""
    value = os.environ.get(f"GRIDPRUNE_{name}")
    return (value, f"GRIDPRUNE_{name}") if value else (default, "default")


def _server() -> tuple[str, str]:
    """The server that `ask` and others take where no option names one, and where it comes from."""
    from gridprune_cli.client.connection import find_socket

    address = find_socket()
    named, origin = _setting("SERVER", "none" if address is None else address.name)
    return named, "its socket" if address is not None and origin == "default" else origin


def _of_model(model: str, name: str, value: str, origin: str) -> tuple[str, str]:
    """What the config file holds for the model in place of a default, and where that is."""
    from gridprune_cli.config import config_path, model_settings
    from gridprune_cli.vlm.checkpoint import model_key

    settings = model_settings(model_key(model))
    return (str(settings[name]), str(config_path())) if origin == "default" and name in settings else (value, origin)


def _default(function: Callable[..., Any], name: str) -> str:
    return str(inspect.signature(function).parameters[name].default)


def _origin_of_root(cache_dir: Path | None) -> str:
    """The option and its variable arrive as one; else the folder follows from the XDG variable or the home folder."""
    if cache_dir is not None:
        variable = os.environ.get("GRIDPRUNE_CACHE_DIR")
        return "GRIDPRUNE_CACHE_DIR" if variable and Path(variable) == cache_dir else "--cache-dir"
    return "XDG_CACHE_HOME" if os.path.isabs(os.environ.get("XDG_CACHE_HOME", "")) else "default"
