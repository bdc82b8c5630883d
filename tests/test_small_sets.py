"""Sets that are too small or lack something: a task gives a reason or NaN with a note, never a traceback"""

import warnings
from functools import cache, partial

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch

from medvlp.data.prepare import png, study_features
from medvlp.data.tokens import train_tokenizer
from medvlp.methods.base import build_method
from medvlp.project.config import ComputeOptions, ConfigError
from medvlp.tables.scoreboard import metric_problems, save_scoreboard, scoreboard
from medvlp.tasks.answer import AnswerOptions, answer
from medvlp.tasks.equal import EqualOptions
from medvlp.tasks.evaluate import EvaluateOptions, _prompts, evaluate
from medvlp.tasks.evaluate import study_set as read_set
from medvlp.tasks.finetune import FinetuneOptions, finetune
from medvlp.tasks.metrics.scores import load_scores, save_results
from medvlp.tasks.metrics.text import text_metrics
from medvlp.tasks.probe import ProbeOptions, label_frame
from medvlp.tasks.report import ReportOptions, report
from medvlp.tasks.retrieval import RetrievalOptions
from medvlp.tasks.zero_shot import ZeroShotOptions

TASKS = ["probe", "retrieval", "zero_shot", "pointing", "localise", "reconstruction"]
LABELS = ["effusion", "nodule"]
PROMPTS = """findings:
  effusion: {positive: [Large effusion.], negative: [No effusion.]}
  nodule: {positive: [A small nodule.], negative: [No nodule.]}
"""


def study(i, split, patient=None, report=True, labels=(1, 0), box="effusion", text=None, names=LABELS):
    text = (text or f"Film {i}. Large effusion and a small nodule.") if report else ""
    image = png(PIL.Image.fromarray(np.random.default_rng(i).integers(0, 255, (36, 36), np.uint8)))
    row = dict(study_id=str(i), patient_id=patient or f"p{i}", view="PA", findings=text, impression="", split=split)
    boxes = [dict(label=box, box=[0.3, 0.3, 0.7, 0.7])] if box else []
    questions = [
        dict(question="Is it bright?", answer=["no", "yes"][i % 2], answer_type="", question_type="", split="")
    ]
    about = dict(paired=report, image=image, mask=None, boxes=boxes, questions=questions)
    return row | about | (dict(labels=dict(zip(names, labels))) if labels else {})


def study_set(*rows):
    features = study_features(list(rows[0].get("labels", {})))
    return datasets.Dataset.from_list(list(rows), features=features)


def both(i):
    return i % 2, i // 2 % 2


