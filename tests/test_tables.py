"Tables as people have them: names with blanks, splits by other names, JSON that is no text, other encodings, leaks"

import gzip
import json
import os

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import small

from medvlp.data import prepare as data_prepare
from medvlp.data.prepare import DataOptions, find_leaks, image_grids, load_studies, prepare_studies, read_manifest
from medvlp.data.sources.base import read_source
from medvlp.data.sources.imagefolder import imagefolder
from medvlp.data.sources.mimic_cxr import mimic_cxr
from medvlp.data.studies import StudyError, check_studies, read_table
from medvlp.tasks.answer import predict_answers
from medvlp.tasks.metrics.text import rouge_cider
from medvlp.tasks.questions import closed_answers


@pytest.fixture
def folder(tmp_path):
    return small.write_studies(tmp_path / "data")


def edit(folder, **columns):
    "Write metadata.csv with other columns; the rows stay"
    path = folder / "metadata.csv"
    pd.read_csv(path, dtype=str, keep_default_na=False).assign(**columns).to_csv(path, index=False)


def read_back(folder, **options):
    "The prepared studies, the manifest and the quarantine"
    output = folder.parent / "prepared"
    data_prepare.prepare(DataOptions(folder=str(folder), image_size=40, **options), output)
    return load_studies(output), read_manifest(output), pd.read_csv(output / "quarantine.csv")


# ---- names


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0", "\u2003", "\n"])
def test_a_patient_with_a_blank_is_the_same_patient(folder, blank):
    names = [f"p{i}" for i in range(47)] + [f"p0{blank}"]
    edit(folder, patient_id=names)
    with pytest.raises(StudyError, match=r"patient_id 'p0' is in train \(line 2\) and test \(line 49\)"):
        read_back(folder)


def test_accents_in_two_forms_are_one_patient(folder):
    edit(folder, patient_id=["M\u00fcller", *(f"p{i}" for i in range(1, 47)), "Mu\u0308ller"])
    with pytest.raises(StudyError, match="patient_id 'M\u00fcller' is in train"):
        read_back(folder)


def test_blanks_around_view_split_and_other_columns(folder):
    columns = pd.read_csv(folder / "metadata.csv", dtype=str)
    edit(folder, view="PA ", split=[f" {s.upper()} " for s in columns.split], hospital=["A", "A "] * 24)
    prepared, manifest, quarantine = read_back(folder, views=["PA"], where=dict(hospital="A"))
    assert len(prepared) == 48 and not len(quarantine)
    assert set(prepared["view"][:]) == {"PA"} and {*manifest["splits"]} == {*columns.split}


def test_a_table_without_a_file_is_stripped_too():
    row = dict(study_id="a ", patient_id="p ", image="a.png", view=" pa", findings="", impression="", split="Dev ")
    row |= dict(labels={}, boxes=[], mask="", questions=[])
    checked = check_studies(pd.DataFrame([row, row | dict(study_id="b")])).iloc[0]
    assert (checked.study_id, checked.patient_id, checked.view, checked.split) == ("a", "p", "pa", "val")


# ---- questions


def ask(folder, *values, **more):
    "One question for each of some studies; the others have none"
    cells = [json.dumps([dict(question="Is it bright?", answer=v) | more]) for v in values]
    edit(folder, questions=[*cells, *[""] * (48 - len(cells))])


def test_splits_of_questions_have_the_names_of_study_splits(folder):
    names = ["train", "validate", "validation", "valid", "dev", "VAL", "Test ", "", None]
    cells = [json.dumps([dict(question="Is it bright?", answer="yes", split=name)]) for name in names]
    edit(folder, questions=[*cells, *[""] * 39])
    prepared, manifest, _ = read_back(folder)
    assert [q["split"] for s in prepared for q in s["questions"]] == ["train", *["val"] * 5, "test", "", ""]
    assert sum(manifest["questions"].values()) == 9 and {*manifest["questions"]} == {"train", "val", "test"}


