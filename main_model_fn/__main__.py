"""`python -m main_model_fn`: serve the main-model function."""

from __future__ import annotations

import sys

from remoe.errors import RemoeError
from remoe.lifecycle import serve_asgi, watch_lifeline
from remoe.logs import configure_logging
from remoe.tracing import TraceRequests, tracing

watch_lifeline()  # before the seconds that importing torch takes

from main_model_fn.app import create_app  # noqa: E402
from main_model_fn.config import MainSettings  # noqa: E402


def main() -> None:
    settings = MainSettings.read_or_exit()
    configure_logging("main", settings.log_level)
    try:
        app = create_app(settings)
        with tracing("main"):
            serve_asgi(TraceRequests(app), log_level=settings.log_level)
    except RemoeError as error:
        sys.exit(f"main-model function: {error.message}")


if __name__ == "__main__":
    main()
