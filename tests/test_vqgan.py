"The VQ-GAN: bad input, kill and resume. As a script: FOLDER RUN MINUTES DEVICE trains on FOLDER/prepared"

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import small
from test_resume import assert_equal, curves, weights

SIZES = dict(image_size=32, channels=[8, 8, 16], layers=1, groups=4, n_codes=16, code_dim=4, attention=False)
TRAINING = dict(
    steps=40,
    batch_size=8,
    learning_rate=2e-3,
    discriminator_rate=1e-3,
    schedule="cosine",
    gan_start=15,
    gan_channels=8,
    gan_layers=1,
    restart_steps=10,
    log_steps=5,
)
HERE = Path(__file__).parent


def train(folder, run, minutes=5.0, device="cpu", studies=None, **changes):
    "The task on FOLDER/prepared, into FOLDER/RUN; call again to resume"
    from medvlp.data.prepare import load_studies
    from medvlp.project.config import ComputeOptions
    from medvlp.tasks.vqgan import VqganOptions, vqgan

    torch.set_num_threads(1)
    folder = Path(folder)
    return vqgan(
        studies or load_studies(folder / "prepared"),
        VqganOptions(**SIZES | TRAINING | dict(n_resamples=20) | changes),
        compute=ComputeOptions(device=device, precision="fp32", checkpoint_minutes=float(minutes)),
        checkpoints=folder / run / "checkpoints",
        output=folder / run / "model",
        curves=folder / run / "curves",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    small.prepare(small.write_studies(folder / "data"), folder / "prepared")
    return folder


@pytest.fixture(scope="module")
def first(folder):
    "A training that was not disturbed"
    return train(folder, "first")


def start(folder, run, minutes, device):
    command = [sys.executable, __file__, folder, run, str(minutes), device]
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(paths))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_killed_and_resumed_gives_equal_weights_and_curves(folder, first, device):
    undisturbed = "first" if device == "cpu" else "first-cuda"
    if device != "cpu":
        train(folder, undisturbed, device=device)
    killed = f"killed-{device}"
    process = start(folder, killed, 1e-6, device)  # a checkpoint every five steps
    while not list((folder / killed).rglob("complete")):
        assert process.poll() is None, process.communicate()[0].decode()[-2000:]
        time.sleep(0.02)
    time.sleep(0.3 * np.random.default_rng().random())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / killed / "model" / "model.safetensors").exists(), "it had finished before it was killed"
    train(folder, killed, device=device)
    assert_equal(weights(folder, undisturbed), weights(folder, killed))
    assert curves(folder / undisturbed) == curves(folder / killed)
    assert not list((folder / killed / "checkpoints").iterdir())


def test_a_checkpoint_of_another_setting_is_left_alone(folder, first, monkeypatch):
    from medvlp.training.alternating import Alternation

    step = Alternation.take_step

    def break_off(self, images):
        if self.step == 10:
            raise KeyboardInterrupt
        step(self, images)

    with monkeypatch.context() as patched:
        patched.setattr(Alternation, "take_step", break_off)
        with pytest.raises(KeyboardInterrupt):
            train(folder, "other", minutes=1e-6, learning_rate=5e-4)
    kept, *_ = (folder / "other").rglob("complete")
    train(folder, "other")
    assert_equal(weights(folder, "first"), weights(folder, "other"))
    assert kept.is_file()


def test_scores_are_complete_and_saved_in_the_common_form(first, tmp_path):
    from medvlp.tasks.metrics.scores import load_scores, save_results
    from medvlp.tasks.vqgan import VqganOptions

    save_results(dict(vqgan=first), tmp_path / "s.csv", experiment="toy", data="grey", method="vqgan", seed=0)
    scores = load_scores(tmp_path).set_index("metric")
    assert list(scores.index) == VqganOptions().metric_names()["vqgan"]
    assert (scores.low.dropna() <= scores.high.dropna()).all()
    assert scores.value["L1"] < scores.chance["L1"]
    assert scores.note["L1"] == "fewer than 10 test studies: 8"


