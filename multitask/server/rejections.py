"""The reasons for which the server rejects a call of a worker, and the messages that say so."""

from collections.abc import Iterable

from multitask.server.messages import OutOfStepError, Push, PushRejectedError


def unknown_worker(worker: str, known: Iterable[str]) -> PushRejectedError:
    """Return the error for a call of a worker that does not belong to this run.

    Args:
        known: the workers of this run.
    """
    return PushRejectedError(
        f"A push came from worker '{worker}', but this server knows {sorted(known)}. "
        "Pass this run's server to every worker."
    )


def replaced_process(worker: str, incarnation: int, newest: int) -> PushRejectedError:
    """Return the error for a call of a process whose place another process of the same worker took."""
    return PushRejectedError(
        f"A push came from process {incarnation} of worker '{worker}', but process "
        f"{newest} took its place. Nothing was applied; the earlier process has to end."
    )


def check_order(push: Push, task: str, step: int, version: int) -> None:
    """Check that a push follows on what the server has.

    Args:
        task: the worker's task.
        step: the worker's next step.
        version: the server's version.
    Raises:
        OutOfStepError: the push has another step, or was computed on a version that this server never had.
    """
    where = f"Push {push.step} of worker '{push.worker}' (task '{task}')"
    if push.step != step:
        raise OutOfStepError(f"{where} is out of order: step {step} is next. Push every step once, in order.")
    if push.version > version:
        raise OutOfStepError(
            f"{where} was computed on version {push.version}, but this server is at {version}: "
            "the worker holds values of another run. Pull before the first step."
        )


def rejection(push: Push, task: str, problem: str) -> str:
    """Return the message for a push whose gradients cannot be applied.

    Args:
        task: the worker's task.
        problem: what is wrong with the gradients.
    """
    return (
        f"Push {push.step} of worker '{push.worker}' (task '{task}') was rejected: {problem} "
        f"(loss {push.loss:g}). Lower optimizer.rate, or look at the images of this step."
    )
