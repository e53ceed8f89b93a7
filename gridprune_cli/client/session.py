"""The first exchange with a server: whether it does what this process would do, before anything is sent to it."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gridprune_cli.cache.root import default_root
from gridprune_cli.client.connection import Connection
from gridprune_cli.client.protocol import SESSION, installed_version
from gridprune_cli.client.remote import RemotePipeline
from gridprune_cli.config import choose_model, config_path, model_settings
from gridprune_cli.errors import BadInput

EMBEDDED = "scenes"
_FIXED = ("clip", "relevance", "device", "dtype", "quantize")  # settings that a server has for all who ask


class Mismatch(BadInput):
    """A server that does not do what was asked of this process: another version, model or setting."""


def open_remote(
    connection: Connection,
    settings: Mapping[str, Any],
    pruning: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    named: bool,
    answers_only: bool = False,
) -> RemotePipeline:
    """The pipeline of a server, after a first exchange. Nothing of an image is sent before.

    settings  of a pipeline, by name, as `opening.open_pipeline` takes them; those that are missing are not looked at
    answers_only  whether it is for pruned sets, which say by their fingerprint which model they need
    named     whether the user named this server. Then it may have a model, cache and dtype that were not asked for;
              one that was only found must do exactly what this process would

    Raises Mismatch where the server is of another version, or does not do what the settings say; ServerFault where
    there is none. What is wrong with the options of pruning and generation is the pipeline's `fault`.
    """
    version = installed_version()
    body = {"version": version, "pruning": dict(pruning), "generation": dict(generation), "fingerprint": answers_only}
    *_, last = connection.post(SESSION, body)
    session: dict[str, Any] = last["result"]
    if session["version"] != version:
        reason = f"the server is gridprune {session['version']}, this is {version}; start it anew, or take `no_server`"
        raise Mismatch(reason, place=connection.address.name)
    named_model = choose_model(settings["model"]).model if "model" in settings else None
    try:
        if "model" in settings:
            _check_model(session, named_model, named)
        _check_settings(session, settings, named)
        if not named and model_settings(session["key"]) != session["remembered"]:
            raise Mismatch(f"{config_path()} has other settings for {session['model']} than the server read")
        if session["changed"]:
            raise Mismatch(f"the files of {session['model']} have changed since the server read them; start it anew")
    except Mismatch as fault:
        raise fault.at(connection.address.name) from None
    scenes_only = named_model is None and session["model"] == EMBEDDED
    return RemotePipeline(connection, session, not settings.get("no_cache"), scenes_only, named)


def _check_model(session: Mapping[str, Any], model: str | None, named: bool) -> None:
    """Raises Mismatch for a server of another model than the one that is in force here."""
    served = session["model"]
    if model is None and not named and (served != EMBEDDED or session["chosen"]):
        raise Mismatch(f"it serves {served}, and no model was named here")
    if model is not None and model != served:
        with suppress(OSError, ValueError):
            if session["folder"] and os.path.samefile(model, session["folder"]):
                model = served
    if model is not None and model != served:
        raise Mismatch(f"the server has {served}; leave it out, or take `no_server`", field="model", value=model)


def _check_settings(session: Mapping[str, Any], settings: Mapping[str, Any], named: bool) -> None:
    """Raises Mismatch for a setting that the server has otherwise."""
    for name in _FIXED:
        value, served = settings.get(name), session["settings"][name]
        if name not in settings or value in served or (value in (None, "auto") and (named or name == "device")):
            continue
        raise _other(name, value, served[-1])
    if "cache_dtype" in settings and settings["cache_dtype"] != session["cache_dtype"]:
        raise _other("cache_dtype", settings["cache_dtype"], session["cache_dtype"])
    if settings.get("cache_limit") is not None and not _from_variable("cache_limit", settings, named):
        raise Mismatch("the server's cache has a limit of its own; leave it out", field="cache_limit")
    if "cache_dir" not in settings or settings.get("no_cache") or _from_variable("cache_dir", settings, named):
        return
    folder = settings["cache_dir"]
    if folder is None and named:
        return
    root = default_root() if folder is None else Path(folder)
    if os.path.realpath(root) != session["cache_dir"]:
        raise _other("cache_dir", root, session["cache_dir"])


def _other(name: str, value: object, served: object) -> Mismatch:
    reason = f"the server has {'none' if served is None else served}; leave it out, or take `no_server`"
    return Mismatch(reason, field=name, value=value)


def _from_variable(name: str, settings: Mapping[str, Any], named: bool) -> bool:
    """Whether a setting comes from a variable, which is meant for this machine, and not for a server that was named."""
    return named and str(settings[name]) == os.environ.get(f"GRIDPRUNE_{name.upper()}")
