"""`gridprune serve`: a model that stays in memory, asked over HTTP as OpenAI's models are."""

import importlib.util
import ipaddress
from pathlib import Path
from typing import Annotated, Any

from gridprune_cli.cli import options
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.output import say, set_quiet
from gridprune_cli.errors import BadInput


@examples(
    "gridprune serve --model ./llava-1.5-7b --keep 0.2",
    "gridprune serve --allow-folder /data/pictures --allow-host images.example.org",
    "GRIDPRUNE_API_KEY=$(cat key) gridprune serve --host 0.0.0.0",
)
@options.takes(pipeline=options.unopened(options.pipeline))
def serve(
    pipeline: dict[str, Any],
    host: Annotated[str, options.option("Address to listen at.", options.SERVER)] = "127.0.0.1",
    port: Annotated[int, options.option("Port; 0 for any that is free.", options.SERVER, min=0, max=65535)] = 8090,
    socket: Annotated[
        bool,
        options.option(
            "Listen at no port, but at a Unix socket that your other commands find by themselves.",
            options.SERVER,
            "--socket",
        ),
    ] = False,
    api_key: Annotated[
        str | None,
        options.option(
            "What clients must send as their key; needed where others can reach the address.",
            options.SERVER,
            metavar="KEY",
            envvar="GRIDPRUNE_API_KEY",
        ),
    ] = None,
    allow_folder: Annotated[
        list[Path] | None,
        options.option("Folder below which `file://` may name pictures; several times.", options.SERVER, metavar="DIR"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        options.option(
            "Host that pictures may be fetched from; several times. One that is not public is named by address.",
            options.SERVER,
            metavar="HOST[:PORT]",
        ),
    ] = None,
    max_waiting: Annotated[
        int, options.option("Requests that may wait for their turn.", options.SERVER, min=1, metavar="N")
    ] = 64,
    max_upload: Annotated[str, options.option("Largest body of a request.", options.SERVER, metavar="SIZE")] = "64M",
    max_held: Annotated[
        str, options.option("Most of all bodies and pictures together that are held.", options.SERVER, metavar="SIZE")
    ] = "1G",
    keep: options.Keep = 0.11,
    method: options.Method = "gridprune",
    max_new_tokens: options.MaxNewTokens = 128,
    quiet: options.Quiet = False,
) -> None:
    """Serve a model over HTTP, in the format of OpenAI's chat completions.

    Where a request says nothing else, pictures are pruned as --keep and --method say. docs/serving.md tells what
    requests may say, what is exposed, and what is refused.
    """
    # 1. what can be known before the model is loaded
    set_quiet(quiet)
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"serve: {' and '.join(missing)} missing; pip install 'gridprune[serve]'")
    from gridprune_cli.cache.store import parse_size
    from gridprune_cli.serve.app import create_app
    from gridprune_cli.serve.commands import command_routes
    from gridprune_cli.serve.fetching import Hosts
    from gridprune_cli.serve.gate import Access
    from gridprune_cli.serve.http import listen, run
    from gridprune_cli.serve.metrics import Metrics
    from gridprune_cli.serve.pictures import Pictures
    from gridprune_cli.serve.runtime import listen_at_socket
    from gridprune_cli.serve.uploads import Budget
    from gridprune_cli.serve.work import Worker

    if socket and (host, port) != ("127.0.0.1", 8090):
        raise BadInput("listens at no port; leave --host and --port out", field="socket")
    if api_key is None and not _is_loopback(host):
        raise BadInput("others can reach it; give an `api_key`, or take 127.0.0.1", field="host", value=host)
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise BadInput("must be of printable ASCII characters, without blanks", field="api_key")
    budget = Budget(parse_size(max_held, "max_held"), parse_size(max_upload, "max_upload"))
    if not 0 < budget.upload <= budget.most:
        raise BadInput("must be above 0, and at most `max_held`", field="max_upload", value=max_upload)
    pictures = Pictures(allow_folder or [], Hosts(allow_host or []), budget.upload)
    metrics = Metrics()

    # 2. the model is opened by the worker, while the server answers already that it is being loaded
    def open_pipeline() -> Any:
        from gridprune_cli.opening import open_pipeline

        return open_pipeline(pipeline)

    worker = Worker(
        open_pipeline,
        metrics,
        defaults={"keep": keep, "method": method},
        max_tokens=max_new_tokens,
        max_waiting=max_waiting,
    )
    routes = command_routes(worker, budget, pipeline, pictures.sent)
    app = create_app(worker, pictures, Access(api_key, (host.lower(),)), budget, metrics, routes)
    with listen_at_socket() if socket else listen(host, port) as listener:
        run(app, worker, listener)
    say("stopped")


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address. Of names only localhost is known to be one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
