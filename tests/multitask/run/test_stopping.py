"""Ctrl-C and SIGTERM."""

import pickle
import signal

import pytest

from multitask import Stopped
from multitask.run.stopping import first_interrupt, sigterm_as_ctrl_c


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_asks_for_the_stop_and_the_second_one_does_not_wait(number: int, status: int) -> None:
    asked: list[bool] = []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    with sigterm_as_ctrl_c(), first_interrupt(lambda: asked.append(True)):
        signal.raise_signal(number)
        assert asked == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def stop() -> None:
        with sigterm_as_ctrl_c(), first_interrupt(lambda: None):
            signal.raise_signal(number)
            raise Stopped("with a checkpoint")

    with pytest.raises(Stopped) as caught:
        stop()
    assert caught.value.exit_status == status
    assert pickle.loads(pickle.dumps(caught.value)).exit_status == status
