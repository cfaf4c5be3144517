"""Loads between steps."""

import threading

import torch

from runtime.adapters.pool import AdapterPool
from runtime.background import Pacer
from tests.runtime.adapter_format.adapter_files import DEADLINE_SECONDS, MODEL, ONE, SIZE


def test_a_piece_waits_for_the_gap_after_a_step() -> None:
    pacer, done = Pacer(patience_seconds=DEADLINE_SECONDS), threading.Event()
    pacer.pause()  # in a gap, at once

    def work() -> None:
        pacer.pause()
        done.set()

    with pacer.computing():
        thread = threading.Thread(target=work)
        thread.start()
        assert not done.wait(0.05)
    assert done.wait(DEADLINE_SECONDS)
    thread.join()


def test_a_step_that_takes_too_long_does_not_stop_a_piece_for_ever() -> None:
    pacer = Pacer(patience_seconds=0.01)
    with pacer.computing():
        pacer.pause()


def test_a_step_that_fails_ends_too() -> None:
    pacer = Pacer(patience_seconds=DEADLINE_SECONDS)
    try:
        with pacer.computing():
            raise ValueError
    except ValueError:
        pacer.pause()


def test_a_load_makes_no_progress_while_a_step_computes_and_goes_on_after_it() -> None:
    pool = AdapterPool(MODEL, SIZE, SIZE, torch.float32, "cpu")
    pool.pacer.patience_seconds = DEADLINE_SECONDS
    digest, content = ONE
    pool.register(digest, content)
    with pool.pacer.computing():
        pool.load(digest, "device")
        assert not pool.wait(0.1)
    while not pool.device.holds(digest):
        assert pool.wait(DEADLINE_SECONDS)
        pool.poll()
    pool.close()
