"""What every engine hands back."""

from collections.abc import Callable

from multitask.engines.interface import Driver, Outcome, take
from multitask.job.checkpoint import CheckpointStore
from multitask.job.job import Job
from multitask.server.messages import Evaluation
from multitask.server.parameter_server import CompleteSnapshot
from multitask.server.progress import Progress
from multitask.spec.schema import JobSpec

MakeSpec = Callable[..., JobSpec]


def test_after_going_back_the_last_version_is_the_one_told_last_and_best_the_best_of_all(make_spec: MakeSpec) -> None:
    """A restored server counts on from an older version, and knows no evaluation that came after its checkpoint."""
    job, outcome = Job(make_spec()), Outcome()
    driver = Driver(lambda *_: None, CheckpointStore(job.spec.checkpoint_folder, keep=2))
    for version, top1 in ((300, 90.0), (252, 85.0)):
        evaluation = Evaluation(version, version, {"pets": {"top1": top1}}, True, {})
        news = [], {version: CompleteSnapshot(Progress(version=version), evaluation, None)}, Progress()
        assert take(job, driver, outcome, news, lambda _: {})
    assert {name: evaluation.version for name, evaluation in outcome.versions.items()} == {"last": 252, "best": 300}
