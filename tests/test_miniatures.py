"Every experiment on a public set, shrunk in sizes alone, on miniature trees in the official layouts: all its stages"

import json
from pathlib import Path

import pandas as pd
import pytest
from execnb.nbio import read_nb
from omegaconf import OmegaConf

from medvlp.data.tokens import train_tokenizer
from medvlp.project import plan
from medvlp.project.config import merge, read_experiment
from medvlp.project.stage import RUNNER
from medvlp.tasks.questions import read_answers
from miniatures import FINDINGS, WRITERS
from small import BERT, write_clip
from test_sources_labels import write_object_cxr, write_rsna, write_siim

ROOT = Path(__file__).parent.parent
BERT_4 = dict(BERT["options"], num_hidden_layers=4)  # aga averages four layers
VIT = dict(embed_dim=32, depth=1, num_heads=2)
PVT = dict(depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32], num_heads=[1, 1, 1, 1])
RESNET = dict(layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
SIZES = dict(  # of all of them
    compute=dict(device="cpu", precision="fp32", threads=1),
    pretrain=dict(
        text_encoder=dict(name=None, pretrained=False, options=BERT_4),
        image_encoder=dict(pretrained=False, image_size=64),
        vocab_size=100,
        max_tokens=24,
        batch_size=2,
        epochs=1,
    ),
    runs=dict(seeds=[0]),
    tasks=dict(
        evaluate=dict(n_resamples=20, probe=dict(subset_seeds=2)),
        finetune=dict(epochs=1, min_steps=0, batch_size=2, n_resamples=20),
        report=dict(
            epochs=1, min_steps=0, batch_size=2, max_tokens=12, hidden_size=32, layers=1, heads=2, n_resamples=20
        ),
        answer=dict(decoder=None, decoder_layers=1, epochs=1, min_steps=0, batch_size=2, n_resamples=20),
        detect=dict(epochs=1, min_steps=0, batch_size=2, n_resamples=20),
        segment=dict(epochs=1, min_steps=0, batch_size=2, n_resamples=20),
    ),
    figures=dict(samples=2, heatmaps=2, prototypes=2, reconstructions=1),
)
DECODERS = dict(decoder_dim=32, decoder_heads=2, decoder_layers=1)
RESNET_50 = dict(image_encoder=dict(pretrained=False, image_size=64, options=RESNET))
TINY_CLIP = dict(options=dict(teacher="clip"))  # in place of those on the hub
AMF = dict(
    pretrain=dict(image_encoder=dict(options=VIT)),
    methods={
        "amf": dict(options=dict(teacher="clip", dim=16, fusion_dim=24, heads=2, layers=1)),
        "amf-fused": dict(epochs=1),
    },
)
CYCLE = dict(
    vqgan=dict(image_size=64, channels=[8] * 5, layers=1, groups=4, n_codes=8, code_dim=4, steps=4, gan_start=2),
    codebook=dict(kappa2=4, patch_pixels=16, n_resamples=20),
    language=dict(name="", text_vocab=0, hidden_size=32, layers=1, epochs=1, context=256, bpe_vocab=300),
    compare=dict(niqe_patch=16, fid_splits=2, n_resamples=20),
    n_resamples=20,
)
PLACED = dict(rsna_pneumonia=write_rsna, siim_acr=write_siim, object_cxr=write_object_cxr)
PLACES = dict(
    pretrain=dict(data=["covid"]),
    methods=dict(
        mgca=dict(options=dict(n_prototypes=3)),
        mpma=dict(image_encoder=dict(image_size=64, options=VIT)),
        adamatch=dict(image_encoder=dict(image_size=64, options=PVT)),
    ),
    tasks=dict(detect=dict(data=["slake"]), segment=dict(data=["covid"])),
    figures=dict(data="covid"),
)
OWN_SIZES = {  # of each
    "mgca": dict(
        pretrain=dict(image_encoder=dict(options=VIT)),
        methods={
            "mgca": dict(options=dict(dim=16, n_prototypes=3)),
            "mgca-resnet50": RESNET_50,
            "untrained-resnet50": RESNET_50,
            "imagenet-resnet50": RESNET_50,
        },
    ),
    "aga": dict(
        pretrain=dict(image_encoder=dict(options=RESNET)),
        methods=dict(mgca=dict(options=dict(n_prototypes=3))),
    ),
    "mpma": dict(
        pretrain=dict(image_encoder=dict(options=VIT)),
        methods=dict(
            imagenet=dict(image_encoder=dict(pretrained=False, image_size=64, options=VIT)),
            mpma=dict(options=dict(heads=2, rows=16, slots=4, **DECODERS)),
        ),
    ),
    "adamatch": dict(
        pretrain=dict(image_encoder=dict(options=PVT)),
        methods=dict(adamatch=dict(options=dict(dim=24))),
    ),
    "cyclic": dict(
        pretrain=dict(image_encoder=dict(options=PVT)),
        methods=dict(adamatch=dict(options=dict(dim=24))),
        tasks=dict(cycle=CYCLE),
    ),
    "amf": AMF,
    "mimic-cxr": dict(pretrain=dict(image_encoder=dict(options=RESNET))),
    "amf-lambda": AMF,
    "amf-teachers": merge(AMF, dict(methods={f"amf-{name}": TINY_CLIP for name in ("clip", "pubmedclip")})),
    "covid-chestxray": dict(
        methods=dict(
            mgca=dict(options=dict(n_prototypes=3)),
            mpma=dict(image_encoder=dict(image_size=64, options=VIT)),
            adamatch=dict(image_encoder=dict(image_size=64, options=PVT)),
        ),
    ),
    "mgca-places": dict(
        methods={
            "mgca": dict(options=dict(dim=16, n_prototypes=3)),
            "mgca-resnet50": RESNET_50,
            "untrained-resnet50": RESNET_50,
            "imagenet-resnet50": RESNET_50,
        },
    ),
    "places": PLACES,
    "places-covid": PLACES,
    "covid-cyclic": merge(
        PLACES,
        dict(tasks=dict(cycle=merge(CYCLE, dict(data=["covid"])), detect=dict(data=[]), segment=dict(data=[]))),
    ),
    "questions": dict(methods=dict(mpma=dict(image_encoder=dict(image_size=64, options=VIT)))),
}


def public(name):
    "The public sets that an experiment names: {set: source}"
    data = read_experiment(ROOT / f"experiments/{name}.yaml")["data"]
    sources = {key: values.get("source", "imagefolder") for key, values in data.items()}
    return {key: source for key, source in sources.items() if source != "imagefolder"}


def shrunk(name):
    "An experiment with small encoders and budgets, as `dvc exp run -S` would change it"
    folders = dict(data={key: dict(folder=source, image_size=64) for key, source in public(name).items()})
    tree = OmegaConf.merge(read_experiment(ROOT / f"experiments/{name}.yaml"), SIZES, folders, OWN_SIZES[name])
    tree.data = {key: values for key, values in tree.data.items() if key in public(name)}
    return tree


def run(stage):
    "Execute a stage's notebook in this process"
    names = {}
    for cell in read_nb(ROOT / f"nbs/stages/{stage.stage}.ipynb").cells:
        if cell.cell_type == "code":
            source = f"run_name = {stage.run!r}" if "parameters" in cell.metadata.get("tags", []) else cell.source
            exec(source, names)


@pytest.fixture
def project(tmp_path, monkeypatch, one_meteor):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUNNER, "1")
    for name in ("nbs", "assets", "dvc.yaml"):
        Path(name).symlink_to(ROOT / name)
    for source, write in (WRITERS | PLACED).items():
        write(tmp_path / source)
    write_clip(tmp_path / "clip", train_tokenizer([*FINDINGS.values()], 60, 1))


