"""`gridprune cache`: see and tidy the encoded images on disk."""

import heapq
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated, Any, Literal

import typer

from gridprune_cli.cache.files import FileFault
from gridprune_cli.cache.store import Entry, Removed, Store, open_store, parse_age, parse_size
from gridprune_cli.cli import options, output
from gridprune_cli.cli.command import Command
from gridprune_cli.errors import GridpruneError
from gridprune_cli.text import printable

BLOCK = 64  # lines of JSON that are written at once

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="See and tidy the encoded images on disk.")


def _command(example: str, name: str | None = None) -> Any:
    return app.command(name, epilog=f"   {example}", cls=Command)


@_command("du -sh $(gridprune cache dir)", name="dir")
def show_dir(cache_dir: options.CacheDir = None) -> None:
    """Print the folder of the cache."""
    print(open_store(cache_dir).root)


@_command("gridprune cache ls --sort size --limit 20", name="ls")
def list_entries(
    cache_dir: options.CacheDir = None,
    sort: Annotated[
        Literal["used", "size", "name"] | None, typer.Option(help="Order; the last used, the largest or z comes last.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the last N in this order.")] = None,
    json: options.Json = False,
) -> None:
    """List the encoded images, by default by last use; --json without --sort or --limit lists them as they lie."""
    entries: Iterable[Entry] = open_store(cache_dir).entries()
    if sort or limit or not json:
        entries = _ordered(entries, sort or "used", limit)
    records = map(_describe, entries)
    if json:
        while block := list(islice(records, BLOCK)):
            output.emit_json(*block)
        return
    now = time.time()
    output.table(
        ("key", "tokens ", "size ", "used ", "model", "image"),
        (
            (
                record["key"][:12],
                str(record["tokens"] or "?"),
                output.size(record["bytes"]),
                output.age(now - record["used"]),
                record["model"] or "?",
                str(record["image"] or "(damaged: see `gridprune cache verify`)"),
            )
            for record in records
        ),
    )


@_command("gridprune cache info --json")
def info(cache_dir: options.CacheDir = None, json: options.Json = False) -> None:
    """Say how much is in the cache, and for which models."""
    store = open_store(cache_dir)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    samples: dict[str, Entry] = {}
    for entry in store.entries():
        counts[entry.encoder] += 1
        sizes[entry.encoder] += entry.bytes
        samples[entry.encoder] = entry
    models = [(_describe(samples[name])["model"] or "?", name, counts[name], sizes[name]) for name in sorted(counts)]
    entries, size = counts.total(), sizes.total()
    if json:
        record = {"dir": str(store.root), "entries": entries, "bytes": size, "limit": store.limit}
        names = ("model", "encoder", "entries", "bytes")
        output.emit_json(record | {"models": [dict(zip(names, row, strict=True)) for row in models]})
        return
    limit = "no limit" if store.limit is None else f"limit {output.size(store.limit)}"
    print(printable(f"{store.root}: {entries} entries, {output.size(size)}, {limit}"))
    if models:
        lines = [(model, encoder, str(count), output.size(total)) for model, encoder, count, total in models]
        output.table(("model", "encoder", "entries ", "size "), lines)


@_command("gridprune cache verify --delete")
def verify(
    cache_dir: options.CacheDir = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is broken.")] = False,
) -> None:
    """Read every entry in full and check it; prints the broken ones. Exit code 1 if any stays."""
    checked = broken = left = 0
    with output.progress("checking", None) as step:
        for entry, fault in open_store(cache_dir).verify(delete=delete):
            checked += 1
            step()
            if fault:
                broken += 1
                left += os.path.lexists(entry.path)
                print(printable(f"{entry.path}: {fault}"))
    output.say(f"{checked} checked, {broken} broken, {broken - left} removed")
    if left:
        raise typer.Exit(1)


@_command("gridprune cache gc --max-size 5G --older-than 30d --dry-run")
def gc(
    cache_dir: options.CacheDir = None,
    max_size: Annotated[
        str | None,
        typer.Option(help="Trim to this size, such as 5G; 0 for no limit.", show_default="the cache's limit"),
    ] = None,
    older_than: Annotated[str | None, typer.Option(help="Remove what was not used for this long, such as 30d.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
) -> None:
    """Remove the least recently used entries, files left by killed runs, and caches of earlier layouts."""
    store = open_store(cache_dir)
    max_bytes = store.limit if max_size is None else parse_size(max_size, "max_size") or None
    seconds = None if older_than is None else parse_age(older_than, "older_than")
    removed = store.gc(max_bytes=max_bytes, older_than=seconds, dry_run=dry_run)
    _say_removed(removed, "would go" if dry_run else "removed")
    output.say(f"{removed.kept_entries} entries, {output.size(removed.kept_bytes)} kept")
    _check_stuck(removed, store)


@_command("gridprune cache rm 3fa9c1 77b2e0")
def rm(
    keys: Annotated[
        list[str], typer.Argument(metavar="KEY...", help="Four or more hex digits that a key starts with.")
    ],
    cache_dir: options.CacheDir = None,
) -> None:
    """Remove entries by key; none is removed where one of the keys is wrong."""
    store = open_store(cache_dir)
    entries = {store.find(key).key for key in keys}
    for key in sorted(entries):
        store.remove(key)
    output.say(f"{len(entries)} removed")


@_command("gridprune cache clear --yes")
def clear(
    cache_dir: options.CacheDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Remove every entry. Files saved with --save or -o are no part of the cache."""
    store = open_store(cache_dir)
    if output.confirm(f"Remove every encoded image in {printable(str(store.root))}?", yes):
        removed = store.clear()
        _say_removed(removed, "removed")
        _check_stuck(removed, store)


def _say_removed(removed: Removed, what: str) -> None:
    output.say(f"{removed.entries} entries, {output.size(removed.bytes)} {what}")


def _check_stuck(removed: Removed, store: Store) -> None:
    """Raises GridpruneError where entries should have gone, and are still there."""
    if removed.stuck:
        raise GridpruneError(f"{store.root}: {removed.stuck} entries can't be removed; see its permissions")


def _ordered(entries: Iterable[Entry], sort: str, limit: int | None) -> Iterator[Entry]:
    """By `sort`, ascending; the last `limit` of them."""
    orders: dict[str, Any] = {
        "used": lambda entry: (entry.used, entry.key),
        "size": lambda entry: (entry.bytes, entry.key),
        "name": lambda entry: (str(_describe(entry)["image"] or ""), entry.key),
    }
    if limit is None:
        return iter(sorted(entries, key=orders[sort]))
    return reversed(heapq.nlargest(limit, entries, key=orders[sort]))


def _describe(entry: Entry) -> dict[str, Any]:
    """One line of `ls`; of a broken entry, only what the file system knows."""
    record: dict[str, Any] = {"key": entry.key, "bytes": entry.bytes, "used": entry.used}
    kinds = {"name": str, "image": str, "model": str, "tokens": int}
    try:
        header = entry.header()
        if any(type(header[name]) is not kind for name, kind in kinds.items()):
            raise FileFault("damaged: its header is none of an encoded image")
        image, sha256, model, tokens = (header[name] for name in kinds)
    except (FileFault, OSError, KeyError):
        return record | dict.fromkeys(("image", "sha256", "model", "tokens"))
    return record | {"image": image, "sha256": sha256, "model": model, "tokens": tokens}
