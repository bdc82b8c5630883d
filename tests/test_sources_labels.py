"Collections of labelled images: a miniature of each, prepared, cut short at many places, and with odd tables"

import csv
import gzip
import json

import numpy as np
import pandas as pd
import PIL.Image
import pydicom
import pytest

from medvlp.data import prepare as data_prepare
from medvlp.data.images import ImageError, Picture, encode_mask, read_mask
from medvlp.data.prepare import DataOptions, load_studies, prepare_studies
from medvlp.data.sources.base import read_source
from medvlp.data.sources.chexpert import _COLUMNS, _LABELS
from medvlp.data.sources.chexpert_5x200 import FIVE, chexpert_5x200
from medvlp.data.sources.siim_acr import decode_runs, siim_acr
from medvlp.data.studies import StudyError, check_studies

GREY = np.add.outer(np.arange(96), np.arange(96)).astype(np.uint8)


def jpeg(path, pixels=GREY):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


def dicom(path, side=96):
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, "1.2.3"
    ds.Rows = ds.Columns = side
    ds.SamplesPerPixel, ds.PixelRepresentation, ds.PhotometricInterpretation = 1, 0, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = np.resize(GREY, (side, side)).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


# ---- a miniature of each; a writer returns the names of its tables


def chexpert_row(path, **labels):
    cells = {"Path": f"CheXpert-v1.0/{path}", "Sex": "Male", "Age": "50", "Frontal/Lateral": "Frontal", "AP/PA": "AP"}
    return cells | dict.fromkeys(_LABELS, "") | labels


def write_chexpert(folder):
    folder.mkdir()
    names = [f"train/patient{i:05}/study1/view1_frontal.jpg" for i in range(8)]
    train = [chexpert_row(name, Edema="1.0", Fracture="-1.0") for name in names]
    valid = [chexpert_row(f"valid/patient6454{i}/study1/view1_frontal.jpg", Edema="0.0") for i in range(2)]
    for name, rows in dict(train=train, valid=valid).items():
        pd.DataFrame(rows, columns=_COLUMNS).to_csv(folder / f"{name}.csv", index=False)
        for row in rows:
            jpeg(folder / row["Path"].split("/", 1)[1])
    return ["train.csv", "valid.csv"]


def write_rsna(folder):
    folder.mkdir()
    labels, classes = ["patientId,x,y,width,height,Target"], ["patientId,class"]
    for i in range(10):
        boxes = ["10.0,20.0,30.0,40.0,1"] * (i % 3) or [",,,,0"]
        labels += [f"a{i},{box}" for box in boxes]
        classes += [f"a{i},{'Lung Opacity' if i % 3 else 'Normal'}"] * len(boxes)
        dicom(folder / f"stage_2_train_images/a{i}.dcm", 1024)
    (folder / "stage_2_train_labels.csv").write_text("\n".join(labels) + "\n")
    (folder / "stage_2_detailed_class_info.csv").write_text("\n".join(classes) + "\n")
    return ["stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"]


def write_siim(folder):
    folder.mkdir()
    rows = ["ImageId, EncodedPixels"]
    for i in range(6):
        rows += [f"1.2.{i}, -1"] if i % 2 else [f"1.2.{i}, {1000 * i + 50} 30 994 30", f"1.2.{i}, 900000 40"]
        dicom(folder / f"dicom-images-train/1.{i}/2.{i}/1.2.{i}.dcm", 1024)
    (folder / "train-rle.csv").write_text("\n".join(rows) + "\n")
    return ["train-rle.csv"]


def write_covidx(folder):
    folder.mkdir()
    for part, n in dict(train=9, test=3).items():
        classes = ["normal rsna", "pneumonia cohen", "COVID-19 cohen"]
        lines = [f"{part}{i} {i}.png {classes[i % 3]}" for i in range(n)]
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")
        for i in range(n):
            jpeg(folder / part / f"{i}.png")
    return ["train.txt", "test.txt"]


def write_object_cxr(folder):
    folder.mkdir()
    shapes = ["", "0 1 2 30 40", "1 5 6 20 21;2 1 1 9 1 9 30"]
    for part, n in dict(train=9, dev=3).items():
        rows = [f"{i:05}.jpg,{shapes[i % 3]}" for i in range(n)]
        (folder / f"{part}.csv").write_text("\n".join(["image_name,annotation", *rows]) + "\n")
        for i in range(n):
            jpeg(folder / part / f"{i:05}.jpg")
    return ["train.csv", "dev.csv"]


