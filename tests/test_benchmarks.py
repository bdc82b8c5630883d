"Benchmarks in several processes"

import pytest
import small

from medvlp.benchmarks.steps import step_benchmark
from medvlp.methods.base import method_names
from medvlp.training.pretrain import PretrainOptions

ENCODERS = dict(image_encoder=small.VIT, text_encoder=small.BERT, vocab_size=60, max_tokens=12)


def options(name, **changes):
    own = dict(dim=16) | small.OPTIONS.get(name, {})
    return PretrainOptions(method=name, options=own, **ENCODERS | changes)


@pytest.mark.slow
def test_every_method_is_measured_in_two_processes():
    methods = {name: options(name) for name in method_names()}
    table = step_benchmark(methods, batches=[4], precisions=["fp32", "bf16"], processes=[2], repeats=1)
    assert table.method.tolist() == [name for name in methods for _ in range(2)]
    assert (table.select_dtypes("number") > 0).all(axis=None) and set(table.processes) == {2}


@pytest.mark.slow
def test_the_error_of_a_process_ends_the_benchmark():
    resnet = options("mpma", image_encoder=small.RESNET)
    with pytest.raises(RuntimeError, match="Give mpma a ViT"):
        step_benchmark(dict(mpma=resnet), batches=[4], processes=[2], repeats=1)
