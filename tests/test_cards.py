"Data cards, the counts of a manifest behind them, and leaks between sets"

import json
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest

from medvlp.data.prepare import DataOptions, find_set_leaks, leak_text, policy_text, prepare, read_manifest
from medvlp.figures.card import data_card
from medvlp.figures.style import cut_off_texts, overlapping_texts, save
from small import write_studies

DATASETS = Path(__file__).parent.parent.parent / "shared" / "datasets"


def prepared(folder, output, change=lambda table: table, **options):
    "The manifest of small.write_studies with a changed table"
    file = write_studies(folder) / "metadata.csv"
    change(pd.read_csv(file, dtype=str)).to_csv(file, index=False)
    return prepare(DataOptions(folder=str(folder), image_size=40, **options), output)


def well_laid_out(folder):
    fig = data_card(folder)
    assert not overlapping_texts(fig) and not cut_off_texts(fig)
    return fig


def words(fig):
    return [text.get_text() for ax in fig.axes for text in (ax.title, *ax.texts)]


# ---- the manifest


def test_counts_by_view_reason_and_label(tmp_path):
    def change(t):
        t.loc[:2, "findings"], t.loc[:2, "impression"], t.loc[:9, "view"] = "", ["", "Grey.", "A fog"], "AP"
        return t.assign(label_bright=t.label_bright.where(t.index % 4 > 0, "-1"))

    manifest = prepared(tmp_path / "data", tmp_path / "set", change, label_policy=dict(uncertain="positive"))
    assert manifest["views"] == dict(test={"PA": 8}, train={"PA": 22, "AP": 10}, val={"PA": 8})
    assert manifest["quarantine_reasons"] == dict(pairs={"report of N words, N are needed": 3})
    assert policy_text(manifest) == "a blank label is unknown, an uncertain one is counted as present"
    assert manifest["licence"] == "" and set(manifest["versions"]) == {"datasets", "pillow"}
    well_laid_out(tmp_path / "set")


def test_the_fingerprint_is_one_of_content(tmp_path):
    first, again = (prepared(tmp_path / name / "data", tmp_path / name / "set") for name in "ab")
    other = prepared(tmp_path / "c" / "data", tmp_path / "c" / "set", lambda t: t.assign(view="AP"))
    assert first["fingerprint"] == again["fingerprint"] != other["fingerprint"]
    assert (tmp_path / "a/set/grids.npy").read_bytes() == (tmp_path / "b/set/grids.npy").read_bytes()


# ---- leaks between sets


def write_pictures(folder, seeds, split, reports, suffix="png", size=(120, 100)):
    "Textures, the same for the same seed"
    folder.mkdir()
    for i, seed in enumerate(seeds):
        grid = np.random.default_rng(seed).integers(0, 256, (10, 12)).astype(np.uint8)
        picture = PIL.Image.fromarray(grid).resize(size, PIL.Image.Resampling.BICUBIC)
        picture.save(folder / f"{i}.{suffix}")
    table = dict(file_name=[f"{i}.{suffix}" for i in range(len(seeds))], patient_id=range(len(seeds)))
    pd.DataFrame(table | dict(findings=reports, split=split)).to_csv(folder / "metadata.csv", index=False)
    output = folder.with_name(f"{folder.name}-set")
    prepare(DataOptions(folder=str(folder), image_size=40), output)
    return output


def test_leaks_between_collections(tmp_path):
    reports = ["The lungs are clear.", "A large nodule is seen.", "Fluid on the left."]
    a = write_pictures(tmp_path / "a", [0, 1, 2], ["train", "train", "val"], reports)
    other = ["THE LUNGS  are clear.", "Two large nodules.", "Fluid on the left."]
    b = write_pictures(tmp_path / "b", [5, 1, 2], "test", other, "jpg", (300, 250))
    found = find_set_leaks(dict(a=a, b=b), ["a"])
    one_of_three = {"test of b in train of a": dict(shared=1, of=3)}
    assert found == dict(pictures=one_of_three, texts=one_of_three)
    assert leak_text(found)[0] == "nearly identical pictures in two splits: 1 of 3 in test of b are also in train of a"
    assert find_set_leaks(dict(a=a, b=b), ["b"]) == find_set_leaks(dict(a=a), ["a"]) == dict(pictures={}, texts={})


# ---- cards


def test_no_text_of_a_report_or_question_is_on_the_card(tmp_path):
    asked = json.dumps([dict(question="Is it qzcanary?", answer="qzcanary", answer_type="open")])
    prepared(tmp_path / "data", tmp_path / "set", lambda t: t.assign(findings="A qzcanary is seen.", questions=asked))
    assert "qzcanary" not in " ".join(words(well_laid_out(tmp_path / "set")))


def test_the_same_set_gives_the_same_bytes(tmp_path):
    prepared(tmp_path / "data", tmp_path / "set")
    one, two = (save(data_card(tmp_path / "set"), tmp_path / f"{i}.png").read_bytes() for i in range(2))
    assert one == two


LONG = "a name that is much longer than any column of a table could ever be in print, and longer"
ODD = {
    "no labels and no reports": lambda t: t.drop(columns=["label_bright", "findings", "impression"]).assign(
        questions=json.dumps([dict(question="?", answer="yes")])
    ),
    "one split": lambda t: t.assign(split="train"),
    "long names": lambda t: t.rename(columns=dict(label_bright=f"label_{LONG}")).assign(view=LONG),
    "sixty labels and views": lambda t: t.assign(view=t.index, **{f"label_{i}": "1" for i in range(60)}),
    "thirty kinds of boxes": lambda t: t.assign(
        boxes=[json.dumps([dict(label=f"{i % 30} {LONG}", box=[0, 0, 20 + i % 20, 30])]) for i in t.index]
    ),
    "thirty kinds of questions": lambda t: t.assign(
        questions=[
            json.dumps([dict(question="?", answer="$x_$", question_type=f"{i % 30} {LONG}", organ=f"${i}_$")])
            for i in t.index
        ]
    ),
    "marks of mathematics": lambda t: t.rename(columns=dict(label_bright="label_$x_$")).assign(view="$y^$"),
    "a single study": lambda t: t.head(1),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_sets_have_a_card_without_overlaps(kind, tmp_path):
    prepared(tmp_path / "data", tmp_path / "set", ODD[kind], title=LONG * 3)
    well_laid_out(tmp_path / "set")


@pytest.mark.parametrize("source, folder", [("slake", "slake"), ("vqa_rad", "vqa-rad")])
@pytest.mark.slow
def test_cards_of_public_sets(source, folder, tmp_path):
    if not (DATASETS / folder).is_dir():
        pytest.skip(f"no {folder} in ../shared/datasets")
    prepare(DataOptions(source=source, folder=str(DATASETS / folder), image_size=64), tmp_path / "set")
    fig = well_laid_out(tmp_path / "set")
    questions = sum(read_manifest(tmp_path / "set")["questions"].values())
    assert f"{questions:,}" in words(fig)
