"""``edgeq serve``: an OpenAI-compatible server, and a chat page."""

from __future__ import annotations

from typing import Any

import click

from edgeq.cli import render
from edgeq.cli.answer_options import draft_option, lookup_option, mtp_option
from edgeq.cli.options import (
    ByteSize,
    choice_options,
    command,
    engine_options,
    shared_option,
)
from edgeq.cli.run import engine_arguments, sampling_params
from edgeq.cli.warmup import compile_first


@command("serve", "Serve models over HTTP, with the OpenAI API and a chat page.")
@click.argument("models", metavar="MODEL [MODEL ...]", nargs=-1)
@shared_option("-m", "--model", "model", env="MODEL", metavar="MODEL", default=None,
               help="Same as the MODEL argument.")  # fmt: skip
@click.option("--host", default="127.0.0.1",
              help="Address to listen on; 0.0.0.0 listens on all addresses of this "
                   "machine.")  # fmt: skip
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, help="TCP port; 0 chooses a free port."
)
@click.option("-np", "--parallel", type=click.IntRange(1, 64), default=2,
              help="Answers of each model that are generated at the same time. Each has its own "
                   "KV cache; the weights are shared.")  # fmt: skip
@click.option(
    "--queue",
    type=click.IntRange(0, 10_000),
    default=32,
    help="Requests that may wait for each model; more are refused with status 429.",
)
@click.option("--api-key", default=None, metavar="KEY",
              help="Key that clients must send. Other users of this machine can read command "
                   "lines; EDGEQ_SERVE_API_KEY is safer.")  # fmt: skip
@click.option(
    "--insecure",
    is_flag=True,
    show_default=False,
    help="Allow an address that other machines can reach without an API key.",
)
@click.option("--cors-origin", "cors_origins", multiple=True, metavar="ORIGIN",
              help="Let web pages of this origin call the server; * is any origin. May be given "
                   "several times.")  # fmt: skip
@click.option(
    "--timeout",
    type=click.FloatRange(1, 86_400),
    default=600,
    help="Seconds after which an answer ends with the tokens that it has.",
)
@click.option("--max-body", type=ByteSize(), default="4M", help="Largest body of a request.")
@click.option(
    "--drain",
    type=click.FloatRange(0, 3600),
    default=30,
    help="Seconds that running answers may take after SIGTERM or Ctrl-C.",
)
@click.option("--cache-ram", type=click.IntRange(0, 1 << 20), default=256, metavar="MIB",
              help="Memory for the KV caches of earlier conversations of all models, which can "
                   "then be continued without processing them again; 0 keeps none.")  # fmt: skip
@click.option("--pooling", type=click.Choice(["last", "mean", "cls"]), default=None,
              show_default="what the model's files say, or last",
              help="How embeddings are computed: from the hidden state of the last token, the "
                   "mean of all tokens, or the first token.")  # fmt: skip
@click.option(
    "--log-prompts", is_flag=True, show_default=False, help="Write prompts and answers to the log."
)
@lookup_option
@draft_option
@mtp_option
@choice_options
@engine_options
def serve(models: tuple[str, ...], model: str | None, **settings: Any) -> None:
    """Serve each MODEL to clients of the OpenAI API, and a chat page to browsers, until Ctrl-C.

    A MODEL is a path, or NAME=PATH to choose its name in requests. The sampling options are the
    defaults for requests that do not set them.
    """
    from edgeq.serving.server import Server, log_to
    from edgeq.serving.settings import ServerSettings

    listed: list[Any] = [*models, *([model] if model and not models else [])]
    if not listed:
        raise click.UsageError("Missing argument 'MODEL'.")
    chosen = ServerSettings(
        host=settings["host"],
        port=settings["port"],
        parallel=settings["parallel"],
        queue=settings["queue"],
        api_key=settings["api_key"],
        insecure=settings["insecure"],
        cors_origins=settings["cors_origins"],
        timeout_s=settings["timeout"],
        body_bytes=settings["max_body"],
        drain_s=settings["drain"],
        prefix_bytes=settings["cache_ram"] << 20,
        lookup=settings["lookup"],
        mtp=settings["mtp"],
        pooling=settings["pooling"],
        params=sampling_params(settings),
        log_prompts=settings["log_prompts"],
    )
    compile_first(settings["backend"])
    log_to(render.note)
    with render.progress("Opening models") as bar:
        server = Server(
            listed, chosen, draft=settings["draft"], **engine_arguments(settings), progress=bar
        )
    render.note(
        f"serving {', '.join(server.service.models)}\n"
        f"chat page   {server.url}/\n"
        f"OpenAI API  {server.url}/v1\n"
        "Ctrl-C ends the server"
    )
    server.run()
