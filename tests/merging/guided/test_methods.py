"""guided_ties: mergekit's own ties where saliency says nothing, a dense version where it does, and registration."""

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mergekit import merge_methods
from mergekit.merge_methods.api import merge_tensors

from tests.conftest import ROOT
from tests.refusals import refused
from utils.merging.guided import mean as guided_mean
from utils.merging.guided.gram_method import GramMean
from utils.merging.guided.methods import (
    GuidedMean,
    GuidedTies,
    OwnMethod,
    register_methods,
)
from utils.recipes.saliency_vectors import vector_file_bytes

GUIDED_TIES, GUIDED_MEAN, GRAM_MEAN = "guided_ties", "guided_mean", "gram_mean"
NAME = "model.layers.0.mlp.up_proj.weight"
register_methods()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("vectors")


def write_vectors(path: Path, axis0: torch.Tensor, axis1: torch.Tensor) -> str:
    path.write_bytes(vector_file_bytes({NAME: (axis0, axis1)}))
    return str(path)


def dense(base, experts, *, normalize=True, scale=1.0, vote=True):
    """Ten lines, whole tensors, torch.topk on delta^2 F. None where an entry is too close to the cut to call."""
    changes, weights = [], torch.tensor([expert[1] for expert in experts])
    for x, weight, density, fisher in experts:
        worth = ((x - base).double() ** 2 * fisher).flatten()
        k = 0 if density <= 0 else len(worth) if density >= 1 else max(1, int(density * len(worth)))
        values, places = worth.topk(len(worth))
        if 0 < k < len(worth) and values[k - 1] - values[k] <= 1e-5 * values[k - 1]:
            return None
        mask = torch.zeros(len(worth)).index_fill_(0, places[:k], 1).view_as(base)
        changes.append(weight * (x - base) * mask)
    stack = torch.stack(changes)
    agree = (stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)) if vote else torch.ones_like(stack)
    divisor = (weights.view(-1, 1, 1) * agree).sum(0)
    mixed = (stack * agree).sum(0) / (torch.where(divisor == 0, 1.0, divisor) if normalize else 1)
    return base + scale * mixed


