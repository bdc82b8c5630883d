"A GPU computes what the CPU computes"

import pytest
import torch
from safetensors.torch import load_file

import small
import test_methods

pytestmark = pytest.mark.cuda


def step(name, device):
    "The terms of one training step, and all gradients in one vector"
    model = test_methods.small(name).train().to(device)
    out = model(**{key: x.to(device) for key, x in test_methods.make_batch().items()})
    out["loss"].backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {key: value.item() for key, value in out["terms"].items()}, gradient.cpu()


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    "Convolutions in float32 instead of TF32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", test_methods.METHODS)
def test_terms_and_gradients_equal_those_of_the_cpu(name):
    terms, gradient = step(name, "cpu")
    gpu_terms, gpu_gradient = step(name, "cuda")
    assert gpu_terms == pytest.approx(terms, rel=1e-4, abs=1e-5)
    assert (gpu_gradient - gradient).norm() < 1e-2 * gradient.norm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    small.prepare(small.write_studies(folder / "data"), folder / "prepared")
    return folder


@pytest.mark.parametrize("name", test_methods.METHODS)
def test_training_in_bfloat16_with_few_pairs_at_a_time(folder, name):
    image = None if name == "adamatch" else small.VIT  # encoders without batch norm
    changes = dict(image=image, epochs=6.0, encoder_batch=3, recompute=True)
    small.train(folder, name, name, device="cuda", precision="bf16", **changes)
    assert all(x.isfinite().all() for x in load_file(folder / name / "model" / "model.safetensors").values())
