"""Gradients block by block equal those of the whole model by plain autograd, and are never all in memory."""

import gc
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.plain_gradients import CPU, opened, plain_gradients, token_lists
from tests.refusals import refused
from tests.selected import few
from tests.tiny_checkpoints import FAMILIES, LAYERS, OTHERS, drop_head, poison, save_any, save_tiny
from utils.models.weight_source import StreamedWeights
from utils.passes.block_gradients import backward_pass, observe_gradients


class Keeper:
    """An observer that keeps everything."""

    def __init__(self, wanted=lambda name: True):
        self.wants, self.gradients, self.finished = wanted, {}, []

    def gradient(self, name, parameter, gradient, sample):
        assert parameter.shape == gradient.shape and parameter.dtype == gradient.dtype
        assert not torch.is_grad_enabled() and not parameter.requires_grad and not gradient.requires_grad
        assert (name, sample) not in self.gradients
        self.gradients[name, sample] = gradient

    def finish(self, layer, parameters):
        self.finished.append((layer, {name: value.clone() for name, value in parameters.items()}))


def assert_same(found, expected, relative=2e-5):
    """Equal up to a share of each gradient's largest entry."""
    assert found.keys() == expected.keys()
    assert found
    for key, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[key], gradient, atol=relative * scale + 1e-9, rtol=0, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize(
    "family", few([*FAMILIES, *OTHERS], "llama", "gemma3", "gpt2", "gpt_neox", "phi3_tied", *OTHERS)
)
def test_every_gradient_equals_plain_autograd(family, tmp_path):
    save_any(family, tmp_path)
    samples, keeper = token_lists(), Keeper()
    decoder, weights = opened(tmp_path)
    losses = observe_gradients(decoder, weights, samples, keeper, CPU, outside=True)
    model, expected_losses, expected = plain_gradients(tmp_path, samples)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert_same(keeper.gradients, expected)
    parameters = dict(model.named_parameters())
    assert [layer for layer, _ in keeper.finished] == [*reversed(range(LAYERS)), None]
    seen = {name: value for _, values in keeper.finished for name, value in values.items()}
    assert seen.keys() == parameters.keys()
    assert all(torch.equal(value, parameters[name]) for name, value in seen.items())
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_bfloat16_is_within_its_rounding(family, tmp_path):
    save_any(family, tmp_path)
    samples, keeper = token_lists(), Keeper()
    decoder, weights = opened(tmp_path, torch.bfloat16)
    files = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    losses = observe_gradients(decoder, weights, samples, keeper, CPU, outside=True)
    _, expected_losses, expected = plain_gradients(tmp_path, samples, torch.bfloat16)
    assert losses == pytest.approx(expected_losses, rel=0.02)
    assert {gradient.dtype for gradient in keeper.gradients.values()} == {torch.bfloat16}
    assert_same(keeper.gradients, expected, 0.1)
    assert files == {path: path.read_bytes() for path in files}


def test_only_what_is_wanted_is_differentiated(tmp_path):
    save_any("llama", tmp_path)
    keeper = Keeper(lambda name: name.endswith("1.mlp.up_proj.weight"))
    observe_gradients(*opened(tmp_path), token_lists(), keeper, CPU, outside=True)
    _, _, expected = plain_gradients(tmp_path, token_lists())
    assert_same(keeper.gradients, {key: expected[key] for key in expected if keeper.wants(key[0])})
    nothing = Keeper(lambda name: False)
    assert observe_gradients(*opened(tmp_path), token_lists(), nothing, CPU) != ()
    assert nothing.gradients == {}
    asked = []
    observe_gradients(*opened(tmp_path), token_lists(), Keeper(lambda name: asked.append(name)), CPU)
    assert asked and all(name.startswith("model.layers.") for name in asked)


