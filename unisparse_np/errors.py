"""The three ways a call can fail on purpose. Each message holds the value, the rule and the way out."""


class UniSparseError(Exception):
    """Base of the three below, so that a caller can catch them together.

    on_all_ranks: whether every rank of a run on several processes raises this error, so that none is left waiting.
    """

    on_all_ranks = False


class InvalidInput(UniSparseError, ValueError):
    """An argument, flag, array or prompt breaks a rule (exit code 2 on the command line)."""


class CheckpointError(UniSparseError, ValueError):
    """A model folder or file is broken, incomplete or of an unknown kind (exit code 1)."""


class BackendUnavailable(UniSparseError, RuntimeError):
    """A backend was asked for by name and a piece of it is missing; the message names the install command (exit code 1)."""


def broken_logits(broken: int, total: int) -> CheckpointError:
    """The error for a model whose logits hold `broken` NaN or infinite numbers of `total`; 0 where all of them are -inf."""
    if broken == 0:
        return CheckpointError("the model's logits are -inf for every token: its weights are broken, so check the checkpoint")
    return CheckpointError(
        f"{broken} of the model's {total} logits are NaN or infinite: its weights hold such values or its arithmetic overflowed, "
        "so check the checkpoint or load it with --dtype float32"
    )
