"""One trainer for all tasks: same seed, same weights; killed and resumed, same weights; saved models work elsewhere.

As a script: train KIND in FOLDER, to be killed.
"""

import json, os, subprocess, sys
from pathlib import Path

import datasets, numpy as np, pytest, torch
from pandas.testing import assert_frame_equal
from PIL import Image
from transformers import set_seed

from medvlp.data.prepare import png, study_features
from medvlp.data.tokens import train_tokenizer
from medvlp.generation.answerer import Answerer
from medvlp.generation.reporter import Reporter
from medvlp.methods.base import build_method
from medvlp.project.config import ComputeOptions
from medvlp.tasks.answer import AnswerModel, AnswerOptions, answer, train_answer_model
from medvlp.tasks.finetune import Classifier, FinetuneOptions, finetune
from medvlp.tasks.probe import label_frame
from medvlp.tasks.questions import answer_vocabulary, question_table
from medvlp.tasks.report import ReportOptions, train_reporter
from medvlp.training.downstream import EarlyStopping, split_studies
from small import assert_equal_models, kill_at_first_checkpoint

KINDS = dict(classifier=Classifier, reporter=Reporter, answer=AnswerModel, decoder=Answerer)
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
BUDGET = dict(epochs=3, min_steps=0, patience=0, batch_size=6, learning_rate=1e-2, encoder_learning_rate=1e-3)
CPU = ComputeOptions(device="cpu", precision="fp32")


def study(i):
    "A bright or a dark square with a label, a report and two questions"
    bright = i % 2
    pixels = 60 + 120 * bright + np.random.default_rng(i).integers(0, 40, (36, 40))
    form = dict(answer_type="", question_type="ABN", split="")
    return dict(
        study_id=str(i),
        patient_id=str(i),
        view="PA",
        findings=["The lungs are clear.", "A large effusion."][bright],
        impression="",
        split="train" if i < 20 else "val" if i < 26 else "test",
        paired=True,
        image=png(Image.fromarray(pixels.astype(np.uint8))),
        mask=None,
        boxes=[],
        questions=[
            dict(question="Is it bright?", answer=["no", "yes"][bright], **form),
            dict(question="What is it?", answer=["dark", "bright"][bright], **form),
        ],
        labels=dict(bright=bright),
    )


def make(n=32):
    "Studies, a tokenizer and an untrained method, the same in every process"
    torch.set_num_threads(1)
    studies = datasets.Dataset.from_list([study(i) for i in range(n)], features=study_features(["bright"]))
    tokenizer = train_tokenizer(["Is it bright? What is it? A large effusion. The lungs are clear."] * 2, 80)
    set_seed(0)
    image = dict(name="resnet10t", image_size=32, patch_stride=16)
    image |= dict(options=dict(channels=[8, 16, 24, 32], stem_width=8))
    return studies, tokenizer, build_method("convirt", image, dict(options=SIZES), len(tokenizer), dim=16)


def train(kind, folder, seed=0, wrong_validation=False, **changes):
    "Train one of the models with checkpoints in FOLDER/checkpoints; call again to resume"
    studies, tokenizer, method = make()
    place = dict(seed=seed, compute=CPU, checkpoints=folder / "checkpoints")
    budget = BUDGET | changes
    if kind == "classifier":
        options, labels = FinetuneOptions(**budget, fractions=[1.0], n_resamples=10), label_frame(studies)
        if wrong_validation:
            labels[20:26] = 1 - labels[20:26]
        finetune(method, studies, labels, options, **place, output=folder / kind)
        return Classifier.from_pretrained(folder / kind)
    if kind == "reporter":
        sizes = dict(hidden_size=16, layers=1, heads=2, max_tokens=16)
        options = ReportOptions(**budget, **sizes, sections=["findings"])
        return train_reporter(method, tokenizer, split_studies(studies), options, **place)
    head = dict(head="decoder" if kind == "decoder" else "classifier", decoder_layers=1)
    table, options = question_table(studies), AnswerOptions(**budget, **head, dim=16, questions_per_study=1)
    parts = {name: table[table.split == name] for name in ("train", "val")}
    answers = answer_vocabulary(parts["train"].answer)
    return train_answer_model(method, tokenizer, studies, parts, answers, options, **place)


