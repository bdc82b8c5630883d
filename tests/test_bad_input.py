"Bad input: one clear error that names the place and the remedy, or a counted entry in the quarantine"

import io, os
import numpy as np, pandas as pd, pytest
from PIL import Image
import small
from medvlp.data import prepare as data_prepare
from medvlp.data.prepare import DataOptions, check_writable, load_studies, read_manifest
from medvlp.data.studies import StudyError
from medvlp.project.config import ConfigError, validate


@pytest.fixture
def studies(tmp_path):
    return small.write_studies(tmp_path / "data")


def edit(folder, change):
    "Change metadata.csv as a table"
    table = change(pd.read_csv(folder / "metadata.csv", dtype=str, keep_default_na=False))
    table.to_csv(folder / "metadata.csv", index=False)


def prepare(folder, **options):
    "The prepared studies, and the quarantine as a table"
    output = folder.parent / "prepared" / "levels"
    data_prepare.prepare(DataOptions(folder=str(folder), image_size=40, **options), output)
    return load_studies(output), pd.read_csv(output / "quarantine.csv")


def only_entry(folder, **options):
    "The single quarantine entry of a set of 48 in which one study is bad"
    prepared, quarantine = prepare(folder, **options)
    assert len(quarantine) == 1 and len(prepared) == 48 - (quarantine.excluded_from[0] == "all")
    return quarantine.iloc[0]


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda p: p.write_bytes(jpeg()[:400]), "cannot be decoded: image file is truncated"),
        (lambda p: p.write_bytes(b""), "0 bytes"),
        (lambda p: Image.new("L", (1, 1)).save(p), "only 1 x 1 pixels"),
        (lambda p: p.unlink(), "no such file"),
    ],
    ids=["truncated JPEG", "zero bytes", "1 x 1", "missing"],
)
def test_unreadable_image_is_set_aside(studies, damage, reason):
    path = studies / "images" / "005.png"
    damage(path)
    entry = only_entry(studies)
    assert entry.study_id == "s5" and entry.field == "image" and reason in entry.reason and entry.file == str(path)


def jpeg(mode="L", size=(64, 64)):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, size, np.uint8)).convert(mode).save(out, "JPEG")
    return out.getvalue()


def test_sixteen_bit_png_keeps_its_grey_levels(studies):
    ramp = np.linspace(0, 65535, 48 * 56).reshape(48, 56).astype(np.uint16)
    Image.fromarray(ramp).save(studies / "images" / "000.png")
    prepared, quarantine = prepare(studies)
    pixels = np.asarray(prepared[0]["image"])
    assert not len(quarantine) and pixels.dtype == np.uint8
    assert pixels.min() < 5 and pixels.max() > 250 and abs(pixels.mean() - 127) < 5


def test_cmyk_jpeg_becomes_grey(studies):
    (studies / "images" / "000.png").write_bytes(jpeg("CMYK"))
    prepared, quarantine = prepare(studies)
    assert not len(quarantine) and prepared[0]["image"].mode == "L"


def test_duplicate_study_id(studies):
    edit(studies, lambda t: t.assign(study_id=t.study_id.replace("s7", "s3")))
    with pytest.raises(StudyError, match=r"metadata.csv: study_id 's3' occurs in lines 5, 9\. Give each"):
        prepare(studies)


def test_patient_in_two_splits(studies):
    edit(studies, lambda t: t.assign(patient_id=t.patient_id.replace("p47", "p0")))
    with pytest.raises(StudyError, match=r"patient_id 'p0' is in train \(line 2\) and test \(line 49\)\..*one split"):
        prepare(studies)


def test_empty_report_keeps_an_image_that_has_labels(studies):
    edit(studies, lambda t: t.assign(**{k: t[k].where(t.index != 4, "") for k in ("findings", "impression")}))
    entry = only_entry(studies)
    assert entry.study_id == "s4" and "report of 0 words" in entry.reason and entry.excluded_from == "pairs"


