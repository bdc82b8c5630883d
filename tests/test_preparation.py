"Preparation that is killed goes on where it was, and ends with the same bytes"

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from medvlp.benchmarks.preparation import write_collection
from medvlp.data.prepare import load_studies

PREPARE = """
import sys
from medvlp.data.prepare import DataOptions, prepare
folder, output = sys.argv[1:]
prepare(DataOptions(source="mimic_cxr", folder=folder, image_size=32), output, workers=2)
"""


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collection") / "mimic"
    write_collection(folder, 1500, (80, 90), pictures=5)
    return folder


def start(collection, output):
    command = [sys.executable, "-c", PREPARE, str(collection), str(output)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)


def whole_shards(output):
    return len(list((output / "parts").glob("*.arrow")))


def kill_after(process, output, shards):
    "SIGKILL to all processes as soon as so many shards are whole"
    while whole_shards(output) < shards:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_three_kills(collection, tmp_path):
    assert start(collection, tmp_path / "whole").wait() == 0
    for shards in (1, 3, 4):
        kill_after(start(collection, tmp_path / "killed"), tmp_path / "killed", shards)
        kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "parts").glob("*.arrow")}
    assert start(collection, tmp_path / "killed").wait() == 0
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()} == expected
    assert len(load_studies(tmp_path / "killed")) == 1500
    assert {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in kept} == kept  # not computed again


def test_a_dead_worker_ends_it(collection, tmp_path):
    process = start(collection, tmp_path / "killed")
    while not whole_shards(tmp_path / "killed"):
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [c for c in children if "popen_loky_posix" in " ".join(c.cmdline())]  # and not joblib's tracker of files
    assert len(workers) == 2
    workers[0].kill()
    assert process.wait(60) != 0