def write_nih(folder):
    folder.mkdir()
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    rows = [header + "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"]
    names = [f"{i:08}_000.png" for i in range(10)]
    for i, name in enumerate(names):
        rows.append(f"{name},{'Mass|Edema' if i % 2 else 'No Finding'},0,{i},50,M,PA,2000,2000,0.1,0.1,")
        jpeg(folder / f"images_{i % 3 + 1:03}/images/{name}")
    (folder / "Data_Entry_2017.csv").write_text("\n".join(rows) + "\n")
    boxes = ["Image Index,Finding Label,Bbox [x,y,w,h],,,", f"{names[1]},Mass,1.5,2,30,40,,,"]
    (folder / "BBox_List_2017.csv").write_text("\n".join(boxes) + "\n")
    (folder / "train_val_list.txt").write_text("\n".join(names[:7]))
    (folder / "test_list.txt").write_text("\n".join(names[7:]))
    return ["Data_Entry_2017.csv", "BBox_List_2017.csv"]


WRITERS = dict(chexpert=write_chexpert, rsna_pneumonia=write_rsna, siim_acr=write_siim, covidx=write_covidx)
WRITERS |= dict(object_cxr=write_object_cxr, nih_chestxray14=write_nih)
SIZES = dict(chexpert=10, rsna_pneumonia=10, siim_acr=6, covidx=12, object_cxr=12, nih_chestxray14=10)
every_source = pytest.mark.parametrize("source", list(WRITERS))


@every_source
def test_prepared_whole(source, tmp_path):
    WRITERS[source](tmp_path / "data")
    options = DataOptions(source=source, folder=str(tmp_path / "data"), image_size=40)
    manifest = data_prepare.prepare(options, tmp_path / "prepared")
    prepared = load_studies(tmp_path / "prepared")
    assert manifest["studies"] == len(prepared) == SIZES[source] and not manifest["quarantine"]
    assert not any(s["pairs"] for s in manifest["splits"].values())
    assert all(None not in labels.values() for labels in prepared["labels"][:])
    assert manifest["label_policy"]["blank"] == ("absent" if source == "chexpert" else "unknown")
    studies = read_source(source, tmp_path / "data")
    assert studies.attrs["licence"] and studies.attrs["title"] == manifest["title"]


@every_source
def test_a_table_cut_short_is_an_error_or_fewer_rows(source, tmp_path):
    "Never another exception, and never a row that was not there"
    tables = WRITERS[source](tmp_path / "data")
    whole = read_source(source, tmp_path / "data").set_index("study_id")
    for name in tables:
        path = tmp_path / "data" / name
        content = path.read_bytes()
        for end in range(0, len(content), 7):
            path.write_bytes(content[:end])
            try:
                studies = read_source(source, tmp_path / "data")
            except StudyError as e:
                assert "\n" not in str(e) and str(tmp_path) in str(e)
            else:
                known = [i for i in studies.study_id if i in whole.index]
                assert len(known) >= len(studies) - 1  # the last name may be cut
        path.write_bytes(content)


@every_source
def test_damaged_bytes_are_an_error_or_stay_in_their_row(source, tmp_path):
    tables, rng = WRITERS[source](tmp_path / "data"), np.random.default_rng(0)
    for name in tables:
        path = tmp_path / "data" / name
        content = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            for at in rng.integers(0, len(content), 3):
                damaged[at] = rng.integers(0, 256)
            path.write_bytes(damaged)
            try:
                check_studies(read_source(source, tmp_path / "data"))
            except StudyError as e:
                assert str(e)
        path.write_bytes(content)


@every_source
def test_a_missing_table_is_named(source, tmp_path):
    for name in WRITERS[source](tmp_path / "data")[:1]:
        (tmp_path / "data" / name).unlink()
        with pytest.raises(StudyError, match=f"{name.split('.')[0]}.*: no such file"):
            read_source(source, tmp_path / "data")


@pytest.mark.parametrize("encoding, sign", [("utf-16", "\t"), ("utf-8-sig", ","), ("cp1252", ";")])
@pytest.mark.parametrize("source", ["chexpert", "rsna_pneumonia", "object_cxr"])
def test_tables_from_a_spreadsheet(source, encoding, sign, tmp_path):
    tables = WRITERS[source](tmp_path / "data")
    whole = read_source(source, tmp_path / "data")
    for name in tables:
        path = tmp_path / "data" / name
        with open(path, newline="") as f:
            rows = list(csv.reader(f))
        with open(path, "w", newline="", encoding=encoding) as f:
            csv.writer(f, delimiter=sign).writerows(rows)
    assert read_source(source, tmp_path / "data").equals(whole)


