"Kernels that are copies of one process do what others do, and none outlives the one who has asked for it"

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from medvlp.project.kernels import KERNELS, copied_kernels
from medvlp.project.run import kernel_environment
from toy_project import ToyProject

SLEEPS = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "100"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(100)
"""


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    "A server, for modules that lie in the working directory"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with copied_kernels({}):
        if KERNELS not in os.environ:
            pytest.skip("kernels are not copied here")
        yield f"{os.environ[KERNELS]}/socket"


def start(address, code, folder):
    "A client whose module is the code; it, and the first numbers that are printed"
    (folder / "code_to_run.py").write_text(code)
    python = [sys.executable, "-m"]
    command = [*python, "medvlp.project.kernels", address, *python, "code_to_run"]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return client, *(int(number) for number in client.stdout.readline().split())


def ended(number):
    "Whether a process has ended, or does so within seconds"
    deadline = time.monotonic() + 10
    while psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_kernel(kernels, tmp_path, number):
    client, kernel, _ = start(kernels, SLEEPS, tmp_path)
    assert kernel != client.pid
    client.send_signal(number)
    assert client.wait(10) == 128 + number
    assert ended(kernel)


def test_a_kernel_ends_with_its_client_and_what_it_has_started_too(kernels, tmp_path):
    client, kernel, child = start(kernels, SLEEPS, tmp_path)
    client.kill()
    assert ended(kernel) and ended(child)


def test_a_killed_kernel_is_told(kernels, tmp_path):
    client, kernel, child = start(kernels, SLEEPS, tmp_path)
    os.kill(kernel, signal.SIGKILL)
    assert client.wait(10) == 128 + signal.SIGKILL
    os.kill(child, signal.SIGKILL)  # in a session of its own, as nobody could know any more


def test_without_a_server_the_client_is_the_kernel(kernels, tmp_path):
    for process in psutil.Process().children():
        if "medvlp.project.kernels" in process.cmdline():
            process.kill()
    client, kernel, child = start(kernels, SLEEPS, tmp_path)
    assert kernel == client.pid
    client.kill()
    os.kill(child, signal.SIGKILL)


def outcome(project):
    "The notebooks and weights of a run of some stages"
    for words in (["prepare", "toy"], ["corpus"], ["pretrain", "convirt-0"]):
        project.stage(*words)
    files = [*(project.folder / "reports").rglob("*.ipynb"), *(project.folder / "models").rglob("*.safetensors")]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stage_gives_the_same_files(tmp_path, monkeypatch, processes):
    project = ToyProject(tmp_path, compute=dict(processes=processes))
    project.run("medvlp.project.plan")
    usual = outcome(project)
    monkeypatch.chdir(project.folder)
    with copied_kernels(kernel_environment(1) | dict(PYTHONPATH=str(project.folder))):
        copied = outcome(project)
    assert len(usual) == 4 and usual == copied