def differs(a, b):
    a, b = a.state_dict(), b.state_dict()
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The models, trained without an interruption"
    return {kind: train(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_seed_decides_weights(whole, kind, tmp_path):
    assert_equal_models(train(kind, tmp_path), whole[kind])
    if kind == "answer":
        assert differs(train(kind, tmp_path, seed=1), whole[kind])


def crash_at(monkeypatch, step):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(EarlyStopping, "on_step_end", on_step_end)


@pytest.mark.parametrize("kind, steps", [("classifier", [6]), ("reporter", [9]), ("answer", [6, 9]), ("decoder", [9])])
def test_crashed_run_resumes_to_equal_weights(whole, kind, steps, tmp_path, monkeypatch):
    for step in steps:  # of 12, four in an epoch: in the middle of one, and at the beginning of the next
        crash_at(monkeypatch, step)
        with pytest.raises(KeyboardInterrupt):
            train(kind, tmp_path)
        assert list(tmp_path.rglob("complete"))
    monkeypatch.undo()
    assert_equal_models(train(kind, tmp_path), whole[kind])
    assert not list((tmp_path / "checkpoints").iterdir())


def test_crashed_run_stops_as_early_as_a_whole_one(tmp_path, monkeypatch):
    options = dict(wrong_validation=True, patience=2, epochs=7)  # the validation loss rises from the beginning
    steps = []
    monkeypatch.setattr(
        EarlyStopping, "on_train_end", lambda self, args, state, control, **_: steps.append(state.global_step)
    )
    uninterrupted = train("classifier", tmp_path / "whole", **options)
    with monkeypatch.context() as context:
        crash_at(context, steps[0] - 2)
        with pytest.raises(KeyboardInterrupt):
            train("classifier", tmp_path / "crashed", **options)
    assert_equal_models(train("classifier", tmp_path / "crashed", **options), uninterrupted)
    assert steps[0] < 28 and steps == [steps[0]] * 2


@pytest.mark.parametrize("kind", ["classifier", "answer"])
def test_interrupted_task_keeps_the_trainings_it_has_finished(kind, tmp_path, monkeypatch):
    steps = []

    def on_train_begin(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        if len(steps) == 2:  # the last of them
            raise KeyboardInterrupt

    whole = run_task(kind, tmp_path / "whole")
    monkeypatch.setattr(EarlyStopping, "on_train_begin", on_train_begin)
    with pytest.raises(KeyboardInterrupt):
        run_task(kind, tmp_path / "interrupted")
    assert len(list((tmp_path / "interrupted").rglob("*.pt"))) == 1
    again = run_task(kind, tmp_path / "interrupted")
    assert len(steps) == 3  # the last one alone was trained again
    assert_frame_equal(again.table, whole.table)
    assert not list((tmp_path / "interrupted/checkpoints").iterdir())


def run_task(kind, folder):
    "The whole task: two trainings each"
    studies, tokenizer, method = make()
    place = dict(compute=CPU, checkpoints=folder / "checkpoints", output=folder / "model")
    if kind == "answer":
        return answer(method, tokenizer, studies, AnswerOptions(**BUDGET, dim=16, n_resamples=10), **place)
    options = FinetuneOptions(**BUDGET, fractions=[0.5, 1.0], n_resamples=10)
    return finetune(method, studies, label_frame(studies), options, **place)


def test_killed_process_resumes_to_equal_weights(whole, tmp_path):
    kill_at_first_checkpoint(tmp_path, __file__, "answer", tmp_path)
    assert_equal_models(train("answer", tmp_path), whole["answer"])
    assert not list((tmp_path / "checkpoints").iterdir())  # this process went on where the killed one stopped


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_encoder_is_unchanged(kind, tmp_path):
    model, (_, _, method) = train(kind, tmp_path, epochs=1, encoder_learning_rate=0.0), make()
    assert_equal_models(getattr(model, model.encoder_names[0]), method.image_encoder)
    if kind in ("answer", "decoder"):
        assert_equal_models(model.text_encoder, method.text_encoder)


def predictions(kind, model, files):
    if kind == "classifier":
        return model.predict(files).to_numpy().tolist()
    return model.write(files) if kind == "reporter" else model.answer(files, ["What is it?"] * len(files))


ELSEWHERE = """
import json
from medvlp.tasks.finetune import Classifier
from medvlp.generation.reporter import Reporter
from medvlp.tasks.answer import load_answerer
files = ["0.png", "1.png"]
print(json.dumps(dict(
    classifier=Classifier.from_pretrained("classifier").predict(files).to_numpy().tolist(),
    reporter=Reporter.from_pretrained("reporter").write(files),
    answer=load_answerer("answer").answer(files, ["What is it?", "What is it?"]),
    decoder=load_answerer("decoder").answer(files, ["What is it?", "What is it?"]),
)))
"""


def test_saved_models_predict_the_same_elsewhere(whole, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for i, file in enumerate(files):
        Image.new("RGB", (90, 70), (80 + 110 * i,) * 3).save(file)
    for kind, model in whole.items():
        model.save_pretrained(tmp_path / kind)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    here = {kind: predictions(kind, model, files) for kind, model in whole.items()}
    assert np.allclose(found.pop("classifier"), here.pop("classifier"), atol=1e-6)
    assert found == here


@pytest.mark.parametrize("kind", KINDS)
def test_stored_images_and_files_are_read_alike(whole, kind, tmp_path):
    studies, _, _ = make()
    pictures = [studies[i]["image"] for i in (26, 27)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    assert predictions(kind, whole[kind], files) == predictions(kind, whole[kind], pictures)


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
