"""Jobs done by several processes at once, each with a model of its own; a GPU is shared by all of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from unisparse_np.model.loading import load

Job, Result = TypeVar("Job"), TypeVar("Result")


def in_processes(work: Callable[[Any, Any, Job], Result], jobs: Iterable[tuple[Path, Job]], backend: str, workers: int) -> Iterator[Result]:
    """work(model, tokenizer, job) for every (model folder, job), in the order in which they end; with one worker in this process."""
    if workers == 1:
        yield from (_with_model(work, folder, job, backend) for folder, job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_with_model, work, folder, job, backend) for folder, job in jobs]):
            yield done.result()


def _with_model(work: Callable[[Any, Any, Any], Any], folder: Path, job: Any, backend: str) -> Any:
    return work(*_loaded(folder, backend), job)


@lru_cache(maxsize=2)
def _loaded(folder: Path, backend: str) -> tuple[Any, Any]:
    """The model and its tokenizer, once a process."""
    return load(str(folder), backend=backend)
