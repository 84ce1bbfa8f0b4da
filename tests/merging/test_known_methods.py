"""What is written down of merge methods is what the installed mergekit, and this project's own methods, have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registered_methods
from pydantic import BaseModel, ValidationError

from utils.mergekit_api import ParameterScope
from utils.merging import recipe_check
from utils.merging.guided.methods import register_methods
from utils.merging.known_methods import METHODS, KnownMethod, setting_problems


def known_to_mergekit() -> dict[str, KnownMethod]:
    register_methods()
    found = {}
    for method in registered_methods():
        spec = method.spec
        scopes = {one.name: one.scope for one in spec.parameters}
        kinds = {one.name: one.value_type for one in spec.parameters}
        shared = {name: kinds[name] for name, scope in scopes.items() if scope == ParameterScope.SHARED}
        own = {name: kind for name, kind in kinds.items() if name not in shared}
        found[spec.name] = KnownMethod(
            spec.name,
            spec.contract.base.value,
            shared,
            own,
            of_base=ParameterScope.INPUT in scopes.values(),
            cuts="density" in own and getattr(method, "sparsification_method", method) is not None,
        )
    return found


def test_every_method_and_parameter_is_the_registered_one():
    assert known_to_mergekit() == METHODS


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("Recipe", "MergeConfiguration"),
        ("Model", "InputModelDefinition"),
        ("Source", "InputSliceDefinition"),
        ("Slice", "OutputSliceDefinition"),
        ("Module", "OutputModuleDefinition"),
        ("Tokenizer", "TokenizerConfig"),
        ("Token", "TokenEmbeddingConfig"),
        ("ModelName", "ModelReference"),
        ("ModelPath", "ModelPath"),
    ],
)
def test_every_key_is_mergekits(ours, theirs):
    import mergekit.config
    import mergekit.tokenizer.config

    schema: type[BaseModel] = getattr(mergekit.config, theirs, None) or getattr(mergekit.tokenizer.config, theirs, None)
    if schema is None:
        import mergekit.common

        schema = getattr(mergekit.common, theirs)
    fields = getattr(recipe_check, ours).__dataclass_fields__
    required = {name for name, one in schema.model_fields.items() if one.is_required()}
    assert set(fields) == set(schema.model_fields)
    assert {
        name for name, one in getattr(recipe_check, ours).__pydantic_fields__.items() if one.is_required()
    } == required


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.floats(-2, 2), st.sampled_from(["", "1e-3", "x"]))
ENTRIES = st.dictionaries(st.sampled_from(["filter", "value", "x"]), st.one_of(SCALARS, st.lists(SCALARS, max_size=2)))
SETTINGS = st.one_of(SCALARS, ENTRIES, st.lists(st.one_of(SCALARS, ENTRIES), max_size=3))


@given(setting=SETTINGS)
def test_a_setting_that_passes_is_one_that_mergekit_takes(setting):
    """And what mergekit takes is refused for a reason of this project's own only: idle keys, no value, no share."""
    problems = list(setting_problems(METHODS["ties"], {"density": setting}, own=True))
    models = [{"model": "a"}, {"model": "b", "parameters": {"density": setting}}]
    try:
        MergeConfiguration.model_validate({"merge_method": "ties", "base_model": "a", "models": models})
    except ValidationError:
        assert problems
    else:
        ours = {"unknown-key", "no-value", "out-of-range", "wrong-type"}
        assert {problem.code for problem in problems} <= ours
