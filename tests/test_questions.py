"""Questions and their scores: what a set may lack, other images, words, and comparisons of models"""

import json
from fnmatch import fnmatchcase

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from scipy.stats import ttest_rel
from torchmetrics.functional.text import squad

from medvlp.data.prepare import DataOptions, png, prepare_studies, study_features
from medvlp.data.sources.slake import slake
from medvlp.data.studies import StudyError
from medvlp.tasks.questions import (
    answer_metric_names,
    answer_scores,
    answer_table,
    compare_answers,
    compare_seeds,
    lacking_questions,
    question_table,
    read_answers,
    token_f1,
    with_other_images,
)


def study_set(*studies):
    "(patient, split, [(question, answer), ...]) as prepared before questions had an organ"
    image = png(PIL.Image.new("L", (36, 36)))
    about = dict(view="", findings="", impression="", paired=False, mask=None, boxes=[], image=image)
    kind = dict(answer_type="", question_type="", split="")
    rows = [
        dict(study_id=str(i), patient_id=patient, split=split, **about)
        | dict(questions=[dict(question=q, answer=a) | kind for q, a in questions])
        for i, (patient, split, questions) in enumerate(studies)
    ]
    return datasets.Dataset.from_list(rows, features=study_features([]))


YES, NO = [("Is it so?", "Yes")], [("Is it so?", "No")]
TRAIN = [("a", "train", YES), ("b", "train", NO)]


@pytest.mark.parametrize(
    "studies, reason",
    [
        ([("a", "train", []), ("b", "test", [])], "the set has no questions; give them as a column questions"),
        ([("a", "train", [(" ", "yes")]), ("b", "test", [("?", "")])], "0 training and 0 test questions with an ans"),
        ([*TRAIN, ("c", "test", [("", "no")])], "2 training and 0 test questions with an answer; both are needed (1 "),
        ([("a", "test", YES), ("b", "test", NO)], "0 training and 2 test questions with an answer; both are needed"),
        ([TRAIN[0], TRAIN[0], ("c", "test", NO)], "answers given at least min_count = 1 times in training: 1, but at"),
        ([("a", "train", YES + NO), ("c", "test", NO)], "training studies with questions: 1, but at least 2"),
        ([*TRAIN, ("c", "test", YES), ("c", "test", NO)], "test patients with questions: 1, but intervals need"),
        ([*TRAIN, ("c", "test", YES), ("d", "test", NO)], ""),
    ],
)
def test_lacking(studies, reason):
    found = lacking_questions(question_table(study_set(*studies)))
    assert found.startswith(reason) and "\n" not in found
    assert bool(found) == bool(reason)


def test_other_images_of_other_patients():
    patients = ["a"] * 8 + ["b", "c"]  # one patient has most of the studies
    table = pd.DataFrame(dict(study=np.repeat(range(10), 3), patient_id=np.repeat(patients, 3), question=range(30)))
    other = with_other_images(table, seed=3)
    assert (np.array(patients)[other.study] != other.patient_id).all()
    assert other.study.is_monotonic_increasing and set(other.index) == set(table.index)
    assert other.sort_index().question.tolist() == list(range(30))
    assert other.groupby(table.study).study.nunique().eq(1).all()  # the questions of a study stay together
    assert not with_other_images(table, seed=4).sort_index().study.equals(other.sort_index().study)


def test_token_f1_is_that_of_squad():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["left", "lung", "base", "mass"], rng.integers(1, 5))) for _ in range(40)]
    for given, truth in zip(texts, texts[1:]):
        target = dict(answers=dict(answer_start=[0], text=[truth]), id="0")
        reference = squad(dict(prediction_text=given, id="0"), target)["f1"].item() / 100
        assert token_f1(given, truth) == pytest.approx(reference, abs=1e-6)


