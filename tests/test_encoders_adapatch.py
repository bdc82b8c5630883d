"AdaPatch: gradients by finite differences, independence of the batch, mixed precision"

import torch
from torch.autograd import gradcheck

from medvlp.encoders.adapatch import AdaPatch


def adapatch(width=6, width_out=8, scale=0.3):
    "A layer whose boxes are no longer the initial ones"
    torch.manual_seed(1)
    layer = AdaPatch(width, width_out)
    with torch.no_grad():
        layer.move.weight.normal_(std=scale)
    return layer


def test_gradients_of_map_offsets_sizes_and_mixing():
    layer = adapatch(2, 3).double()
    names = ("move.weight", "size", "mix.weight")
    parameters = dict(layer.named_parameters())

    def patches(maps, *changed):
        return torch.func.functional_call(layer, parameters | dict(zip(names, changed)), (maps,))

    inputs = [torch.randn(1, 2, 4, 4, dtype=torch.float64), *(parameters[name].detach() for name in names)]
    assert gradcheck(patches, [x.clone().requires_grad_() for x in inputs])


def test_a_study_does_not_depend_on_its_batch():
    layer, maps, order = adapatch(), torch.randn(2, 6, 8, 12), torch.tensor([1, 0])
    torch.testing.assert_close(layer(maps[order]), layer(maps)[order])


def test_boxes_are_single_precision_under_autocast():
    layer, maps = adapatch(), torch.randn(2, 6, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(maps).isfinite().all()
    assert layer.last_boxes.dtype == torch.float32
