"The page nbs/guides/own_method.ipynb, followed to the letter in a copy of the project: the new method trains and loads"

import json
import re

import pytest
from execnb.nbio import mk_cell, new_nb, read_nb, write_nb
from omegaconf import OmegaConf

from medvlp.tasks.metrics.scores import load_scores
from toy_project import ROOT, ToyProject


def blocks(language):
    "The page's fenced blocks of a language (several languages: in their order), as (language, text)"
    cells = read_nb(ROOT / "nbs/guides/own_method.ipynb").cells
    text = "\n\n".join("".join(cell.source) for cell in cells if cell.cell_type == "markdown")
    return re.findall(rf"```({language})\n(.*?)\n```", text, re.DOTALL)


def add(old, new):
    "`new` put into `old`: sections merged, lists extended"
    if isinstance(old, list):
        return old + new
    return {**old, **{k: add(old[k], v) if k in old else v for k, v in new.items()}} if isinstance(old, dict) else new


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = ToyProject(tmp_path_factory.mktemp("own"))
    cells = [
        mk_cell(text, "markdown" if language == "markdown" else "code", id=f"c{i}")
        for i, (language, text) in enumerate(blocks("python|markdown"))
    ]
    notebook = project.folder / "nbs/7_methods/99_sigmoid.ipynb"
    write_nb(new_nb(cells), notebook)
    (project.folder / "export.py").write_text(f"from nbdev.export import nb_export\nnb_export({str(notebook)!r})\n")
    project.run("export")
    project.cells = [cell.source for cell in cells if cell.cell_type == "code"]
    return project


def test_the_page_makes_a_method(project):
    assert (project.folder / "medvlp/methods/sigmoid.py").is_file()
    params = project.params
    for _, text in blocks("yaml"):
        params = add(params, OmegaConf.to_container(OmegaConf.create(text)))
    for task in params["tasks"].values():
        task["data"] = ["toy"] if task["methods"] else []
    project.change(**params)
    project.run("medvlp.project.plan")
    plans = {path.stem: json.loads(path.read_text()) for path in (project.folder / "plan").glob("*.json")}
    behind = {name for name, stage in plans.items() if "medvlp/methods/sigmoid.py" in stage["code"]}
    assert "pretrain@sigmoid-0" in behind
    assert all("sigmoid" in name for name in behind - {"figures"})  # no other run depends on it

    project.stage("prepare", "toy")
    project.stage("pretrain", "sigmoid-0")
    curve = project.folder / "curves/toy/sigmoid-0/plots/metrics/train/pairs.tsv"
    assert len(curve.read_text().splitlines()) > 2
    project.stage("evaluate", "toy-sigmoid-0")
    scores = load_scores(project.folder / "scores/toy")
    assert "AUROC 100 %" in set(scores.metric[scores.task == "probe"])


def test_its_own_tests_pass_on_what_was_exported(project):
    tests = [cell for cell in project.cells if "#| export" not in cell and "#| default_exp" not in cell]
    lines = ["import math, torch", "from medvlp.methods.sigmoid import *", *tests]
    (project.folder / "own_tests.py").write_text("\n".join(lines))
    project.run("own_tests")
