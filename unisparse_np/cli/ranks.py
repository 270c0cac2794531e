"""One command on several processes, started by mpirun: only rank 0 speaks, and what ends one process ends them all."""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback

import click

from ..errors import InvalidInput, UniSparseError
from ..parallel import Single, world
from .options import Attention, flag, in_section

LAUNCHER_READS = 0.3  # seconds: what it has not passed on when it hears of the end is lost

rank_options = in_section(
    "Several processes (mpirun -n N unisparse-np ...)",
    flag("--context-parallel", type=click.IntRange(min=1), metavar="M", default=1, show_default=True,
         help="M groups of N / M processes share out the prompt's blocks; the processes of a group share out the heads and weights."),
    flag("--tensor-parallel", type=click.IntRange(min=1), metavar="T", help="Processes in a group. Only checked: T is N / M."),
)  # fmt: skip


def hush_other_ranks() -> None:
    """Keep every rank but 0 from printing. Raises BackendUnavailable when the processes cannot be connected."""
    if world().rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (open as long as the process lives)


def refuse_several(command: str) -> None:
    """Raises UsageError, on every rank, when a command that runs in one process was started in several."""
    if world().size > 1:
        raise click.UsageError(f"unisparse-np {command} runs in one process, but {world().size} were started: start it without mpirun")


def refuse_one_device(device: int | None) -> None:
    """Raises InvalidInput when one GPU is named for several processes."""
    if device is not None and world().size > 1:
        raise InvalidInput(
            f"--device {device} names one GPU, but each of {world().size} processes takes the one of its own number on its machine: "
            "leave it out, or set CUDA_VISIBLE_DEVICES"
        )


def refuse_uneven(model_dir: str, tensor_parallel: int, *attentions: Attention) -> None:
    """Raises InvalidInput when the model or an attention cannot be shared evenly, before a weight is read."""
    if tensor_parallel > 1:
        from ..model.config import ModelConfig  # late, so that help and usage errors come at once
        from ..model.sharding import check_split

        parts = [part for attention in attentions for part in (attention if isinstance(attention, list) else [attention])]
        check_split(ModelConfig.from_folder(model_dir), tensor_parallel, parts)


def end_all_ranks(error: BaseException, code: int) -> None:
    """Nothing in one process. Otherwise say which rank failed, on the stderr that it had, and end every process now.

    Others would wait for this one in their next exchange. An error that all ranks raise needs no such end.
    """
    everyone = world()
    if isinstance(everyone, Single) or (isinstance(error, UniSparseError) and error.on_all_ranks):
        return
    if not isinstance(error, (KeyboardInterrupt, BrokenPipeError)):
        a_bug = not isinstance(error, UniSparseError)  # which keeps its traceback
        text = " ".join(str(error).split()) or type(error).__name__
        said = [*(traceback.format_exception(error) if a_bug else ()), f"Error: rank {everyone.rank} on {platform.node()}: {text}\n"]
        print("".join(said), end="", file=sys.__stderr__, flush=True)
        time.sleep(LAUNCHER_READS)
    everyone.abort(code)