def test_two_models_in_lock_step(tmp_path):
    samples, folders = token_lists(), (tmp_path / "base", tmp_path / "expert")
    keepers, oracles = (Keeper(), Keeper()), []
    for seed, folder in enumerate(folders):
        oracles.append(plain_gradients(save_tiny("qwen3", folder, seed=seed), samples))
    base, expert = (
        backward_pass(*opened(folder), samples, keeper, CPU) for folder, keeper in zip(folders, keepers, strict=True)
    )
    layers = []
    with base as one, expert as two:
        assert one.losses == pytest.approx(oracles[0][1], rel=1e-5)
        for mine, theirs in zip(one.blocks, two.blocks, strict=True):
            layers.append((mine.layer, theirs.layer))
            assert mine.parameters.keys() == theirs.parameters.keys()
            for done, (model, _, _) in ((mine, oracles[0]), (theirs, oracles[1])):
                assert all(torch.equal(model.get_parameter(name), value) for name, value in done.parameters.items())
            for keeper, (_, _, expected) in zip(keepers, oracles, strict=True):
                here = {key: value for key, value in expected.items() if key[0] in mine.parameters}
                assert_same({key: keeper.gradients[key] for key in here}, here)
    assert layers == [(layer, layer) for layer in reversed(range(LAYERS))]


class CountedWeights(StreamedWeights):
    """Counts the blocks that are in memory."""

    def __init__(self, *args):
        super().__init__(*args)
        self.alive, self.most, self.order = {}, 0, []

    def fetch(self, names):
        tensors = {name: value.clone() for name, value in super().fetch(names).items()}
        layers = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
        if layers:
            (layer,) = layers
            key = len(self.order), int(layer)
            self.order.append(int(layer))
            self.alive[key] = len(tensors)
            for value in tensors.values():
                weakref.finalize(value.untyped_storage(), self.gone, key)
            self.most = max(self.most, sum(1 for left in self.alive.values() if left))
        return tensors

    def gone(self, key):
        self.alive[key] -= 1


