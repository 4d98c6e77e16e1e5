"""Metrics of a parameter server in Ray's own format, which dashboards and Prometheus read from the cluster."""

from multitask.cluster.interface import Cluster
from multitask.job.job import Job
from multitask.server.messages import StepRecord

STEP_BOUNDARIES_S = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
"""Upper bounds of the bins of the histogram of step times."""


class ServerMetrics:
    """Counts the pushes of one server process. Dashboards compute rates per second from the counters."""

    def __init__(self, cluster: Cluster, job: Job) -> None:
        metrics = cluster.metrics
        self._bytes_of = {task.name: job.pushed_bytes(task.name) for task in job.spec.tasks}
        by_task = {"tag_keys": ("task",)}
        self._pushes = metrics.Counter("multitask_pushes", "Pushes applied to shared tensors.", **by_task)
        self._images = metrics.Counter("multitask_images", "Images that applied pushes learned from.", **by_task)
        self._bytes = metrics.Counter("multitask_pushed_bytes", "Bytes of gradients that arrived.", **by_task)
        self._rejected = metrics.Counter("multitask_refused_pushes", "Pushes rejected.", **by_task)
        self._staleness = metrics.Gauge(
            "multitask_staleness", "Versions by which the latest push was behind.", **by_task
        )
        self._queue = metrics.Gauge("multitask_queue", "Workers that wait for others.")
        self._step_s = metrics.Histogram(
            "multitask_step_seconds", "From loading a batch to the end of backward.", STEP_BOUNDARIES_S, **by_task
        )

    def note(self, record: StepRecord) -> None:
        """Count a push that was applied, redone or rejected."""
        tags = {"task": record.task}
        if self._bytes_of[record.task]:  # a Counter of Ray accepts only amounts above zero
            self._bytes.inc(self._bytes_of[record.task], tags)
        self._queue.set(record.queue)
        if record.rejected is not None:
            self._rejected.inc(1, tags)
        elif not record.redone:
            self._pushes.inc(1, tags)
            self._images.inc(record.images, tags)
            self._staleness.set(record.staleness, tags)
            self._step_s.observe(record.seconds, tags)