def test_report_of_5000_words_is_cut_to_the_encoder(studies, tmp_path):
    edit(studies, lambda t: t.assign(findings=t.findings.where(t.index != 0, "opacity " * 5000)))
    prepared, quarantine = prepare(studies)
    assert not len(quarantine) and len(prepared[0]["findings"].split()) == 5000
    from medvlp.data.batches import Collate, StudyDataset
    from medvlp.data.images import eval_transform
    from medvlp.data.tokens import build_tokenizer

    tokenizer = build_tokenizer(prepared, ["findings"], 100)
    assert Collate(tokenizer, 112)([StudyDataset(prepared, eval_transform(32))[0]])["input_ids"].shape == (1, 112)


def test_report_that_is_not_utf8(studies):
    path = studies / "metadata.csv"
    path.write_bytes(path.read_bytes().replace(b"A dark field", b"A d\x81rk field", 1))
    entry = only_entry(studies)
    assert entry.study_id == "s1" and "UTF-8" in entry.reason and entry.field == "findings"


def test_metadata_without_a_needed_column(studies):
    edit(studies, lambda t: t.drop(columns="patient_id"))
    with pytest.raises(StudyError, match=r"metadata.csv: no column patient_id. The columns are: file_name"):
        prepare(studies)


def cells(column, value, row=3):
    "A change: one cell of a column has another value; every report has three lines, so this row begins at line 11"
    texts = dict(findings="A field\nof one\ngrey level.")
    return lambda t: t.assign(**texts | {column: t[column].where(t.index != row, value)})


@pytest.mark.parametrize(
    "change, message",
    [
        (cells("patient_id", " "), "metadata.csv, line 11: patient_id is empty"),
        (cells("patient_id", "M\ufffdller"), "line 11: patient_id 'M\ufffdller' is not UTF-8"),
        (cells("study_id", ""), "line 11: study_id is empty"),
        (cells("file_name", ""), "line 11: file_name is empty"),
        (cells("file_name", "images/000.png"), r"file_name 'images/000.png' occurs in lines 2, 11\."),
        (cells("split", "trian"), "line 11: split is 'trian'. Use train, val or test"),
        (cells("split", ""), "line 11: split is empty, others are not"),
        (cells("label_bright", "yes"), "line 11, label_bright is 'yes'. A label is 1"),
        (lambda t: cells("boxes", '[{"label": ')(t.assign(boxes="")), "line 11, boxes is not JSON.*character 11"),
        (lambda t: cells("boxes", '[{"label": "a", "box": [9, 0, 1, 2]}]')(t.assign(boxes="")), "is not a box"),
        (lambda t: cells("questions", '[{"question": "?"}]')(t.assign(questions="")), "keys question, answer"),
        (lambda t: t.rename(columns=dict(patient_id="PatientID")), 'Rename "PatientID" to patient_id\\?'),
        (lambda t: t[["file_name", "patient_id"]].assign(Report="A"), r'Report \(did you mean "report"\?\)'),
        (lambda t: t.head(0), "no rows below the header"),
    ],
)
def test_mistake_in_a_cell_or_column_is_one_line(studies, change, message):
    edit(studies, change)
    with pytest.raises(StudyError, match=message) as caught:
        prepare(studies)
    assert "\n" not in str(caught.value) and str(studies / "metadata.csv") in str(caught.value)


def rewrite(**options):
    return lambda path: pd.read_csv(path, dtype=str).to_csv(path, index=False, **options)


@pytest.mark.parametrize(
    "change, message",
    [
        (rewrite(encoding="utf-32"), "this is not a text file"),
        (rewrite(header=False), "Line 1 has to hold the names of columns"),
        (lambda p: p.write_bytes(b"PK\3\4"), "this is a workbook"),
        (lambda p: p.write_bytes(b"\n"), "the file is empty"),
        (
            lambda p: p.write_text(p.read_text().replace("A dark", "A, dark", 1)),
            "line 3: the header has 8 fields, this",
        ),
        (lambda p: p.write_text(p.read_text().replace("A dark", '"A dark', 1)), "line 3: unexpected end of data"),
        (lambda p: p.rename(p.with_suffix(".jsonl")), "no such file. The folder holds images/, metadata.jsonl"),
    ],
)
def test_file_that_cannot_be_read_is_one_line(studies, change, message):
    change(studies / "metadata.csv")
    with pytest.raises(StudyError, match=message) as caught:
        prepare(studies)
    assert "\n" not in str(caught.value)