@pytest.mark.parametrize("name", ["tset", "0", "training", "None"])
def test_an_unknown_split_of_a_question_is_an_error(folder, name):
    ask(folder, "yes", "no", split=name)
    with pytest.raises(StudyError, match=f"csv, line 2, questions: in question 1, split is '{name}'. Use train, val"):
        read_back(folder)


@pytest.mark.parametrize("value", [None, True, False, float("nan"), float("inf"), 2.0, 1.5, ["yes"], {"a": 1}])
@pytest.mark.parametrize("field", ["question", "answer"])
def test_json_that_is_no_text_is_refused_by_line_and_field(folder, value, field):
    question = dict(question="Is it\nbright?", answer="yes")
    cells = [json.dumps([question, question | {field: value}]), json.dumps([question])]
    edit(folder, findings="One\nfield.", questions=[*[""] * 3, *cells, *[""] * 43])
    text = json.dumps(value).replace("[", r"\[").replace("{", r"\{")
    with pytest.raises(StudyError, match=f"metadata.csv, line 8, questions: in question 2, {field} is {text}"):
        read_back(folder)


def test_whole_numbers_are_their_digits_and_optional_fields_may_be_null(folder):
    ask(folder, 2, " left ", "None", answer_type=None, question_type=3, organ=None)
    prepared, *_ = read_back(folder)
    found = [prepared[i]["questions"][0] for i in range(3)]
    assert [q["answer"] for q in found] == ["2", "left", "None"]
    assert {(q["answer_type"], q["question_type"], q["organ"]) for q in found} == {("", "3", "")}


@pytest.mark.parametrize("source", ["vqa_rad", "slake"])
def test_json_files_of_questions_name_their_line(tmp_path, source):
    row = dict(question="?", answer="CT", answer_type="OPEN", image_name="a.jpg", question_type="X")
    row |= dict(img_name="xmlab0/source.jpg", q_lang="en", content_type="X", location="Lung", modality="CT")
    names = dict(vqa_rad=["trainset", "testset"], slake=["train", "validate", "test"])[source]
    for name in names:
        rows = [row | dict(img_name=f"{name}/source.jpg")] * 2
        (tmp_path / f"{name}.json").write_text(json.dumps(rows, indent=1))
    assert len(read_source(source, tmp_path)) > 0
    for field in ("question", "answer"):
        for value in (None, True, float("nan"), 2.0):
            text = json.dumps([row, row | {field: value}], indent=1)
            (tmp_path / f"{names[-1]}.json").write_text(text)
            line = text.count("\n", 0, text.index("},")) + 2
            with pytest.raises(StudyError, match=rf"{names[-1]}.json, line {line}, question 2, {field} is "):
                read_source(source, tmp_path)


def test_json_in_other_encodings(tmp_path):
    row = dict(question="Größe?", answer=3, answer_type="OPEN", image_name="a.jpg", question_type="X")
    text = json.dumps([row], ensure_ascii=False)
    for encoding in ("utf-8-sig", "utf-16"):
        for name in ("trainset", "testset"):
            (tmp_path / f"{name}.json").write_text(text, encoding=encoding)
        question = read_source("vqa_rad", tmp_path).questions[0][0]
        assert (question["question"], question["answer"]) == ("Größe?", "3")
    (tmp_path / "testset.json").write_text(text, encoding="cp1252")
    with pytest.raises(StudyError, match="testset.json: is not JSON in UTF-8. Save the file as UTF-8"):
        read_source("vqa_rad", tmp_path)


# ---- MIMIC-CXR


