"What becomes of a report's sections, and how a study is paired by those in use, from the manifest to the scores"

import random
import time
from pathlib import Path

import pandas as pd
import pytest

from medvlp.data.headings import HEADINGS
from medvlp.data.prepare import DataOptions, count_pairs, load_sets, load_studies, prepare
from medvlp.data.reports import clean, split_report
from medvlp.data.tokens import load_tokenizer
from medvlp.methods.base import load_method
from medvlp.phantom.reports import report_of
from medvlp.project.config import ConfigError
from medvlp.project.plan import check_corpus
from medvlp.project.stage import Stage
from medvlp.tasks.evaluate import EvaluateOptions, evaluate, study_set
from medvlp.training.pretrain import PretrainOptions, pretrain_stage
from small import BERT, RESNET, write_studies

CASES = Path(__file__).resolve().parents[1] / "../shared/cases"

# a report: its findings and its impression
REPORTS = {
    "FINDINGS: The heart is large.\n\nCOMPARISONS: Film of last year with large effusion.\n\n"
    "IMPRESSION: No pneumothorax.\n\nADDENDUM: On second look a small pneumothorax.": (
        "The heart is large.",
        "No pneumothorax. On second look a small pneumothorax.",
    ),
    "IMPRESSION: Mild oedema.\nREASON FOR EXAMINATION: pneumonia?\nELECTRONICALLY SIGNED BY: A. B.": (
        "",
        "Mild oedema.",
    ),
    "procedure: one chest view comparison: none findings: no tubes. patchy opacity on both sides. "
    "impression: 1. patchy opacity, unchanged.": (
        "no tubes. patchy opacity on both sides.",
        "patchy opacity, unchanged.",
    ),
    "EXAMINATION: Chest TECHNIQUE: two views COMPARISON: none FINDINGS: Clear lungs IMPRESSION: Normal chest": (
        "Clear lungs",
        "Normal chest",
    ),
    "INDICATION: cough; FINDINGS: Clear lungs; IMPRESSION: Normal chest.": ("Clear lungs", "Normal chest."),
    "PORTABLE CHEST RADIOGRAPH, ONE VIEW\nINDICATION: cough.\nThere is a large left effusion.": (
        "There is a large left effusion.",
        "",
    ),
    "CHEST, PA AND LATERAL:\nThe lungs are clear.": ("The lungs are clear.", ""),
    "PORTABLE AP CHEST RADIOGRAPH: The lungs are clear.": ("The lungs are clear.", ""),
    "INDICATION: rule out pneumonia.\nFINDINGS:\nIMPRESSION:": ("", ""),
    "INDICATION: rule out pneumonia.\n\nIMPRESSION:\n\n": ("", ""),
    "1. No focal consolidation\n2. Small left pleural effusion\n3. No pneumothorax": (
        "No focal consolidation. Small left pleural effusion. No pneumothorax.",
        "",
    ),
    "FINDINGS: nan\nIMPRESSION: N/A": ("", ""),
    "FINDINGS: None\nIMPRESSION: NaN.": ("", ""),
    # MIMIC-CXR's layout
    " FINAL REPORT\n CHEST RADIOGRAPH\n \n INDICATION:  Cough.\n \n TECHNIQUE:  PA.\n \n Clear lungs.\n \n No mass.": (
        "Clear lungs. No mass.",
        "",
    ),
    " WET READ: ___ 8:15 AM\n  No change.\n \n FINAL REPORT\n PORTABLE CHEST\n \n FINDINGS: Stable.": ("Stable.", ""),
    " ADDENDUM:  Line is arterial.\n_____________\n FINAL REPORT\n IMPRESSION:  Line placed.": (
        "",
        "Line placed. Line is arterial.",
    ),
    "FINDINGS: Old text.\nFINDINGS:\nFINDINGS: New text.": ("New text.", ""),
    "CHEST, TWO VIEWS: ___\nFINDINGS: Clear.\nIMPRESSION:1. Normal": ("Clear.", "Normal."),
    # other ways to write a heading
    "Findings\nClear lungs.\n\nImpression\nNormal.": ("Clear lungs.", "Normal."),
    "FINDINGS - Clear lungs.\nIMPRESSION - Normal.": ("Clear lungs.", "Normal."),
    "CLEAR LUNGS. IMPRESSION: NORMAL CHEST. I HAVE REVIEWED THE FILM.": ("", "NORMAL CHEST."),
    "LUNGS: Clear\nHEART: Normal\nIMPRESSION: Normal.": ("LUNGS: Clear. HEART: Normal", "Normal."),
    # no headings
    "FINDINGS: Clear since 8:15. The impression is good. Two findings: a scar, and a clip.": (
        "Clear since 8:15. The impression is good. Two findings: a scar, and a clip.",
        "",
    ),
    "LEFT LOWER LOBE PNEUMONIA.\nNO EFFUSION.": ("LEFT LOWER LOBE PNEUMONIA. NO EFFUSION.", ""),
    "INDICATION: Man of 62 with\ncough and fever.\nCOMPARISON: None.": ("", ""),
}