# ---- CheXpert


def test_chexpert_5x200_is_the_draw_of_pandas(tmp_path):
    "On a table of 1,300 rows in which 250 for each finding qualify; checked against the rule in columns"
    finding = {"Atelectasis": 0, "Cardiomegaly": 1, "Consolidation": 2, "Edema": 3, "Pleural Effusion": 4}
    rows = []
    for i in range(1300):
        labels = {name: "1.0" for name, k in finding.items() if i % 5 == k}
        labels |= (
            {"Support Devices": "-1.0"} if i >= 1250 else {"Fracture": "0.0", "No Finding": "1.0" if i % 7 else ""}
        )
        rows.append(chexpert_row(f"train/patient{i:05}/study1/view1_frontal.jpg", **labels))
    table = pd.DataFrame(rows, columns=_COLUMNS)
    table.to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame([chexpert_row("valid/patient64541/study1/view1_frontal.jpg")]).to_csv(
        tmp_path / "valid.csv", index=False
    )
    studies = chexpert_5x200(tmp_path)
    assert len(studies) == 1000 and set(studies.split) == {"test"}
    numbers = table[_LABELS].replace("", "0").astype(float).drop(columns="No Finding")
    expected = []
    for name in finding:
        exclusive = (numbers[name] == 1) & (numbers.drop(columns=name) == 0).all(axis=1)
        expected += table[exclusive].sample(200, random_state=0).Path.tolist()
    assert [p.split("/", 1)[1] for p in expected] == [f"train/{s}.jpg" for s in studies.study_id]
    assert [studies.labels.iloc[200 * k][name] for k, name in enumerate(FIVE)] == [1] * 5


