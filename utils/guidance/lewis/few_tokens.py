"""What is said of experts of a mixture that were given few tokens of the text."""

from collections.abc import Mapping

from utils.guidance.lewis.visitor import StackNorms


def few_tokens_note(model: str, stacks: Mapping[tuple[int, str], StackNorms], fewest: int) -> str:
    """A line that says how many experts of a model were taken towards the mean of their layer; "" for none.

    Args:
        model: its type.
        stacks: what was measured, by layer and component; each mixture has one component that leads down.
        fewest: the number of tokens below which an expert is taken there.
    """
    counts = [
        int(count)
        for (_, component), stack in stacks.items()
        if stack.tokens is not None and component.endswith("down_proj")
        for count in stack.tokens.tolist()
    ]
    few = sum(count < fewest for count in counts)
    if not few:
        return ""
    return (
        f"{model}: {few} of {len(counts)} experts of its mixtures were given fewer than {fewest} tokens of the text "
        f"({counts.count(0)} none) and are taken towards the mean of their layer (--expert_tokens; norms.csv has their tokens)"
    )