settings_of_a_merge = {
    "normalize": st.booleans(),
    "vote": st.booleans(),
    "scale": st.sampled_from([1.0, 0.3, 2.0]),
}
an_expert = st.tuples(
    st.sampled_from([1.0, 0.25, 1.5, 0.0]), st.one_of(st.sampled_from([0.0, 1e-9, 0.1, 0.5, 1.0]), st.floats(0, 1))
)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    experts=st.lists(an_expert, min_size=1, max_size=3),
    **settings_of_a_merge,
)
def test_it_is_the_dense_version(folder, seed, shape, experts, normalize, vote, scale):
    assume(vote or not normalize or sum(weight for weight, _ in experts) > 0)
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    tensors, rows, files = [base], [], []
    for place, (weight, density) in enumerate(experts):
        tensors.append(base + 0.1 * torch.randn(shape, generator=generator))
        axis0, axis1 = (torch.rand(n, generator=generator) ** 3 * 1e-6 + 1e-12 for n in shape)
        files.append(write_vectors(folder / f"{place}.safetensors", axis0, axis1))
        rows.append((tensors[-1], weight, density, axis0.double()[:, None] * axis1.double()))
    expected = dense(base, rows, normalize=normalize, scale=scale, vote=vote)
    assume(expected is not None)
    parameters = {
        "weight": [weight for weight, _ in experts],
        "density": [density for _, density in experts],
        "saliency": files,
        "normalize": normalize,
        "lambda": scale,
        "vote": vote,
    }
    before = [tensor.clone() for tensor in tensors]
    merged = merge_tensors(tensors, GUIDED_TIES, parameters=parameters, base_index=0, name=NAME)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(left, right) for left, right in zip(tensors, before, strict=True))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    experts=st.lists(an_expert, min_size=1, max_size=5),
    constant=st.sampled_from([None, 1.0, 3e-13, 7e20]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 0.3]),
)
def test_constant_saliency_and_none_are_mergekits_ties(folder, seed, experts, constant, dtype, normalize, scale):
    """Bit for bit, where no magnitudes tie."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn((13, 7), generator=generator).to(dtype)
    others = [base + 0.1 * torch.randn(base.shape, generator=generator).to(dtype) for _ in experts]
    assume(all((other - base).abs().float().unique().numel() == base.numel() for other in others))
    file = (
        "" if constant is None else write_vectors(folder / "c", torch.full((13,), constant), torch.full((7,), constant))
    )
    parameters = {
        "weight": [weight for weight, _ in experts],
        "density": [density for _, density in experts],
        "normalize": normalize,
        "lambda": scale,
    }
    guided = {**parameters, "saliency": [file] * len(experts)}
    ours = merge_tensors([base, *others], GUIDED_TIES, parameters=guided, base_index=0, name=NAME)
    stock = merge_tensors([base, *others], "ties", parameters=parameters, base_index=0)
    assert ours.dtype == dtype and torch.equal(ours, stock)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_vote_and_cut_it_is_mergekits_task_arithmetic(normalize, dtype):
    base, *others = torch.randn((4, 9, 9), generator=torch.Generator().manual_seed(2)).to(dtype)
    parameters = {"weight": [0.5, 1.0, 0.25], "normalize": normalize, "lambda": 0.7}
    ours = merge_tensors([base, *others], GUIDED_TIES, parameters={**parameters, "vote": False}, base_index=0)
    stock = merge_tensors([base, *others], "task_arithmetic", parameters=parameters, base_index=0)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("density", [1e-6, 0.1, 0.37, 0.9])
def test_exactly_k_entries_change(folder, dtype, density):
    """One expert that differs everywhere, so that every entry kept is an entry changed; many ranks are equal."""
    base = torch.zeros(31, 17, dtype=dtype)
    signs = torch.randint(0, 2, base.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expert = signs.to(dtype) * 0.5
    axis0, axis1 = torch.arange(1.0, 32) // 5 + 1, torch.ones(17)
    file = write_vectors(folder / "k", axis0, axis1)
    parameters = {"weight": [1.0], "density": [density], "saliency": [file]}
    merged = merge_tensors([base, expert], GUIDED_TIES, parameters=parameters, base_index=0, name=NAME)
    k = max(1, int(density * base.numel()))
    changed = merged != base
    assert merged.dtype == dtype and int(changed.sum()) == k
    assert torch.equal(merged[changed], expert[changed])
    # rows of larger axis0 come first, and of equal ones the first entries
    order = (axis0[:, None] * axis1).flatten().sort(descending=True, stable=True).indices[:k]
    assert torch.equal(changed.flatten().nonzero().flatten(), order.sort().values)


def test_bfloat16_is_computed_in_bfloat16(folder):
    """The changes and sums of ties in the working dtype; ranks in float32."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn((20, 30), generator=generator).bfloat16()
    others = [base + (0.2 * torch.randn(base.shape, generator=generator)).bfloat16() for _ in range(2)]
    axes = [tuple(torch.rand(n, generator=generator) for n in base.shape) for _ in others]
    files = [write_vectors(folder / f"b{place}", *pair) for place, pair in enumerate(axes)]
    parameters = {"weight": [1.0, 0.75], "density": [0.3, 0.6]}
    merged = merge_tensors(
        [base, *others], GUIDED_TIES, parameters={**parameters, "saliency": files}, base_index=0, name=NAME
    )
    trimmed = []
    for other, (axis0, axis1), density in zip(others, axes, parameters["density"], strict=True):
        worth = (other - base).double() ** 2 * axis0.double()[:, None] * axis1.double()
        places = worth.flatten().topk(int(density * worth.numel())).indices
        mask = torch.zeros(worth.numel(), dtype=torch.bool).index_fill_(0, places, True).view_as(base)
        trimmed.append(torch.where(mask, other, base))
    whole = {**parameters, "density": [1.0, 1.0]}
    expected = merge_tensors([base, *trimmed], "ties", parameters=whole, base_index=0)
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, expected)


