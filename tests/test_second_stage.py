"The second pre-training goes on from exactly what the first one saved; a teacher is loaded before either begins"

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import small
from medvlp.project.config import ComputeOptions, ConfigError
from medvlp.project.stage import Stage
from medvlp.training.loop import Guard
from medvlp.training.pretrain import pretrain_stage

ENCODERS = ("image_encoder.", "text_encoder.", "image_projection.", "text_projection.", "temperatures", "average")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    small.prepare(small.write_studies(folder / "data"), folder / "prepared")
    pretrain(folder, "first")
    return folder


def pretrain(folder, run, start=None, epochs=1, **own):
    "Run the stage, on the folder of a first one where `start` names it"
    kind, phase = ("fuse", dict(phase="fuse")) if start else ("pretrain", {})
    options = dict(method="amf", options=small.AMF | dict(dim=16) | phase | own, vocab_size=100, epochs=epochs)
    options |= dict(image_encoder=small.RESNET, text_encoder=small.BERT, batch_size=8, learning_rate=1e-2)
    inputs = dict(prepared=[str(folder / "prepared")]) | (dict(start=str(folder / start / "model")) if start else {})
    outputs = {name: str(folder / run / name) for name in ("model", "curves")}
    outputs |= dict(checkpoints=str(folder / "checkpoints"))
    compute = ComputeOptions(device="cpu", precision="fp32", threads=1, checkpoint_minutes=1e-6)
    stage = dict(stage=kind, run="amf-0", method="amf", experiment="small", compute=compute)
    return pretrain_stage(Stage(**stage, options=options, inputs=inputs, outputs=outputs))


def weights(folder, run):
    return load_file(folder / run / "model" / "model.safetensors")


def differing(a, b):
    "Names of the weights that are not bitwise equal"
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_it_starts_from_all_weights_of_the_first(folder):
    pretrain(folder, "as it is", "first", epochs=0)
    assert not differing(weights(folder, "first"), weights(folder, "as it is"))


def test_it_leaves_the_encoders_as_they_are(folder):
    pretrain(folder, "fused", "first")
    changed = differing(weights(folder, "first"), weights(folder, "fused"))
    assert changed and not any(name.startswith(ENCODERS) for name in changed)
    assert {name.split(".")[0] for name in changed} == {"fusion", "fusion_patches", "fusion_words", "match"}


def test_a_checkpoint_on_other_encoders_is_not_resumed(folder, monkeypatch):
    def crash(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    def interrupt(run, start):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Guard, "on_step_begin", crash)
            pretrain(folder, run, start)
        return {path.name for path in (folder / "checkpoints").iterdir()}

    shutil.copytree(folder / "first", folder / "other")
    other = weights(folder, "first")
    other["text_projection.3.bias"] += 1
    save_file(other, folder / "other/model/model.safetensors", metadata=dict(format="pt"))
    (kept,) = interrupt("crashed", "first")
    assert interrupt("crashed", "first") == {kept}
    assert len(interrupt("crashed", "other")) == 2
    pretrain(folder, "crashed", "other")
    pretrain(folder, "whole", "other")
    assert not differing(weights(folder, "whole"), weights(folder, "crashed"))
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {kept}


@pytest.mark.parametrize(
    "changed, parts",
    [
        (dict(teacher="none"), "average, averaged"),
        (dict(layers=2), "fusion"),
        (dict(dim=8), "average, image_projection, text_projection"),
    ],
)
def test_other_parts_than_those_of_the_first_are_one_line(folder, changed, parts):
    with pytest.raises(
        ConfigError,
        match=f"first/model: the second pre-training cannot start from it, as it has another {parts}: give both",
    ):
        pretrain(folder, "changed", "first", **changed)


@pytest.mark.parametrize("start", [None, "hard labels"])
def test_a_teacher_that_is_not_there_is_one_line_before_the_first_step(folder, start, monkeypatch):
    pretrain(folder, "hard labels", epochs=0, teacher="none")
    monkeypatch.setattr(Guard, "on_step_begin", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(ConfigError) as caught:
        pretrain(folder, "no teacher", start, teacher=str(folder / "no-such-teacher"))
    (problem,) = caught.value.problems
    assert problem.startswith(f"teacher '{folder}/no-such-teacher': ") and "\n" not in problem
    assert "Give the name of a CLIP-like model on the hub, or a folder with one" in problem
