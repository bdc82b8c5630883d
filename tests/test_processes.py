"""Several processes train to the weights of one, through the launcher. As a script: FOLDER STOP VARIANT ...

In float64: Adam turns the rounding errors of gradients that should be 0, as those of a bias before a batch norm, into
steps of full length, and in float32 no two orders of a sum agree on these."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import psutil
import pytest
import small
import test_plan
import torch
from safetensors.torch import load_file

BERT = dict(options=small.BERT["options"] | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
GRID = small.RESNET | dict(patch_stride=16)  # 2 x 2 patches
SALIENT = small.VIT | dict(saliency=True)
MGCA = dict(n_prototypes=5)


def weights(**values):
    return dict(weights=values)


# {variant: method, image encoder, options, options of the training}: all methods, every way in which
# experiments/ablation-* leaves terms out, and encoders that take their pairs a part at a time
VARIANTS = {
    "convirt": ("convirt", small.RESNET, {}),
    "gloria": ("gloria", GRID, {}),
    "sparc": ("sparc", GRID, {}),
    "mgca": ("mgca", SALIENT, MGCA),
    "mgca-global": ("mgca", SALIENT, MGCA | weights(local=0.0, prototype=0.0)),
    "mgca-local": ("mgca", SALIENT, MGCA | weights(prototype=0.0)),
    "mgca-prototype": ("mgca", SALIENT, MGCA | weights(local=0.0)),
    "aga": ("aga", GRID, {}),
    "aga-global": ("aga", GRID, weights(iga=0.0, bcga=0.0)),
    "aga-no-bcga": ("aga", GRID, weights(bcga=0.0)),
    "aga-fixed": ("aga", GRID, dict(gate="fixed")),
    "mpma": ("mpma", small.VIT, small.MPMA),
    "mpma-parts": ("mpma", small.VIT, small.MPMA, dict(encoder_batch=3, recompute=True)),
    "mpma-image": ("mpma", small.VIT, small.MPMA | {"weights": {"mlm": 0.0, "global": 0.0, "local": 0.0}}),
    "mpma-text": ("mpma", small.VIT, small.MPMA | dict(fusion="text")),
    "mpma-gap": ("mpma", small.VIT, small.MPMA | dict(fusion="gap")),
    "mpma-gmp": ("mpma", small.VIT, small.MPMA | dict(fusion="gmp")),
    "mpma-cmf": ("mpma", small.VIT, small.MPMA | dict(fusion="cmf")),
    "mpma-mlm1": ("mpma", small.VIT, small.MPMA | weights(mlm=1.0)),
    "mpma-reconstruction": ("mpma", small.VIT, small.MPMA | {"weights": {"global": 0.0, "local": 0.0}}),
    "adamatch": ("adamatch", small.PVT, {}),
    "adamatch-parts": ("adamatch", small.PVT, {}, dict(encoder_batch=1)),
    "adamatch-fixed": ("adamatch", small.PVT | dict(adapatch=[]), {}),
    "adamatch-stage2": ("adamatch", small.PVT | dict(patch_stride=8, adapatch=[2]), {}),
    "adamatch-stage4": ("adamatch", small.PVT | dict(patch_stride=32, adapatch=[2, 3, 4]), {}),
    "amf": ("amf", GRID, small.AMF),
    "amf-hard": ("amf", GRID, small.AMF | dict(teacher="none")),
    "amf-fused": ("amf", GRID, small.AMF | dict(phase="fuse")),
    "amf-no-transport-fused": ("amf", GRID, small.AMF | dict(phase="fuse") | weights(transport=0.0)),
    "amf-no-matching-fused": ("amf", GRID, small.AMF | dict(phase="fuse") | weights(matching=0.0)),
    "amf-random-fused": ("amf", GRID, small.AMF | dict(phase="fuse", negatives="random")),
    "amf-hard-fused": ("amf", GRID, small.AMF | dict(phase="fuse", teacher="none")),
}
SHORT = ["convirt", "mgca-global", "adamatch"]


def in_double(self, batch):
    return {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}


def train(folder, variant, stop=0):
    "Pre-train a variant on FOLDER/../prepared into FOLDER/VARIANT; `stop` breaks off at that step"
    from medvlp.data.prepare import load_studies
    from medvlp.data.tokens import build_tokenizer
    from medvlp.methods.base import build_method
    from medvlp.project.config import ComputeOptions
    from medvlp.training.pretrain import Guard, MethodTrainer, PretrainOptions, pretrain

    folder, (method, image, own, *more) = Path(folder), VARIANTS[variant]
    studies = {s: load_studies(folder.parent / "prepared", s, ["findings"]) for s in ("train", "val")}
    tokenizer = build_tokenizer(studies["train"], ["findings"], 100)
    torch.manual_seed(0)
    model = build_method(method, image, BERT, len(tokenizer), dim=16, **own).double()
    options = dict(method=method, epochs=1.4, batch_size=8, sections=["findings"], learning_rate=1e-3, log_steps=1)
    options |= dict(augment=dict(degrees=5.0), max_grad_norm=1.0, checkpoint_steps=3)
    options |= dict(optimizer="lamb" if method == "adamatch" else "adamw", **dict(*more))

    def break_off(self, args, state, control, **kwargs):
        if stop and state.global_step == stop:
            raise ArithmeticError("broken off")

    with (
        mock.patch.object(MethodTrainer, "_prepare_inputs", in_double),
        mock.patch.object(Guard, "on_step_begin", break_off),
    ):
        trainer = pretrain(
            model,
            tokenizer,
            studies,
            PretrainOptions(**options),
            seed=0,
            compute=ComputeOptions(device="cpu", precision="fp32"),
            output=folder / variant / "model",
            curves=folder / variant / "curves",
            checkpoints=folder / variant / "checkpoints",
        )
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(folder / variant / "state.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    small.prepare(small.write_studies(folder / "data", 60), folder / "prepared")  # 40 to train on, 10 to validate
    return folder


def train_together(folder, processes, *variants, stop=0):
    from medvlp.project.launch import launch

    launch(processes, __file__, str(folder / str(processes)), str(stop), *variants)


def alone(folder, variant):
    "Where one process has trained a variant"
    if not (folder / "1" / variant / "state.json").is_file():
        train(folder / "1", variant)
    return folder / "1" / variant


def assert_close(one, several):
    "Weights, losses and terms to 1e-5; evaluations have one batch of 8 pairs, for one of the processes"
    a, b = (load_file(run / "model" / "model.safetensors") for run in (one, several))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    logs = [json.loads((run / "state.json").read_text())["log_history"] for run in (one, several)]
    assert sum("eval_loss" in entry for entry in logs[0]) >= 2
    for first, second in zip(*logs, strict=True):
        assert first.keys() == second.keys()
        exact = {k: v for k, v in first.items() if not k.endswith(("runtime", "per_second", "flos", "train_loss"))}
        assert not {k: (v, second[k]) for k, v in exact.items() if abs(v - second[k]) > 1e-5}


def check(folder, processes, variants):
    "Train all in one launch, then compare"
    train_together(folder, processes, *variants)
    wrong = []
    for variant in variants:
        try:
            assert_close(alone(folder, variant), folder / str(processes) / variant)
        except AssertionError as e:
            wrong.append(f"{variant}: {e}")
    assert not wrong, "\n".join(wrong)


def test_two_processes_train_to_the_weights_of_one(folder):
    check(folder, 2, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_method_and_variant(folder, processes):
    check(folder, processes, VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("variant", ["convirt", "aga", "amf"])
def test_a_training_resumes_with_another_number_of_processes(folder, variant, first, then):
    own = folder / f"{first}-{then}"
    own.mkdir(exist_ok=True)
    (own / "prepared").symlink_to(folder / "prepared") if not (own / "prepared").exists() else None
    with pytest.raises(ArithmeticError, match="broken off"):
        train_together(own, first, variant, stop=5)
    assert [p.parent.name for p in own.rglob("complete")][-1] == "checkpoint-3"
    (own / str(first)).rename(own / str(then))
    train_together(own, then, variant)
    assert not list(own.rglob("complete"))
    assert_close(alone(folder, variant), own / str(then) / variant)
    (own / str(then)).rename(own / f"{variant} done")


def run_stage(folder, run, **options):
    "The stage `pretrain` with compute.processes"
    from medvlp.project.config import ComputeOptions
    from medvlp.project.stage import Stage
    from medvlp.training.pretrain import PretrainOptions, pretrain_stage

    values = dict(image_encoder=small.RESNET, text_encoder=BERT, sections=["findings"], vocab_size=100)
    options = PretrainOptions(**values | dict(batch_size=8, epochs=0.4, learning_rate=1e-3, log_steps=1) | options)
    names = ("model", "curves", "checkpoints")
    return pretrain_stage(
        Stage(
            stage="pretrain",
            run="convirt-0",
            experiment="small",
            method="convirt",
            compute=ComputeOptions(device="cpu", precision="fp32", processes=2),
            options=options.model_dump(),
            inputs=dict(prepared=[str(folder / "prepared")]),
            outputs={name: str(folder / run / name) for name in names},
        )
    )


def test_a_stage_trains_in_two_processes_and_shows_the_output_of_one(folder, capsys):
    state = run_stage(folder, "stage")
    assert state.global_step == 2 and [e["step"] for e in state.log_history if "loss" in e] == [1, 2]
    assert capsys.readouterr().out.count("40 pairs to train on") == 1
    assert (folder / "stage/model/model.safetensors").is_file()
    assert (folder / "stage/curves/plots/metrics/train/loss.tsv").is_file()
    assert not list((folder / "stage/checkpoints").iterdir())


@pytest.mark.slow
def test_a_stage_ends_with_the_error_of_its_processes(folder, capsys):
    with pytest.raises(FloatingPointError, match="is not finite. Lower the learning rate"):
        run_stage(folder, "diverging", learning_rate=1e30, epochs=4.0)
    assert "FloatingPointError" not in capsys.readouterr().err  # it is told once
    assert not [p for p in psutil.Process().children(recursive=True) if "-u" in p.cmdline()]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_launching_process_is_ended(number):
    sleeping = "import time; from medvlp.project.launch import obey_launcher; obey_launcher(); print('started');"
    own = f"from medvlp.project.launch import launch; launch(2, '-c', {sleeping + 'time.sleep(600)'!r})"
    process = subprocess.Popen([sys.executable, "-u", "-c", own], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.send_signal(number)
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert process.wait() == -number


def test_a_batch_that_the_processes_cannot_share_is_an_error_of_the_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(test_plan.ROOT)
    (problem,) = test_plan.problems_of(tmp_path, lambda tree: tree["compute"].update(processes=3))
    assert problem.startswith("params.yaml: batch_size 32 of convirt, ")
    assert problem.endswith("compute.processes is 3: make it a multiple of that")


def test_more_processes_than_pairs_is_an_error_before_training(folder):
    from medvlp.project.config import ConfigError
    from medvlp.training.pretrain import PretrainOptions, check_trainable

    manifest = json.loads((folder / "prepared/manifest.json").read_text())
    check_trainable([manifest], PretrainOptions(), processes=40)
    with pytest.raises(ConfigError, match="there are 40 pairs to train on: lower compute.processes, which is 48"):
        check_trainable([manifest], PretrainOptions(), processes=48)


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def main():
        for variant in sys.argv[3:]:
            train(sys.argv[1], variant, int(sys.argv[2]))

    main()
