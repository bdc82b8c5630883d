"Open-i, R2Gen's form of it, and ROCO: whole trees through `prepare`, and input that is damaged or hostile"

import io, json, tarfile
from importlib.util import find_spec
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from medvlp.data.prepare import DataOptions, load_studies, prepare
from medvlp.data.sources.base import read_source, source_names
from medvlp.data.sources.openi import openi, read_reports
from medvlp.data.sources.roco import roco
from medvlp.data.studies import StudyError, check_studies

SENTENCES = ["The lungs are clear.", "Small left effusion.", "Heart size is normal.", "No pneumothorax is seen."]


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8)).astype(np.uint8)
    Image.fromarray(pixels).resize((64, 72), Image.Resampling.BICUBIC).save(path)


def xml(n, images, findings="", impression="", codes=()):
    text = f'<AbstractText Label="FINDINGS">{findings}</AbstractText>'
    text += f'<AbstractText Label="IMPRESSION">{impression}</AbstractText>'
    codes = "".join(f"<major>{code}</major>" for code in codes)
    images = "".join(f'<parentImage id="{image}"/>' for image in images)
    return f'<?xml version="1.0"?><eCitation><uId id="CXR{n}"/>{text}<MeSH>{codes}</MeSH>{images}</eCitation>'


@pytest.fixture
def official(tmp_path):
    "Twelve reports with a frontal and a lateral image, one without an image"
    folder, views = tmp_path / "openi", ["uid,filename,projection"]
    (folder / "ecgen-radiology").mkdir(parents=True)
    for n in range(1, 13):
        names = [f"CXR{n}_IM-{n:04}-{i}001" for i in (1, 2)]
        text = xml(n, names, SENTENCES[n % 4], f"Report number {n}.", [["normal"], ["Lung/hypoinflation"]][n % 2])
        (folder / f"ecgen-radiology/{n}.xml").write_text(text)
        for i, name in enumerate(names):
            picture(folder / f"NLMCXR_png/{name}.png", 2 * n + i)
            views.append(f"{n},{name.removeprefix('CXR')}.dcm.png,{['Frontal', 'Lateral'][i]}")
    (folder / "ecgen-radiology/13.xml").write_text(xml(13, [], "No image at all."))
    (folder / "indiana_projections.csv").write_text("\n".join(views))
    return folder


@pytest.fixture
def r2gen(tmp_path):
    "Two examinations in each part; a test report is verbatim in training"
    parts, n = {}, 0
    for split in ("train", "val", "test"):
        parts[split] = []
        for i in range(2):
            n += 1
            name = f"CXR{n}_IM-{n:04}"
            paths = [f"{name}/{k}.png" for k in range(2)]
            for k, path in enumerate(paths):
                picture(tmp_path / "r2gen/images" / path, 2 * n + k)
            report = SENTENCES[0] if i == 0 and split != "val" else f"Report number {n}."
            parts[split].append(dict(id=name, report=report, image_path=paths, split=split))
    (tmp_path / "r2gen/annotation.json").write_text(json.dumps(parts))
    return tmp_path / "r2gen"


@pytest.fixture
def figures(tmp_path):
    "ROCO with three radiology figures in each part, and a photograph"
    n = 0
    for part, kind in [
        ("train", "radiology"),
        ("validation", "radiology"),
        ("test", "radiology"),
        ("train", "non-radiology"),
    ]:
        folder, captions, links = tmp_path / f"roco/data/{part}/{kind}", "", ""
        for _ in range(3):
            n += 1
            picture(folder / f"images/PMC{n % 7}_fig{n}.jpg", n)
            captions += f"ROCO_{n:05}\t A caption of figure {n}.\r\n"
            links += f"ROCO_{n:05}\twget -r ftp://host/PMC{n % 7}.tar.gz -P /path/to/Dir\tfig{n}.jpg\n"
        (folder / "captions.txt").write_text(captions)
        (folder / "dlinks.txt").write_text(links)
    return tmp_path / "roco"


def prepared(source, folder, **options):
    output = folder.parent / "prepared" / source
    manifest = prepare(DataOptions(source=source, folder=str(folder), image_size=32, **options), output)
    return manifest, load_studies(output), pd.read_csv(output / "quarantine.csv")


def test_both_sources_are_found():
    assert {"openi", "roco"} <= set(source_names()) and "openi_reports" not in source_names()


def test_official_openi_is_prepared_with_the_images_of_a_report_in_one_split(official):
    manifest, studies, quarantine = prepared("openi", official)
    assert manifest["studies"] == 24 and manifest["title"] == "IU X-Ray"
    assert pd.Series(studies["split"][:]).groupby(studies["patient_id"][:]).nunique().max() == 1
    assert manifest["label_policy"]["blank"] == "absent" and manifest["labels"]["lung"] == {"0": 12, "1": 12}
    assert quarantine.study_id.tolist() == ["CXR13"] and "names no image" in quarantine.reason[0]


def test_frontal_images_of_openi(official):
    manifest, studies, quarantine = prepared("openi", official, views=["FRONTAL"])
    assert manifest["studies"] == 12 and {name[-4:] for name in studies["study_id"][:]} == {"1001"}
    assert (quarantine.excluded_from == "views").sum() == 12


def test_images_of_openi_may_be_anywhere_below_the_folder(official):
    before = [Path(p).name for p in openi(official).image]
    (official / "NLMCXR_png").rename(official / "images")
    after = openi(official).image
    assert [Path(p).name for p in after] == before and all(Path(p).is_file() for p in after)


def test_annotation_decides_over_xml(official, r2gen):
    (official / "annotation.json").write_bytes((r2gen / "annotation.json").read_bytes())
    assert openi(official).split.tolist() == openi(r2gen).split.tolist()


