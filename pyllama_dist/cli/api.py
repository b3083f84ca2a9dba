"""`pyllama-dist api`."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from pyllama_dist.cli.options import (
    BUILTIN,
    SpaceSeparated,
    cluster_options,
    make_cluster,
    option,
    progress_bar,
    tokenizer_option,
)
from pyllama_dist.cluster import MAX_SEQS
from pyllama_dist.errors import UsageError
from pyllama_dist.files import read_text

_KEYS_LIMIT = 1 << 20  # bytes
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.command("api", cls=SpaceSeparated)
@cluster_options
@tokenizer_option
@option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen at; 0: a free one.",
)
@option(
    "--parallel",
    type=click.IntRange(1, MAX_SEQS),
    default=4,
    show_default=True,
    help="Answers at once; others wait.",
)
@option(
    "--max-queue",
    type=click.IntRange(0, 100_000),
    default=32,
    show_default=True,
    help="Answers that may wait; more are refused with 429.",
)
@option("--api-key", multiple=True, help="Clients must send one of these keys.")
@option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File of keys, one in each line.",
)
@option("--trust-network", is_flag=True, help="Listen beyond this machine without a key.")
@option("--allowed-host", multiple=True, help="Name of this machine in the address of clients.")
@option("--cors-origin", multiple=True, help="Web page of another site that may ask.")
@option(
    "--thinking-budget",
    type=click.IntRange(0),
    help="Tokens after which a thought is ended, where a request does not say.",
)
@option("--log-json", is_flag=True, help="Write each line of the log as a JSON object.")
@option("--alias", multiple=True, help="Further name of the model.")
def command(
    model: Path | None,
    tokenizer: Path | None,
    host: str,
    port: int,
    parallel: int,
    max_queue: int,
    api_key: tuple[str, ...],
    api_key_file: Path | None,
    trust_network: bool,
    allowed_host: tuple[str, ...],
    cors_origin: tuple[str, ...],
    thinking_budget: int | None,
    log_json: bool,
    alias: tuple[str, ...],
    **cluster_settings: Any,
) -> None:
    """Serve a model to several clients at once, as OpenAI's API does.

    Point any client of that API at http://HOST:PORT/v1, or a browser at http://HOST:PORT.
    """
    try:
        from pyllama_dist.api.metrics import Metrics
        from pyllama_dist.api.request_log import JsonLines
        from pyllama_dist.api.security import Access
        from pyllama_dist.api.server import Loaded, serve
        from pyllama_dist.api.service import Limits, Service
    except ImportError as error:
        raise UsageError(
            f"the server needs the {error.name} library; install pyllama-dist[api]"
        ) from None
    from pyllama_dist.cluster import open_root
    from pyllama_dist.conversation import open_model
    from pyllama_dist.model_dir import ModelPaths

    keys = (*api_key, *_keys(api_key_file))
    if any(not key.isascii() or not key.strip() for key in keys):
        raise UsageError("an API key is empty or has other than ASCII characters; choose another")
    if host not in _LOOPBACK and not keys and not trust_network:
        raise UsageError(
            f"--host {host} lets other machines ask; add --api-key, or --trust-network if you "
            f"trust everybody who reaches it"
        )
    cluster = make_cluster(**cluster_settings)
    name = "builtin" if model is None else ModelPaths.find(model, tokenizer).name

    @contextmanager
    def load() -> Iterator[Loaded]:
        with ExitStack() as stack:
            parts = stack.enter_context(open_model(model or BUILTIN, tokenizer))
            with progress_bar("weights") as progress:
                root = stack.enter_context(open_root(parts.file, cluster, progress))
            yield Loaded(parts, root, root.names)

    if log_json:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines())
    limits = Limits(parallel, max_queue, thinking_budget)
    service = Service((name, *alias), limits, Metrics(name))
    serve(service, Access(keys, (host, *allowed_host), cors_origin), load, host, port)


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    lines = read_text(path, _KEYS_LIMIT).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
