"The stage runner as a whole process: exit status, what the terminal says, what lies on disk afterwards."

import os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from execnb.nbio import mk_cell, new_nb, read_nb, write_nb

KNOBS = """epochs: PositiveInt = 12     # passes over the training studies
rate: PositiveFloat = 3e-4   # peak of the warm-up
tags: list[str] = []
encoder: dict = {}           # nested
note: str | None = None"""
PARAMS = "pretrain: {epochs: 2, rate: 1, tags: [a], encoder: {depth: [1, 2], on: yes}}\nmethod: {convirt: {note: null, rate: 3e-4}}\n"
GIVEN = ("--sections", "pretrain", "method.convirt")


def stage(path, *sources, tags=("parameters",)):
    "A stage notebook: imports, parameters, then `sources`"
    cells = [
        mk_cell(s, id=f"c{i}")
        for i, s in enumerate(("from pydantic import PositiveFloat, PositiveInt", KNOBS, *sources))
    ]
    cells[1]["metadata"]["tags"] = list(tags)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nb(new_nb(cells), path)


@pytest.fixture
def project(tmp_path):
    stage(tmp_path / "nbs/pretrain.ipynb", "print(epochs)")
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "dvc.yaml").write_text("""stages:
  pretrain:
    foreach: ${method}
    do:
      cmd: python -m medvlp.project.stage nbs/pretrain.ipynb reports/${key}.ipynb --sections pretrain method.${key}
      params:
        - pretrain
        - method.${key}
""")
    return tmp_path


def command(*args):
    return [sys.executable, "-m", "medvlp.project.stage", *map(str, args)]


def run(folder, *args, env=None):
    return subprocess.run(
        command(*args), cwd=folder, capture_output=True, text=True, timeout=60, env={**os.environ, **(env or {})}
    )


def problems(done, *, among=None):
    "The lines of a refusal: status 2, no traceback"
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr and not done.stdout
    return done.stderr.splitlines()


def test_run(project):
    "Values, kernel, working directory, progress; the copy is the same bytes twice, though asked for from a subfolder with misleading surroundings"
    stage(
        project / "nbs/pretrain.ipynb",
        "import os, sys\nfrom pathlib import Path\nfrom tqdm import tqdm\nimport matplotlib.pyplot as plt",
        "print(repr((epochs, rate, tags, encoder, note)))",
        "print(sys.executable, os.environ['PYTHONHASHSEED'], hash('study'), Path.cwd().name)",
        "for i in tqdm(range(3)): print('step', i)",
        "plt.plot([1, 2]); plt.show()\nobject()",
    )
    (project / "bad/kernels/python3").mkdir(parents=True)
    (project / "bad/kernels/python3/kernel.json").write_text(
        '{"argv": ["false"], "display_name": "wrong", "language": "python"}'
    )
    copies = []
    for output in "reports/a/b.ipynb", "../reports/a/b.ipynb":
        first = not copies
        done = run(
            project if first else project / "nbs",
            "nbs/pretrain.ipynb" if first else "pretrain.ipynb",
            output,
            *GIVEN,
            "--set",
            "epochs=3",
            "--params",
            "params.yaml" if first else "../params.yaml",
            env={"JUPYTER_PATH": str(project / "bad"), "MPLBACKEND": "agg"},
        )
        assert done.returncode == 0, done.stderr
        assert "step 2" in done.stdout and "3/3" in done.stderr and "Traceback" not in done.stderr
        copies.append((project / "reports/a/b.ipynb").read_bytes())
    assert copies[0] == copies[1]
    assert os.listdir(project / "reports/a") == ["b.ipynb"]
    cells = read_nb(project / "reports/a/b.ipynb").cells
    printed = ["".join(o.text) for c in cells for o in c.get("outputs", []) if "text" in o]
    assert printed[0] == "(3, 0.0003, ['a'], {'depth': [1, 2], 'on': 'yes'}, None)\n"
    assert printed[1].split()[0::3] == [sys.executable, project.name] and printed[1].split()[1] == "0"
    assert printed[2] == "step 0\nstep 1\nstep 2\n"
    assert "image/png" in cells[-1].outputs[0].data
    assert [c.metadata.get("tags") for c in cells[1:3]] == [["parameters"], ["injected-parameters"]]


def test_defaults(project):
    "A stage without a section: what is set wins, the rest is the notebook's own"
    stage(project / "nbs/aside.ipynb", "print(epochs, rate)")
    done = run(project, "nbs/aside.ipynb", "reports/aside.ipynb", "--defaults", "--set", "epochs=3")
    assert done.returncode == 0 and done.stdout.splitlines()[0] == "3 0.0003", done.stderr


def test_failing_cell(project):
    stage(
        project / "nbs/fail.ipynb", "print('so far')\nraise FileNotFoundError('no such study: x.png')", "print('never')"
    )
    (project / "reports").mkdir()
    (project / "reports/f.ipynb").write_text("the last good copy")
    done = run(project, "nbs/fail.ipynb", "reports/f.ipynb", *GIVEN)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == "so far\n"
    assert lines[0] == "nbs/fail.ipynb failed in cell [4]:" and lines[-1] == "FileNotFoundError: no such study: x.png"
    assert (
        lines[-2] == "partial copy: reports/f.failed.ipynb"
        and "Traceback" not in done.stderr
        and "\x1b" not in done.stderr
    )
    assert (project / "reports/f.ipynb").read_text() == "the last good copy"
    assert (
        "so far" in (project / "reports/f.failed.ipynb").read_text()
        and not (project / "reports/f.running.ipynb").exists()
    )


