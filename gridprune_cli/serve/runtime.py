"""The Unix socket of a user's server, which the commands of the same user find by themselves."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gridprune_cli.client.protocol import is_private, socket_path
from gridprune_cli.errors import BadInput

WAITING = 256  # connections that may wait to be taken


@contextmanager
def listen_at_socket() -> Iterator[socket.socket]:
    """Listens at the socket of this user, in a folder of mode 0700. What an earlier server left is removed.

    Raises BadInput where a server listens there already, or the folder is not this user's alone.
    """
    path = socket_path()
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if not is_private(folder):
            raise BadInput("must be a folder of yours alone; make it so, with mode 0700", place=str(folder))
        lock = os.open(folder / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as fault:
        raise BadInput(f"no place for a socket ({fault.strerror}); set XDG_RUNTIME_DIR", place=str(folder)) from fault
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back by the system, however this process ends
        except OSError as fault:
            raise BadInput(f"a server of yours listens at {path} already; end it first", field="socket") from fault
        with socket.socket(socket.AF_UNIX) as listener:
            path.unlink(missing_ok=True)
            try:
                listener.bind(str(path))
                listener.listen(WAITING)
            except OSError as fault:  # such as a path that is too long
                raise BadInput(f"no place for a socket ({fault}); set XDG_RUNTIME_DIR", place=str(path)) from fault
            try:
                yield listener
            finally:
                with suppress(OSError):
                    path.unlink()
    finally:
        os.close(lock)
