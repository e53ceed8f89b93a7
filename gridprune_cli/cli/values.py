"""What options say that are more than a word: shares of the work, and files of schedules."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from gridprune_cli.errors import BadInput


def read_schedules(pairs: Sequence[str]) -> list[str]:
    """Options of a method, with what files hold in the place of each @FILE, as `gridprune calibrate` writes them.

    Raises BadInput for a file that can't be read, or holds no schedule.
    """
    read: list[str] = []
    for pair in pairs:
        if not pair.startswith("@"):
            read.append(pair)
            continue
        try:
            schedule = json.loads(Path(pair[1:]).read_text("utf-8"))
            read += [f"{name}={json.dumps(value)}" for name, value in schedule["options"].items()]
        except OSError as fault:
            reason = f"can't be read ({fault.strerror}); check the path"
            raise BadInput(reason, field="method_option", value=pair) from fault
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
            reason = "holds no schedule; make one with `gridprune calibrate --schedule`"
            raise BadInput(reason, field="method_option", value=pair) from fault
    return read


def in_shard(shard: str | None) -> Callable[[str], bool] | None:
    """Whether a name belongs to a share as given by --shard; None where all is to be done."""
    if shard is None:
        return None
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard, re.ASCII)
    if not match or not int(match[1]) < int(match[2]):
        raise BadInput("not I/N with I from 0 to N-1, as in 0/4", field="shard", value=shard[:40])
    share, shares = int(match[1]), int(match[2])

    def belongs(name: str) -> bool:
        hashed = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(hashed[:8], "big") % shares == share

    return belongs
