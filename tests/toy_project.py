"A copy of the project with an experiment that runs in seconds a stage"

import os
import shutil
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from medvlp.project.config import merge
from small import BERT, write_studies

ROOT = Path(__file__).parent.parent
TASKS = ("evaluate", "finetune", "report", "answer", "cycle", "detect", "segment")
TINY = dict(
    experiment="toy",
    compute=dict(device="cpu", precision="fp32", threads=1),
    data=dict(toy=dict(folder="data", image_size=40)),
    pretrain=dict(
        data=["toy"],
        image_encoder=dict(name="resnet10t", image_size=32),
        text_encoder=BERT,
        vocab_size=100,
        epochs=2.0,
        batch_size=8,
        learning_rate=1e-3,
        log_steps=1,
    ),
    runs=dict(methods=["convirt"], fused=[], seeds=[0]),
    tasks={task: dict(data=[], methods=[]) for task in TASKS},
    figures=dict(data="toy"),
)


class ToyProject:
    "A folder with the project's code and a tiny experiment"

    def __init__(self, folder, **changes):
        self.folder = Path(folder)
        unused = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "images")
        for name in ("nbs", "medvlp", "assets/prompts"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=unused)
        for name in ("settings.ini", "setup.py", "pyproject.toml", "dvc.yaml"):
            shutil.copy(ROOT / name, self.folder)
        write_studies(self.folder / "data")
        self.change(**changes)

    def change(self, **changes):
        "Write params.yaml with changes to the tiny experiment"
        self.params = merge(getattr(self, "params", TINY), changes)
        OmegaConf.save(OmegaConf.create(self.params), self.folder / "params.yaml")

    def run(self, *words, status=0):
        "`python -m WORDS` in the folder; returns what it printed"
        environment = dict(os.environ, PYTHONPATH=str(self.folder), OMP_NUM_THREADS="1")
        done = subprocess.run(
            [sys.executable, "-m", *map(str, words)], cwd=self.folder, capture_output=True, text=True, env=environment
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def stage(self, *words, **options):
        return self.run("medvlp.project.run", *words, **options)