def write_mimic(folder, label="1.0", metadata=("a1", "a2", "b1")):
    "Two patients, three images; the reports stand beside them"
    tables = dict(
        split="dicom_id,study_id,subject_id,split\na1,51,1100,train\na2,51,1100,train\nb1,52,1200,test\n",
        metadata="dicom_id,ViewPosition,Procedure\n" + "".join(f'{d},PA ,"CHEST\nPA"\n' for d in metadata),
        chexpert=f"subject_id,study_id,Edema,Remark\n1100,51,,\n1200,52,{label},\n",
    )
    folder.mkdir(exist_ok=True)
    for name, text in tables.items():
        (folder / f"mimic-cxr-2.0.0-{name}.csv").write_text(text)
    for patient, study, dicoms in (("1100", "51", ("a1", "a2")), ("1200", "52", ("b1",))):
        place = folder / "files" / f"p{patient[:2]}" / f"p{patient}"
        (place / f"s{study}").mkdir(parents=True, exist_ok=True)
        (place / f"s{study}.txt").write_text("FINDINGS: The lungs are clear.\n")
        for dicom in dicoms:
            PIL.Image.new("L", (48, 48), 90).save(place / f"s{study}" / f"{dicom}.jpg")
    return folder


@pytest.mark.parametrize("label", ["nan", "0.5", "-2", "3", "yes"])
def test_mimic_labels_are_those_of_an_image_folder(tmp_path, folder, label):
    with pytest.raises(StudyError, match=f"chexpert.csv, line 3, Edema is '{label}'. A label is 1"):
        mimic_cxr(write_mimic(tmp_path / "mimic", label))
    edit(folder, label_bright=[label] + ["1"] * 47)
    with pytest.raises(StudyError, match=f"metadata.csv, line 2, label_bright is '{label}'. A label is 1"):
        imagefolder(folder)


def test_mimic_labels_that_are_right(tmp_path):
    for label, value in {"1.0": 1, "0": 0, "-1.0": -1}.items():
        assert mimic_cxr(write_mimic(tmp_path / "mimic", label)).labels.iloc[-1] == {"edema": value}
    assert mimic_cxr(write_mimic(tmp_path / "mimic", "")).labels.tolist() == [{}] * 3


def test_a_mimic_image_without_metadata_is_in_the_quarantine(tmp_path):
    mimic = write_mimic(tmp_path / "mimic", metadata=("a1", "b1"))
    prepared, _, quarantine = read_back(mimic, source="mimic_cxr", views=["PA"], max_quarantine=0.5)
    assert prepared["study_id"][:] == ["s51/a1", "s52/b1"]
    assert quarantine[["study_id", "field", "reason", "excluded_from"]].values.tolist() == [
        ["s51/a2", "view", "no row in the metadata table", "all"]
    ]
    assert os.path.exists(quarantine.file[0])


def test_mimic_tables_name_the_line_of_the_file(tmp_path):
    mimic = write_mimic(tmp_path / "mimic", metadata=("a1", "a2", "b1", "a2"))  # each row has two lines
    with pytest.raises(StudyError, match=r"metadata.csv: dicom_id 'a2' occurs in lines 4, 8\. Download"):
        mimic_cxr(mimic)
    path = write_mimic(mimic) / "mimic-cxr-2.0.0-split.csv"
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:40])
    path.unlink()
    with pytest.raises(StudyError, match="split.csv.gz: cannot be read: .*download it again"):
        mimic_cxr(mimic)


# ---- encodings and delimiters