def test_r2gen_is_prepared_with_its_split_and_a_warning(r2gen, capsys):
    manifest, studies, _ = prepared("openi", r2gen)
    assert {s: n["studies"] for s, n in manifest["splits"].items()} == dict(train=4, val=4, test=4)
    assert manifest["leaks"]["texts"] == {"test in train": dict(shared=2, of=4)}
    assert "warning: identical reports in two splits: 2 of 4 in test are also in train" in capsys.readouterr().out
    assert set(studies["view"][:]) == {""}


@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:300])], ids=["lost", "cut"]
)
def test_a_bad_image_costs_its_own_row(r2gen, damage):
    damage(r2gen / "images/CXR1_IM-0001/1.png")
    manifest, _, quarantine = prepared("openi", r2gen)
    assert manifest["studies"] == 11 and quarantine.study_id.tolist() == ["CXR1_IM-0001/1.png"]


def test_a_patient_in_two_parts_of_r2gen_is_an_error(r2gen):
    parts = json.loads((r2gen / "annotation.json").read_text())
    parts["test"][0]["id"] = "CXR1_IM-0001-0002"
    (r2gen / "annotation.json").write_text(json.dumps(parts))
    with pytest.raises(StudyError, match="id 'CXR1' is in train .* and test"):
        check_studies(read_source("openi", r2gen))


def test_archive_is_read_in_memory_and_only_its_xml_files(tmp_path):
    path = tmp_path / "in" / "NLMCXR_reports.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../outside.xml", "/etc/absolute.xml", "ecgen-radiology/._3.xml", "ecgen-radiology/readme.txt"):
            data = xml(len(name), [f"CXR{len(name)}_IM-1"], name).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("ecgen-radiology/link.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert read_reports(path).findings.tolist() == ["../outside.xml", "/etc/absolute.xml"]
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "NLMCXR_reports.tgz"]


def test_entities_that_explode_are_refused(official):
    entities = '<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    text = f"<!DOCTYPE x [{entities}]>" + xml(1, [], "&a11;").removeprefix('<?xml version="1.0"?>')
    (official / "ecgen-radiology/1.xml").write_text(text)
    with pytest.raises(StudyError, match="1.xml: is not XML: limit on input amplification"):
        openi(official)


def damaged(data, rng):
    "The bytes cut short, or with some of them changed"
    if rng.random() < 0.5:
        return data[: rng.integers(len(data))]
    data = bytearray(data)
    for at in rng.integers(0, len(data), 5):
        data[at] = rng.integers(256)
    return bytes(data)


@pytest.mark.parametrize("seed", range(40))
def test_damage_gives_one_clear_error_or_a_table(official, r2gen, figures, seed):
    rng = np.random.default_rng(seed)
    with tarfile.open(official.parent / "reports.tgz", "w:gz") as tar:
        tar.add(official / "ecgen-radiology", "ecgen-radiology")
    for path, read, folder in [
        (official / "ecgen-radiology/2.xml", openi, official),
        (official / "indiana_projections.csv", openi, official),
        (r2gen / "annotation.json", openi, r2gen),
        (figures / "data/train/radiology/captions.txt", roco, figures),
        (figures / "data/train/radiology/dlinks.txt", roco, figures),
        (official.parent / "reports.tgz", read_reports, official.parent / "reports.tgz"),
    ]:
        before = path.read_bytes()
        path.write_bytes(damaged(before, rng))
        try:
            assert len(read(folder))
        except StudyError as e:
            assert path.name in str(e) and "\n" not in str(e)
        path.write_bytes(before)


def test_roco_is_prepared_as_mpma_selects_it(figures):
    manifest, studies, _ = prepared("roco", figures, where=dict(kind=["radiology"]))
    assert {s: n["pairs"] for s, n in manifest["splits"].items()} == dict(train=3, val=3, test=3)
    assert studies["findings"][0] == "A caption of figure 1."


def test_roco_without_dlinks_finds_images_by_number(figures):
    for folder in figures.glob("data/*/*"):
        (folder / "dlinks.txt").unlink()
        for path in (folder / "images").iterdir():
            path.rename(path.with_name(f"ROCO_{int(path.stem.split('fig')[1]):05}.jpg"))
    studies = roco(figures)
    assert all(Path(p).is_file() for p in studies.image) and set(studies.article) == {""}


def test_a_figure_of_roco_in_two_parts_is_an_error(figures):
    path = figures / "data/test/radiology/captions.txt"
    path.write_text(path.read_text() + "ROCO_00001\t Once more.\n")
    with pytest.raises(StudyError, match="ROCO_ID 'ROCO_00001' occurs in"):
        check_studies(read_source("roco", figures))


def test_captions_with_unusual_characters_keep_their_lines(figures):
    path = figures / "data/train/radiology/captions.txt"
    path.write_bytes('\ufeffROCO_00001\tA\u2028b\x85c "quoted, half\nROCO_00002\tÉpanchement\n'.encode())
    assert roco(figures).findings.tolist()[:2] == ['A\u2028b\x85c "quoted, half', "Épanchement"]


@pytest.mark.skipif(
    not find_spec("torchxrayvision"), reason="the package torchxrayvision, which has the reports, is absent"
)
def test_real_reports():
    folder = Path(find_spec("torchxrayvision").submodule_search_locations[0])
    reports = read_reports(folder / "data/NLMCXR_reports.tgz")
    images = reports.images.str.len()
    assert (len(reports), images.sum(), len({i for names in reports.images for i in names})) == (3955, 7470, 7470)
    assert ((images > 1) & (reports.findings != "")).sum() == 2955  # as many as R2Gen has examinations
