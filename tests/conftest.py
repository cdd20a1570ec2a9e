"""Keep tests off the network's model hub, and off each other's threads."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: spinning threads starve them
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _ctrl_c():
    """The command ignores Ctrl-C when it ends; the tests go on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _threads(request):
    """One thread for tiny models (the rest is waiting), all for real ones."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("real") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def registries():
    """The registries of analyses and claims; after the test they are as they were."""
    from sst_interp.analyses import load
    from sst_interp.findings.ledger import CLAIMS

    kept = [(registry, dict(registry)) for registry in (load(), CLAIMS)]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)


@pytest.fixture
def only(registries):
    """Leaves these analyses in the registry: the others are most of the time."""

    from sst_interp.analyses import load

    def keep(*names):
        known = load()
        for name in known.keys() - set(names):
            del known[name]

    return keep
