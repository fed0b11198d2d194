"""`python -m gateway`: serve the OpenAI API on the inherited socket or on $PORT."""

from __future__ import annotations

import sys

from fastapi import FastAPI

from gateway.app import create_app
from gateway.config import GatewaySettings
from remoe.errors import RemoeError
from remoe.lifecycle import loopback_only, serve_asgi
from remoe.logs import configure_logging
from remoe.tracing import tracing


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
