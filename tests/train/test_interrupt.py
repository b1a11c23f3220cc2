"""Promises of Ctrl-C during training: the first asks, the second stops, and the handler is given back."""

from __future__ import annotations

import os
import signal

import pytest

from halfbyte.train.interrupt import CtrlC


def test_the_first_ctrl_c_asks_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGINT)
    with CtrlC() as ctrl_c:
        assert not ctrl_c.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert ctrl_c.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
