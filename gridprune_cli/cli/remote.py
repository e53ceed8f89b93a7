"""Which server a command is done by, if by any."""

import signal
from collections.abc import Mapping
from typing import Any

from gridprune_cli.cli.describe import describe, set_method_options
from gridprune_cli.cli.output import say, set_quiet
from gridprune_cli.client.connection import Address, Connection, find_socket, parse_address
from gridprune_cli.client.protocol import ServerFault
from gridprune_cli.client.remote import RemotePipeline
from gridprune_cli.client.session import EMBEDDED, Mismatch, open_remote

OFF = "off"


def find_server(
    server: str | None,
    no_server: bool,
    api_key: str | None,
    options: Mapping[str, Any],
    pruning: Mapping[str, Any],
    generation: Mapping[str, Any],
) -> RemotePipeline | None:
    """The server that a command is done by; None where this process is to do it.

    options  of the command, by name

    A server that was named must do it, or the command fails. One that was found by its socket does it where it would do
    the same as this process; where it would not, a note says why.

    Raises BadInput for options that can't be, and for a named server that has others; ServerFault where it fails.
    """
    set_quiet(bool(options.get("quiet")))
    if no_server or (server or "").lower() == OFF:
        return None
    address: Address | None = parse_address(server) if server else find_socket()
    if address is None:
        return None
    connection = Connection(address, api_key)
    settings = {name: options[name] for name in _SETTINGS if name in options}
    try:
        _check_elsewhere(options)
        remote = open_remote(connection, settings, pruning, generation, named=bool(server))
    except (Mismatch, ServerFault) as fault:
        if server:
            raise
        if not isinstance(fault, ServerFault) or fault.status is not None:  # not one that has gone and left its socket
            say(f"working without the server at {address.name}: {describe(fault)}")
        return None
    finally:
        set_method_options(None)
    set_method_options(remote.methods)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a server that has gone is an error, with its line
    if server and not options.get("model") and remote.model != EMBEDDED:
        say(f"asking {remote.model} at {server}")
    return remote


_SETTINGS = (
    *("model", "clip", "relevance", "device", "dtype"),
    *("cache_dir", "cache_limit", "cache_dtype", "no_cache"),
)


def _check_elsewhere(options: Mapping[str, Any]) -> None:
    """Raises Mismatch for what no server does: work of other machines, models beside its own."""
    if options.get("engine", "local") != "local":
        raise Mismatch("not by a server; take `no_server`", field="engine", value=options["engine"])
    if options.get("localizer") not in (None, "relevance", "vlm"):
        reason = "the server loads no other model; take `no_server`"
        raise Mismatch(reason, field="localizer", value=options["localizer"])
