"""Gram matrices and scores against whole models in memory: hooks on the base, each module of each expert called itself."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.plain_gradients import CPU, token_lists
from tests.refusals import refused
from tests.selected import few
from tests.tiny_checkpoints import FAMILIES, VOCABULARY, save_any
from utils.guidance.submodule_linearity.comparison import ComparedText, compare_models
from utils.guidance.submodule_linearity.nonlinearity import GRID
from utils.guidance.submodule_linearity.outside_changes import ComparedModel
from utils.guidance.submodule_linearity.parts import require_comparable
from utils.guidance.submodule_linearity.weights import merging_weights, misfit
from utils.models.decoder import find_decoder
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.models.weight_source import StreamedWeights, build_skeleton
from utils.pair.batches import micro_batches
from utils.passes import snapshots

NAMES = ("base", "one", "two")
LENGTHS = ((17, 2, 23, 4), (9, 21, 12))  # of each text; longer than the sliding windows (8)


TEXTS = [token_lists(lengths, seed) for seed, lengths in enumerate(LENGTHS)]


def save_models(family, folder, names=NAMES, size=0.02):
    """A base, and experts that differ from it a little everywhere."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(save_any(family, folder / "base"), dtype=torch.bfloat16)
    for seed, name in enumerate(names[1:]):
        torch.manual_seed(seed + 7)
        other = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(torch.randn_like(parameter) * size)
        other.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of the models of a family, read only: `models("llama", size=0.2)`; made once."""
    made = {}

    def saved(family, size=0.02):
        if (family, size) not in made:
            made[family, size] = save_models(family, tmp_path_factory.mktemp(family), size=size)
        return made[family, size]

    return saved


@pytest.fixture
def llamas(models, tmp_path):
    """A copy of Llama's, to change."""
    return shutil.copytree(models("llama"), tmp_path, dirs_exist_ok=True)


