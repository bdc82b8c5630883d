"No training step of a method waits for the device: reading a value there would stop a GPU in every step"

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import test_methods
from medvlp.losses import ops
from medvlp.losses.gla import local_scores
from medvlp.losses.matching import patch_word_scores
from medvlp.losses.pairwise import region_word_scores

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "unique_dim")
TO_PYTHON = {getattr(torch.Tensor, name) for name in ("item", "tolist", "numpy", "cpu", "__array__", "__bool__")}
PACKAGE = Path(__file__).parent.parent / "medvlp"

# Where a step waits all the same: {(file, function): why}
REAL_WORDS = "batch normalisation over the real words only: their number is a shape, and SyncBatchNorm takes no mask"
MASKED = "the vocabulary is large, so only masked words are scored: their number is a shape"
VISIBLE = "the encoder sees the visible patches only: their number is a shape, and it is checked against the mask"
EXCEPTIONS = {
    ("data/tokens.py", "count_words"): "the words of the longest report are a shape; read first, before the networks",
    ("encoders/text.py", "_encode"): "transformers looks whether any token is padding, for a faster attention",
    ("methods/base.py", "forward"): REAL_WORDS,
    ("generation/reader.py", "forward"): REAL_WORDS,
    ("encoders/masked.py", "_check_visible"): VISIBLE,
    ("encoders/masked.py", "_keep_visible"): VISIBLE,
    ("generation/image_decoder.py", "forward"): VISIBLE,
    ("losses/masked.py", "word_losses"): MASKED,
    ("generation/report_decoder.py", "forward"): MASKED,
    ("methods/mpma.py", "_word_losses"): MASKED,
    ("losses/ops.py", "real_words"): "on a CPU only, where padding is left out",
    ("autograd", ""): "the backward pass of these",
}


def place():
    "The line of the package that is being executed; outside it in the backward pass"
    frames = [f for f in traceback.extract_stack() if PACKAGE in Path(f.filename).parents]
    return (str(Path(frames[-1].filename).relative_to(PACKAGE)), frames[-1].name) if frames else ("autograd", "")


class Watch(TorchDispatchMode):
    "Counts the operators whose result the CPU must know"

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in READS or by_mask:
            self.found[place() + (name,)] += 1
        return func(*args, **kwargs or {})


class WatchPython(TorchFunctionMode):
    "Counts what becomes a Python value without an operator of its own"

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in TO_PYTHON:
            self.found[place() + (func.__name__,)] += 1
        return func(*args, **kwargs or {})


def reads(step):
    with Watch() as watch, WatchPython(watch.found):
        step()
    return watch.found


def test_reads_are_noticed():
    x = torch.tensor([1.0, 2.0])
    for read in (
        lambda: x.sum().item(),
        lambda: float(x[0]),
        lambda: x.tolist(),
        lambda: bool((x > 0).all()),
        lambda: x[x > 1],
        lambda: x.clone().__setitem__(x > 1, x[:1]),
        lambda: (x > 1).nonzero(),
        lambda: torch.equal(x, x + 1),
        lambda: x.numpy(),
    ):
        assert reads(read)
    assert not reads(lambda: torch.where(x > 1, x, 0).softmax(0)[torch.tensor([0])])


@pytest.mark.parametrize("name", test_methods.METHODS)
def test_a_training_step_reads_no_value(name):
    model, batch = test_methods.small(name).train(), test_methods.make_batch()
    model.epoch = 1.0

    def step():
        model.zero_grad()
        model(**batch)["loss"].backward()

    step()  # the first may set up what later ones use
    found = reads(step)
    print(*found.items(), sep="\n")
    assert {where[:2] for where in found} <= EXCEPTIONS.keys()


@pytest.mark.parametrize("scores", [region_word_scores, local_scores, patch_word_scores])
def test_scores_of_all_pairs_in_the_form_for_gpus_read_no_value(scores, monkeypatch):
    patches, words = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 6, 4, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])

    def step(reports):
        scores(patches, words, mask, reports=reports).sum().backward()

    assert not reads(lambda: step(reports=2))
    monkeypatch.setattr(ops, "CACHED_BLOCK", 1)
    assert reads(lambda: step(reports=None))