def test_missing_images_say_how_their_path_is_built(studies):
    edit(studies, lambda t: t.assign(file_name=t.file_name.str.removeprefix("images/")))
    with pytest.raises(StudyError, match=r"48 x no such file \(e.g. .*data/000.png\)\. .* is .*data / file_name"):
        prepare(studies)


def test_no_message_quotes_a_report(studies, capsys):
    secret = "Suspicious mass in the left upper lobe."
    edit(studies, lambda t: t.assign(findings=secret, label_bright=t.label_bright.where(t.index != 3, secret)))
    with pytest.raises(StudyError, match="label_bright is 'a text of 39 characters'"):
        prepare(studies)
    edit(studies, lambda t: t.assign(label_bright="1", impression=secret, study_id="", boxes="").drop(columns="view"))
    with pytest.raises(StudyError) as caught:
        prepare(studies, where={"findings": "x"})
    assert secret not in str(caught.value)
    prepare(studies)
    files = (studies.parent / "prepared" / "levels").glob("*.[cj]s*")
    assert secret not in capsys.readouterr().out + "".join(f.read_text() for f in files)


def remarks(studies, capsys, change=lambda t: t, **options):
    "The lines that prepare prints, and the manifest"
    edit(studies, change)
    capsys.readouterr()
    prepare(studies, **options)
    return capsys.readouterr().out, read_manifest(studies.parent / "prepared" / "levels")


def test_unread_columns_are_listed(studies, capsys):
    out, _ = remarks(studies, capsys, lambda t: t.assign(year="2020", finding="x", Label_Mass="1"))
    assert 'only the option `where` can use: year, finding (did you mean "findings"?), Label_Mass' in out
    assert len([line for line in out.splitlines() if "year" in line]) == 1


def test_several_images_of_a_study(studies, capsys):
    pairs = dict(study_id=[f"s{i // 2}" for i in range(48)], patient_id=[f"p{i // 4}" for i in range(48)])
    out, manifest = remarks(studies, capsys, lambda t: t.assign(**pairs).drop(columns="split"))
    assert "studies with several images: 24; their 48 rows" in out and "48 images of 12 patients" in out
    assert sum(s["patients"] for s in manifest["splits"].values()) == 12
    prepared = load_studies(studies.parent / "prepared" / "levels")
    assert prepared["study_id"][:2] == ["s0/images/000.png", "s0/images/001.png"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.drop(columns="split").head(5), "the split that was drawn leaves test empty (5 patients)"),
        (lambda t: t.drop(columns="split").assign(patient_id="p"), "a single patient: everything is in test"),
        (lambda t: t.drop(columns="split").head(1), "a single patient: everything is in train"),
        (lambda t: t.assign(split="test"), "no study is in train: nothing can be trained"),
        (lambda t: t.drop(columns="label_bright"), "no study has labels"),
        (lambda t: t.drop(columns=["findings", "impression"]), "no study has a report"),
        (lambda t: t, "test: bright (4 positive, 4 negative)\n"),
        (
            lambda t: t.assign(label_bright=t.label_bright.where(t.index < 9, "")),
            "train: bright (4 positive, 5 negative)",
        ),
    ],
)
def test_small_and_odd_sets_are_prepared_with_a_remark(studies, capsys, change, message):
    out, manifest = remarks(studies, capsys, change)
    assert message in out and not manifest["quarantine"]
    counts = [c.get("bright", {}).get("1", 0) for c in manifest["labels_by_split"].values()]
    assert sum(counts) == manifest["labels"].get("bright", {}).get("1", 0)


