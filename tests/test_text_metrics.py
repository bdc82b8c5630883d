"Word measures at their edges: nothing written, one report, reports all alike, one word, other scripts, great length"

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from medvlp.tasks.metrics.text import bleu, bleu_sums, r2gen_tokens, rouge_cider, text_metrics, tokenise

LONG = " ".join(f"word{i} of line {i}." for i in range(60))
CASES = {  # truth, written
    "an empty report": (["no effusion", "a nodule"], ["", "a nodule"]),
    "one report": (["no effusion is seen"], ["no effusion is seen"]),
    "all alike": (["no effusion"] * 4, ["no effusion", "a nodule", "", "no effusion"]),
    "one word": (["normal", "clear"], ["normal", "normal"]),
    "unicode": (["größe 3 mm — φ", "肺部 清晰", "сердце не увеличено"], ["größe 3 mm", "肺部 清晰", "😀"]),
    "very long": ([LONG.lower(), "no effusion"], [LONG.lower(), "no effusion"]),
    "separators": (["a ||| b", "c"], ["a ||| b", "c |||"]),
}


@pytest.mark.parametrize("name", CASES)
def test_meteor(name, one_meteor):
    truth, written = CASES[name]
    sums = one_meteor.sums(truth, written)
    each = one_meteor.scores(sums)
    assert sums.shape == (len(truth), 23) and np.all((each >= 0) & (each <= 1))
    for t, w, score in zip(truth, written, each):
        assert (score == 0) == (not set(t.split()) & set(w.split()) - {"|||"})
    assert 0 <= one_meteor.scores(sums.sum(0)) <= 1


@pytest.mark.parametrize("name", CASES)
def test_cider_and_bleu_are_those_of_pycocoevalcap(name):
    truth, written = CASES[name]
    gold, said = ({i: [t] for i, t in enumerate(texts)} for texts in (truth, written))
    np.testing.assert_allclose(
        bleu(bleu_sums(truth, written).sum(0)), Bleu(4).compute_score(gold, said, verbose=0)[0], atol=1e-9
    )
    cider = rouge_cider(truth, written)[:, 1]
    if len(set(truth)) == 1:
        assert np.isnan(cider).all()
    else:
        theirs = Cider().compute_score(gold, said)[1] * np.array([len(w) > 0 for w in written])
        np.testing.assert_allclose(cider, theirs)


@pytest.mark.usefixtures("one_meteor")
@pytest.mark.parametrize("name", CASES)
def test_the_table_is_whole(name):
    truth, written = CASES[name]
    patients = range(len(truth))
    if len(truth) == 1:
        with pytest.raises(ValueError, match="at least two patients"):
            text_metrics(truth, dict(model=written), patients, 10)
        return
    table = text_metrics(truth, dict(model=written), patients, 10).set_index(["system", "measure"])
    alike = len(set(truth)) == 1
    assert table.value.isna().sum() == alike
    assert table.note["model", "CIDEr"].startswith("not defined: all true reports are alike") == alike
    assert table.value["model", "distinct"] == len(set(written)) / len(written)
    assert table.value["truth", "distinct"] == len(set(truth)) / len(truth)
    assert table["empty"]["model", "CIDEr"] == tokenise(written).count("")


@pytest.mark.usefixtures("one_meteor")
def test_reports_that_differ_in_case_and_stops_only_are_alike():
    table = text_metrics(["No effusion.", "no effusion"], dict(model=["a", "b"]), ["p", "q"], 10).set_index("measure")
    assert np.isnan(table.value.CIDEr) and table.value.drop("CIDEr").notna().all()


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("", ""),
        (" \n ", ""),
        ("Normal", "normal ."),
        ("Normal.", "normal ."),
        ("Heart normal... Lungs clear.", "heart normal . lungs clear ."),
        ("1. Heart normal. 2. Lungs clear. 3. No effusion.", "heart normal . lungs clear . no effusion ."),
        ("1. Heart normal 2. Lungs clear", "heart normal . lungs clear ."),
        ("FINDINGS: 3.5 cm; left-sided (new)?", "findings 35 cm left-sided new ."),
        ("Dr. ___ was told. T1/2 \"flat\" 'x' \\ [a] {b} <c> @=d", "dr . was told . t12 flat x a b c d ."),
        ("Größe normal. 肺部清晰。", "größe normal . 肺部清晰。 ."),
    ],
)
def test_the_tokens_of_r2gen(text, tokens):
    assert r2gen_tokens(text) == tokens
    assert r2gen_tokens(text, 3).split() == tokens.split()[:3]


def test_truncation_cuts_the_truth_alone():
    truth, written = [f"{LONG} Effusion.", "No nodule."], [LONG, "No nodule."]
    rows = [
        text_metrics(truth, dict(model=written), ["p", "q"], 10, truncate_truth=n, java="no-java")
        .set_index(["system", "measure"])
        .value
        for n in (0, 60)
    ]
    assert rows[1]["model", "BLEU-1 (R2Gen)"] < rows[0]["model", "BLEU-1 (R2Gen)"] < 1
    assert rows[1]["model", "BLEU-1"] == rows[0]["model", "BLEU-1"]


def test_a_long_report_keeps_its_words():
    assert len(tokenise([LONG])[0].split()) == 240
