"""Tests run offline, on few threads, with the repo's root on the path."""

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow each other down
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "experiments")]


@pytest.fixture
def wide(monkeypatch):
    """Scripts load float32, and models of any type compute norms and rotations in it: here this means float64.

    A test with this fixture reads no float32 files, but float64 ones, which tiny.write_model makes where it is told to.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def inside(monkeypatch):
    """Experiments run the scripts one after the other inside this process, where importing torch costs nothing."""
    import report
    import tyro

    import look

    def launch(script, *arguments, threads=1):
        module = importlib.import_module(Path(script).stem)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            module.main(tyro.cli(module.Args, args=[str(argument) for argument in arguments]))
        return out.getvalue()

    for name in ("plot_curves", "write_samples"):  # both take longer than these runs
        monkeypatch.setattr(look, name, lambda *_: None)
    monkeypatch.setattr(report, "launch", launch)
    monkeypatch.setattr(report, "side_by_side", lambda jobs, jobs_at_once=0: [job() for job in jobs])
