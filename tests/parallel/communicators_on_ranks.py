"""Run on every rank by test_ranks.py: what each call of the MPI communicator gives, checked on each rank."""

import sys
from itertools import product

import ml_dtypes
import numpy as np

from unisparse_np.errors import BackendUnavailable, CheckpointError, InvalidInput
from unisparse_np.parallel import Mpi, Single, arrange, together, world

everyone = world()


def check_arrays() -> None:
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        inputs = [np.random.default_rng(rank).standard_normal((3, 4, 5)).astype(dtype) for rank in range(everyone.size)]
        mine = inputs[everyone.rank]
        for view in (mine, mine.transpose(2, 0, 1), mine[:, :2]):
            np.testing.assert_array_equal(everyone.all_gather(view)[everyone.rank], view)
        gathered = everyone.all_gather(mine)
        assert gathered.dtype == dtype and gathered.shape == (everyone.size, 3, 4, 5)
        np.testing.assert_array_equal(gathered, np.stack(inputs))
        summed = everyone.all_reduce(mine.transpose(2, 0, 1))
        expected = sum(x.astype(np.float64) for x in inputs).transpose(2, 0, 1)
        eps = float(ml_dtypes.finfo(dtype).eps)
        assert summed.dtype == dtype and np.abs(summed.astype(np.float64) - expected).max() <= 4 * everyone.size * eps
        for other in everyone.all_gather(summed):  # the same bits everywhere
            np.testing.assert_array_equal(other, summed)


def check_objects() -> None:
    assert everyone.broadcast(f"from {everyone.rank}") == "from 0"
    assert everyone.gather_values(everyone.rank**2) == [rank**2 for rank in range(everyone.size)]


def check_errors() -> None:
    assert together(everyone, lambda: everyone.rank) == everyone.rank
    last = everyone.size - 1

    def fails_everywhere() -> None:
        raise InvalidInput("too long: shorten it")

    def fails_on_the_last() -> None:
        if everyone.rank == last:
            raise CheckpointError("no such file")

    for work, kind, words in (
        (fails_everywhere, InvalidInput, "too long: shorten it"),
        (fails_on_the_last, CheckpointError, f"rank {last} on "),
    ):
        try:
            together(everyone, work)
        except (BackendUnavailable, CheckpointError, InvalidInput) as error:
            assert type(error) is kind and str(error).startswith(words) and error.on_all_ranks, error
        else:
            raise AssertionError("no error on this rank")


class Backend:
    """With devices and a carrier of its own, as cupy."""

    @staticmethod
    def take_device(rank: int, size: int) -> None:
        assert (rank, size) == (everyone.rank, everyone.size)  # one machine

    @staticmethod
    def carrier(group: Mpi) -> Mpi:
        assert group.size > 1
        return group


def check_grid() -> None:
    for context_parallel in (size for size in (1, 2, 4) if everyone.size % size == 0):
        ranks = arrange(everyone, context_parallel, backend=Backend)
        tensor_parallel = everyone.size // context_parallel
        assert (ranks.tensor.size, ranks.context.size) == (tensor_parallel, context_parallel)
        assert ranks.context.rank * tensor_parallel + ranks.tensor.rank == everyone.rank
        assert isinstance(ranks.tensor, Single if tensor_parallel == 1 else Mpi)
        mine = np.array([ranks.context.rank, ranks.tensor.rank])
        expected = list(product([ranks.context.rank], range(tensor_parallel)))
        np.testing.assert_array_equal(ranks.tensor.all_gather(mine), expected)
        expected = list(product(range(context_parallel), [ranks.tensor.rank]))
        np.testing.assert_array_equal(ranks.context.all_gather(mine), expected)
    assert everyone.on_this_host().size == everyone.size


assert isinstance(everyone, Mpi) and everyone.size == int(sys.argv[1])
check_arrays()
check_objects()
check_errors()
check_grid()
print(f"rank {everyone.rank} is done")
