"Long runs: killed, stopped by signals, on a full disk, with damaged checkpoints; and a memory that does not grow"

import gc
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch

import small
from test_resume import assert_equal, curves, weights

OFTEN, RARELY = 1e-6, 60.0  # minutes between two checkpoints
HOW = dict(image=small.VIT, log_steps=2, checkpoint_steps=12)  # a signal comes between two log lines, too


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    small.prepare(small.write_studies(folder / "data"), folder / "prepared")
    return folder


@pytest.fixture(scope="module")
def whole(folder, processes):
    "Trains as nothing disturbs it; the name of the run"

    def train(method, epochs=10.0):
        name = f"{method}-{epochs}"
        if not (folder / name).exists():
            run(processes, folder, name, method, epochs)
        return name

    return train


def run(processes, folder, name, method, epochs, minutes=RARELY, wait=True):
    how = HOW | dict(epochs=epochs)
    process = processes.Process(target=small.train, args=(folder, name, method, minutes), kwargs=how)
    process.start()
    if wait:
        process.join()
        assert process.exitcode == 0
    return process


def whole_steps(folder):
    with suppress(FileNotFoundError):  # a training has just removed it
        return sorted(int(mark.parent.name.split("-")[1]) for mark in folder.glob("*/*/checkpoint-*/complete"))
    return []


def wait_for(condition, process):
    "Until something has happened or the process has ended"
    while process.is_alive() and not condition():
        time.sleep(0.005)


def damage(folder, rng):
    "Truncate or overwrite a file of the newest checkpoint, if there is another one"
    steps = whole_steps(folder)
    if len(steps) > 1:
        (newest,) = folder.rglob(f"checkpoint-{steps[-1]}")
        file = newest / rng.choice(["model.safetensors", "optimizer.pt", "trainer_state.json"])
        content = file.read_bytes()
        at = rng.randrange(len(content))
        file.write_bytes(content[:at] + (b"" if rng.random() < 0.5 else bytes([content[at] ^ 1]) + content[at + 1 :]))
    return len(steps) > 1


def assert_undisturbed(folder, name, expected):
    assert_equal(weights(folder, expected), weights(folder, name))
    assert curves(folder / expected) == curves(folder / name)
    assert not list((folder / name / "checkpoints").iterdir())


# four steps in an epoch
ROUNDS = [("convirt", 10.0, 2)] + [pytest.param(m, 30.0, 20, marks=pytest.mark.slow) for m in ("convirt", "aga")]


@pytest.mark.parametrize("method, epochs, kills", ROUNDS)
def test_killed_at_random_moments(folder, processes, whole, method, epochs, kills):
    rng, name, damaged = random.Random(kills), f"{method}-killed-{kills}", 0
    for i, step in enumerate(sorted(rng.sample(range(6, int(3 * epochs)), kills))):
        process = run(processes, folder, name, method, epochs, OFTEN, wait=False)
        wait_for(lambda: max(whole_steps(folder / name), default=0) >= step, process)
        process.join(0.1 * rng.random())  # somewhere in the next steps and checkpoints, or in its beginning
        assert process.is_alive(), "it had finished before it was killed"
        process.kill()
        process.join()
        damaged += i % 3 == 0 and damage(folder / name, rng)
    assert damaged
    run(processes, folder, name, method, epochs)
    assert_undisturbed(folder, name, whole(method, epochs))


@pytest.mark.parametrize("method, epochs, stops", ROUNDS)
def test_stopped_by_signals_at_random_moments(folder, processes, whole, method, epochs, stops):
    rng, name, saved = random.Random(stops), f"{method}-stopped-{stops}", []
    curve = folder / name / "curves" / "plots" / "metrics" / "train" / "loss.tsv"
    for _ in range(stops):
        curve.unlink(missing_ok=True)
        process = run(processes, folder, name, method, epochs, wait=False)
        wait_for(curve.is_file, process)  # it has begun to train
        process.join(0.05 * rng.random())
        assert process.is_alive(), "it had finished before it was stopped"
        number = rng.choice([signal.SIGTERM, signal.SIGUSR1])
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == 128 + number
        saved.append(max(whole_steps(folder / name)))
    assert saved == sorted(set(saved)) and any(step % HOW["log_steps"] for step in saved)
    run(processes, folder, name, method, epochs)
    assert_undisturbed(folder, name, whole(method, epochs))


FULL_DISK = """
mount -t tmpfs -o size={small} tmpfs {checkpoints} || exit 77
{train} && exit 1
ls -d {checkpoints}/*/*
mount -o remount,size={large} tmpfs {checkpoints} && {train}
"""
MAY_MOUNT = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)


@pytest.mark.skipif(MAY_MOUNT.returncode != 0, reason="no tmpfs may be mounted here")
def test_a_full_disk(folder, processes, whole):
    model = folder / whole("convirt") / "model" / "model.safetensors"
    size = 3 * model.stat().st_size + 2**16  # of a checkpoint
    checkpoints = folder / "full" / "checkpoints"
    checkpoints.mkdir(parents=True)
    code = f"import small; small.train('{folder}', 'full', minutes={OFTEN}, **{HOW})"
    train = f"{sys.executable} -c {shlex.quote(code)}"
    script = FULL_DISK.format(small=int(2.5 * size), large=5 * size, checkpoints=checkpoints, train=train)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    how = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | dict(PYTHONPATH=paths))
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], **how)
    assert done.returncode == 0, done.stdout[:20000]
    assert "No space left on device" in done.stdout and "the last whole checkpoint is" in done.stdout
    assert [line[-1] for line in done.stdout.splitlines() if "/checkpoint-" in line and line[0] == "/"] == ["1", "2"]
    assert_undisturbed(folder, "full", whole("convirt"))


def watch_memory(folder, steps, queue):
    "Train and report bytes in use and the number of tensors at some steps"
    from medvlp.training.loop import Guard

    seen = []

    def look(self, args, state, control, **kwargs):
        if state.global_step % 50 == 49:
            gc.collect()
            tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
            seen.append((psutil.Process().memory_info().rss, tensors))

    changes = dict(image=small.VIT, epochs=steps / 4, log_steps=20, checkpoint_steps=50)
    with patch.object(Guard, "on_step_begin", look):
        small.train(folder, "memory", "aga", RARELY, **changes)
    queue.put(seen)


@pytest.mark.parametrize("steps", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_memory_does_not_grow(folder, processes, steps):
    queue = processes.Queue()
    process = processes.Process(target=watch_memory, args=(folder, steps, queue))
    process.start()
    seen = queue.get(timeout=600)
    process.join()
    shutil.rmtree(folder / "memory")
    rss, tensors = zip(*seen[1:])  # the first 50 steps fill caches
    print([f"{x / 2**20:.1f}" for x in rss], tensors)
    assert max(tensors) < tensors[0] + 5
    assert max(rss) - rss[0] < 2**20 * (2 + steps / 100)
