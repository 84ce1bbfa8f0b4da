"""Passes that stop at every block refuse what they could not follow.

python -m pytest tests/passes/test_flows.py
"""

import torch
from torch import nn

from tests.refusals import refused
from utils.pair.batches import MicroBatch
from utils.passes.flows import Flow, stops


class Body(nn.Module):
    """Two blocks that see the tokens of all samples side by side, as XLNet's do, or as usual."""

    def __init__(self, tokens_first: bool) -> None:
        super().__init__()
        self.tokens_first = tokens_first
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, input_ids, attention_mask, use_cache):
        states = torch.nn.functional.one_hot(input_ids % 4, 4).float()
        states = states.transpose(0, 1) if self.tokens_first else states
        for block in self.blocks:
            states = block(states)
        return (states,)


def begun(tokens_first: bool) -> tuple[Body, Flow]:
    body = Body(tokens_first)
    batch = MicroBatch.of([[0, 1, 2, 3, 4], [5, 6, 7]])
    return body, Flow(body, batch, torch.device("cpu"))


def test_states_with_tokens_first_are_refused():
    body, flow = begun(tokens_first=True)
    with stops(body.blocks):
        flow.advance()
        with refused("model-unsupported"):
            flow.expect(0)
        flow.close()


def test_states_with_samples_first_are_followed_to_the_end():
    body, flow = begun(tokens_first=False)
    with stops(body.blocks):
        flow.advance()
        for layer in range(2):
            flow.expect(layer)
            arrival = flow.arrival
            flow.advance_with(arrival.forward(*arrival.args, **arrival.kwargs))
    assert flow.result().shape == (2, 5, 4)