def test_saliency_is_per_model(folder):
    """One by saliency, the other by magnitude."""
    base, x = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    file = write_vectors(folder / "p", torch.tensor([1e6, 1.0]), torch.ones(2))
    parameters = {"weight": [1.0, 1.0], "density": [0.5, 0.5], "saliency": [file, ""], "normalize": False}
    merged = merge_tensors([base, x, 10 * x], GUIDED_TIES, parameters=parameters, base_index=0, name=NAME)
    assert merged.tolist() == [[1, 2], [30, 40]]


def test_density_0_and_1_need_no_vectors():
    base, x = torch.zeros(3), torch.ones(3)
    parameters = {"weight": [1.0], "saliency": ["nowhere"]}
    for density in (0.0, 1.0):
        merged = merge_tensors(
            [base, x], GUIDED_TIES, parameters={**parameters, "density": [density]}, base_index=0, name=NAME
        )
        assert merged.tolist() == [density] * 3
    with refused("vectors-missing"):
        merge_tensors([base, x], GUIDED_TIES, parameters={**parameters, "density": [0.5]}, base_index=0, name=NAME)


def test_vectors_that_do_not_fit_name_file_and_tensor(folder):
    file = write_vectors(folder / "f", torch.ones(2), torch.ones(3))
    parameters = {"weight": [1.0], "density": [0.5], "saliency": [file]}
    with refused("saliency-shape"):
        merge_tensors(
            [torch.zeros(3, 2), torch.ones(3, 2)], GUIDED_TIES, parameters=parameters, base_index=0, name=NAME
        )


def test_the_base_is_required():
    with pytest.raises(ValueError, match="requires a base"):
        merge_tensors([torch.ones(1), torch.ones(1)], GUIDED_TIES, parameters={"weight": 1.0})


def test_registering_twice_changes_nothing(run_command_line, tmp_path):
    register_methods()
    own = [method for method in merge_methods.registered_methods() if isinstance(method, OwnMethod)]
    assert [type(method) for method in own] == [GuidedTies, GuidedMean, GramMean]
    assert own == [merge_methods.get(name) for name in (GUIDED_TIES, GUIDED_MEAN, GRAM_MEAN)]
    probe = (
        "from mergekit import merge_methods\n"
        "before = merge_methods.registered_methods()\n"
        "from utils.merging.guided.methods import register_methods\n"
        "assert merge_methods.registered_methods() == before, 'importing must not register'\n"
        "register_methods(); register_methods()\n"
        "after = merge_methods.registered_methods()\n"
        "own = tuple(merge_methods.get(name) for name in ('guided_ties', 'guided_mean', 'gram_mean'))\n"
        "assert tuple(after) == (*before, *own)\n"
        "print('fine')"
    )
    (tmp_path / "probe.py").write_text(probe)
    done = run_command_line(tmp_path / "probe.py", PYTHONPATH=str(ROOT))
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize("name", [GUIDED_TIES, GUIDED_MEAN])
def test_a_foreign_method_of_that_name_is_refused(monkeypatch, name):
    from mergekit.merge_methods import registry

    monkeypatch.setitem(registry._METHODS, name, merge_methods.get("linear"))
    with refused("recipe-method-taken"):
        register_methods()


# --- guided_mean ------------------------------------------------------------------------------------------------------


