"The experiments of the papers, shrunk in sizes alone, on a tree of five studies a split in MIMIC-CXR's layout"

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from execnb.nbio import read_nb
from omegaconf import OmegaConf
from PIL import Image

from medvlp.project import plan
from medvlp.project.config import read_experiment
from medvlp.project.stage import RUNNER
from small import BERT

ROOT = Path(__file__).parent.parent
FINDINGS = {
    "Atelectasis": "There is mild atelectasis at the left base.",
    "Cardiomegaly": "The heart is enlarged.",
    "Consolidation": "Consolidation in the right lower lobe.",
    "Edema": "Mild pulmonary edema.",
    "Pleural Effusion": "Small left pleural effusion.",
}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_mimic(folder):
    "Five patients a split, with a study of one finding each; that of edema has two views and no findings section"
    images, labels = [], []
    for i, (name, sentence) in enumerate([*FINDINGS.items()] * 3):
        patient, study, split = f"10{i:06}", f"50{i:06}", ["train", "validate", "test"][i // 5]
        report = folder / f"files/p10/p{patient}/s{study}.txt"
        findings = f" FINDINGS:\n {sentence} No pneumothorax.\n\n" if name != "Edema" else ""
        write(report, f" FINAL REPORT\n INDICATION: ___ with cough.\n\n{findings} IMPRESSION:  {name} is seen today.\n")
        for view in ["PA", "LATERAL"] if name == "Edema" else ["AP"]:
            dicom = f"{i:04}-{view.lower()}"
            pixels = np.random.default_rng(i).integers(0, 99, (72, 80)) + 30 * (i % 5)
            report.with_suffix("").mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(report.with_suffix("") / f"{dicom}.jpg")
            images.append(dict(dicom_id=dicom, study_id=study, subject_id=patient, split=split, ViewPosition=view))
        cells = {other: "" for other in FINDINGS} | {name: "1.0", "Pneumothorax": "0.0"}
        labels.append(dict(subject_id=patient, study_id=study) | cells)
    images = pd.DataFrame(images)
    images.drop(columns="ViewPosition").to_csv(folder / "mimic-cxr-2.0.0-split.csv", index=False)
    images[["dicom_id", "ViewPosition"]].to_csv(folder / "mimic-cxr-2.0.0-metadata.csv", index=False)
    pd.DataFrame(labels).to_csv(folder / "mimic-cxr-2.0.0-chexpert.csv.gz", index=False)


BERT_4 = dict(BERT["options"], num_hidden_layers=4)  # aga averages four layers
VIT = dict(embed_dim=32, depth=1, num_heads=2)
PVT = dict(depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32], num_heads=[1, 1, 1, 1])
RESNET = dict(layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
SIZES = dict(  # of all of them
    compute=dict(device="cpu", precision="fp32", threads=1),
    data={"mimic-cxr": dict(folder="mimic", image_size=64)},
    pretrain=dict(
        text_encoder=dict(name=None, pretrained=False, options=BERT_4),
        image_encoder=dict(pretrained=False, image_size=64),
        vocab_size=100,
        max_tokens=24,
        batch_size=2,
        epochs=1,
    ),
    tasks=dict(
        evaluate=dict(n_resamples=20, probe=dict(subset_seeds=2)),
        finetune=dict(epochs=1, min_steps=0, batch_size=2, n_resamples=20),
        report=dict(epochs=1, batch_size=2, max_tokens=12, hidden_size=32, layers=1, heads=2, n_resamples=20),
    ),
    figures=dict(samples=2, heatmaps=2, prototypes=2, reconstructions=1),
)
DECODERS = dict(decoder_dim=32, decoder_heads=2, decoder_layers=1)
RESNET_50 = dict(image_encoder=dict(pretrained=False, image_size=64, options=RESNET))
OWN_SIZES = dict(  # of each
    mgca=dict(
        pretrain=dict(image_encoder=dict(options=VIT)),
        methods={
            "mgca": dict(options=dict(dim=16, n_prototypes=3)),
            "mgca-resnet50": RESNET_50,
            "untrained-resnet50": RESNET_50,
            "imagenet-resnet50": RESNET_50,
        },
    ),
    aga=dict(
        pretrain=dict(image_encoder=dict(options=RESNET)),
        methods=dict(mgca=dict(options=dict(n_prototypes=3))),
    ),
    mpma=dict(
        pretrain=dict(image_encoder=dict(options=VIT)),
        methods=dict(
            imagenet=dict(image_encoder=dict(pretrained=False, image_size=64, options=VIT)),
            mpma=dict(options=dict(heads=2, rows=16, slots=4, **DECODERS)),
        ),
    ),
    adamatch=dict(
        pretrain=dict(image_encoder=dict(options=PVT)),
        methods=dict(adamatch=dict(options=dict(dim=24))),
    ),
)


def shrunk(name):
    "An experiment with small encoders and budgets, as `dvc exp run -S` would change it"
    return OmegaConf.merge(read_experiment(ROOT / f"experiments/{name}.yaml"), SIZES, OWN_SIZES[name])


def run(stage):
    "Execute a stage's notebook in this process"
    names = {}
    for cell in read_nb(ROOT / f"nbs/stages/{stage.stage}.ipynb").cells:
        if cell.cell_type == "code":
            source = f"run_name = {stage.run!r}" if "parameters" in cell.metadata.get("tags", []) else cell.source
            exec(source, names)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUNNER, "1")
    for name in ("nbs", "assets", "dvc.yaml"):
        Path(name).symlink_to(ROOT / name)
    write_mimic(tmp_path / "mimic")


@pytest.mark.parametrize("name", OWN_SIZES)
def test_an_experiment_runs_from_plan_to_scoreboard(name, project, capsys):
    OmegaConf.save(shrunk(name), "params.yaml")
    assert plan.main([]) == 0
    stages = plan.plan(plan.resolve())
    for stage in stages:
        run(stage)
    manifest, out = json.loads(Path("prepared/mimic-cxr/manifest.json").read_text()), capsys.readouterr().out
    assert manifest["label_policy"] == dict(blank="absent", uncertain="dropped")
    laterals = name in ("aga", "adamatch")  # which read all views
    counts = manifest["splits"]["train"], manifest["sections"]["train"]
    n = 5 + laterals
    assert counts == (dict(studies=n, patients=5, pairs=n), dict(findings=4, impression=n))
    assert f"{4 if name == 'aga' else n} pairs to train on" in out
    scores = pd.concat(map(pd.read_csv, Path("scores", name).rglob("*.csv"))).dropna(subset="value")
    measured, tasks = scores.groupby("task").method.agg(set), shrunk(name).tasks
    assert all(measured[part] == set(tasks.evaluate.methods) for part in ("probe", "retrieval", "zero_shot"))
    assert all(measured[task] == set(tasks[task].methods) for task in ("finetune", "report"))
    assert measured.get("reconstruction") == ({"mpma"} if name == "mpma" else None)
    assert Path(f"results/{name}.md").is_file()
