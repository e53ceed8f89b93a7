"""Pictures from other hosts: only from those that are named, at addresses that were looked at before connecting."""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable
from contextlib import suppress
from threading import Timer
from urllib.parse import urljoin, urlsplit

from gridprune_cli.errors import BadInput
from gridprune_cli.serve.wire import Refusal

SECONDS = 30.0  # for all pictures of a request, redirects included
WAIT = 10.0  # seconds without a byte
MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_CHUNK = 1 << 16

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Hosts:
    """Hosts that may be asked: HOST stands for its ports 80 and 443, HOST:PORT for that port.

    An address that is not public must be named by itself, whatever name leads there.
    """

    def __init__(self, names: Iterable[str]):
        """Raises BadInput for what is no HOST or HOST:PORT."""
        self._named: set[tuple[str, int]] = set()
        for name in names:
            try:
                parsed = urlsplit(f"//{name}")
                host, port = parsed.hostname, parsed.port
            except ValueError:
                host = port = None
            if not host or parsed.path or parsed.username is not None:
                raise BadInput("not HOST or HOST:PORT; an IPv6 address stands in []", field="allow_host", value=name)
            self._named |= {(host, number) for number in ([port] if port else _PORTS.values())}

    def allow(self, host: str, port: int) -> bool:
        return (host, port) in self._named

    def resolve(self, host: str, port: int) -> str:
        """An address of an allowed host. Raises Refusal where any of its addresses may not be asked."""
        try:
            addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        except (OSError, UnicodeError) as fault:
            raise BadInput(f"the host {host} is not known") from fault
        for text in addresses:
            address = ipaddress.ip_address(text.partition("%")[0])
            if not (_is_public(address) or self.allow(text, port)):
                raise Refusal(403, f"{host} has an address inside, which is not asked", code="host_not_allowed")
        return min(addresses, key=lambda text: (":" in text, text))  # IPv4 first


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return _is_public(inner)
    return address.is_global and not address.is_multicast


def fetch(url: str, hosts: Hosts, most: int, end: float) -> bytes:
    """The body behind a URL, at most `most` bytes. Redirects are followed to allowed hosts alone.

    end  of all pictures of a request, on the clock of `time.monotonic`

    Raises Refusal with 403 for a host that is not allowed, BadInput for what can't be had.
    """
    for _ in range(MAX_REDIRECTS + 1):
        status, location, data = _request(url, hosts, most, end)
        if location is None:
            if status != 200:
                raise BadInput(f"the host answered with status {status}")
            return data
        try:
            url = urljoin(url, location)
        except ValueError as fault:
            raise BadInput(f"redirected to no URL ({fault})") from fault
    raise BadInput(f"more than {MAX_REDIRECTS} redirects")


def _request(url: str, hosts: Hosts, most: int, end: float) -> tuple[int, str | None, bytes]:
    """Status, where it is redirected to, and body of one request."""
    # 1. where it goes
    if not url.isascii() or not url.isprintable() or " " in url:
        raise BadInput("the URL holds characters that must be escaped")
    try:
        parsed = urlsplit(url)
        scheme, host, port = parsed.scheme, parsed.hostname, parsed.port
    except ValueError as fault:
        raise BadInput(f"no URL ({fault})") from fault
    if scheme not in _PORTS or not host or parsed.username is not None:
        raise Refusal(403, "only http and https, without a user's name", code="host_not_allowed")
    port = port or _PORTS[scheme]
    if not hosts.allow(host, port):
        raise Refusal(403, f"the server was not allowed to ask {host}:{port}", code="host_not_allowed")
    address = hosts.resolve(host, port)
    # 2. a connection to that very address: the name is not looked up again
    connection = http.client.HTTPConnection(host, port, timeout=WAIT)
    alarm = Timer(max(0.0, end - time.monotonic()), _hang_up, [connection])
    try:
        alarm.start()
        connection.sock = raw = socket.create_connection((address, port), timeout=_seconds_left(end))
        if scheme == "https":
            raw.settimeout(_seconds_left(end))  # which bounds the whole handshake
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
        connection.sock.settimeout(_seconds_left(end))  # the alarm may have come before there was what it hangs up
        target = (parsed.path or "/") + (f"?{parsed.query}" if parsed.query else "")
        connection.request("GET", target, headers={"User-Agent": "gridprune", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and (location := response.headers.get("Location")):
            return response.status, location, b""
        # 3. its body, within bounds of size and time
        pieces, size = [], 0
        while piece := response.read1(_CHUNK):
            size += len(piece)
            if size > most:
                raise BadInput(f"more than {most} bytes")
            pieces.append(piece)
        if time.monotonic() > end or response.length:  # the alarm, or the host, cut it off
            raise _too_late()
        return response.status, None, b"".join(pieces)
    except (OSError, http.client.HTTPException) as fault:
        raise BadInput(f"can't be fetched from {host}:{port} ({type(fault).__name__})") from fault
    finally:
        alarm.cancel()
        connection.close()


def _seconds_left(end: float) -> float:
    """For which a connection may say nothing. Raises BadInput where the time is over."""
    left = end - time.monotonic()
    if left <= 0:
        raise _too_late()
    return min(WAIT, left)


def _too_late() -> BadInput:
    return BadInput(f"not all there after {SECONDS:g} s")


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """Ends what reads or writes a connection in another thread, however few bytes at a time."""
    if connection.sock is not None:
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)
