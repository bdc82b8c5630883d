"Text of patients stays where it belongs: none on the terminal, and none in what git or a colleague may see"

import json
import re

import pandas as pd
import pytest
from execnb.nbio import mk_cell, read_nb, write_nb

from medvlp.data.studies import StudyError
from small import prepare, write_studies
from toy_project import TASKS, ToyProject

CANARY = "qzcanary"  # a word of every report, question and answer
PRIVATE = ("data", "prepared/toy/data", "models", "fitted", "reports")  # not in git; they may hold text
RUN = [task for task in TASKS if task not in ("cycle", "segment")]  # these need another method, and masks
STAGES = [(task, "toy-convirt-0") for task in RUN]
PLENTY = dict(epochs=1, min_steps=0, batch_size=8)


def edit(folder, change):
    "Change metadata.csv as a table"
    file = folder / "metadata.csv"
    change(pd.read_csv(file, dtype=str, keep_default_na=False)).to_csv(file, index=False)


def with_canary(table):
    "Reports with the word, and two questions about each image"
    words = [dict(question=f"Is it {CANARY}?", answer="yes"), dict(question="Which word?", answer=CANARY)]
    boxes = [dict(label="bright", box=[4, 4, 40, 40])]
    reports = {part: table[part].str.replace(".", f" {CANARY}.") for part in ("findings", "impression")}
    return table.assign(questions=json.dumps(words), boxes=json.dumps(boxes), **reports)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    tasks = {task: dict(data=["toy"], methods=["convirt"]) for task in RUN}
    for task in ("finetune", "report", "answer", "detect"):
        tasks[task] |= PLENTY
    project = ToyProject(tmp_path_factory.mktemp("canary"), tasks=tasks)
    edit(project.folder / "data", with_canary)
    return project


def run_all(project):
    "Every stage of the pipeline; what they print"
    said = project.run("medvlp.project.plan")
    for words in [("prepare", "toy"), ("corpus",), ("pretrain", "convirt-0"), *STAGES, ("figures",), ("scoreboard",)]:
        said += project.stage(*words)
    return said


def public_files(project):
    files = {p.relative_to(project.folder).as_posix(): p for p in project.folder.rglob("*") if p.is_file()}
    return {name: p for name, p in files.items() if not name.startswith(PRIVATE)}


@pytest.mark.slow
def test_the_pipeline_shows_no_text(project):
    said = run_all(project)
    assert re.search(r"scoreboard: \d+ s, executed copy", said) and CANARY not in said.lower()
    files = public_files(project)
    found = {name.split("/")[0] for name in files}
    assert {"plan", "prepared", "curves", "scores", "results", "corpus.json"} <= found
    assert "prepared/toy/manifest.json" in files and "prepared/toy/quarantine.csv" in files
    shown = [name for name, p in files.items() if CANARY.encode() in p.read_bytes().lower()]
    assert not shown


def insert_cell(project, stage, source):
    "An unexpected error: a cell before the last one"
    file = project.folder / f"nbs/stages/{stage}.ipynb"
    nb = read_nb(file)
    nb.cells.insert(len(nb.cells) - 1, mk_cell(source, id="broken"))
    write_nb(nb, file)


@pytest.mark.slow
def test_a_failing_stage_shows_no_text(project):
    project.change(pretrain=dict(learning_rate=1e30))
    project.run("medvlp.project.plan")
    said = project.stage("pretrain", "convirt-0", status=1)
    assert "is not finite" in said and "Traceback" not in said
    insert_cell(project, "evaluate", "report = studies['findings'][0]; assert report.isdigit()")
    failed = project.stage("evaluate", "toy-convirt-0", status=1)
    assert "failed in cell" in failed and CANARY not in (said + failed).lower()


@pytest.mark.parametrize("column", ["boxes", "questions", "study_id", "split", "view", "label_bright"])
def test_report_text_in_a_wrong_column_is_not_quoted(column, tmp_path, capsys):
    "As happens where a comma in a report stands without quotes"
    folder = write_studies(tmp_path / "data")
    edit(folder, with_canary)
    edit(folder, lambda t: t.assign(**{column: t.findings.where(t.index == 7, t[column])}))
    try:
        prepare(folder, tmp_path / "prepared")
    except StudyError as e:
        assert CANARY not in str(e).lower()
    assert CANARY not in "".join(capsys.readouterr()).lower()
