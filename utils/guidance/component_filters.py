"""Whether a filter can be written for each component, asked before anything is measured.

mergekit's filters are substrings of names. Where a component's name is the end of another tensor's (`layers.0.wo` beside
`vision.layers.0.wo`), no filter hits the one without the other, and a recipe by components cannot be written.
"""

from utils.errors import Problem, raise_collected
from utils.passes.subjects import Subject, component_names


def require_own_filters(base: Subject) -> None:
    """Refuse a base in whose other tensors' names those of its components stand.

    Raises:
        UserError: a component's name stands within that of another tensor.
    """
    stems = {name.removesuffix(".weight"): name for name in component_names(base)}
    problems = []
    for name in base.checkpoint.tensors:
        parts = name.split(".")
        for start in range(1, len(parts)):
            for end in range(start + 1, len(parts) + 1):
                if (found := stems.get(".".join(parts[start:end]))) is not None:
                    text = f"no filter can hit {found} without {name}, so a recipe by components cannot be written"
                    problems.append(Problem(text, "filter-inexact"))
    raise_collected(problems[:3], f"base model {base.entry.name}: use another --guidance, such as gram_mean")
