"Sets that are small, bare or written in an unusual way: each figure is drawn, or a sentence says why not"

import json
import warnings

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch

from medvlp.data.prepare import png, study_features
from medvlp.data.tokens import train_tokenizer
from medvlp.figures.answers import answer_examples, answer_gates, answer_regions
from medvlp.figures.answers import plot_answer_regions, plot_answers, plot_gates
from medvlp.figures.sheets import Run, all_figures
from medvlp.figures.style import FigureOptions, cut_off_texts, overlapping_texts
from medvlp.generation.answerer import build_answerer
from medvlp.methods.base import build_method
from small import BERT, MPMA, RESNET, VIT

REPORT = "Film {}. A large pleural effusion. No nodule."
LONG = "THE LUNGS SHOW NO CHANGE COMPARED WITH ____________________ AND COST 3 $ OR $ 4 " * 6
NAME = "enlarged cardiomediastinal silhouette (on the follow-up film, not confirmed) "
OPTIONS = FigureOptions(samples=3, heatmaps=2, prototypes=1, reconstructions=1)
CROWDED = {"long words, reports and names", "Chinese", "wide and high images"}  # their texts are measured


def study(i, report=REPORT, labels={"effusion": 1}, box="effusion", split="test", patient=None, size=(36, 36)):
    image = png(PIL.Image.fromarray(np.random.default_rng(i).integers(0, 255, size, np.uint8)))
    names = dict(study_id=str(i), patient_id=patient or f"p{i}", view="PA", split=split)
    boxes = [dict(label=box, box=[0.3, 0.3, 0.7, 0.7])] if box else []
    text = dict(findings=report.format(i), impression="", paired=bool(report))
    return names | text | dict(image=image, mask=None, boxes=boxes, questions=[], labels=labels)


def both(i):
    return {"effusion": [1, 0, -1, None][i % 4], "nodule": [1, 1, 0, None][i % 4]}


SETS = {
    "one study": [study(0)],
    "four studies": [study(i) for i in range(4)],
    "five studies": [study(i) for i in range(5)],
    "one patient": [study(i, patient="ann") for i in range(7)],
    "labels unknown": [study(i, labels={"effusion": None}) for i in range(6)],
    "uncertain, several and unknown labels": [study(i, labels=both(i)) for i in range(8)],
    "no reports": [study(i, report="") for i in range(6)],
    "no reports, boxes and labels": [study(i, report="", box="", labels={}) for i in range(6)],
    "boxes of something else": [study(i, box="left_lung") for i in range(6)],
    "no test studies": [study(i, split="train") for i in range(6)],
    "no finding in the reports": [study(i, report="Film 12 of 30.") for i in range(6)],
    "numbers for reports": [study(i, report="1 2 3 4") for i in range(6)],
    "long words, reports and names": [
        study(i, f"{LONG} pleural effusion {LONG}", {f"{NAME} {k}": int(k <= i) for k in range(14)}, f"_{NAME} {i}")
        for i in range(6)
    ],
    "Chinese": [study(i, "右侧胸腔积液 effusion " + "肺部有积液" * 30, {"胸腔积液": 1}, "胸腔积液") for i in range(6)],
    "wide and high images": [study(i, size=[(36, 120), (120, 36)][i % 2]) for i in range(6)],
    "equal images": [study(0) | dict(study_id=str(i)) for i in range(6)],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tok = train_tokenizer([REPORT.format(i) for i in range(3)], vocab_size=120)
    methods = dict(mgca=(RESNET, dict(n_prototypes=4, token_weights="uniform")), mpma=(VIT, MPMA))
    for name, (image, options) in methods.items():
        torch.manual_seed(0)
        build_method(name, image, BERT, len(tok), dim=16, **options).save_pretrained(folder / name)
        tok.save_pretrained(folder / name)
    return [Run(f"{name}-0", name, 0, str(folder / name), str(folder / "none"), max_tokens=400) for name in methods]


def figures_of(name, runs, folder):
    "{figure: sentence, or None where it is drawn}, each figure checked"
    labels = list(SETS[name][0]["labels"])
    rows = [row if labels else {k: v for k, v in row.items() if k != "labels"} for row in SETS[name]]
    datasets.Dataset.from_list(rows, features=study_features(labels)).save_to_disk(folder)
    title = f"a set of {name}" if "long" not in name else NAME * 4
    (folder / "manifest.json").write_text(
        json.dumps(dict(title=title, labels={}, label_policy=dict(blank="unknown", uncertain="dropped")))
    )
    found = {}
    for figure, fig in all_figures(runs, folder, OPTIONS):
        if name in CROWDED:
            assert (overlapping_texts(fig), cut_off_texts(fig)) == ([], []), figure
        else:
            fig.draw_without_rendering()
        images = any(ax.has_data() for ax in fig.axes)
        found[figure] = None if images else " ".join(t.get_text() for ax in fig.axes for t in ax.texts)
        assert images or found[figure], f"{figure} is empty"
        plt.close(fig)
    return found


@pytest.mark.parametrize("name", SETS)
def test_every_figure_is_drawn_or_explained(name, runs, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        found = figures_of(name, runs, tmp_path)
    assert {"samples", "tsne", "curves", "clusters-mgca", "prototypes-mgca", "reconstruction-mpma"} <= set(found)
    assert "words" in found or {"words-mgca", "words-mpma"} <= set(found)
    drawn = {figure for figure, sentence in found.items() if not sentence}
    assert {"samples", "prototypes-mgca", "reconstruction-mpma"} <= drawn
    assert ("tsne" in drawn) == (len(SETS[name]) >= 5)


ASKED = {  # question, reference, answer given
    "one word": ("Why?", "left", "left"),
    "long words": ("Pneumonoultramicroscopicsilicovolcanoconiosis costs 3 $? " * 9, "opacity " * 40, "no " * 60),
    "no spaces": ("_" * 300, "x" * 300, "y" * 300),
    "Chinese": ("图像中有哪些异常？" * 9, "胸腔积液" * 9, "肺部" * 30),
    "no answer": ("Is it $x?", "yes", ""),
    "all": None,
}


@pytest.fixture(scope="module")
def asked():
    "A model with a co-attention and a gate, a study for each question, and the questions"
    rows = [asked for asked in ASKED.values() if asked]
    table = pd.DataFrame(rows, columns=["question", "answer", "given"]).assign(kind="other", closed=False)
    table = table.assign(study=range(len(table)), patient_id="ann")
    tok, answers = train_tokenizer([*table.question, *table.answer], vocab_size=200), sorted({*table.answer})
    torch.manual_seed(0)
    method, fusion = build_method("convirt", VIT, BERT, len(tok), dim=16), dict(kind="co_attention", dim=32, layers=1)
    studies = datasets.Dataset.from_list([study(i) for i in table.study], features=study_features(["effusion"]))
    return build_answerer(method, tok, answers, max_answer_tokens=400, max_tokens=32, **fusion).eval(), studies, table


@pytest.mark.parametrize("name", ASKED)
def test_answers_with_odd_words(name, asked):
    model, studies, table = asked
    table = table if name == "all" else table[table.question == ASKED[name][0]]
    drawn = [(answer_examples, plot_answers), (answer_regions, plot_answer_regions), (answer_gates, plot_gates)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        for find, plot in drawn:
            found = find(model, studies, table)
            fig = plot(found, title=NAME * (name != "one word"))
            assert (overlapping_texts(fig), cut_off_texts(fig)) == ([], []), plot.__name__
            plt.close(fig)
    assert all(len(e["words"]) == len(e["gates"]) for e in found)
