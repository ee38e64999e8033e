"""Signals are remembered until a step has ended, and handlers are restored to what they were."""

import multiprocessing
import os
import signal

import pytest

from foveate.train.interrupt import Signals, loader_context, outlive_signals
from foveate.train.together import Flags


def test_the_first_ctrl_c_waits_for_the_end_of_the_iteration():
    with Signals() as signals:
        signals.after_train_iter(None, 0)
        signal.raise_signal(signal.SIGINT)
        for ended in (signals.after_train_iter, signals.after_val_iter):
            with pytest.raises(KeyboardInterrupt):
                ended(None, 0)


def test_the_second_ctrl_c_does_not_wait():
    with Signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_that_ends_jobs_is_noted_for_the_next_step(number):
    flags = Flags()
    with Signals(flags):
        signal.raise_signal(number)
        assert flags.gather()["stop"] == number


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Signals(Flags()):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_afterwards_all_signals_are_what_they_were():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(ZeroDivisionError), Signals(Flags()):
        assert all(signal.getsignal(n) != b for n, b in zip(numbers, before, strict=True))
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_loader_worker_outlives_one_signal_to_the_whole_group():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    try:
        outlive_signals(0)
        for number in numbers:
            signal.raise_signal(number)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the second one ends a worker that hangs
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _starts_while_the_group_gets_a_signal():
    os.kill(os.getpid(), signal.SIGTERM)
    outlive_signals(0)
    os._exit(7)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers are not forked")
def test_a_loader_worker_outlives_a_signal_that_arrives_while_it_starts():
    context, before = loader_context(1), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    process = context.Process(target=_starts_while_the_group_gets_a_signal)
    process.start()
    process.join(60)
    assert process.exitcode == 7 and signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert loader_context(0) is None  # torch refuses a context without workers
