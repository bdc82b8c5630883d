"The page nbs/own_method.ipynb, followed to the letter in a copy of the project: the new method trains, and loads"

import os, re, shutil, subprocess, sys
from pathlib import Path
from execnb.nbio import mk_cell, new_nb, read_nb, write_nb
from ruamel.yaml import YAML
from small import prepare, write_studies

ROOT = Path(__file__).parent.parent
TINY = dict(
    image_encoder="{name: resnet10t, image_size: 32}",
    text_encoder="{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}",
    vocab_size=100,
    epochs=2,
    batch_size=8,
    checkpoint_steps=0,
    log_steps=1,
    device="cpu",
    precision="fp32",
    workers=0,
    seed=0,
    prepared="prepared",
    output="models/sigmoid-0",
    curves="curves/sigmoid-0",
    checkpoints="checkpoints",
)


def blocks(language):
    "The page's fenced blocks of a language (several languages: in their order), as (language, text)"
    text = "\n\n".join(
        "".join(c.source) for c in read_nb(ROOT / "nbs/own_method.ipynb").cells if c.cell_type == "markdown"
    )
    return re.findall(rf"```({language})\n(.*?)\n```", text, re.DOTALL)


def merge(old, new):
    "`new` put into `old`: sections joined, lists appended"
    if isinstance(old, list):
        return old + new
    return {**old, **{k: merge(old[k], v) if k in old else v for k, v in new.items()}} if isinstance(old, dict) else new


def test_the_page_makes_a_method(tmp_path):
    def run(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=dict(os.environ, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1"),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name in ("nbs", "medvlp", "ablations"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "models", "curves", "reports"),
        )
    for name in ("settings.ini", "setup.py", "pyproject.toml", "params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)

    cells = [
        mk_cell(text, "markdown" if language == "markdown" else "code", id=f"c{i}")
        for i, (language, text) in enumerate(blocks("python|markdown"))
    ]
    notebook = tmp_path / "nbs/6_methods/99_sigmoid.ipynb"
    write_nb(new_nb(cells), notebook)
    run("-c", f"from nbdev.export import nb_export; nb_export({str(notebook)!r})")
    assert (tmp_path / "medvlp/methods/sigmoid.py").is_file()

    yaml = YAML(typ="safe", pure=True)
    params = yaml.load((tmp_path / "params.yaml").read_text())
    for _, text in blocks("yaml"):
        params = merge(params, yaml.load(text))
    with open(tmp_path / "params.yaml", "w") as f:
        yaml.dump(params, f)
    run("-m", "medvlp.project.stage", "--check", "--code", "code")
    behind = {f.stem for f in (tmp_path / "code").rglob("*.txt") if "methods/sigmoid.py" in f.read_text()}
    assert "pretrain@sigmoid-0" in behind and all(
        "@sigmoid-" in stage for stage in behind
    )  # no other run depends on it

    prepare(write_studies(tmp_path / "data"), tmp_path / "prepared")
    run(
        "-m",
        "medvlp.project.stage",
        "nbs/stages/pretrain.ipynb",
        "reports/pretrain.ipynb",
        "--sections",
        "reports",
        "compute",
        "pretrain",
        "methods.sigmoid",
        *(word for k, v in TINY.items() for word in ("--set", f"{k}={v}")),
    )
    assert len((tmp_path / "curves/sigmoid-0/plots/metrics/train/pairs.tsv").read_text().splitlines()) > 2

    cells = [
        c.source for c in cells if c.cell_type == "code" and "#| export" not in c.source
    ]  # the notebook's own tests, on what was exported
    loads = "from medvlp.methods.base import load_method; m = load_method('models/sigmoid-0'); assert m.config.dim == 128 and abs(m.bias.item() + 10) > 1e-6, m.bias"
    run("-c", "\n".join(["import math, torch; from medvlp.methods.sigmoid import *", *cells, loads]))
