"""What every test gets: a fixed seed, and no network."""

import socket
import time
from pathlib import Path
from types import SimpleNamespace

import hub_server
import numpy as np
import processes
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http
from transformers.utils import logging

import lmu_hf
from lmu_hf import evaluation, example
from lmu_hf.model import compiled

LOOPBACK = ("127.0.0.1", "::1", "localhost")


# Whose tests train, or start processes, for up to minutes each.
LONG = {
    "test_running",
    "test_launched",
    "test_adversarial",
    "test_finetune",
    "test_hub",
    "test_cli",
    "test_after_conversion",
}


def pytest_configure(config):
    """The compiled loop is built once, before there are workers, rather than by each of them."""
    if not hasattr(config, "workerinput"):
        lmu_hf.native.load()


def pytest_collection_modifyitems(items):
    """Long tests first: with one of them at the end, all workers but one would be idle."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries use it)


@pytest.fixture(scope="session", autouse=True)
def _quick_processes():
    """Runs within a test reload their model in the same process; those that tests start as processes of their own do what the
    command line does. What else starts Python here, starts it quickly."""
    quick = SimpleNamespace(run=processes.run)
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluation, example):
            patch.setattr(module, "subprocess", quick)
        processes.reload_here(patch.setattr)
        yield


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise OSError(f"the network is blocked in tests: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    # The client of the Hub tries again, and waits longer each time.
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))


@pytest.fixture(autouse=True)
def _verbosity():
    """The command line quietens transformers for good, which would blind later tests that read its warnings."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture
def python_loop(monkeypatch):
    """The time loop in Python even where the compiled one is there, whose sums round differently; also in child processes."""
    monkeypatch.setattr(compiled, "_load", None)
    monkeypatch.setenv("LMU_HF_NATIVE", "0")


@pytest.fixture
def compiled_loop():
    """The compiled time loop, for tests that are about nothing else."""
    if lmu_hf.native.why_not() is not None:
        pytest.skip(f"no compiled loop: {lmu_hf.native.why_not()}")


@pytest.fixture
def set_threads():
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["python", "compiled"])
def loop(request):
    """Which time loop runs: each in turn."""
    request.getfixturevalue(f"{request.param}_loop")
    return request.param


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory):
    """A folder as `lmu-hf train` writes it, of two quick epochs. Not to be changed; copy it."""
    from lmu_hf.experiment import Experiment
    from lmu_hf.training import train

    quick = ["training.num_train_epochs=2", "model.order=8", "model.hidden_size=20"]
    folder = tmp_path_factory.mktemp("digits") / "model"
    train(Experiment.read(Path(lmu_hf.__file__).parent / "tasks" / "digits.yaml", quick), folder, progress=False)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub of `hub_server`, where the client of this process finds it, logged in as ada."""
    with hub_server.running() as server:
        for name, value in server.client(hub_server.ADA, tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        # What the client read from the environment when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # its own client, made at first use
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
        yield server