def test_chexpert_val_is_drawn_by_patient(tmp_path):
    rows = [
        chexpert_row(f"train/patient{i:05}/study{s}/view1_frontal.jpg", Edema="1.0") for i in range(900) for s in (1, 2)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame([chexpert_row("valid/patient64541/study1/view1_frontal.jpg")]).to_csv(
        tmp_path / "valid.csv", index=False
    )
    checked = check_studies(read_source("chexpert", tmp_path))
    counts = checked.split.value_counts()
    assert counts["test"] == 1 and 10 <= counts["val"] <= 90 and counts.sum() == 1801


def test_chexpert_dropped_and_policy(tmp_path):
    write_chexpert(tmp_path / "data")
    policy = dict(blank="unknown", uncertain="positive")
    options = DataOptions(source="chexpert", folder=str(tmp_path / "data"), image_size=40, label_policy=policy)
    ds, _ = prepare_studies(read_source("chexpert", tmp_path / "data"), options)
    assert (ds[0]["labels"]["fracture"], ds[0]["labels"]["edema"]) == (1, 1)


# ---- run lengths


def organisers(text, side):
    "The challenge's sample program in our words: pixel by pixel, then turned over"
    flat, at, numbers = np.zeros(side * side, bool), 0, [int(n) for n in text.split()]
    for skip, length in zip(numbers[::2], numbers[1::2]):
        at += skip
        flat[at : at + length] = True
        at += length
    return flat.reshape(side, side).T


def relative_runs(mask):
    counts = json.loads(encode_mask(mask))["counts"]
    return " ".join(map(str, counts[: len(counts) // 2 * 2]))


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_there_and_back(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((24, 24)) < rng.random()
    mask[0, 0] = True
    text = relative_runs(mask)
    assert (decode_runs(text, 24) == mask).all() and (organisers(text, 24) == mask).all()
    wide = rng.random((24, 48)) < 0.5
    again = np.asarray(read_mask(encode_mask(wide), Picture(None, (48, 24), 1)))
    assert (again == wide).all()


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"size": [4, 4]}', '{"size": [4, 4], "counts": []}', '{"size": [4, 4], "counts": [16.5]}']
    + ['{"size": [4], "counts": [16]}', '{"size": ["a", 4], "counts": [16]}', '{"size": [4, 4], "counts": "16"}']
    + ['{"size": [100000, 100000], "counts": [10000000000]}', '{"size": [-4, -4], "counts": [16]}']
    + ['{"size": [4, 4], "counts": [[16]]}', '{"size": [4, 4], "counts": [17, -1]}', '{"size": null, "counts": null}']
    + ['{"size": [4, 4], "counts": [1e400]}', '{"size": [4, 4], "counts": [99999999999999999999]}'],
)
def test_damaged_run_lengths_are_image_errors(text):
    with pytest.raises(ImageError) as e:
        read_mask(text, Picture(None, (4, 4), 1))
    assert "\n" not in str(e.value)


def test_siim_masks_do_not_depend_on_processes(tmp_path):
    write_siim(tmp_path / "data")
    options = DataOptions(source="siim_acr", folder=str(tmp_path / "data"), image_size=512)
    studies = siim_acr(tmp_path / "data")
    one, _ = prepare_studies(studies, options, output=tmp_path / "one")
    two, _ = prepare_studies(studies, options, output=tmp_path / "two", workers=2)
    assert one._fingerprint == two._fingerprint
    assert [np.asarray(m).any() for m in one["mask"]] == [True, False] * 3


def test_siim_mask_beside_a_picture_of_another_shape_costs_the_segmentation(tmp_path):
    write_siim(tmp_path / "data")
    jpeg(tmp_path / "wide.png", np.resize(GREY, (96, 150)))
    studies = siim_acr(tmp_path / "data")
    wrong = studies.assign(image=[str(tmp_path / "wide.png"), *studies.image[1:]])
    ds, quarantine = prepare_studies(wrong, DataOptions(folder=str(tmp_path), image_size=64))
    assert ds[0]["mask"] is None and len(ds) == 6
    assert quarantine.frame().reason[0].startswith("mask of 1024 x 1024 pixels beside a picture of 150 x 96")


def test_siim_second_stage_table(tmp_path):
    write_siim(tmp_path / "data")
    text = (tmp_path / "data/train-rle.csv").read_text().replace(", ", ",")
    dicom(tmp_path / "data/dicom-images-test/1/2/1.3.1.dcm", 1024)
    dicom(tmp_path / "data/dicom-images-test/1/2/1.3.2.dcm", 1024)
    (tmp_path / "data/stage_2_train.csv").write_text(f"{text}1.3.1,-1\n")
    studies = siim_acr(tmp_path / "data")
    assert studies.image.iloc[-1].endswith("dicom-images-test/1/2/1.3.1.dcm")
    assert len(studies) == 7 and not studies.attrs["excluded"]


# ---- the others


def test_covidx_patients_of_two_sources_with_one_number(tmp_path):
    write_covidx(tmp_path / "data")
    (tmp_path / "data/test.txt").write_text("train0 0.png normal sirm\n")
    assert len(check_studies(read_source("covidx", tmp_path / "data"))) == 10
    (tmp_path / "data/test.txt").write_text("train0 0.png normal rsna\n")
    with pytest.raises(StudyError, match="patient 'rsna-train0' is in (train|val) "):
        check_studies(read_source("covidx", tmp_path / "data"))


def test_nih_later_table_and_flat_folder(tmp_path):
    write_nih(tmp_path / "data")
    data = tmp_path / "data"
    (data / "Data_Entry_2017.csv").rename(data / "Data_Entry_2017_v2020.csv")
    for path in list(data.glob("images_*/images/*.png")):
        (data / "images").mkdir(exist_ok=True)
        path.rename(data / "images" / path.name)
    studies = read_source("nih_chestxray14", data)
    assert studies.attrs["file"].endswith("v2020.csv")
    ds, quarantine = prepare_studies(studies, DataOptions(folder=str(data), image_size=40))
    assert len(ds) == 10 and not len(quarantine)
    (data / "BBox_List_2017.csv").unlink()
    assert not any(read_source("nih_chestxray14", data).boxes)


def test_rsna_box_outside_and_lost_image(tmp_path):
    write_rsna(tmp_path / "data")
    path = tmp_path / "data/stage_2_train_labels.csv"
    path.write_text(path.read_text().replace("a1,10.0", "a1,1010.0", 1))
    (tmp_path / "data/stage_2_train_images/a3.dcm").unlink()
    options = DataOptions(folder=str(tmp_path / "data"), image_size=40)
    ds, quarantine = prepare_studies(read_source("rsna_pneumonia", tmp_path / "data"), options)
    rows = quarantine.frame().set_index("study_id")
    assert (rows.field["a1"], rows.excluded_from["a1"], rows.reason["a3"]) == ("boxes", "pointing", "no such file")
    assert [len(b) for b in ds["boxes"][:4]] == [0, 0, 2, 1]


def test_compressed_tables(tmp_path):
    "read_table takes .gz by its name only; a table that is compressed under its plain name is refused"
    write_object_cxr(tmp_path / "data")
    path = tmp_path / "data/train.csv"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(StudyError, match=r"train\.csv"):
        read_source("object_cxr", tmp_path / "data")