def of_one_patient_each(i):
    "Three images a patient, all with one report"
    split = ["train", "train", "val", "test", "test"][i // 3 % 5]
    return study(i, split, f"p{i // 3}", labels=both(i), text=f"Film {i // 3}. No effusion.")


def foreign(i):
    return study(i, ["train", "test"][i // 4 % 2], labels=both(i), names=["Lungenödem (links)", "  "], box="")


SETS = {
    "one study": study_set(study(0, "test")),
    "one training study": study_set(study(0, "train")),
    "one patient": study_set(*(study(i, "test", "ann", labels=both(i)) for i in range(5))),
    "two test studies": study_set(study(0, "test"), study(1, "test", labels=(0, 1))),
    "three of five to test": study_set(*(study(i, "train" if i < 2 else "test", labels=both(i)) for i in range(5))),
    "no test studies": study_set(*(study(i, "train" if i < 3 else "val") for i in range(5))),
    "no training studies": study_set(*(study(i, "val" if i < 2 else "test", labels=both(i)) for i in range(5))),
    "no labels": study_set(*(study(i, ["train", "test"][i % 2], labels=None) for i in range(6))),
    "unknown labels": study_set(*(study(i, ["train", "test"][i % 2], labels=(None, -1)) for i in range(6))),
    "one class only": study_set(*(study(i, ["train", "test"][i // 2 % 2], labels=(1, i % 2)) for i in range(12))),
    "one class in training": study_set(*(study(i, "train" if i < 6 else "test", labels=(i > 6, 1)) for i in range(12))),
    "no reports": study_set(*(study(i, ["train", "test"][i % 2], report=False, labels=both(i)) for i in range(8))),
    "no boxes": study_set(*(study(i, ["train", "test"][i // 4 % 2], labels=both(i), box="") for i in range(12))),
    "boxes without a word": study_set(*(study(i, ["train", "test"][i // 4 % 2], box="hernia") for i in range(12))),
    "boxes in the test split only": study_set(
        *(study(i, "test" if i > 5 else "train", labels=both(i), box="effusion" if i > 5 else "") for i in range(12))
    ),
    "several images a study": study_set(*(of_one_patient_each(i) for i in range(30))),
    "twenty training studies": study_set(*(study(i, "train" if i < 20 else "test", labels=both(i)) for i in range(50))),
    "labels in another language": study_set(*(foreign(i) for i in range(16))),
    "most of one patient": study_set(*(study(i, "test", "ann" if i < 3 else "bob", labels=both(i)) for i in range(4))),
}


@pytest.fixture(scope="module")
def mpma():
    tok = train_tokenizer(["Film 0. Large effusion and a small nodule. No effusion. No nodule."] * 3, vocab_size=120)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    vit = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2)
    image = dict(name="vit_tiny_patch16_224", image_size=32, options=vit)
    small = dict(dim=16, rows=16, heads=2, slots=4, decoder_dim=32, decoder_heads=2, decoder_layers=1)
    torch.manual_seed(0)
    return build_method("mpma", image, dict(options=sizes), len(tok), **small), tok


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.yaml"
    file.write_text(PROMPTS)
    return EvaluateOptions(
        probe=ProbeOptions(fractions=[0.01, 0.1, 1.0], subset_seeds=2),
        equal_classes=EqualOptions(labels=LABELS),
        zero_shot=ZeroShotOptions(prompts=str(file)),
        n_resamples=20,
    )


@pytest.fixture(scope="module")
def results(mpma, options):
    @cache
    def of(name):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", category=RuntimeWarning)
            return evaluate(*mpma, SETS[name], options=options)

    return of


@pytest.mark.parametrize("name", SETS)
def test_a_reason_or_a_note(name, results, tmp_path):
    results = results(name)
    assert list(results) == TASKS
    for task, (scores, _, reason, _) in results.items():
        assert bool(reason) == (not len(scores)) and "\n" not in reason, task
        unexplained = scores[scores.value.isna() & (scores.note == "")]
        assert not len(unexplained), f"{task}: {unexplained.metric.tolist()}"
        assert scores.metric.is_unique, task
    facts = dict(experiment="small", data="set", method="mpma", seed=0)
    saved = save_results(results, tmp_path / "set-mpma-0.csv", **facts)
    assert list(saved.note[saved.metric == ""]) == [r.reason for r in results.values() if r.reason]
    assert len(load_scores(tmp_path)) == sum(len(r.scores) for r in results.values())


@pytest.mark.parametrize(
    "name, task, reason",
    [
        ("one patient", "retrieval", "the test studies with a report are all of one patient"),
        ("no test studies", "probe", "the set has no test studies"),
        ("no training studies", "probe", "the set has no training studies"),
        ("no labels", "zero_shot", "the set has no labels"),
        ("no reports", "retrieval", "the set has no test studies with a report"),
        ("no boxes", "pointing", "no test study with a report has boxes"),
        ("boxes without a word", "pointing", "no test report names a finding that has a visible box"),
        ("most of one patient", "reconstruction", "no shift of the test studies gives each an image of another"),
    ],
)
def test_the_reason_names_what_is_missing(name, task, reason, results):
    assert results(name)[task].reason.startswith(reason)


def test_two_fractions_of_the_same_studies_give_the_same_numbers(results):
    table = results("one class only")["probe"].table.set_index(["fraction", "label"])
    assert table.n_labelled[0.01, "macro"] == table.n_labelled[0.1, "macro"] == 2
    assert table.value[0.01, "nodule"] == table.value[0.1, "nodule"]
    assert table.note[0.01, "effusion"].startswith("one class only in the test set")


def test_prompts_without_a_finding_of_the_set(mpma, options, tmp_path):
    (tmp_path / "other.yaml").write_text(PROMPTS.replace("effusion:", "oedema:").replace("nodule:", "hernia:"))
    other = options.model_copy(update=dict(zero_shot=ZeroShotOptions(prompts=str(tmp_path / "other.yaml"))))
    reason = evaluate(*mpma, SETS["two test studies"], options=other)["zero_shot"].reason
    assert "(option zero_shot.prompts) has no finding that is a label of the set" in reason
    missing = options.model_copy(update=dict(zero_shot=ZeroShotOptions(prompts="nowhere.yaml")))
    with pytest.raises(ConfigError, match="zero_shot.prompts: nowhere.yaml: cannot be read"):
        evaluate(*mpma, SETS["two test studies"], options=missing)


def test_labels_without_sentences_are_listed_in_one_line(options, caplog):
    rows = (study(i, "test", labels=both(i), names=["effusion", "Rippenbruch"]) for i in range(4))
    assert list(_prompts(read_set(study_set(*rows)), options)) == ["effusion"]
    (line,) = caplog.messages
    assert line.startswith("zero-shot classification leaves out Rippenbruch: ") and line.endswith("by `also:`")


def test_a_report_without_the_section_that_a_method_reads(mpma, options):
    rows = [study(i, "test", labels=both(i)) for i in range(6)]
    rows += [row | dict(study_id=f"x{row['study_id']}", findings="", impression=row["findings"]) for row in rows[:3]]
    found = evaluate(*mpma, study_set(*rows), options=options, sections=["findings"])
    assert found["retrieval"].scores.n[0] == 6


def test_classes_that_nobody_names_are_those_of_the_set(mpma, options):
    few = dict(retrieval=RetrievalOptions(precision_ks=[2]), equal_classes=EqualOptions())
    unnamed = options.model_copy(update=few)
    found = evaluate(*mpma, SETS["twenty training studies"], options=unnamed)
    scores = pd.concat([found[task].scores for task in ("probe", "retrieval", "zero_shot")])
    equal = scores[scores.metric.str.startswith("equal-classes ")].set_index("metric")
    assert {"equal-classes P@2", "equal-classes P@2 nodule", "equal-classes AUROC 1 %"} <= set(equal.index)
    assert equal.note.str.startswith("2 x 7 studies with exactly one of effusion, nodule").all()
    assert (equal.n["equal-classes P@2"], equal.n["equal-classes which accuracy"]) == (14, 14)
    assert equal.chance["equal-classes which accuracy"] == equal.chance["equal-classes AUROC 1 %"] == 0.5
    silent = evaluate(*mpma, SETS["two test studies"], options=unnamed)
    assert silent["retrieval"].scores.note.iloc[-1] == "no two labels are alone in five test studies each"


def test_classes_that_the_set_does_not_have(mpma, options):
    five = options.model_copy(update=dict(equal_classes=EqualOptions(labels=["Edema", "Atelectasis"])))
    scores = evaluate(*mpma, SETS["two test studies"], options=five)["retrieval"].scores.set_index("metric")
    assert scores.note["equal-classes P@5"] == "the set has no label Edema, Atelectasis"


def test_without_reports_the_equal_set_is_of_all_test_studies(mpma, options):
    films = study_set(*(study(i, "train" if i > 7 else "test", report=False, labels=both(i)) for i in range(16)))
    found = evaluate(*mpma, films, options=options)
    scores = pd.concat([found[task].scores for task in ("probe", "zero_shot")]).set_index("metric")
    assert scores.n["equal-classes AUROC 1 %"] == scores.n["equal-classes which accuracy"] == 4


@pytest.mark.parametrize("name", SETS)
def test_every_metric_has_a_name_that_the_options_announce(name, results, options):
    found = [[task, metric] for task, result in results(name).items() for metric in result.scores.metric]
    assert metric_problems(found, dict(evaluate=options)) == []


TRAINING = dict(epochs=1, min_steps=1, batch_size=4, patience=1, n_resamples=20)
TRAINED = {
    "finetune": FinetuneOptions(fractions=[0.01, 0.1], **TRAINING),
    "report": ReportOptions(hidden_size=32, layers=1, heads=2, max_tokens=8, **TRAINING),
    "answer": AnswerOptions(dim=16, max_tokens=8, **TRAINING),
    "answer by a decoder": AnswerOptions(head="decoder", dim=16, max_tokens=8, **TRAINING),
}


@pytest.fixture(scope="module")
def trained(mpma, tmp_path_factory):
    model, tok = mpma

    def run(task, studies):
        output = tmp_path_factory.mktemp(task)
        place = dict(compute=ComputeOptions(device="cpu", precision="fp32"), checkpoints=output / "checkpoints")
        place |= dict(output=output / "model")
        if task == "finetune":
            return finetune(model, studies, label_frame(studies), TRAINED[task], **place)
        return dict(report=report).get(task, answer)(model, tok, studies, TRAINED[task], **place)

    with pytest.MonkeyPatch.context() as patch:  # starting Java takes seconds
        patch.setattr("medvlp.tasks.report.text_metrics", partial(text_metrics, java="no-java"))
        yield run


@pytest.mark.parametrize("task", TRAINED)
@pytest.mark.parametrize("name", SETS)
def test_a_task_that_trains_gives_a_reason_or_a_note(name, task, trained):
    scores, _, reason, _ = trained(task, SETS[name])
    assert bool(reason) == (not len(scores)) and "\n" not in reason
    assert not len(scores[scores.value.isna() & (scores.note == "")]) and scores.metric.is_unique
    assert not scores.note.str.contains("Film").any() and "Film" not in reason
    task_name = task.split()[0]
    assert metric_problems([[task_name, metric] for metric in scores.metric], {task_name: TRAINED[task]}) == []


def test_few_studies_are_noted_and_marked(results, trained, tmp_path):
    found = results("twenty training studies")
    probe = found["probe"].scores.set_index("metric")
    assert probe.note["AUROC 1 %"] == "fewer than 10 labelled training studies: 2; the same 2 studies as 10 %"
    assert probe.note["AUROC 10 %"] == "fewer than 10 labelled training studies: 2; the same 2 studies as 1 %"
    assert probe.note["AUROC 100 %"] == ""
    tuned = dict(finetune=trained("finetune", SETS["twenty training studies"]))
    assert "studies as 10 %" in tuned["finetune"].scores.set_index("metric").note["AUROC 1 %"]
    facts = dict(experiment="small", data="set", method="mpma", seed=0)
    save_results(found, tmp_path / "small/evaluate/set-mpma-0.csv", **facts)
    save_results(tuned, tmp_path / "small/finetune/set-mpma-0.csv", **facts)
    board = scoreboard(tmp_path, "small", dict(set="a small set"), ["mpma"], [0])
    save_scoreboard(board, tmp_path / "small.md")
    heads = board.markdown.split("\n")[2]
    assert "probe AUROC 1 % ↑ †" in heads and "probe AUROC 100 % ↑ †" not in heads
    assert "†: fewer than ten" in board.markdown


def test_a_scoreboard_of_reasons_alone(results, tmp_path):
    save_results(
        results("one study"), tmp_path / "small/set-mpma-0.csv", experiment="small", data="set", method="mpma", seed=0
    )
    board = scoreboard(tmp_path, "small", dict(set="a small set"), ["mpma"], [0])
    save_scoreboard(board, tmp_path / "small.md")
    assert (tmp_path / "small.md").read_text().startswith("The experiment small has no scores to show")
    assert (tmp_path / "small.png").is_file()