def texts(report, **options):
    "Findings and impression, cleaned"
    return tuple(clean(text) for text in split_report(report, **options).values())


@pytest.mark.parametrize("report", REPORTS)
def test_a_report(report):
    assert texts(report) == REPORTS[report]


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is absent")
def test_a_report_like_those_of_chexpert_plus():
    text = (CASES / "chexpert-plus-like.txt").read_text()
    assert tuple(split_report(text).values()) == ("LINE IN THE SVC.", "NEW LINE. NO PNEUMOTHORAX.")


@pytest.mark.parametrize("heading", ["IMPRESSON", "TYPE OF EXAMINATION", "CLINICAL INDICATION", "NEVER HEARD OF"])
def test_any_heading_in_capitals_ends_a_section(heading):
    own = ("Clear.", "Text.") if HEADINGS.section(heading) == "impression" else ("Clear.", "")
    assert texts(f"FINDINGS: Clear.\n{heading}: Text.") == own


@pytest.mark.parametrize(
    "form",
    [
        "FINDINGS: Clear lungs._x000D_\nIMPRESSION: Normal & well._x000D_",
        "FINDINGS: Clear lungs.\rIMPRESSION: Normal & well.",
        "\u00a0FINDINGS\u00a0: Clear lungs.\n\u00a0IMPRESSION\u00a0:\u00a0Normal & well.",
        "FINDINGS: Clear lungs.<br>IMPRESSION: Normal &amp; well.<br/>",
        "<p><b>FINDINGS:</b> Clear lungs.</p><p class='x'>IMPRESSION: Normal &amp; well.</p>",
        "**FINDINGS:** Clear lungs.\n**IMPRESSION**: Normal & well.",
        "## Findings\nClear lungs.\n## Impression\nNormal & well.",
        "FINDINGS: Clear lungs.\\nIMPRESSION: Normal & well.\\n",
        "FINDINGS: Clear lungs.\\r\\nIMPRESSION: Normal & well.",
    ],
)
def test_what_other_programs_leave_in_a_text(form):
    assert texts(form) == ("Clear lungs.", "Normal & well.")


@pytest.mark.parametrize("text", ["nan", "NaN", "None", "N/A", "n/a.", " - ", "1. None"])
def test_no_text(text):
    assert clean(text) == "" and texts(text) == texts(f"FINDINGS: {text}") == ("", "")


@pytest.mark.parametrize(
    "text",
    [
        "Healed fracture of left rib 7. No pneumothorax. Compression of T 11 and 12. Nodule measures 12. Stable.",
        "Size < 5 mm and > 3 mm. P-A view, left\\right comparison.",
        "None of the tubes is seen.",
    ],
)
def test_what_is_text_stays(text):
    assert clean(text) == text and texts(f"FINDINGS: {text}") == (text, "")
    assert clean(text.replace("left rib ", "left rib\n")) == text


def test_only_text_under_a_heading():
    assert texts(" HISTORY: Cough.\n \n Clear lungs.", fallback=False) == ("", "")
    assert texts("PORTABLE CHEST:\n Clear lungs.", fallback=False) == ("Clear lungs.", "")


