"""Second moments of what each expert of a mixture is given: of its own tokens, weighted as they count in the output.

    s_e,j = sum over the tokens t routed to e of (g_t,e x_t,j)^2          g: the gate's weight of e for that token

for the input x of each matrix of each expert. An expert that is rarely asked, or hardly counts where it is, gets small
sums; divided by all tokens of a text they are comparable between experts, and with the linear parts beside them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from utils.errors import UserError
from utils.models.decoder import Component
from utils.pair.batches import MicroBatch
from utils.passes.expert_products import ExpertProducts, ExpertRows, unknown_routing
from utils.passes.routed_tokens import take_towards_mean


@dataclass
class StackSums:
    """What was summed up of one stack of matrices.

    Attributes:
        squares: [experts, in], float64.
        tokens: [experts], float64: how many real tokens each expert had.
        inputs_last: whether a matrix is [out, in], else [in, out]; None before anything was seen.
    """

    squares: torch.Tensor
    tokens: torch.Tensor
    inputs_last: bool | None = None

    def metric(self, stack: torch.Tensor, divisor: float, fewest: int = 0) -> torch.Tensor:
        """W_ij^2 s_j of every expert, float32, of the stack's shape.

        Args:
            stack: the matrices.
            divisor: what the sums are divided by.
            fewest: an expert with fewer tokens is taken towards the mean of its layer (`take_towards_mean`).
        """
        return stack.float().square_().mul_(self._spread(divisor, fewest))

    def metrics(self, stack: torch.Tensor, divisor: float, fewest: int = 0) -> Iterator[torch.Tensor]:
        """The same of one expert after the other, whose matrices are taken as `stack[expert]`."""
        for expert, spread in enumerate(self._spread(divisor, fewest)):
            yield stack[expert].float().square_().mul_(spread)

    def _spread(self, divisor: float, fewest: int) -> torch.Tensor:
        moments = take_towards_mean(self.squares / divisor, self.tokens, fewest)
        return (moments[:, None, :] if self.inputs_last else moments[:, :, None]).float()


class ExpertInputs:
    """Sums up what the experts of one block's mixtures are given.

    Args:
        stacks: the components of the block that are stacks of experts' matrices.
    """

    def __init__(self, stacks: Sequence[Component]) -> None:
        self.stacks = tuple(stacks)
        self.sums: dict[Component, StackSums] = {}
        self._products = ExpertProducts(self.stacks, self._add)

    @contextlib.contextmanager
    def attached(self, block: nn.Module) -> Iterator[None]:
        """Start from zero and watch a block's experts while the context lasts; they run one after the other meanwhile."""
        self.sums = {}
        with self._products.attached(block):
            yield

    def begin(self, batch: MicroBatch) -> None:
        """Say which micro-batch comes next (on the block's device)."""
        self._products.batch = batch

    def checked(self, layer: int) -> dict[Component, StackSums]:
        """The sums by component.

        Raises:
            UserError: an architecture that does not multiply its tokens with the stacks one expert after the other.
        """
        for one in self.stacks:
            if one not in self.sums and (experts := self._products.idle_experts(one)):
                empty = torch.zeros(experts, 1, dtype=torch.float64, device=self._products.device)
                self.sums[one] = StackSums(empty, empty[:, 0])
            if one not in self.sums:
                raise UserError(
                    f"{one.own_path} of block {layer}: this architecture computes its experts in a way that cannot be "
                    "watched; leave it out of components",
                    "model-unsupported",
                )
        return self.sums

    def _add(self, component: Component, stack: torch.Tensor, given: ExpertRows) -> None:
        if component not in self.sums:
            empty = torch.zeros(stack.shape[0], given.rows.shape[-1], dtype=torch.float64, device=given.rows.device)
            self.sums[component] = StackSums(empty, empty.new_zeros(stack.shape[0]))
        sums = self.sums[component]
        sums.inputs_last = given.inputs_last
        if given.expert is None:  # every token to every expert, those that are not its own as zeros
            squares = given.rows.float().square()
            sums.squares += squares.sum(dim=1, dtype=torch.float64)
            sums.tokens += (squares.amax(dim=2) > 0).sum(dim=1)
            return
        if given.gates is None:
            raise unknown_routing(component)
        weighted = given.rows.float() * given.gates.float()
        sums.squares[given.expert] += weighted.square().sum(dim=0, dtype=torch.float64)
        sums.tokens[given.expert] += len(weighted)
