"An interrupted or failed run of the pipeline leaves no process and no lock behind, and says how it ended"

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from execnb.nbio import mk_cell, new_nb, write_nb

from medvlp.project.stage import Stage, write_stage

pytestmark = pytest.mark.slow
PARALLEL = ["-m", "medvlp.project.parallel", "--jobs"]
SLEEPS = """
import os, subprocess, time
from pathlib import Path
subprocess.Popen(["sleep", "100"])  # as a process that loads images
Path(f"{run_name}.started").touch()
time.sleep(100)
"""
TRAINS = """
import time
from pathlib import Path
from medvlp.training.loop import StopSignals
with StopSignals() as signals:  # as a training
    Path(f"{run_name}.started").touch()
    while not signals.came():
        time.sleep(0.05)
    time.sleep(4)  # longer than what does not train is given
    Path(f"{run_name}.saved").touch()
    signals.leave(step=7)
"""


def write_project(folder, code=SLEEPS, **commands):
    "A pipeline of independent stages; `sleep@RUN` is a notebook that sleeps, or whose code is another"
    stages = {name: dict(cmd=cmd, outs=[f"{name}.out"]) for name, cmd in commands.items()}
    (folder / "dvc.yaml").write_text(json.dumps(dict(stages=stages)))
    (folder / "nbs/stages").mkdir(parents=True)
    cells = [mk_cell('run_name: str = "a"', id="c0"), mk_cell(code, id="c1")]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = dict(name="python3", display_name="python3", language="python")
    write_nb(new_nb(cells, meta=dict(kernelspec=kernel)), folder / "nbs/stages/sleep.ipynb")
    for run in "ab":
        outputs = dict(notebook=f"reports/sleep/{run}.ipynb")
        write_stage(Stage(stage="sleep", run=run, experiment="toy", outputs=outputs), folder / "plan")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=folder, check=True)
    (folder / ".dvc/config").write_text("[core]\n no_scm = true\n analytics = false\n check_update = false\n")


def start(folder, *words):
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent), SHELL="/bin/sh")
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # a group of its own, as a terminal gives to a command
    )


def processes(folder):
    "Those that work in a folder"
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            pass
    return found


def wait_for(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def locks(folder):
    held = json.loads((folder / ".dvc/tmp/rwlock").read_text())
    return held.get("read", {}) | held.get("write", {})


SLEEPING = {run: f"{sys.executable} -m medvlp.project.run sleep {run}" for run in "ab"}


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    "to_all, number, said",
    [(True, signal.SIGINT, "interrupted"), (False, signal.SIGTERM, "terminated"), (True, signal.SIGHUP, "hung up")],
    ids=["Ctrl-C", "SIGTERM", "closed terminal"],
)
def test_a_signal_ends_everything(jobs, to_all, number, said, tmp_path):
    write_project(tmp_path, **SLEEPING)
    process = start(tmp_path, *PARALLEL, str(jobs))
    wait_for(lambda: len(list(tmp_path.glob("*.started"))) == jobs)
    os.killpg(process.pid, number) if to_all else process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert processes(tmp_path) == []
    assert process.returncode == 128 + number
    assert f"{said}: nothing is left running" in out and "Traceback" not in out
    assert not locks(tmp_path) and not list(tmp_path.rglob("*.running.ipynb"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("words", [["-m", "medvlp.project.run", "sleep", "a"], [*PARALLEL, "1"]], ids=["run", "dvc"])
def test_a_training_saves_before_it_ends(number, words, tmp_path):
    write_project(tmp_path, TRAINS, a=SLEEPING["a"])
    process = start(tmp_path, *words)
    wait_for((tmp_path / "a.started").exists)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert (tmp_path / "a.saved").exists() and processes(tmp_path) == []
    assert process.returncode == 128 + number
    assert "there is a checkpoint of step 7" in out and "Traceback" not in out
    assert not list(tmp_path.rglob("*.running.ipynb")) and list(tmp_path.rglob("*.failed.ipynb"))


def test_a_stage_ends_when_dvc_is_killed(tmp_path):
    write_project(tmp_path, a=SLEEPING["a"])
    process = start(tmp_path, "-m", "dvc", "repro")
    wait_for((tmp_path / "a.started").exists)
    process.kill()
    process.wait()
    wait_for(lambda: not processes(tmp_path), seconds=10)


def test_a_failure_waits_for_what_runs_beside_it_and_is_named(tmp_path):
    write_project(tmp_path, good="sleep 4; touch good.out", bad="sleep 1; exit 3")
    process = start(tmp_path, *PARALLEL, "2")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and (tmp_path / "good.out").exists() and processes(tmp_path) == []
    assert "bad failed: see its messages above" in out and "exited with 3" in out and "good failed" not in out
