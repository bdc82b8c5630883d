"The experiments of the papers, shrunk in sizes alone, on a tree of five studies a split in MIMIC-CXR's layout"

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from execnb.nbio import read_nb
from omegaconf import OmegaConf
from PIL import Image

from medvlp.data.tokens import train_tokenizer
from medvlp.project import plan
from medvlp.project.config import read_experiment
from medvlp.project.stage import RUNNER
from medvlp.tasks.questions import read_answers
from small import BERT, write_clip

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


ASKED = [("Is the heart large?", ["Yes", "No"], "CLOSED"), ("Where is it?", ["left lung", "right lung"], "OPEN")]


def questions(i, **form):
    "Questions about an image, an open one and a closed one"
    return [dict(question=q, answer=answers[i % 2], answer_type=kind) | form for q, answers, kind in ASKED]


def picture(path, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (72, 80), np.uint8)).save(path)


def write_vqa_rad(folder):
    "Six images with training questions, and three with test questions"
    for part, numbers in dict(trainset=range(6), testset=range(6, 9)).items():
        names = {i: f"synpic{i}.jpg" for i in numbers}
        form = dict(question_type="PRES", image_organ="CHEST")
        rows = [row for i, name in names.items() for row in questions(i, image_name=name, **form)]
        write(folder / f"{part}.json", json.dumps(rows))
        for i, name in names.items():
            picture(folder / "images" / name, i)


def write_slake(folder):
    "Five images a split, each with a box, and with a question in Chinese beside those in English"
    form = dict(content_type="Abnormality", location="Lung", modality="X-Ray")
    for start, part in enumerate(("train", "validate", "test")):
        rows = []
        for i in range(5 * start, 5 * start + 5):
            about = dict(form, img_name=f"xmlab{i}/source.jpg")
            rows += [*questions(i, q_lang="en", **about), *questions(i, q_lang="zh", **about)[:1]]
            picture(folder / "imgs" / f"xmlab{i}" / "source.jpg", i)
            write(folder / "imgs" / f"xmlab{i}" / "detection.json", json.dumps([{"Left Lung": [5, 5, 30, 40]}]))
        write(folder / f"{part}.json", json.dumps(rows))


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
    amf=dict(
        data={name: dict(folder=name, image_size=64) for name in ("vqa-rad", "slake")},
        pretrain=dict(image_encoder=dict(options=VIT)),
        methods={
            "amf": dict(options=dict(teacher="clip", dim=16, fusion_dim=24, heads=2, layers=1)),
            "amf-fused": dict(epochs=1),
        },
        tasks=dict(answer=dict(decoder=None, decoder_layers=1, epochs=1, min_steps=0, batch_size=2, n_resamples=20)),
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
    write_vqa_rad(tmp_path / "vqa-rad")
    write_slake(tmp_path / "slake")
    write_clip(tmp_path / "clip", train_tokenizer([*FINDINGS.values()], 60, 1))


@pytest.mark.parametrize("name", OWN_SIZES)
def test_an_experiment_runs_from_plan_to_scoreboard(name, project, capsys):
    OmegaConf.save(shrunk(name), "params.yaml")
    assert plan.main([]) == 0
    stages = plan.plan(plan.resolve())
    for stage in stages:
        run(stage)
    manifest, out = json.loads(Path("prepared/mimic-cxr/manifest.json").read_text()), capsys.readouterr().out
    assert manifest["label_policy"] == dict(blank="absent", uncertain="dropped")
    laterals = name in ("aga", "adamatch", "amf")  # which read all views
    counts = manifest["splits"]["train"], manifest["sections"]["train"]
    n = 5 + laterals
    assert counts == (dict(studies=n, patients=5, pairs=n), dict(findings=4, impression=n))
    assert f"{4 if name == 'aga' else n} pairs to train on" in out
    scores = pd.concat(map(pd.read_csv, Path("scores", name).rglob("*.csv"))).dropna(subset="value")
    measured, tasks = scores.groupby("task").method.agg(set), shrunk(name).tasks
    assert all(measured[part] == set(tasks.evaluate.methods) for part in ("probe", "retrieval", "zero_shot"))
    trained = [task for task in ("finetune", "report", "answer") if tasks[task].data]
    assert all(measured[task] == set(tasks[task].methods) for task in trained)
    assert measured.get("reconstruction") == ({"mpma"} if name == "mpma" else None)
    assert Path(f"results/{name}.md").is_file()
    if name == "amf":
        assert {stage.name for stage in stages} > {"pretrain@amf-0", "pretrain@clip-0", "fuse@amf-0"}
        for data, n in (("vqa-rad", 6), ("slake", 10)):
            answered = read_answers(f"fitted/amf/answer/{data}-amf-fused-0")
            ways = ["given", "given (free)", "given (constrained)", "blind", "shuffled"]
            assert len(answered) == n and answered[ways].notna().all(axis=None)
            assert set(answered.given) <= set(answered.answer)  # the candidates are the test answers
