"The commands of nbs/guides/everyday fit a terminal, need no network and delete nothing"

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from toy_project import ROOT


def dvc(*words):
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_metrics_show_fits_160_columns():
    lines = dvc("metrics", "show").splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 160


@pytest.mark.parametrize("target", ["pretrain@mpma-0", "evaluate@hospital-b-mpma-0"])
def test_what_leads_to_a_stage_fits_160_columns(target):
    assert max(map(len, dvc("dag", target).splitlines())) <= 160


def test_plots_are_pictures():
    "DVC draws tables with a script that it loads from the network, and pictures without"
    plots = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml").plots)
    assert all(str(plot).endswith(".png") for plot in plots)


def test_results_outlive_a_failed_scoreboard():
    "DVC deletes what a stage writes before it runs it, except with `persist`"
    stage = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml").stages.scoreboard)
    outs = [out for out in stage["outs"] + stage["metrics"] if "results/" in str(out)]
    assert len(outs) == 4
    assert all(options["persist"] for out in outs for options in out.values())