TABLE = 'file_name,patient_id,report\na.png,Müller,Größe unverändert.\nb.png,Möller,"Klar\nund, frei."\n'
SEMICOLONS = TABLE.replace("und, frei", "und§ frei").replace(",", ";").replace("§", ",")
FORMS = {
    "UTF-8": (TABLE.encode(), ""),
    "UTF-8 with a mark": (TABLE.encode("utf-8-sig"), ""),
    "Windows-1252": (TABLE.encode("cp1252"), "t.csv: read as Windows-1252; check letters with accents"),
    "UTF-16": (TABLE.encode("utf-16"), "t.csv: read as UTF-16; check letters with accents"),
    "UTF-16, big": (b"\xfe\xff" + TABLE.encode("utf-16-be"), "t.csv: read as UTF-16; check letters with accents"),
    "UTF-16 without a mark": (TABLE.encode("utf-16-le"), "t.csv: read as UTF-16; check letters with accents"),
    "semicolons": (SEMICOLONS.encode(), "t.csv: the fields are separated by semicolons"),
    "tabs": (SEMICOLONS.replace(";", "\t").encode(), "t.csv: the fields are separated by tabs"),
    "Excel": (b"sep=;\r\n" + SEMICOLONS.replace("\n", "\r\n").encode("cp1252"), "read as Windows-1252"),
    "Excel's text": (SEMICOLONS.replace(";", "\t").encode("utf-16"), "separated by tabs"),
    "empty columns": (SEMICOLONS.replace("\n", ";;\n").replace('"Klar;;', '"Klar').encode(), "semicolons"),
    "old line ends": (TABLE.replace("\n", "\r").encode(), ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_tables_in_other_forms_are_read_and_named(tmp_path, form):
    data, note = FORMS[form]
    (tmp_path / "t.csv").write_bytes(data)
    table = read_table(tmp_path / "t.csv")
    first = 3 if form == "Excel" else 2
    assert table.patient_id.to_dict() == {first: "Müller", first + 1: "Möller"}
    assert " ".join(table.report.iloc[1].split()) == "Klar und, frei."
    assert note in "; ".join(table.attrs["notes"]) and bool(note) == bool(table.attrs["notes"])


@pytest.mark.parametrize("form", ["Windows-1252", "semicolons"])
def test_the_note_is_printed_and_messages_keep_the_line(folder, capsys, form):
    edit(folder, findings="One\nfield, größer.", patient_id=[f"ü{i}" for i in range(48)])
    path = folder / "metadata.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)

    def write():
        table.to_csv(path, index=False, **dict(semicolons=dict(sep=";")).get(form, dict(encoding="cp1252")))

    write()
    prepared, *_ = read_back(folder)
    assert f"data: metadata.csv: {FORMS[form][1].split(': ')[1]}" in capsys.readouterr().out.replace("prepared", "data")
    assert len(prepared) == 48 and prepared["patient_id"][0] == "ü0" and "größer" in prepared["findings"][0]
    table.loc[3, "split"] = "trian"
    write()
    with pytest.raises(StudyError, match="metadata.csv, line 8: split is 'trian'"):
        read_back(folder)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"PK\3\4 workbook", "this is a workbook or an archive, not a CSV file. Save it as CSV in UTF-8"),
        (b"\xd0\xcf\x11\xe0 old workbook", "this is a workbook"),
        (TABLE.encode("utf-32"), "not a text file"),
        (TABLE.encode("utf-16")[:-1], "this looks like UTF-16 but is damaged. Save it as CSV in UTF-8"),
        (b"a;b, c;d\n1;2;3;4\n", "line 2: the header has 3 fields, this row has 4. Quote fields that contain semi"),
        (b"a,b\n1,2\n1,2,3\n", "line 3: the header has 2 fields, this row has 3. Quote fields that contain commas"),
    ],
)
def test_tables_that_are_refused(tmp_path, data, message):
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(StudyError, match=message) as error:
        read_table(tmp_path / "t.csv")
    assert "\n" not in str(error.value)


def test_semicolons_in_a_report_do_not_make_a_delimiter(tmp_path):
    rows = "".join(f'p{i},"Clear; no effusion; no nodule; normal heart"\n' for i in range(9))
    (tmp_path / "t.csv").write_text(f"patient_id,report\n{rows}")
    assert read_table(tmp_path / "t.csv").shape == (9, 2)
    (tmp_path / "t.csv").write_text(f"patient_id;report, cleaned\n{rows.replace(',', ';')}")
    assert list(read_table(tmp_path / "t.csv")) == ["patient_id", "report, cleaned"]


def test_a_damaged_byte_in_utf8_costs_its_report_alone(folder):
    edit(folder, findings=["Größe unverändert, sonst klar."] * 48)
    path = folder / "metadata.csv"
    path.write_bytes(path.read_bytes().replace("ö".encode(), b"\xc3", 1))
    prepared, _, quarantine = read_back(folder)
    assert len(prepared) == 48 and quarantine.reason.tolist() == ["not UTF-8: save the file as UTF-8"]


