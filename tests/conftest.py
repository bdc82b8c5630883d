"""`pytest tests --slow --cuda` also runs what takes minutes or needs a GPU, as `make test FLAGS='slow cuda'` does"""

import pytest

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
