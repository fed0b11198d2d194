"""`python -m planner`: read the settings, load the model's tables and the history, serve."""

from __future__ import annotations

import os
import sys

from remoe.lifecycle import serve_asgi, watch_lifeline


def main() -> None:
    watch_lifeline()
    # One plan is far too small to share out, the other cores belong to the model, and OpenBLAS's
    # spinning threads multiply the time of a plan when they wait for one. Read when it is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import faiss

    from planner.app import create_app
    from planner.config import PlannerSettings
    from planner.planning import Planner
    from remoe.errors import RemoeError
    from remoe.logs import configure_logging
    from remoe.tracing import TraceRequests, tracing

    settings = PlannerSettings.read_or_exit()
    configure_logging("planner", settings.log_level)
    faiss.omp_set_num_threads(1)
    try:
        app = create_app(
            Planner.load(settings),
            main_url=settings.load_topology().main_url,
            adapt_every_s=settings.adapt_every_s,
        )
        with tracing("planner"):
            serve_asgi(TraceRequests(app), log_level=settings.log_level)
    except RemoeError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()
