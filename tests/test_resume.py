"The promise of reproducibility: same seed, same weights; killed and resumed, same weights"

import random, subprocess, sys, time
import pytest, torch
from safetensors.torch import load_file
import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    small.prepare(small.write_studies(folder / "data"), folder / "prepared")
    return folder


def start(processes, folder, run, method, device, minutes=5.0):
    process = processes.Process(target=small.train, args=(folder, run, method, minutes, device))
    process.start()
    return process


def finish(process):
    process.join(300)
    assert process.exitcode == 0


def weights(folder, run):
    return load_file(folder / run / "model" / "model.safetensors")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def curves(folder):
    return {p.name: p.read_text() for p in (folder / "curves").rglob("*") if p.is_file()}


def between_evaluations(folder):
    "Whether the last checkpoint was made by time: evaluations come every three steps"
    steps = [int(mark.parent.name.split("-")[1]) for mark in folder.rglob("complete")]
    return steps and max(steps) % 3


# aga has gates, buffers that change with every batch; mpma draws masks and has a ramp; adamatch learns its temperature
# under LAMB; amf averages its weights, and draws negatives in its second pre-training
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("method", ["convirt", "aga", "mpma", "adamatch", "amf", "amf-fused"])
def test_two_runs_give_equal_weights_and_a_killed_run_resumed_too(folder, processes, method, device):
    first, second, killed = (f"{method}-{device}-{run}" for run in ("first", "second", "killed"))
    finish(start(processes, folder, first, method, device))
    subprocess.run([sys.executable, small.__file__, folder, second, method, "5.0", device], check=True)  # all anew
    assert_equal(weights(folder, first), weights(folder, second))

    process = start(processes, folder, killed, method, device, minutes=1e-6)  # a checkpoint at each step
    while not between_evaluations(folder / killed):
        assert process.is_alive()
        time.sleep(0.02)
    process.join(random.random())  # then at any moment, in the middle of a checkpoint perhaps
    process.kill()
    process.join()
    assert not (folder / killed / "model" / "model.safetensors").exists(), "it had finished before it was killed"
    finish(start(processes, folder, killed, method, device))
    assert_equal(weights(folder, first), weights(folder, killed))
    assert curves(folder / first) == curves(folder / killed)
