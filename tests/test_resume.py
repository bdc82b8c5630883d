"The promise of reproducibility: same seed, same weights; killed and resumed, same weights"

import random, signal, subprocess, sys, time
import pytest, torch
from safetensors.torch import load_file
import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    small.prepare(small.write_studies(folder / "data"), folder / "prepared")
    return folder


def start(folder, run, method):
    return subprocess.Popen(
        [sys.executable, small.__file__, folder, run, method], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out.decode()[-2000:]


def weights(folder, run):
    return load_file(folder / run / "model" / "model.safetensors")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# aga has gates, buffers that change with every batch; mpma draws masks and has a ramp; adamatch learns its temperature
# under LAMB
@pytest.mark.parametrize("method", ["convirt", "aga", "mpma", "adamatch"])
def test_two_runs_give_equal_weights_and_a_killed_run_resumed_too(folder, method):
    first, second, killed = (f"{method}-{run}" for run in ("first", "second", "killed"))
    for run in (first, second):
        finish(start(folder, run, method))
    assert_equal(weights(folder, first), weights(folder, second))

    process = start(folder, killed, method)
    while not list((folder / killed).rglob("complete")):  # a checkpoint is there
        assert process.poll() is None, process.communicate()[0].decode()[-2000:]
        time.sleep(0.02)
    time.sleep(random.random())  # then at any moment, in the middle of a checkpoint perhaps
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / killed / "model" / "model.safetensors").exists(), "it had finished before it was killed"
    finish(start(folder, killed, method))
    assert_equal(weights(folder, first), weights(folder, killed))
    curves = [{p.name: p.read_text() for p in (folder / run / "curves").rglob("*.tsv")} for run in (first, killed)]
    assert curves[0] == curves[1]