def answered(seed, accuracy=0.6, n=60):
    rng = np.random.default_rng(seed)
    closed = np.arange(n) % 2 == 0
    truth = np.where(closed, "yes", "left lung")
    frame = pd.DataFrame(dict(study=np.arange(n) // 3, patient_id=(np.arange(n) // 6).astype(str), question="Where?"))
    frame = frame.assign(answer=truth, closed=closed, kind=np.where(closed, "PRES", "POS"), split="test")
    return frame.assign(given=np.where(rng.random(n) < accuracy, truth, "left"))


def test_measures_of_absent_columns_are_left_out():
    few, frame = answered(0), answered(0)
    frame = frame.assign(blind="yes", shuffled=answered(1, 0.2).given, organ="lung")
    frame["given (free)"] = "The left LUNG."
    assert set(answer_table(few, few, 50).measure) == {"accuracy", "unknown", "token F1", "BLEU-1"}
    scores = answer_scores(answer_table(frame, frame, 50))
    names = answer_metric_names(["free"], shuffled=True)
    assert all(any(fnmatchcase(metric, name) for name in names) for metric in scores.metric)
    value = scores.set_index("metric").value
    assert value["accuracy"] - value["accuracy with another image"] == pytest.approx(value["image effect"])
    assert value["accuracy"] - value["accuracy without the image"] == pytest.approx(value["gain by the image"])
    assert value["organ lung accuracy"] == value["accuracy"]
    assert value["open accuracy (free)"] == value["open token F1 (free)"] == 1
    assert value["open BLEU-1 (free)"] == pytest.approx(1)
    assert scores.value.notna().all() and (scores.low <= scores.value + 1e-9).all()


def test_a_model_that_gives_nothing():
    silent = answered(0).assign(given="")
    value = answer_scores(answer_table(silent, silent, 50)).set_index("metric").value
    assert value["accuracy"] == value["open token F1"] == value["open BLEU-1"] == 0


def test_one_form_of_question_alone():
    frame = answered(0)
    for form, absent in (("open", "closed"), ("closed", "open")):
        labels = set(answer_table(frame[frame.closed == (form == "closed")], frame, 50).questions)
        assert form in labels and absent not in labels


def test_answers_come_back_from_their_file(tmp_path):
    frame = answered(0).assign(blind="None", organ="")
    frame["given (free)"] = "1"
    frame.to_csv(tmp_path / "answers.csv", index=False)
    pd.testing.assert_frame_equal(read_answers(tmp_path), frame, check_dtype=False)


def test_comparisons():
    a, b = [answered(seed, 0.9) for seed in range(4)], [answered(seed, 0.3) for seed in range(4, 8)]
    one = compare_answers(a[0], b[0], 500).set_index("questions")
    assert one.low["all"] > 0 and one.n.to_dict() == dict(all=60, open=30, closed=30)
    opposite = compare_answers(b[0], a[0], 500).set_index("questions")
    np.testing.assert_allclose(opposite[["value", "low", "high"]], -one[["value", "high", "low"]].values)
    accuracy = [[(f.given == f.answer).mean() for f in frames] for frames in (a, b)]
    assert one.value["all"] == pytest.approx(accuracy[0][0] - accuracy[1][0])
    several = compare_seeds(list(zip(a, b))).set_index("questions")
    assert several.p["all"] == pytest.approx(ttest_rel(*accuracy).pvalue)
    assert several["mean"]["all"] == pytest.approx(np.subtract(*accuracy).mean())


def test_comparisons_that_say_little():
    same = answered(0)
    assert compare_answers(same, same, 50)[["value", "low", "high"]].eq(0).all(axis=None)
    for pairs in ([(same, answered(1))], [(same, same)] * 3):  # a single seed; no difference at all
        assert compare_seeds(pairs).p.isna().all()
    with pytest.raises(ValueError, match=r"different test questions \(60 and 60\); compare models that"):
        compare_answers(same, same[::-1])
    with pytest.raises(ValueError, match="at least two patients"):
        compare_answers(same[:6], same[:6])


def test_slake_without_its_images(tmp_path):
    row = dict(question="?", answer="CT", q_lang="en", answer_type="OPEN", content_type="Modality")
    row |= dict(location="Lung", modality="CT")
    for i, part in enumerate(("train", "validate", "test")):
        rows = [row | dict(img_name=f"xmlab{i}/source.jpg")]
        (tmp_path / f"{part}.json").write_text(json.dumps(rows))
    with pytest.raises(StudyError) as error:
        prepare_studies(slake(tmp_path), DataOptions(folder=str(tmp_path)))
    assert "3 of 3 studies cannot be used" in str(error.value)
    assert f"The path of an image is {tmp_path} / imgs / img_name" in str(error.value)


def test_statements_are_of_the_own_split_and_never_of_test_questions(tmp_path):
    PIL.Image.new("L", (36, 36)).save(tmp_path / "image.png")

    def study(name, split, *asked, findings=""):
        questions = [dict(question=f"{q} of {name}?", answer=q.upper(), split=s) for q, s in asked]
        row = dict(study_id=name, patient_id=name, split=split, findings=findings, questions=questions)
        return row | dict(
            image=str(tmp_path / "image.png"), view="", impression="", labels=dict(a=1), boxes=[], mask=""
        )

    both = ("one", "train"), ("two", "test"), ("three", "val"), ("four", "")
    rows = [study(split, split, *both) for split in ("train", "val", "test")]
    rows += [study("told", "train", *both, findings="The lungs are clear."), study("unasked", "train")]
    found = {}
    for statements in (False, True):
        options = DataOptions(folder=str(tmp_path), image_size=32, statements=statements)
        prepared, quarantine = prepare_studies(pd.DataFrame(rows), options)
        found[statements] = {s["study_id"]: (s["findings"], s["paired"], len(s["questions"])) for s in prepared}
        assert not len(quarantine.frame().query("excluded_from == 'all'"))
    before = dict(train=("", False, 4), val=("", False, 4), test=("", False, 4))
    assert found[False] == before | dict(told=("The lungs are clear.", True, 4), unasked=("", False, 0))
    made = dict(train="one of train: ONE. four of train: FOUR.", val="three of val: THREE. four of val: FOUR.")
    assert found[True] == found[False] | {name: (text, True, 4) for name, text in made.items()}
