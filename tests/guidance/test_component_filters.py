"""A component whose name ends another tensor's is refused before it is measured."""

from types import SimpleNamespace

import pytest

from tests.refusals import refused
from utils.guidance.component_filters import require_own_filters


class Base:
    """A base with one block of one component."""

    def __init__(self, *names, component):
        self.entry, self.checkpoint = SimpleNamespace(name="base"), SimpleNamespace(tensors=dict.fromkeys(names))
        self.decoder = SimpleNamespace(blocks=[None], components_of=lambda layer: [component])
        self.component = component

    def parts(self, layer, component):
        return [SimpleNamespace(name="wo", tensor=component)]


@pytest.mark.parametrize("other", ["vision.layers.0.wo.weight", "a.vision.layers.0.wo.bias"])
def test_a_name_within_another(other):
    with refused("filter-inexact", "no filter can hit layers.0.wo.weight without"):
        require_own_filters(Base("layers.0.wo.weight", other, component="layers.0.wo.weight"))


@pytest.mark.parametrize("other", ["layers.10.wo.weight", "vision.layers.0.wox.weight", "layers.0.wo.bias"])
def test_names_that_only_look_alike(other):
    require_own_filters(Base("layers.0.wo.weight", other, component="layers.0.wo.weight"))
