"""The norms of parts that a checkpoint stores in several tensors, and a pass that is gone on with."""

import math

import torch
from torch import nn

from utils.guidance.lewis.visitor import LewisVisitor
from utils.models.decoder import Component, Decoder
from utils.pair.batches import MicroBatch


class Pieces:
    """A checkpoint that stores `inner.weight` as its first three rows and the others."""

    def stored_names(self, parameter):
        return ("first", "rest")

    def split(self, parameter, value):
        return {"first": value[:3], "rest": value[3:]}


def visitor(layout):
    torch.manual_seed(0)
    block = nn.ModuleDict({"inner": nn.Linear(4, 5, bias=False)})
    blocks, component = nn.ModuleList([block]), Component("inner", "inner")
    decoder = Decoder(nn.Module(), nn.Module(), blocks, "layers", (component,), (("inner",),))
    return LewisVisitor(decoder, 6, 6, 0.0, layout), block


def test_a_linear_part_in_pieces_has_a_norm_for_each():
    found, block = visitor(Pieces())
    x = torch.randn(2, 3, 4)
    with found.observing(0, block):
        found.begin(MicroBatch.of([[0, 0, 0], [0, 0, 0]]))
        block["inner"](x)
    found.finish(0, block)
    (norms,) = (one.norms for one in found.stacks.values())
    weight, rows = block["inner"].weight.detach().double(), x.reshape(6, 4).double()
    for name, part in (("first", weight[:3]), ("rest", weight[3:])):
        wanted = math.sqrt(sum(float((row * line).square().sum()) for row in rows for line in part) / 6)
        assert abs(float(norms[name]) - wanted) < 1e-6
    assert not found.norms


def test_what_is_kept_of_a_pass_has_the_norms_of_pieces_too():
    found, block = visitor(Pieces())
    with found.observing(0, block):
        found.begin(MicroBatch.of([[0, 0, 0], [0, 0, 0]]))
        block["inner"](torch.randn(2, 3, 4))
    found.finish(0, block)
    again, _ = visitor(Pieces())
    again.restore(found.state(), torch.device("cpu"))
    assert again.stacks == found.stacks and again.norms == found.norms