def compared(folder, name):
    checkpoint = open_checkpoint(str(folder / name))
    model = build_skeleton(checkpoint, torch.bfloat16, False)
    decoder = find_decoder(model, [], {}, name)
    headers = stored_layout(model, checkpoint)
    sources = [StreamedWeights(headers, CPU, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return ComparedModel(decoder, *sources, name)


def everything(folder, names=NAMES, texts=TEXTS, tokens_at_once=64, scores=True, owners=((0,), (1,)), **more):
    """The base, and all that is measured of a pair."""
    base, *experts = (compared(folder, name) for name in names)
    given = [ComparedText(micro_batches(text, tokens_at_once, 0), own) for text, own in zip(texts, owners, strict=True)]
    found = compare_models(base, experts, given, CPU, scores=scores, **more)
    assert all(parameter.is_meta for model in (base, *experts) for parameter in model.decoder.model.parameters())
    assert not any("forward" in vars(module) or module._forward_hooks for module in base.decoder.model.modules())
    return base, found


def measured(folder, **how):
    """The base, and what is measured of each part."""
    base, found = everything(folder, **how)
    kept = ("levels", "layer", "name", "scores")
    return base, [
        SimpleNamespace(grams=found.grams(part), **{key: getattr(part, key) for key in kept}) for part in found.parts
    ]


def whole(folder, name):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()


def first(output):
    return output[0] if isinstance(output, tuple) else output


def calls_of(base, sample):
    """Every module call of a plain pass: path -> (args, kwargs, output)."""
    found = {}

    def hook(path):
        def keep(module, args, kwargs, output):
            if isinstance(first(output), torch.Tensor):
                found[path] = (args, kwargs, first(output).clone())  # some models go on to add to it in place

        return keep

    handles = [module.register_forward_hook(hook(path), with_kwargs=True) for path, module in base.named_modules()]
    with torch.no_grad():
        base(input_ids=torch.tensor([sample]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def expected_parts(base, blocks_path):
    """(level, layer, submodule) -> path in the model, written down without the code under test."""
    blocks = base.get_submodule(blocks_path)
    found = {}
    for layer, block in enumerate(blocks):
        prefix = f"{blocks_path}.{layer}"
        found["block", layer, "block"] = prefix
        for name, child in block.named_children():
            if list(child.parameters()):
                found["attention_mlp", layer, name] = f"{prefix}.{name}"
        for name, module in block.named_modules():
            if list(module.parameters()) and not list(module.children()):
                found["tensor", layer, name] = f"{prefix}.{name}"
    return found


def outside_paths(base, blocks_path):
    return [
        path
        for path, module in base.named_modules()
        if list(module.parameters(recurse=False)) and not path.startswith(blocks_path + ".")
    ]


def grams_of(changes, tokens):
    flat = torch.stack(changes).double().flatten(1)
    return flat @ flat.T / tokens


EVERY = [*FAMILIES, "opt", "bloom", "granite", "cohere", "falcon", "modernbert-decoder"]
QUICK = ("llama", "gemma3", "gpt2", "gpt_neox", "modernbert-decoder")  # norms of heads, Conv1D, side by side, no mask


@pytest.mark.parametrize("family", few(EVERY, *QUICK))
def test_every_gram_matrix_equals_a_direct_evaluation(family, models):
    folder = models(family)
    compared_base, parts = measured(folder)
    base, *experts = (whole(folder, name) for name in NAMES)
    blocks_path = compared_base.decoder.blocks_path
    paths = expected_parts(base, blocks_path)
    found = {(level, part.layer, part.name): part for part in parts for level in part.levels}
    outside = outside_paths(base, blocks_path)
    inside = {key for key in found if 0 <= key[1] < len(compared_base.decoder.blocks)}
    assert inside == set(paths)
    assert {key[2] for key in found if key not in inside} == set(outside)
    paths |= {key: key[2] for key in found if key not in inside}
    for text, samples in enumerate(TEXTS):
        total = dict.fromkeys(paths, 0)
        for sample in samples:
            calls = calls_of(base, sample)
            for key, path in paths.items():
                args, kwargs, output = calls[path]
                with torch.no_grad():
                    changes = [
                        first(expert.get_submodule(path)(*args, **kwargs)).double() - output.double()
                        for expert in experts
                    ]
                total[key] = total[key] + grams_of(changes, sum(map(len, samples)))
        for key, expected in total.items():
            got = found[key].grams[text]
            scale = expected.diagonal().max()
            assert scale > 0
            torch.testing.assert_close(
                got, expected, atol=3e-4 * float(scale), rtol=0, msg=lambda m, k=key: f"{k}: {m}"
            )


def interpolated(base, expert, path, share):
    module = copy.deepcopy(base.get_submodule(path))
    for mine, its in zip(module.parameters(), expert.get_submodule(path).parameters(), strict=True):
        mine.data = mine.data + share * (its.data - mine.data)
    return module


@pytest.mark.parametrize(
    ("family", "tokens_at_once"), [("llama", 8), ("gemma3", 1000), pytest.param("gpt2", 30, marks=pytest.mark.slow)]
)
def test_scores_over_all_text_equal_a_direct_evaluation(family, tokens_at_once, models):
    folder = models(family, size=0.2)
    compared_base, parts = measured(folder, tokens_at_once=tokens_at_once)
    base, *experts = (whole(folder, name) for name in NAMES)
    paths = expected_parts(base, compared_base.decoder.blocks_path)
    found = {(level, part.layer, part.name): part for part in parts for level in part.levels}
    for key, path in paths.items():
        if key[0] == "tensor":
            continue
        for place, expert in enumerate(experts):
            distance = torch.zeros(len(GRID), len(GRID), dtype=torch.float64)
            for sample in TEXTS[place]:
                args, kwargs, _ = calls_of(base, sample)[path]
                with torch.no_grad():
                    outputs = [first(interpolated(base, expert, path, a)(*args, **kwargs)).flatten(0, 1) for a in GRID]
                distance += torch.tensor([[float((x - y).norm(dim=-1).sum()) for x in outputs] for y in outputs])
            share = distance / distance[-1, 0]
            grid = torch.tensor(GRID)
            expected = (share - (grid[:, None] - grid).abs()).square().mean()
            assert found[key].scores[place] == pytest.approx(float(expected), rel=2e-2, abs=1e-7), key
    attention = [
        part.scores[0] for part in parts if "attention_mlp" in part.levels and "attn" in part.name and part.scores
    ]
    assert max(attention) > 1e-4


@pytest.mark.parametrize("family", few(["llama", "gemma3", "gpt2"], "gemma3"))
def test_scores_do_not_depend_on_micro_batches(family, models):
    _, together = everything(models(family), tokens_at_once=1000)
    for tokens_at_once in (1, 30):
        _, other = everything(models(family), tokens_at_once=tokens_at_once)
        assert together.whole == pytest.approx(other.whole, rel=1e-5) and min(together.whole.values()) > 1e-7
        for one, two in zip(together.parts, other.parts, strict=True):
            assert one.scores == pytest.approx(two.scores, rel=1e-5, abs=1e-12)


def between(base, expert, share):
    model = copy.deepcopy(base)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), expert.parameters(), strict=True):
            ours.lerp_(theirs, share)
    return model


@pytest.mark.parametrize("family", few(["llama", "gemma3", "gpt2"], "gemma3"))
def test_the_whole_models_score_equals_a_direct_evaluation(family, models):
    folder = models(family, size=0.05)
    _, found = everything(folder, tokens_at_once=30)
    base, *experts = (whole(folder, name).double() for name in NAMES)
    grid = torch.tensor(GRID)
    for place, expert in enumerate(experts):
        models = [between(base, expert, share) for share in GRID]
        distance = torch.zeros(len(GRID), len(GRID), dtype=torch.float64)
        for sample in TEXTS[place]:
            with torch.no_grad():
                finals = [model.base_model(input_ids=torch.tensor([sample])).last_hidden_state[0] for model in models]
            distance += torch.stack([torch.stack([(one - two).norm(dim=-1).sum() for two in finals]) for one in finals])
        expected = (distance / distance[-1, 0] - (grid[:, None] - grid).abs()).square().mean()
        assert found.whole[place] == pytest.approx(float(expected), rel=1e-4) and float(expected) > 1e-4


@pytest.mark.parametrize(
    ("family", "stop", "scores"),
    [
        ("gemma2", 1, True),
        ("granite", 2, False),
        pytest.param("gemma2", 2, False, marks=pytest.mark.slow),
        pytest.param("granite", 1, True, marks=pytest.mark.slow),
    ],
)
def test_a_comparison_that_was_stopped_between_two_blocks_goes_on(family, stop, scores, models, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "SECONDS", -1.0)
    monkeypatch.setattr(snapshots, "MOST_SHARE", float("inf"))
    folder, fetched = models(family), []
    _, whole = everything(folder, scores=scores)

    def interrupt(layer):
        if layer == stop:
            raise KeyboardInterrupt

    kept = snapshots.Snapshots(tmp_path / "way.snapshot")
    with pytest.raises(KeyboardInterrupt):
        everything(folder, scores=scores, snapshots=kept, on_block=interrupt)
    fetch = StreamedWeights.fetch
    monkeypatch.setattr(StreamedWeights, "fetch", lambda source, names: fetched.extend(names) or fetch(source, names))
    _, found = everything(folder, scores=scores, snapshots=snapshots.Snapshots(tmp_path / "way.snapshot"))
    assert {int(name.split(".")[2]) for name in fetched if ".layers." in name} == set(range(stop, 3))
    assert (found.whole, found.missed) == (whole.whole, whole.missed) and len(found.parts) == len(whole.parts)
    for ours, theirs in zip(found.parts, whole.parts, strict=True):
        assert (ours.name, ours.layer, ours.levels, ours.calls) == (
            theirs.name,
            theirs.layer,
            theirs.levels,
            theirs.calls,
        )
        assert torch.equal(ours.sums, theirs.sums) and ours.scores == theirs.scores


def test_folds_are_the_samples_own_and_add_up(models):
    folder = models("llama")
    _, found = everything(folder, tokens_at_once=30, scores=False)
    for text, samples in enumerate(TEXTS):
        longest_first = sorted(map(len, samples), reverse=True)
        assert (
            found.tokens[text, : len(samples)].tolist() == longest_first
            and not found.tokens[text, len(samples) :].any()
        )
    base, *experts = (whole(folder, name) for name in NAMES)
    sample = sorted(TEXTS[0], key=len, reverse=True)[2]
    calls = calls_of(base, sample)
    for part in found.parts:
        if part.name not in ("mlp", "lm_head", "model.embed_tokens") or part.layer == 1:
            continue
        path = f"model.layers.{part.layer}.mlp" if part.name == "mlp" else part.name
        args, kwargs, output = calls[path]
        with torch.no_grad():
            changes = [first(one.get_submodule(path)(*args, **kwargs)).double() - output.double() for one in experts]
        expected = grams_of(changes, 1)
        torch.testing.assert_close(part.sums[0, 2], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_what_a_level_misses_equals_a_direct_evaluation_on_the_other_samples(models):
    """Weights from every other sample (longest first), the block's merge tried on the rest, one plain module each."""
    folder = models("llama", size=0.1)
    _, found = everything(folder, tokens_at_once=30)
    base, *experts = (whole(folder, name) for name in NAMES)
    texts = [sorted(samples, key=len, reverse=True) for samples in TEXTS]
    assert {key[:2] for key in found.missed} == {
        (layer, level) for layer in range(3) for level in ("block", "attention_mlp", "tensor")
    }
    for layer, level in ((1, "block"), (2, "tensor"), (0, "attention_mlp")):
        merged = copy.deepcopy(base.model.layers[layer])
        for part in found.parts:
            if part.layer == layer and level in part.levels:
                own = [part.sums[text, 0::2].sum(0) / found.tokens[text, 0::2].sum() for text in (0, 1)]
                weights = merging_weights(misfit([torch.stack(own).numpy()], "equal"), 0.1)
                with torch.no_grad():
                    for name in part.parameters:
                        change = [
                            float(a) * (one.get_parameter(name) - base.get_parameter(name))
                            for a, one in zip(weights, experts, strict=True)
                        ]
                        short = name.removeprefix(f"model.layers.{layer}.")
                        merged.get_parameter(short).copy_(base.get_parameter(name) + sum(change))
        for place, expert in enumerate(experts):
            missed = whole_change = 0.0
            for sample in texts[place][1::2]:
                args, kwargs, output = calls_of(base, sample)[f"model.layers.{layer}"]
                with torch.no_grad():
                    theirs, ours = (first(one(*args, **kwargs)) for one in (expert.model.layers[layer], merged))
                missed += float((ours - theirs).double().square().sum())
                whole_change += float((theirs - output).double().square().sum())
            assert found.missed[layer, level, place] == pytest.approx(missed / whole_change, rel=1e-4)


def test_one_sample_leaves_none_to_try_levels_on(models):
    _, found = everything(models("llama"), texts=[TEXTS[0][:1], TEXTS[1]])
    assert found.missed == {} and found.whole.keys() == {0, 1}


def test_scores_are_taken_only_if_asked(models):
    _, found = everything(models("llama"), scores=False)
    assert not any(part.scores for part in found.parts) and not found.whole and not found.missed


def test_a_shared_text_scores_all_its_experts(models):
    _, parts = measured(models("llama"), texts=TEXTS[:1], owners=((0, 1),))
    assert parts[1].scores.keys() == {0, 1} and parts[0].grams.shape == (1, 2, 2)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_micro_batches_do_not_matter(family, models):
    runs = [measured(models(family), tokens_at_once=size)[1] for size in (1000, 1)]
    for one, other in zip(*runs, strict=True):
        assert (one.layer, one.name) == (other.layer, other.name)
        torch.testing.assert_close(one.grams, other.grams, rtol=2e-4, atol=1e-5 * float(one.grams.max()))


def test_an_expert_equal_to_the_base_is_exactly_zero(models):
    _, parts = measured(models("gemma3"), names=("base", "base", "two"))
    for part in parts:
        assert part.grams[:, 0].abs().sum() == 0 and part.grams[:, :, 0].abs().sum() == 0
        assert (part.grams[:, 1, 1] > 0).all()
        assert part.scores.get(0, 0) == 0


def test_one_step_of_bfloat16_is_measured_exactly(llamas):
    """bfloat16's rounding of outputs would be as large as this change of one weight of one block."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llamas / "base", dtype=torch.bfloat16)
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[3, 5] *= 1 + 2**-7
    model.save_pretrained(llamas / "one")
    _, parts = measured(llamas)
    base, expert = (whole(llamas, name) for name in ("base", "one"))
    expected = {"mlp": 0.0, "mlp.up_proj": 0.0, "block": 0.0}
    for sample in TEXTS[0]:
        calls = calls_of(base.double(), sample)
        for name in expected:
            path = "model.layers.1" + ("" if name == "block" else f".{name}")
            args, kwargs, output = calls[path]
            with torch.no_grad():
                expected[name] += float(
                    (first(expert.double().get_submodule(path)(*args, **kwargs)) - output).square().sum()
                )
    tokens = sum(map(len, TEXTS[0]))
    for part in parts:
        got = float(part.grams[0, 0, 0])
        if part.layer == 1 and part.name in expected:
            assert got == pytest.approx(expected[part.name] / tokens, rel=1e-2)
        else:
            assert got == 0


def test_a_head_of_another_size_is_compared_as_far_as_both_go(llamas):
    from transformers import AutoModelForCausalLM

    _, before = measured(llamas)
    model = AutoModelForCausalLM.from_pretrained(llamas / "one", dtype=torch.bfloat16)
    model.resize_token_embeddings(VOCABULARY + 8)
    model.save_pretrained(llamas / "one")
    _, after = measured(llamas)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one.grams, other.grams, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_pads_where_the_length_equals_the_number_of_heads(family, models):
    """Gemma 3 norms [samples, heads, tokens, width], Qwen 3 [samples, tokens, heads, width]; there are 4 heads, 2 of keys."""
    texts = [token_lists((4, 2, 3), 5), token_lists((2, 1), 6)]
    _, together = measured(models(family), texts=texts)
    _, alone = measured(models(family), texts=texts, tokens_at_once=1)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.grams, other.grams, rtol=2e-4, atol=1e-5 * float(one.grams.max()))


def compared_after(folder, change):
    """Compare models after a change to the base's first block."""
    base, *experts = (compared(folder, name) for name in NAMES)
    change(base.decoder.blocks[0])
    try:
        return compare_models(base, experts, [ComparedText(micro_batches(TEXTS[0], 64, 0), (0, 1))], CPU, scores=False)
    finally:
        assert all(parameter.is_meta for parameter in base.decoder.model.parameters())


def test_a_small_part_that_is_called_twice_or_never_counts_as_the_larger_one_around_it(models):
    def change(block):
        mlp = block.mlp
        mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x) + 0 * mlp.up_proj(x))

    parts = {(part.layer, part.name): part.sums for part in compared_after(models("llama"), change).parts}
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        assert torch.equal(parts[0, name], parts[0, "mlp"])
    assert not torch.equal(parts[0, "mlp.down_proj"], parts[0, "mlp"])
    assert not torch.equal(parts[1, "mlp.gate_proj"], parts[1, "mlp"])


def test_a_larger_part_that_is_called_twice_is_refused(models):
    def change(block):
        plain = block.self_attn.forward

        def forward(*given, **named):
            result = plain(*given, **named)
            block.mlp(result[0])
            return result

        block.self_attn.forward = forward

    with refused("model-unsupported", "mlp of block 0 is called 2 times"):
        compared_after(models("llama"), change)


def test_models_of_other_parts_are_refused_without_weights(tmp_path):
    save_any("llama", tmp_path / "base")
    save_any("llama_bias", tmp_path / "one")
    base, one = (compared(tmp_path, name).decoder for name in ("base", "one"))
    with refused("model-not-of-base"):
        require_comparable(base, {"model one": one})
