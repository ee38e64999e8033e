"""Ctrl-C is remembered until an iteration has ended, and restored to what it was."""

import signal

import pytest

from foveate.train.interrupt import CtrlC


def test_the_first_ctrl_c_waits_for_the_end_of_the_iteration():
    with CtrlC() as ctrl_c:
        ctrl_c.after_train_iter(None, 0)
        signal.raise_signal(signal.SIGINT)
        for ended in (ctrl_c.after_train_iter, ctrl_c.after_val_iter):
            with pytest.raises(KeyboardInterrupt):
                ended(None, 0)


def test_the_second_ctrl_c_does_not_wait():
    with CtrlC():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_afterwards_ctrl_c_is_what_it_was():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), CtrlC():
        assert signal.getsignal(signal.SIGINT) != before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) == before
