"Bad input: one clear error that names the place and the remedy, or a counted entry in the quarantine"

import io, os
import numpy as np, pandas as pd, pytest
from PIL import Image
import small
from medvlp.data import prepare as data_prepare
from medvlp.data.prepare import DataOptions, check_writable, load_studies
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
    with pytest.raises(StudyError, match=r"study_id 's3' occurs in rows 4, 8"):
        prepare(studies)


def test_patient_in_two_splits(studies):
    edit(studies, lambda t: t.assign(patient_id=t.patient_id.replace("p47", "p0")))
    with pytest.raises(StudyError, match=r"patient 'p0' is in train \(row 1\), test \(row 48\).*one split"):
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
    path.write_bytes(path.read_bytes().replace(b"A dark field", b"A d\xe4rk field", 1))
    entry = only_entry(studies)
    assert entry.study_id == "s1" and "UTF-8" in entry.reason and entry.field == "findings"


def test_metadata_without_a_needed_column(studies):
    edit(studies, lambda t: t.drop(columns="patient_id"))
    with pytest.raises(StudyError, match=r"metadata.csv: no column patient_id. The columns are: file_name"):
        prepare(studies)


def test_label_column_missing(studies):
    with pytest.raises(StudyError, match=r'data.levels.labels: the data have no label "brigt": did you mean "bright"'):
        prepare(studies, labels=["brigt"])


def with_hospitals(studies, **columns):
    edit(studies, lambda t: t.assign(hospital=["A", "B"] * 24, **columns))
    return studies


def test_rows_are_selected_by_hospital_and_the_others_are_not_quarantined(studies):
    prepared, quarantine = prepare(with_hospitals(studies), where={"hospital": "A"})
    assert prepared["study_id"][:] == [f"s{i}" for i in range(0, 48, 2)] and not len(quarantine)


def test_message_after_a_selection_names_the_row_of_the_file(studies):
    with_hospitals(studies)
    edit(studies, lambda t: t.assign(study_id=t.study_id.replace("s6", "s2")))
    with pytest.raises(StudyError, match="study_id 's2' occurs in rows 3, 7"):
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