def damaged(data, rng):
    "A few bytes changed, inserted or cut off, or the whole in another encoding"
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        kind, i = rng.integers(5), rng.integers(len(data) + 1)
        if kind == 0:
            data[i : i + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            data[i:i] = bytes(rng.choice([*b'",;[]{}: \n\r\t\0\xff1'], 1).astype(np.uint8))
        elif kind == 2:
            del data[i : i + rng.integers(40)]
        elif kind == 3:
            data = data.replace(b"yes", rng.choice([b"", b'"', b"null", b"Yes."]).item())
        else:
            encoding = rng.choice(["utf-16", "utf-32", "cp1252", "utf-8-sig"])
            data = bytearray(data.decode("utf-8", "replace").encode(encoding, "replace"))
    return bytes(data)


@pytest.mark.parametrize("source, name", [("imagefolder", "metadata.csv"), ("vqa_rad", "testset.json")])
def test_damaged_tables_give_one_line_or_a_table(tmp_path, source, name):
    question = dict(question="Größe?", answer="yes", answer_type="OPEN", question_type="X", image_name="a.jpg")
    table = pd.DataFrame(dict(file_name=["a.png", "b.png"], patient_id=["ä", "ü"], findings="Clear\nlungs; normal."))
    table = table.assign(split="train", label_a=1, questions=json.dumps([question]))
    good = dict(imagefolder=table.to_csv(index=False), vqa_rad=json.dumps([question] * 2, indent=1))[source].encode()
    (tmp_path / "trainset.json").write_text(json.dumps([question]))
    rng, refused = np.random.default_rng(0), 0
    for _ in range(200):
        (tmp_path / name).write_bytes(damaged(good, rng))
        try:
            check_studies(read_source(source, tmp_path))
        except StudyError as e:
            assert "\n" not in str(e) and str(tmp_path) in str(e)
            refused += 1
    assert 50 < refused < 200


# ---- leaks


def texture(seed, size=(200, 160)):
    grid = np.random.default_rng(seed).integers(0, 256, (12, 16)).astype(np.uint8)
    return PIL.Image.fromarray(grid).resize(size, PIL.Image.Resampling.BICUBIC)


def write_pictures(folder, pictures, splits, reports=None, **columns):
    "A folder of pictures; {name: picture}, a patient each"
    folder.mkdir()
    for name, picture in pictures.items():
        picture.save(folder / name)
    reports = reports or [f"This is picture number {i}." for i in range(len(splits))]
    patients = [f"p{i}" for i in range(len(splits))]
    table = dict(file_name=[*pictures], patient_id=patients, findings=reports, split=splits) | columns
    pd.DataFrame(table).to_csv(folder / "metadata.csv", index=False)
    return folder


def test_the_same_picture_under_two_patients_is_a_warning(tmp_path, capsys):
    pictures = {"a.png": texture(0), "b.png": texture(1), "c.jpg": texture(0, (300, 240)), "d.png": texture(2)}
    pictures |= {"e.bmp": texture(1), "f.png": texture(3)}
    _, manifest, _ = read_back(write_pictures(tmp_path / "data", pictures, ["train"] * 2 + ["test"] * 2 + ["val"] * 2))
    found = {"test in train": dict(shared=1, of=2), "val in train": dict(shared=1, of=2)}
    assert manifest["leaks"] == dict(pictures=found, texts={})
    warning = "nearly identical pictures in two splits: 1 of 2 in val are also in train, 1 of 2 in test are also in"
    assert f"warning: {warning}" in capsys.readouterr().out


def test_the_same_report_in_two_splits_is_a_warning(tmp_path, capsys):
    reports = ["The lungs are clear.", "A large nodule.", "THE LUNGS\nare clear.", "Clear lungs and a nodule."]
    pictures = {f"{i}.png": texture(i) for i in range(4)}
    folder = write_pictures(tmp_path / "data", pictures, ["train", "train", "test", "test"], reports)
    _, manifest, _ = read_back(folder)
    assert manifest["leaks"] == dict(pictures={}, texts={"test in train": dict(shared=1, of=2)})
    assert "warning: identical reports in two splits: 1 of 2 in test are also in train" in capsys.readouterr().out


def test_pictures_that_resemble_each_other_are_no_leak(tmp_path):
    flat = {f"{i}.png": PIL.Image.new("L", (64, 64), 20 * i) for i in range(6)}
    _, manifest, _ = read_back(write_pictures(tmp_path / "data", flat, ["train", "val", "test"] * 2))
    assert manifest["leaks"] == dict(pictures={}, texts={})


def test_one_split_and_images_without_reports(tmp_path):
    pictures = {"a.png": texture(0), "b.png": texture(0)}
    folder = write_pictures(tmp_path / "data", pictures, ["train", "test"], ["", ""], label_bright=["1", "0"])
    ds, _ = prepare_studies(imagefolder(folder), DataOptions(folder=str(folder), image_size=40))
    same = dict(pictures={"test in train": dict(shared=1, of=1)}, texts={})
    for rows, leaks in (([0, 1], same), ([0], dict(pictures={}, texts={})), ([], dict(pictures={}, texts={}))):
        some = ds.select(rows)
        assert find_leaks(some, image_grids(some["image"])) == leaks


def test_an_image_with_questions_in_two_splits_is_in_both(tmp_path):
    questions = [
        json.dumps([dict(question="?", answer="yes", split=s) for s in splits])
        for splits in (("train", "test"), ("test",), ("train",))
    ]
    pictures = {f"{i}.png": texture(i) for i in range(3)}
    splits = ["train", "test", "train"]
    folder = write_pictures(tmp_path / "data", pictures, splits, [""] * 3, questions=questions)
    _, manifest, _ = read_back(folder)
    assert manifest["leaks"]["pictures"] == {"test in train": dict(shared=1, of=2)}


# ---- measures


def test_cider_of_identical_reports_or_of_one_is_not_a_number():
    for n in (1, 3):
        scores = rouge_cider(["no effusion is seen"] * n, ["no effusion is seen"] * n)
        assert (scores[:, 0] == 1).all() and np.isnan(scores[:, 1]).all()
    assert np.isfinite(rouge_cider(["no effusion", "a nodule"], ["no effusion"] * 2)).all()


def test_closed_questions_choose_among_the_answers_of_the_set():
    train = pd.DataFrame(dict(answer=["yes", "no", "ct", "left lung"], closed=[True, True, True, False]))
    choices, answers = closed_answers(train), ["yes", "no", "ct", "left lung"]
    logits = np.array([[1.0, 2, 3, 9], [1, 2, 3, 9], [4, 2, 3, 9]])
    assert [*predict_answers(logits, answers, [True, False, True], choices)] == ["ct", "left lung", "yes"]
    assert [*predict_answers(logits, answers, [True] * 3)] == ["left lung"] * 3


SLAKE = os.path.join(os.path.dirname(__file__), "..", "..", "shared", "datasets", "slake")


@pytest.mark.skipif(not os.path.isdir(SLAKE), reason=f"no folder {SLAKE}")
def test_closed_questions_of_slake_can_be_right():
    "With yes and no alone, 61 of 416 cannot; 3 have an answer that only open training questions have"
    questions = [q for qs in read_source("slake", SLAKE).questions for q in qs if q["answer_type"] == "closed"]
    table = pd.DataFrame(questions).assign(answer=lambda t: t.answer.str.lower(), closed=True)
    test, choices = table[table.split == "test"], closed_answers(table[table.split == "train"])
    assert (len(test), (~test.answer.isin(["yes", "no"])).sum(), (~test.answer.isin(choices)).sum()) == (416, 61, 3)
