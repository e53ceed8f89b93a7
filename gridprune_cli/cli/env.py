"""`gridprune env`: what is in force, and where each setting comes from."""

import os
import platform
from importlib.metadata import version

from gridprune_cli.cli import options
from gridprune_cli.cli.output import emit_json, table


def env(
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> None:
    """Print the settings in force and where each came from, versions, and device and dtype with the reason."""
    from gridprune_cli import store
    from gridprune_cli.device import place

    placed = place(os.environ.get("GRIDPRUNE_DEVICE", "auto"), os.environ.get("GRIDPRUNE_DTYPE", "auto"))
    folder = store.open_store(cache_dir).root
    rows = [
        ("model", os.environ.get("GRIDPRUNE_MODEL", "scenes"), _origin("MODEL")),
        ("keep", os.environ.get("GRIDPRUNE_KEEP", "0.11"), _origin("KEEP")),
        ("method", os.environ.get("GRIDPRUNE_METHOD", "gridprune"), _origin("METHOD")),
        ("cache-dir", str(folder), _origin("CACHE_DIR") if cache_dir is None else "--cache-dir or its variable"),
        ("cache-limit", os.environ.get("GRIDPRUNE_CACHE_LIMIT", "20G"), _origin("CACHE_LIMIT")),
        ("device", placed.device, placed.device_reason),
        ("dtype", str(placed.dtype).removeprefix("torch."), placed.dtype_reason),
        ("python", platform.python_version(), "version"),
    ]
    rows += [(name, version(name), "version") for name in ("gridprune", "torch", "transformers", "safetensors")]
    if json:
        emit_json({name: {"value": value, "from": origin} for name, value, origin in rows})
    else:
        table(("setting", "value", "from"), rows)


def _origin(name: str) -> str:
    return f"GRIDPRUNE_{name}" if f"GRIDPRUNE_{name}" in os.environ else "default"
