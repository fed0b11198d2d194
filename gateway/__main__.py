"""`python -m gateway`: serve the OpenAI API on the inherited socket or on $PORT."""

from __future__ import annotations

import sys

from gateway.app import create_app
from gateway.config import GatewaySettings
from remoe.errors import RemoeError
from remoe.lifecycle import serve_asgi
from remoe.logs import configure_logging


def main() -> None:
    """Read settings, topology and tokenizer first, so that a mistake fails before any port."""
    settings = GatewaySettings.read_or_exit()
    configure_logging("gateway", settings.log_level)
    try:
        app = create_app(settings, settings.load_topology())
    except RemoeError as error:
        sys.exit(error.message)
    serve_asgi(app, log_level=settings.log_level)


if __name__ == "__main__":
    main()
