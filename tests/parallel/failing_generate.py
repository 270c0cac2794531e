"""unisparse-np generate, with a fault on rank 1 in the middle of its work. Arguments: error, bug, wait or kill; those of the command."""

import os
import signal
import sys
import time

from unisparse_np.cli import main
from unisparse_np.errors import CheckpointError
from unisparse_np.model.forward import ForwardPass
from unisparse_np.parallel import world


def fail(*arguments: object) -> None:
    print("rank 1 reaches its fault", file=sys.__stderr__, flush=True)
    if sys.argv[1] == "error":
        raise CheckpointError("the weights are broken")
    if sys.argv[1] == "bug":
        raise ZeroDivisionError("a mistake")
    if sys.argv[1] == "wait":
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)


if world().rank == 1:
    ForwardPass._gated = fail  # type: ignore[assignment]
main(sys.argv[2:])