def test_title_comes_from_the_set(studies, capsys):
    where = {"hospital": "A"}
    with_hospitals(studies)
    assert remarks(studies, capsys, where=where)[1]["title"] == "data, hospital A"
    (studies / "README.md").write_text("---\npretty_name: Grey fields\n---\n")
    assert remarks(studies, capsys, where=where)[1]["title"] == "Grey fields, hospital A"
    assert remarks(studies, capsys, where=where, title="mine")[1]["title"] == "mine"
    (studies / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(StudyError, match="README.md: what stands between the two lines ---"):
        prepare(studies)


def test_box_beyond_the_image_costs_the_boxes_only(studies):
    edit(studies, lambda t: cells("boxes", '[{"label": "a", "box": [0, 0, 9, 900]}]')(t.assign(boxes="")))
    entry = only_entry(studies)
    assert (entry.study_id, entry.field, entry.excluded_from) == ("s3", "boxes", "pointing")


def test_label_column_missing(studies):
    with pytest.raises(StudyError, match=r'data.levels.labels: the data have no label "brigt": did you mean "bright"'):
        prepare(studies, labels=["brigt"])


def with_hospitals(studies, **columns):
    edit(studies, lambda t: t.assign(hospital=["A", "B"] * 24, **columns))
    return studies


def test_rows_are_selected_by_hospital_and_the_others_are_not_quarantined(studies):
    prepared, quarantine = prepare(with_hospitals(studies), where={"hospital": "A"})
    assert prepared["study_id"][:] == [f"s{i}" for i in range(0, 48, 2)] and not len(quarantine)


def test_message_after_a_selection_names_the_line_of_the_file(studies):
    with_hospitals(studies)
    edit(studies, lambda t: t.assign(study_id=t.study_id.replace("s6", "s2")))
    with pytest.raises(StudyError, match="study_id 's2' occurs in lines 4, 8"):
        prepare(studies, where={"hospital": "A"})
    prepare(studies, where={"hospital": "B"})  # the other hospital has no repetition


@pytest.mark.parametrize(
    "where, message",
    [
        ({"hospitl": "A"}, "data.levels.where: the metadata have no column 'hospitl'.*study_id.*hospital"),
        ({"hospital": ["A", "C"]}, "data.levels.where.hospital: no study has 'C'. Values of this column: A, B"),
        ({"patient_id": "q"}, r"Values of this column: (p\d+, ){10}... \(48 in all\)"),
        ({"hospital": "A", "study_id": "s1"}, "no study matches all of"),
    ],
    ids=["column", "value", "many values", "nothing left"],
)
def test_selection_that_finds_nothing(studies, where, message):
    with pytest.raises(StudyError, match=message):
        prepare(with_hospitals(studies), where=where)


def test_unknown_source(studies):
    with pytest.raises(StudyError, match="no source 'image_folder': did you mean \"imagefolder\""):
        prepare(studies, source="image_folder")


def test_misspelt_option_and_wrong_values_are_reported_together():
    wrong = dict(folder="data", image_sise=64, seed=-1, fractions=[0.7, 0.1, 0.1], where=dict(hospital=1.5))
    with pytest.raises(ConfigError) as caught:
        validate(DataOptions, wrong, "params.yaml: data.levels")
    text = "\n".join(caught.value.problems)
    assert all(k in text for k in ('did you mean "image_size"?', "data.levels.seed: -1", "sum to 1", "whole number"))
    assert len(caught.value.problems) == 4


def test_unknown_folder(studies):
    with pytest.raises(StudyError, match="absent: no such folder"):
        prepare(studies.parent / "absent")


def test_no_write_permission(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    root = os.geteuid() == 0
    if root:
        os.chmod(tmp_path, 0o755)
        os.seteuid(65534)  # root may write anywhere: be nobody for a moment
    try:
        with pytest.raises(PermissionError, match="cannot be written to.*another output folder"):
            check_writable(locked / "output")
    finally:
        if root:
            os.seteuid(0)
