"""`pytest tests --slow --cuda` also runs what takes minutes or needs a GPU, as `make test FLAGS='slow cuda'` does"""

from multiprocessing import get_context

import pytest

from medvlp.tasks.metrics.text import Meteor

FLAGS = dict(slow="takes minutes", cuda="needs a GPU")


def pytest_addoption(parser):
    for flag, reason in FLAGS.items():
        parser.addoption(f"--{flag}", action="store_true", help=f"also run tests marked {flag}: {reason}")


def pytest_configure(config):
    for flag, reason in FLAGS.items():
        config.addinivalue_line("markers", f"{flag}: {reason}; runs with --{flag}")


def pytest_collection_modifyitems(config, items):
    for item in items:
        for flag, reason in FLAGS.items():
            if item.get_closest_marker(flag) and not config.getoption(f"--{flag}"):
                item.add_marker(pytest.mark.skip(reason=f"{reason}: --{flag} runs it"))


@pytest.fixture(scope="session")
def processes():
    "Starts processes that have imported everything already"
    context = get_context("forkserver")
    context.set_forkserver_preload(["small", "medvlp.training.pretrain"])
    return context


@pytest.fixture(scope="module")
def one_meteor():
    "METEOR's program, started once and not whenever it is asked, since it reads its tables for seconds"
    with Meteor() as program, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Meteor, "__enter__", lambda self: program)
        patch.setattr(Meteor, "__exit__", lambda *_: None)
        yield program
