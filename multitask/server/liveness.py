"""Liveness: when the server last heard of each worker, and which workers are silent."""

from collections.abc import Collection, Iterable


class Liveness:
    """Remembers when each worker last gave a sign of life.

    Every method takes the present time `now` in seconds, from any clock that never runs backwards.
    """

    def __init__(self, workers: Iterable[str], now: float) -> None:
        self._heard = dict.fromkeys(workers, now)

    def report(self, worker: str, now: float) -> None:
        """Note a sign of life of a worker."""
        self._heard[worker] = now

    def silent(self, seconds: float, now: float, busy: Collection[str]) -> list[str]:
        """Return the workers that have work to do and were not heard of for more than `seconds`.

        The time of a worker starts only when the worker has work to do. A call therefore counts as a sign of life for
        every worker outside `busy`, and the caller has to ask regularly.

        Args:
            busy: workers that were asked for something and do not wait for another worker.
        """
        for worker in self._heard:
            if worker not in busy:
                self.report(worker, now)
        return [worker for worker, heard in self._heard.items() if now - heard > seconds]