def test_phantom_reports_are_as_before():
    for k in range(300):
        r = report_of(3, k)
        both = dict(findings=r.findings, impression=r.impression)
        assert split_report(f"FINDINGS: {r.findings}\nIMPRESSION: {r.impression}") == both
        assert {k: clean(text) for k, text in both.items()} == both


def test_any_text_is_split():
    words = "FINDINGS: IMPRESSION: LUNGS: ADDENDUM: CHEST,PA: 1. 2) - ** <br> &amp; &#x110000; _x000D_ _xD800_ nan : ."
    words = words.split() + ["\ud800", "\n", "\n\n", "\r", "\\n", "\u00a0", "clear", "effusion", "7."]
    draw = random.Random(0)
    for _ in range(2000):
        found = split_report(" ".join(draw.choices(words, k=draw.randrange(30))))
        assert list(found) == ["findings", "impression"] and all(clean(text) is not None for text in found.values())


@pytest.mark.parametrize("text", ["A:", ":", " ", "\n", "a b ", "<", "-", "1. a\n", "FINDINGS: x\n", "a. b: "])
def test_a_long_text_takes_no_time(text):
    start = time.process_time()
    split_report(text * 5_000)
    assert time.process_time() - start < 5  # 0.1 s on a quiet core


AGA = dict(method="aga", options=dict(dim=16), image_encoder=RESNET, text_encoder=BERT, sections=["findings"])
AGA |= dict(vocab_size=100, epochs=1.0, batch_size=4, learning_rate=1e-3)


def prepared(folder, change):
    "48 studies, 32 of them in train and 8 in val and test each, with other reports"
    table = write_studies(folder / "data") / "metadata.csv"
    change(pd.read_csv(table)).to_csv(table, index=False)
    return prepare(DataOptions(folder=str(folder / "data"), image_size=40), folder / "prepared")


def test_aga_leaves_studies_without_findings_out(tmp_path, capsys):
    texts = dict(impression="Seen before, unchanged.")
    manifest = prepared(tmp_path, lambda t: t.assign(findings=t.findings.where(t.index % 4 > 0, ""), **texts))
    assert manifest["splits"]["train"] == dict(studies=32, patients=32, pairs=32)
    assert [count_pairs(manifest, split, ["findings"]) for split in ("train", "val", "test")] == [24, 6, 6]
    assert len(load_sets([tmp_path / "prepared"], "train", ["findings"])) == 24
    folders = {name: str(tmp_path / name) for name in ("model", "curves", "checkpoints")}
    inputs = dict(prepared=[str(tmp_path / "prepared")])
    compute = dict(device="cpu", precision="fp32", threads=1)
    stage = Stage(stage="pretrain", experiment="small", method="aga", options=AGA, inputs=inputs, outputs=folders)
    state = pretrain_stage(stage.model_copy(update=dict(compute=stage.compute.model_copy(update=compute))))
    assert "24 pairs to train on, 6 to validate (images with findings)" in capsys.readouterr().out
    assert state.global_step == 6
    model, tokenizer = load_method(folders["model"]), load_tokenizer(folders["model"])
    studies, options = load_studies(tmp_path / "prepared"), EvaluateOptions(n_resamples=20)
    results = evaluate(model, tokenizer, studies, options=options, sections=["findings"])
    assert len(study_set(studies, sections=["findings"]).pairs) == 6
    assert results["retrieval"].scores.set_index("metric").value["image to report R@1"] > 0


def test_no_text_in_the_section_is_an_error_before_training(tmp_path):
    manifest = prepared(tmp_path, lambda t: t.assign(findings="", impression="Seen before, unchanged."))
    options = PretrainOptions(**AGA).model_dump()
    with pytest.raises(ConfigError) as error:
        check_corpus([manifest], dict(aga=options))
    problem = "none of the 48 studies has text under findings to train on: change the option sections"
    assert error.value.problems == [f"params.yaml: methods.aga: {problem}"]
    check_corpus([manifest], dict(aga=dict(options, sections=["findings", "impression"])))