def dense_mean(base, experts, *, power, floor, scale):
    """Ten lines, whole tensors, float64. None where an entry is too close to a cut to call."""
    above, below = torch.zeros_like(base, dtype=torch.float64), torch.zeros_like(base, dtype=torch.float64)
    plain, total = torch.zeros_like(above), sum(weight for _, weight, _, _ in experts)
    for x, weight, density, fisher in experts:
        delta, worth = (x - base).double(), ((x - base).double() ** 2 * fisher**power).flatten()
        k = 0 if density <= 0 else len(worth) if density >= 1 else max(1, int(density * len(worth)))
        values, places = worth.topk(len(worth))
        if 0 < k < len(worth) and values[k - 1] - values[k] <= 1e-5 * values[k - 1] and weight:
            return None
        delta = delta * torch.zeros(len(worth)).index_fill_(0, places[:k], 1).view_as(base)
        q = (fisher / fisher.mean()) ** power if fisher.any() else torch.zeros_like(fisher)
        above, below = above + weight * q * delta, below + weight * q
        plain = plain + weight * delta / (total or 1)
    below = below + floor * below.mean() / len(experts)
    return base + scale * torch.where(below == 0, plain, above / torch.where(below == 0, 1.0, below))


a_mean_expert = st.tuples(
    st.sampled_from([1.0, 0.25, 3.0, 0.0]),
    st.one_of(st.just(1.0), st.sampled_from([0.0, 1e-9, 0.1, 0.5]), st.floats(0, 1)),
    st.sampled_from(["some", "some", "rows", "nothing"]),
)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.one_of(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 30))),
    experts=st.lists(a_mean_expert, min_size=1, max_size=3),
    power=st.sampled_from([0.5, 1.0, 0.3]),
    floor=st.sampled_from([0.1, 0.0, 2.0]),
    scale=st.sampled_from([1.0, 0.3]),
)
def test_the_mean_is_the_dense_version(folder, seed, shape, experts, power, floor, scale):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    tensors, rows, files = [base], [], []
    for place, (weight, density, kind) in enumerate(experts):
        tensors.append(base + 0.1 * torch.randn(shape, generator=generator))
        axes = [torch.rand(n, generator=generator) ** 3 * 1e-6 + 1e-12 for n in shape]
        if kind == "rows":  # a token that was never seen
            axes[0][torch.rand(shape[0], generator=generator) < 0.5] = 0
        elif kind == "nothing":
            axes = [torch.zeros(n) for n in shape]
        path = folder / f"m{place}.safetensors"
        path.write_bytes(vector_file_bytes({NAME: tuple(axes)}))
        files.append(str(path))
        fisher = axes[0].double() if len(shape) == 1 else axes[0].double()[:, None] * axes[1].double()
        assume(kind == "some" or density in (0.0, 1.0))  # else zeros tie
        rows.append((tensors[-1], weight, density, fisher))
    expected = dense_mean(base, rows, power=power, floor=floor, scale=scale)
    assume(expected is not None)
    parameters = {"weight": [one[0] for one in experts], "density": [one[1] for one in experts], "saliency": files}
    parameters |= {"power": power, "floor": floor, "lambda": scale}
    before = [tensor.clone() for tensor in tensors]
    merged = merge_tensors(tensors, GUIDED_MEAN, parameters=parameters, base_index=0, name=NAME)
    torch.testing.assert_close(merged, expected.float(), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(left, right) for left, right in zip(tensors, before, strict=True))


