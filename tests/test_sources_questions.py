"Sets of questions, and those of COVID-19, in miniature: whole, in other encodings, and damaged at random places"

import random
from collections import Counter
from pathlib import Path

import pytest

from medvlp.data.prepare import DataOptions, prepare_studies
from medvlp.data.sources.base import read_source
from medvlp.data.studies import StudyError, check_studies
from miniatures import WRITERS

SHARED = Path(__file__).parents[2] / "shared/datasets"
SIZES = dict(mimic_cxr=18, covid_chestxray=20, vqa_rad=9, slake=15, hannover_covid=4, pathvqa=6, vqa_med_2019=6)
TABLES = "*.csv", "*.csv.gz", "*.json", "*.txt"


@pytest.fixture(params=WRITERS)
def tree(request, tmp_path):
    "The name of a source and its miniature"
    WRITERS[request.param](tmp_path)
    return request.param, tmp_path


def prepared(name, folder, **options):
    return prepare_studies(
        read_source(name, folder), DataOptions(source=name, folder=str(folder), image_size=32, **options)
    )


def test_a_miniature_is_read_and_prepared_whole(tree):
    name, folder = tree
    studies = check_studies(read_source(name, folder))
    assert len(studies) == SIZES[name] and set(studies.split) <= {"train", "val", "test"}
    assert studies.attrs["title"] and studies.attrs["licence"]
    assert all(Path(image).is_file() for image in studies.image)
    kept, _ = prepared(name, folder)
    assert kept["study_id"][:] == studies.study_id.tolist()


def test_a_lost_image_and_a_broken_one_cost_their_studies_alone(tree):
    name, folder = tree
    lost, broken, *kept = read_source(name, folder).itertuples()
    Path(lost.image).unlink()
    Path(broken.image).write_bytes(Path(broken.image).read_bytes()[:300])
    found, quarantine = prepared(name, folder, max_quarantine=0.7)
    assert found["study_id"][:] == [study.study_id for study in kept]
    rows = quarantine.frame()
    reasons = rows[rows.field == "image"].set_index("study_id").reason
    assert reasons[lost.study_id] == "no such file" and "decoded" in reasons[broken.study_id]


def damaged(data, rng):
    "A file cut off, with other bytes in it, with a piece missing, or empty"
    i = rng.randrange(len(data))
    way = rng.randrange(4)
    if way == 0:
        return data[:i]
    if way == 1:
        return data[:i] + rng.randbytes(3) + data[i + 3 :]
    return data[:i] + data[i + rng.randrange(1, 30) :] if way == 2 else data[i : i + 1]


def test_a_damaged_table_is_an_error_or_is_read(tree):
    "40 times each: `StudyError` in one line that names a file of the set, or a table that the checks accept or refuse"
    name, folder = tree
    rng, refused = random.Random(name), 0
    files = sorted(path for pattern in TABLES for path in folder.rglob(pattern))
    for _ in range(40):
        path = rng.choice(files)
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng))
        try:
            check_studies(read_source(name, folder))
        except StudyError as e:
            refused += 1
            assert str(folder) in str(e) and "\n" not in str(e), str(e)
        path.write_bytes(whole)
    assert refused


def test_a_missing_table_is_named(tree):
    name, folder = tree
    for pattern in ("*.csv", "*.json", "C*.txt", "VQA*.txt"):
        for path in folder.rglob(pattern):
            if path.name == "splits.csv":  # covid-chestxray may lack it
                continue
            whole = path.read_bytes()
            path.unlink()
            with pytest.raises(StudyError, match=path.name.replace(".", r"\.")):
                read_source(name, folder)
            path.write_bytes(whole)


@pytest.mark.parametrize("name", ["vqa_rad", "slake", "pathvqa"])
def test_json_in_other_encodings(name, tmp_path):
    WRITERS[name](tmp_path)
    before = read_source(name, tmp_path)
    for encoding in ("utf-8-sig", "utf-16"):
        for path in tmp_path.glob("*.json"):
            path.write_bytes(path.read_text(encoding="utf-8-sig").encode(encoding))
        assert read_source(name, tmp_path).equals(before)
        for path in tmp_path.glob("*.json"):
            path.write_bytes(path.read_text(encoding=encoding).encode())


def test_lines_as_windows_writes_them(tmp_path):
    WRITERS["vqa_med_2019"](tmp_path)
    before = read_source("vqa_med_2019", tmp_path)
    for path in tmp_path.rglob("*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert read_source("vqa_med_2019", tmp_path).equals(before)
    assert [len(q) for q in before.questions] == [4, 4, 4, 4, 1, 1]
    assert before.questions[4][0]["answer"] == "cta"  # of two accepted answers


def test_outcomes_that_nobody_recorded_count_as_absent(tmp_path):
    WRITERS["hannover_covid"](tmp_path)
    kept, _ = prepared("hannover_covid", tmp_path)
    labels = {name: [row["labels"][name] for row in kept] for name in kept[0]["labels"]}
    assert labels == dict(covid19=[1, 1, 1, 1], died=[1, 0, 0, 0], icu=[1, 1, 0, 0])


@pytest.mark.parametrize("cell", ["soon", "nan", "inf", "1 day"])
def test_days_are_a_number(cell, tmp_path):
    WRITERS["hannover_covid"](tmp_path)
    path = tmp_path / "data.csv"
    path.write_text(path.read_text().replace("7.0", cell))
    with pytest.raises(StudyError, match=f"data.csv, line 2, death_offset is '{cell}'. Give a number of days"):
        read_source("hannover_covid", tmp_path)


def test_pickles_are_not_opened(tmp_path):
    WRITERS["pathvqa"](tmp_path)
    (tmp_path / "pathvqa_val.json").unlink()
    (tmp_path / "pvqa/qas").mkdir(parents=True)
    (tmp_path / "pvqa/qas/val_vqa.pkl").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(StudyError, match="pathvqa_val.json: no such file. .*val_vqa.pkl is a pickle"):
        read_source("pathvqa", tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared/datasets")
def test_the_copy_of_hannover_prepared():
    folder = SHARED / "hannover-covid"
    kept, quarantine = prepared("hannover_covid", folder)
    assert len(kept) == 139 and not len(quarantine)
    assert Counter(row["icu"] for row in kept["labels"]) == {1: 125, 0: 14}
    assert Counter(row["died"] for row in kept["labels"]) == {0: 95, 1: 44}
