"""Signals and devices."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from detection.config import ConfigError
from detection.engine import parallel
from detection.engine.parallel import StopFlag, choose_device


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's echo of the first
        assert stop.agreed()
        monkeypatch.setattr(parallel, "DOUBLE_SIGNAL_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda or cuda:N"):
        choose_device("gpu")
    with pytest.raises(ConfigError, match="CUDA devices here, number 63 asked for"):
        choose_device("cuda:63")
