"""`python -m gateway`: serve the OpenAI API on the inherited socket or on $PORT."""

from __future__ import annotations

import sys

from remoe.errors import RemoeError
from remoe.lifecycle import loopback_only, serve_asgi, watch_lifeline
from remoe.logs import configure_logging
from remoe.tracing import tracing

watch_lifeline()  # before the second that importing the rest takes

from fastapi import FastAPI  # noqa: E402

from gateway.app import create_app  # noqa: E402
from gateway.config import GatewaySettings  # noqa: E402


def main() -> None:
    """Read settings, topology and tokenizer first, so that a mistake fails before any port."""
    settings = GatewaySettings.read_or_exit()
    configure_logging("gateway", settings.log_level)
    try:
        app = create_app(settings, settings.load_topology(), public=not loopback_only())
        _serve(app, settings)
    except RemoeError as error:
        sys.exit(error.message)


def _serve(app: FastAPI, settings: GatewaySettings) -> None:
    tls = (settings.tls_cert, settings.tls_key) if settings.tls_cert and settings.tls_key else None
    with tracing("gateway"):
        serve_asgi(app, log_level=settings.log_level, tls=tls)


if __name__ == "__main__":
    main()