@pytest.mark.parametrize("constant", [None, 1.0, 3e-13, 7e20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_squares_without_a_floor_are_the_plain_mean(folder, constant, dtype):
    base, *others = torch.randn((4, 13, 7), generator=torch.Generator().manual_seed(3)).to(dtype)
    file = (
        "" if constant is None else write_vectors(folder / "e", torch.full((13,), constant), torch.full((7,), constant))
    )
    weights = [1.0, 0.5, 2.0]
    parameters = {"weight": weights, "saliency": [file] * 3, "floor": 0.0}
    merged = merge_tensors([base, *others], GUIDED_MEAN, parameters=parameters, base_index=0, name=NAME)
    mean = sum(weight * (x.double() - base.double()) for weight, x in zip(weights, others, strict=True)) / 3.5
    expected = base.double() + mean
    assert merged.dtype == dtype
    if dtype == torch.bfloat16:  # rounded once: no farther off than half a step
        torch.testing.assert_close(merged.double(), expected, rtol=2**-8, atol=0)
        assert (merged == expected.to(dtype)).float().mean() > 0.98
    else:
        torch.testing.assert_close(merged.double(), expected, rtol=0, atol=1e-6)


def test_a_mean_in_several_pieces_is_that_of_one(folder, monkeypatch):
    base, *others = torch.randn((3, 50, 8), generator=torch.Generator().manual_seed(4))
    files = [write_vectors(folder / f"s{place}", torch.rand(50), torch.rand(8)) for place in range(2)]
    parameters = {"weight": [1.0, 2.0], "density": [1.0, 0.4], "saliency": files}
    merged = [merge_tensors([base, *others], GUIDED_MEAN, parameters=parameters, base_index=0, name=NAME)]
    monkeypatch.setattr(guided_mean, "ENTRIES_AT_ONCE", 3 * 8)
    merged.append(merge_tensors([base, *others], GUIDED_MEAN, parameters=parameters, base_index=0, name=NAME))
    assert torch.equal(*merged)


def test_scalars_and_empty_tensors_have_a_mean(folder):
    (folder / "scalar").write_bytes(vector_file_bytes({NAME: (torch.ones(1),)}))
    parameters = {"weight": [1.0], "saliency": [str(folder / "scalar")], "floor": 1.0}
    base, x = torch.tensor(1.0), torch.tensor(3.0)
    assert merge_tensors([base, x], GUIDED_MEAN, parameters=parameters, base_index=0, name=NAME).tolist() == 2
    empty = torch.zeros(0, 4)
    parameters["saliency"] = [write_vectors(folder / "empty", torch.ones(0), torch.ones(4))]
    assert merge_tensors([empty, empty], GUIDED_MEAN, parameters=parameters, base_index=0, name=NAME).shape == (0, 4)


def test_without_a_weight_no_vectors_are_read_and_nothing_changes():
    base, x = torch.ones(3), torch.zeros(3)
    parameters = {"weight": [0.0], "saliency": ["nowhere"]}
    assert torch.equal(merge_tensors([base, x], GUIDED_MEAN, parameters=parameters, base_index=0, name=NAME), base)
    with refused("vectors-missing"):
        merge_tensors([base, x], GUIDED_MEAN, parameters={**parameters, "weight": [1.0]}, base_index=0, name=NAME)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"power": 0.0}, "power must be a number above 0 and at most 1, got 0"),
        ({"power": 1.5}, "power must be a number above 0 and at most 1, got 1.5"),
        ({"floor": -0.1}, "floor must be a number of at least 0, got -0.1"),
        ({"floor": float("inf")}, "floor must be a number of at least 0, got inf"),
        ({"floor": float("nan")}, "floor must be a number of at least 0, got nan"),
        ({"weight": [-1.0]}, "weight must be a number of at least 0, got -1"),
    ],
)
def test_numbers_outside_their_range_are_refused(change, words):
    parameters = {"weight": [1.0], "saliency": [""], **change}
    with pytest.raises(ValueError, match=words):
        merge_tensors([torch.ones(2), torch.zeros(2)], GUIDED_MEAN, parameters=parameters, base_index=0, name=NAME)


def test_saliency_must_be_said_and_must_fit(folder):
    with pytest.raises(TypeError, match="Missing required parameter saliency"):
        merge_tensors([torch.ones(2), torch.zeros(2)], GUIDED_MEAN, parameters={"weight": [1.0]}, base_index=0)
    parameters = {"weight": [1.0], "saliency": [write_vectors(folder / "w", torch.ones(2), torch.ones(3))]}
    for shape in ((3, 2), (2,), (2, 3, 1)):
        with refused("saliency-shape"):
            merge_tensors([torch.ones(shape)] * 2, GUIDED_MEAN, parameters=parameters, base_index=0, name=NAME)