def test_dead_kernel(project):
    stage(project / "nbs/die.ipynb", "import os\nos.kill(os.getpid(), 9)")
    done = run(project, "nbs/die.ipynb", "die.ipynb", *GIVEN)
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1] == "nbs/die.ipynb: the kernel died: killed, or out of memory"
    )


def ended(pid):
    return (
        not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_signals(project, sent, status):
    "However the runner ends, its kernel does not live on"
    stage(project / "nbs/slow.ipynb", "import os\nprint(os.getpid(), flush=True)\nwhile True: sum(range(10**6))")
    runner = subprocess.Popen(
        command("nbs/slow.ipynb", "slow.ipynb", *GIVEN),
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    kernel = int(runner.stdout.readline())
    runner.send_signal(sent)
    _, said = runner.communicate(timeout=20)
    assert runner.returncode == status and "Traceback" not in said
    assert status < 0 or said.rstrip().endswith("partial copy: slow.failed.ipynb")
    deadline = time.monotonic() + 10
    while not ended(kernel) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ended(kernel) and not (project / "slow.ipynb").exists()


def test_refusals_are_listed_together(project):
    (project / "params.yaml").write_text(PARAMS.replace("epochs: 2", "epoch: 2").replace("tags: [a]", "tags: [1]"))
    lines = problems(run(project, "nbs/pretrain.ipynb", "out.ipynb", *GIVEN, "--set", "rate='3e-4'"))
    assert len(lines) == 4
    assert lines[0].startswith(
        "params.yaml: pretrain or method.convirt: epochs is missing: nbs/pretrain.ipynb declares epochs: PositiveInt (passes over the"
    )
    assert (
        lines[1] == 'params.yaml: pretrain.epoch: nbs/pretrain.ipynb has no parameter "epoch": did you mean "epochs"?'
    )
    assert (
        lines[2].startswith("--set rate='3e-4': '3e-4' does not fit rate: PositiveFloat (peak of the warm-up)")
        and "write it without" in lines[2]
    )
    assert lines[3].startswith(
        "params.yaml: pretrain.tags: [1] does not fit tags: list[str]: input should be a valid string"
    )
    assert not (project / "out.ipynb").exists()


@pytest.mark.parametrize(
    "change, args, said",
    [
        (None, ("nbs/pretrian.ipynb", "o.ipynb"), "nbs/pretrian.ipynb: cannot be read: No such file or directory"),
        (
            None,
            ("nbs/pretrain.ipynb", "o.ipynb", "--sections", "pretrain", "method.convrt"),
            'params.yaml: there is no section "method.convrt": did you mean "convirt"?',
        ),
        (None, ("nbs/pretrain.ipynb", "params.yaml/o.ipynb", *GIVEN), "params.yaml/o.ipynb: cannot be written: "),
        (None, ("nbs/pretrain.ipynb",), "give a stage notebook and a place for its executed copy, or --check"),
        ("a: [1\nb: 2\n", ("nbs/pretrain.ipynb", "o.ipynb", *GIVEN), "params.yaml:2: this is not YAML"),
    ],
)
def test_refusal(project, change, args, said):
    if change:
        (project / "params.yaml").write_text(change)
    lines = problems(run(project, *args))
    assert len(lines) == 1 and lines[0].startswith(said)


@pytest.mark.parametrize("tags", [(), ("parameter",)])
def test_missing_tag(project, tags):
    stage(project / "nbs/pretrain.ipynb", tags=tags)
    assert problems(run(project, "nbs/pretrain.ipynb", "o.ipynb", *GIVEN))[0].startswith(
        "nbs/pretrain.ipynb: 0 cells are tagged parameters"
    )


def test_check(project):
    (project / "params.yaml").write_text(PARAMS.replace("method: {", "method: {gloria: {note: x}, "))
    done = run(project, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"pretrain@{m}: nbs/pretrain.ipynb, 5 parameters" for m in ("gloria", "convirt")
    ] + ["2 stages, no problem"]


def test_check_of_a_preset(project):
    (project / "presets").mkdir()
    (project / "presets/x.yaml").write_text(
        PARAMS.replace("convirt: {note: null", "gloria: {notes: null") + "pretrian: {}\n"
    )
    lines = problems(run(project, "--check", "--params", "presets/x.yaml"))
    assert lines[0].startswith("presets/x.yaml: pretrain or method.gloria: note is missing")
    assert (
        lines[1]
        == 'presets/x.yaml: method.gloria.notes: nbs/pretrain.ipynb has no parameter "notes": did you mean "note"?'
    )
    assert lines[2] == 'presets/x.yaml: no stage of dvc.yaml reads section "pretrian": did you mean "pretrain"?'


def test_check_of_a_template_without_value(project):
    (project / "dvc.yaml").write_text((project / "dvc.yaml").read_text().replace("${method}", "${methods}"))
    (line,) = problems(run(project, "--check"))
    assert (
        line.startswith("dvc.yaml with params.yaml: ") and "methods" in line and str(Path(project).parent) not in line
    )


def test_light_import(project):
    code = "import sys, medvlp.project.stage; print([m for m in ('torch', 'papermill', 'nbformat', 'dvc') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True).stdout == "[]\n"
