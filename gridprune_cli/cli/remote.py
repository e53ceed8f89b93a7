"""Which server a command is done by, if by any."""

import signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from gridprune_cli.cli import options
from gridprune_cli.cli.describe import describe, set_method_options
from gridprune_cli.cli.output import say, set_quiet
from gridprune_cli.client.protocol import ServerFault, finite
from gridprune_cli.errors import BadInput

if TYPE_CHECKING:
    from gridprune_cli.integrations.vllm_http import Vllm

OFF = "off"


def server(
    server: Annotated[
        str | None,
        options.option(
            "Server that has the model: http://HOST:PORT or unix:PATH; off: none.",
            options.SERVER,
            metavar="URL",
            envvar="GRIDPRUNE_SERVER",
            show_default="that of `gridprune serve --socket`, where one runs",
        ),
    ] = None,
    no_server: Annotated[bool, options.option("Work in this process.", options.SERVER, "--no-server")] = False,
    api_key: Annotated[
        str | None,
        options.option("What the server asks for.", options.SERVER, metavar="KEY", envvar="GRIDPRUNE_API_KEY"),
    ] = None,
) -> Callable[..., dict[str, Any]]:
    """The server that does the work: a function that finds it, as `takes` calls it."""
    return partial(find_server, server, no_server, api_key)


def find_server(
    server: str | None,
    no_server: bool,
    api_key: str | None,
    values: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What groups of a command give where a server does the work; where this process is to do it, `server` is None.

    values  options of the command, by name
    groups  those of each of its groups

    A server that was named must do it, or the command fails. One that was found by its socket does it where it would do
    the same as this process; where it would not, a note says why.

    Raises BadInput for options that can't be, and for a named server that has others; ServerFault where it fails.
    """
    from gridprune_cli.client.connection import Connection, find_socket, parse_address
    from gridprune_cli.client.session import EMBEDDED, Mismatch, open_remote

    set_quiet(bool(values.get("quiet")))
    if values.get("engine") == "vllm":
        return {"server": None, "engine": _vllm(None if no_server else server, api_key, values)}
    if no_server or (server or "").lower() == OFF:
        return {"server": None}
    address = parse_address(server) if server else find_socket()
    if address is None:
        return {"server": None}
    check_key(api_key)
    ignore_broken_pipes()
    connection = Connection(address, api_key)
    settings = {name: values[name] for name in _SETTINGS if name in values}
    answers_only = "pipeline" not in groups
    if answers_only and settings["model"] is None:  # pruned sets name their own
        del settings["model"]
    try:
        if setting := _elsewhere(values):
            reason = "a server works alone, with its one model; take `no_server`"
            raise Mismatch(reason, field=setting, value=values[setting])
        pruning = {name: finite(value) for name, value in groups.get("pruning", {}).items()}
        generation = groups.get("generation", {})
        remote = open_remote(connection, settings, pruning, generation, named=bool(server), answers_only=answers_only)
    except (Mismatch, ServerFault) as fault:
        if server:
            raise
        if not (isinstance(fault, ServerFault) and fault.gone):  # not one that has ended and left its socket
            say(f"working without the server at {address.name}: {describe(fault)}")
        return {"server": None}
    set_method_options(remote.methods)
    if remote.fault:
        raise remote.fault
    if server and not values.get("model") and remote.model != EMBEDDED:
        say(f"asking {remote.model} at {server}")
    results = {"server": remote, "pipeline": remote, "pruning": remote.pruning, "generation": remote.generation}
    return results | ({"engine": None} if "engine" in groups else {})


def check_key(api_key: str | None) -> None:
    """Raises BadInput for an API key that no header can hold."""
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise BadInput("must be of printable ASCII characters, without blanks", field="api_key")


def ignore_broken_pipes() -> None:
    """Has a server that has gone be an error, with its line, in place of a signal that ends this process."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _vllm(server: str | None, api_key: str | None, values: Mapping[str, Any]) -> "Vllm":
    """The vLLM that answers. Raises BadInput where none is named, and for options of other engines."""
    if not server or server.lower() == OFF:
        raise BadInput("needs `server`, the http://HOST:PORT of a running vLLM", field="engine", value="vllm")
    for name in ("workers", "address"):
        if values.get(name) is not None:
            raise BadInput("only with `engine=ray`", field=name)
    check_key(api_key)
    ignore_broken_pipes()
    from gridprune_cli.integrations.vllm_http import Vllm, VllmServer

    return Vllm(VllmServer(server, api_key))


_SETTINGS = (
    *("model", "clip", "relevance", "device", "dtype", "quantize"),
    *("cache_dir", "cache_limit", "cache_dtype", "no_cache"),
)


def _elsewhere(values: Mapping[str, Any]) -> str | None:
    """The option that asks for what no server does, if any: work of other machines, models beside its own."""
    if values.get("engine", "local") != "local":
        return "engine"
    return None if values.get("localizer") in (None, "relevance", "vlm") else "localizer"
