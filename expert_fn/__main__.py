"""`python -m expert_fn`: serve the experts of REMOE_EXPERT_FIRST_LAYER to _LAST_LAYER."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from expert_fn.compute import ExpertComputer
from expert_fn.config import ExpertSettings
from expert_fn.endpoint import Endpoint
from expert_fn.logs import configure_logging
from expert_fn.server import serve
from remoe.checkpoint import Checkpoint
from remoe.errors import RemoeError
from remoe.expert_call import TOKEN_VARIABLE
from remoe.kernel.interface import open_kernel
from remoe.lifecycle import InFlight, Notifier, bind, watch_lifeline


def main() -> None:
    watch_lifeline()
    settings = ExpertSettings.read_or_exit()
    configure_logging(settings.log_level)

    notifier = Notifier.from_environment()
    in_flight = InFlight(notifier)

    def load() -> Endpoint:
        topology = settings.load_topology()
        checkpoint = Checkpoint.open(Path(topology.model_dir))
        topology.check_weights(checkpoint.digest)
        computer = ExpertComputer(
            checkpoint,
            first_layer=settings.first_layer,
            last_layer=settings.last_layer,
            kernel=open_kernel(
                checkpoint.expert,
                settings.kernel,
                activation=checkpoint.activation,
                threads=settings.threads,
            ),
        )
        return Endpoint(
            computer,
            notifier,
            payload_limit_bytes=settings.payload_limit_bytes,
            token=os.environ.get(TOKEN_VARIABLE, ""),
        )

    try:
        serve(bind(), load, notifier, in_flight)
    except (RemoeError, ValueError) as error:
        sys.exit(f"expert function: {error}")
    finally:
        in_flight.close()
        notifier.close()


if __name__ == "__main__":
    main()
