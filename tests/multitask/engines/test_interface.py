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


def test_last_is_the_newest_version_of_the_last_server_and_best_the_best_of_all(make_spec: MakeSpec) -> None:
    """A restored server counts on from an older version, and knows no evaluation that came after its checkpoint.

    An older version is told later than a newer one where it is saved too, and so waits for more reports.
    """
    job, outcome = Job(make_spec()), Outcome()
    driver = Driver(lambda *_: None, CheckpointStore(job.spec.checkpoint_folder, keep=2))
    last = []
    for server, version, top1 in ((1, 300, 90.0), (2, 252, 85.0), (2, 246, 80.0), (2, 258, 70.0)):
        evaluation = Evaluation(version, version, {"pets": {"top1": top1}}, True, {}, server)
        news = [], {version: CompleteSnapshot(Progress(version=version), evaluation, None)}, Progress()
        assert take(job, driver, outcome, news, lambda _: {})
        last.append(outcome.versions["last"].version)
    assert last == [300, 252, 252, 258]
    assert outcome.versions["best"].version == 300