class Counter(Keeper):
    """Counts the gradients that are in memory as one comes, and keeps none."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = weakref.WeakSet(), 0

    def gradient(self, name, parameter, gradient, sample):
        self.alive.add(gradient)
        self.most = max(self.most, len(self.alive))

    def finish(self, layer, parameters):
        assert not self.alive


def test_two_blocks_of_weights_and_no_kept_gradients(tmp_path):
    save_tiny("llama", tmp_path, layers=7)
    decoder, weights = opened(tmp_path, weights_class=CountedWeights)
    counter, progress = Counter(), []
    with backward_pass(decoder, weights, token_lists(), counter, CPU, outside=True, on_block=progress.append) as model:
        held = list(model.blocks)
    assert weights.order == progress == [*range(7), *reversed(range(7))]
    assert weights.most == 2
    assert counter.most == 1
    assert [len(done.parameters) for done in held] == [0] * 8
    del held, model
    gc.collect()
    assert not any(weights.alive.values())


@pytest.mark.parametrize("outside", [False, True])
def test_nothing_in_memory_grows_with_depth(outside, tmp_path, monkeypatch):
    """Live tensors, weights aside: what a block more needs of each sample waits on disk."""
    samples, live = token_lists((30, 30)), {}
    for layers in (4, 8):
        save_tiny("llama", tmp_path / str(layers), layers=layers)
        decoder, weights = opened(tmp_path / str(layers))
        places = {f"model.layers.{layer}.mlp.up_proj.weight": layer for layer in (0, layers - 1)}
        keeper = Keeper(lambda name, places=places: name in places or name == "model.norm.weight")

        def count(name, parameter, gradient, sample, places=places, layers=layers):
            if name not in places:
                return
            storages = {
                item.untyped_storage().data_ptr(): item.untyped_storage().nbytes()
                for item in gc.get_objects()
                if issubclass(type(item), torch.Tensor) and item.shape[:2] == (1, 30) and not item.is_meta
            }
            live[layers, "first" if places[name] == 0 else "last", sample] = sum(storages.values())

        monkeypatch.setattr(keeper, "gradient", count)
        observe_gradients(decoder, weights, samples, keeper, CPU, outside=outside)
    for sample, place in product(range(len(samples)), ("first", "last")):
        assert live[8, place, sample] == live[4, place, sample] > 0


def pristine(decoder):
    return all(parameter.is_meta for parameter in decoder.model.parameters()) and not any(
        "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
        for module in decoder.model.modules()
    )


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_pass_that_is_left_early_leaves_the_model_as_it_was(steps, tmp_path):
    save_any("llama", tmp_path)
    decoder, weights = opened(tmp_path)
    with backward_pass(decoder, weights, token_lists(), Keeper(), CPU, outside=True) as model:
        for _ in range(steps):
            next(model.blocks)
        assert not pristine(decoder)
    assert pristine(decoder)
    with pytest.raises(StopIteration):
        next(model.blocks)


@pytest.mark.parametrize("where", ["wants", "gradient", "finish"])
def test_a_failing_observer_leaves_the_model_as_it_was(where, tmp_path):
    def fail(*args):
        raise RuntimeError("planned")

    save_any("llama", tmp_path)
    decoder, weights = opened(tmp_path)
    keeper = Keeper()
    setattr(keeper, where, fail)
    with pytest.raises(RuntimeError, match="planned"):
        observe_gradients(decoder, weights, token_lists(), keeper, CPU)
    assert pristine(decoder)


def test_the_callers_gradient_mode_is_left_alone(tmp_path):
    save_any("llama", tmp_path)
    expected = Keeper()
    observe_gradients(*opened(tmp_path), token_lists(), expected, CPU)
    with torch.no_grad():
        keeper = Keeper()
        with backward_pass(*opened(tmp_path), token_lists(), keeper, CPU) as model:
            for _ in model.blocks:
                assert not torch.is_grad_enabled()
    with backward_pass(*opened(tmp_path), token_lists(), Keeper(), CPU) as model:
        for _ in model.blocks:
            assert torch.is_grad_enabled()
    assert_same(keeper.gradients, expected.gradients, 1e-6)


def test_a_sample_without_a_next_token_is_refused(tmp_path):
    save_any("llama", tmp_path)
    with refused("text-too-short"):
        observe_gradients(*opened(tmp_path), [[1, 2], [3], [4, 5]], Keeper(), CPU)


def test_weights_without_the_head_are_refused(tmp_path):
    save_any("llama", tmp_path)
    decoder, weights = opened(tmp_path)
    kept = {name: header for name, header in weights.layout.direct.items() if name != "lm_head.weight"}
    weights.layout = replace(weights.layout, direct=kept)
    with refused("model-no-head"):
        observe_gradients(decoder, weights, token_lists(), Keeper(), CPU)
    assert pristine(decoder)


def test_a_head_that_the_checkpoint_lacks_is_not_made_up(tmp_path):
    drop_head(save_any("llama", tmp_path))
    decoder, weights = opened(tmp_path)
    with refused("model-no-head"):
        observe_gradients(decoder, weights, token_lists(), Keeper(), CPU)


def test_a_stored_head_that_differs_from_its_tied_embedding_stays_its_own(tmp_path):
    import json

    save_any("qwen2", tmp_path)  # not tied: both are stored
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    keeper = Keeper()
    observe_gradients(*opened(tmp_path), token_lists(), keeper, CPU, outside=True)
    _, _, expected = plain_gradients(tmp_path, token_lists())
    assert ("lm_head.weight", 0) in expected
    assert_same(keeper.gradients, expected)


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    poison(save_any("llama", tmp_path), "model.norm.weight", float("inf"))
    with refused("measured-not-finite"):
        observe_gradients(*opened(tmp_path), token_lists(), Keeper(), CPU)


def test_blocks_that_share_parameters_are_refused(tmp_path):
    save_any("llama", tmp_path)
    decoder, weights = opened(tmp_path)
    decoder.blocks[2].mlp = decoder.blocks[0].mlp
    with refused("model-unsupported", "is shared between decoder blocks"):
        observe_gradients(decoder, weights, token_lists(), Keeper(), CPU)


def test_a_model_that_skips_a_block_is_refused(tmp_path):
    save_any("llama", tmp_path)
    decoder, weights = opened(tmp_path)
    decoder.body.config.num_hidden_layers = 2  # Llama's forward slices its blocks by this number
    with refused("model-unsupported", "once each and in order"):
        observe_gradients(decoder, weights, token_lists(), Keeper(), CPU)
    assert pristine(decoder)