def test_every_experiment_on_a_public_set_is_here():
    names = [file.stem for file in (ROOT / "experiments").glob("*.yaml")]
    assert {name for name in names if public(name)} == set(OWN_SIZES)


# the others share most stages
SLOW = ["adamatch", "aga", "mpma", "mimic-cxr", "amf-lambda", "amf-teachers", "covid-chestxray"]
SLOW += ["places", "places-covid", "covid-cyclic", "mgca-places"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in OWN_SIZES]
)
def test_an_experiment_runs_from_plan_to_scoreboard(name, project, capsys):
    OmegaConf.save(shrunk(name), "params.yaml")
    assert plan.main([]) == 0
    stages = plan.plan(plan.resolve())
    for stage in stages:
        run(stage)
    check_scores(name)
    if "mimic-cxr" in public(name):
        check_mimic_cxr(name, capsys.readouterr().out)
    if name == "amf":
        assert {stage.name for stage in stages} > {"pretrain@amf-0", "pretrain@clip-0", "fuse@amf-0"}
    for data, n in dict(vqa_rad=6, slake=10).items():
        for key in (key for key, source in public(name).items() if source == data):
            check_answers(name, key, n)


def check_scores(name):
    "Every task has a score of each method that the experiment names"
    scores = pd.concat(map(pd.read_csv, Path("scores", name).rglob("*.csv"))).dropna(subset="value")
    measured, tasks = scores.groupby("task").method.agg(set), shrunk(name).tasks
    if tasks.evaluate.data:
        assert all(measured[part] == set(tasks.evaluate.methods) for part in ("probe", "retrieval", "zero_shot"))
    trained = [task for task in ("finetune", "report", "answer", "detect", "segment") if tasks[task].data]
    assert all(measured[task] == set(tasks[task].methods) for task in trained)
    assert measured.get("reconstruction") == ({"mpma"} if "mpma" in tasks.evaluate.methods else None)
    assert Path(f"results/{name}.md").is_file()


def check_mimic_cxr(name, out):
    "What was prepared, and what was trained on"
    manifest = json.loads(Path("prepared/mimic-cxr/manifest.json").read_text())
    assert manifest["label_policy"] == dict(blank="absent", uncertain="dropped")
    n = 5 + (not shrunk(name).data["mimic-cxr"]["views"])  # an experiment that reads all views has the lateral one too
    counts = manifest["splits"]["train"], manifest["sections"]["train"]
    assert counts == (dict(studies=n, patients=5, pairs=n), dict(findings=4, impression=n))
    assert f"{4 if name == 'aga' else n} pairs to train on" in out


def check_answers(name, data, n):
    "Every test question has its answers"
    for method in shrunk(name).tasks.answer.methods:
        answered = read_answers(f"fitted/{name}/answer/{data}-{method}-0")
        ways = ["given", "blind", "shuffled"]
        ways += ["given (free)", "given (constrained)"] if method.endswith("-fused") else []  # which have a decoder
        assert len(answered) == n and answered[ways].notna().all(axis=None)
        if shrunk(name).tasks.answer.get("candidates") == "test":
            assert set(answered.given) <= set(answered.answer)