def test_the_published_defaults():
    from medvlp.tasks.vqgan import VqganOptions

    options = VqganOptions()
    assert (options.image_size, options.n_codes, options.code_dim) == (256, 1024, 256)
    assert options.channels == [128, 128, 256, 256, 512]
    assert (options.gan_start, options.gan_weight, options.commitment) == (10_000, 0.8, 0.25)
    assert options.learning_rate == pytest.approx(4.5e-6 * options.batch_size)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image_size=33), "image_size = 33 is no multiple of the stride 4 of 3 channels: use 32"),
        (dict(n_codes=1), "n_codes"),
        (dict(channels=[]), "channels"),
        (dict(groups=3), "groups = 3 does not divide channels [8, 8, 16]: use 8"),
        (dict(resize=31), "resize = 31 is smaller than image_size = 32"),
        (dict(batch_size=0), "batch_size"),
    ],
)
def test_wrong_options(folder, change, message):
    with pytest.raises(ValueError) as e:
        train(folder, "wrong", **change)
    assert message in str(e.value)


def test_a_set_that_does_not_do(folder):
    from medvlp.data.prepare import load_studies
    from medvlp.project.config import ConfigError

    studies = load_studies(folder / "prepared")
    split = np.asarray(studies["split"][:])
    untaught = studies.select(np.flatnonzero(split == "test"))
    result = train(folder, "untaught", studies=untaught)
    assert result.reason == "training studies: 0, but at least 2 are needed"
    assert (folder / "untaught/model/no-model.txt").read_text().strip() == result.reason
    untested = studies.select(np.flatnonzero(split == "train"))
    assert train(folder, "untested", studies=untested).reason.startswith("test patients: 0")
    with pytest.raises(ConfigError, match="image_size: 64, but the set's images are stored at 40: use at most 40"):
        train(folder, "large", image_size=64)


def test_a_loss_that_is_not_finite_stops_the_training(folder):
    with pytest.raises(FloatingPointError, match="is not finite. Lower the learning rate"):
        train(folder, "wild", learning_rate=1e30)
    assert not (folder / "wild/model/model.safetensors").exists()


def test_a_perceptual_network_without_weights(folder):
    from medvlp.project.config import ConfigError

    with pytest.raises(ConfigError, match="perceptual: nothing_here: no pre-trained features at hand"):
        train(folder, "unjudged", perceptual="nothing_here")


def test_a_perceptual_network_from_a_folder(folder, first):
    import timm

    torch.manual_seed(0)
    net = timm.create_model("test_resnet", in_chans=1)
    timm.models.save_for_hf(net, folder / "net", safe_serialization=True)
    train(folder, "perceptual", perceptual=str(folder / "net"), steps=8)
    curve = (folder / "perceptual/curves").rglob("perceptual.tsv")
    assert all(float(line.split("\t")[-1]) > 0 for line in next(curve).read_text().splitlines()[1:])


def test_every_token_is_decoded_and_none_beyond(first, folder):
    from medvlp.generation.vqgan import VQGAN

    model = VQGAN.from_pretrained(folder / "first/model")
    tokens = torch.arange(64)[None] % 16
    assert model.decode(tokens).shape == (1, 1, 32, 32)
    for wrong in (tokens - 1, tokens + 1):
        with pytest.raises(ValueError, match="this VQ-GAN has the codes 0..15"):
            model.decode(wrong)
    with pytest.raises(ValueError, match="the stride 4 does not divide both sides. Resize or crop them to 32 x 28"):
        model.encode(torch.rand(1, 1, 33, 29))
    config = json.loads((folder / "first/model/config.json").read_text())
    assert config["model_type"] == "medvlp_vqgan" and config["n_codes"] == 16


def fit_only(folder):
    "A few steps, alone or as one of several processes; the weights go to FOLDER/PROCESSES.pt"
    from medvlp.data.prepare import load_studies
    from medvlp.generation.vqgan import build_vqgan
    from medvlp.project.config import ComputeOptions
    from medvlp.tasks.vqgan import VqganOptions
    from medvlp.training.alternating import fit_vqgan

    options = VqganOptions(**SIZES | TRAINING | dict(steps=6, gan_start=2))
    compute = ComputeOptions(device="cpu", precision="fp32")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    studies = load_studies(Path(folder) / "prepared", "train")
    model = fit_vqgan(build_vqgan(options), studies, options, compute=compute, checkpoints=Path(folder) / "fit")
    if os.environ.get("RANK", "0") == "0":
        torch.save(model.state_dict(), Path(folder) / f"{os.environ.get('WORLD_SIZE', '1')}.pt")


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(folder):
    fit_only(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | dict(PYTHONPATH=f"{HERE.parent}{os.pathsep}{HERE}", OMP_NUM_THREADS="1")
    subprocess.run([*command, __file__, folder], env=environment, check=True, timeout=300)
    one, two = (torch.load(folder / f"{n}.pt") for n in (1, 2))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)


if __name__ == "__main__":
    (train if len(sys.argv) > 2 else fit_only)(*sys.argv[1:])
