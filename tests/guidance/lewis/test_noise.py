"""What rounding makes of deltas, against plain models in bfloat16 and in float32 with the same weights.

python -m pytest tests/guidance/lewis/test_noise.py
"""

from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.plain_gradients import CPU, opened, token_lists
from tests.refusals import refused
from tests.tiny_checkpoints import save_any
from tests.tiny_pairs import save_pair
from tests.tiny_recipes import decide_here
from utils.commands.measure import measure_pair
from utils.commands.measure_options import MeasureOptions
from utils.guidance.lewis.noise import RoundingTrial, VisitorWithTrial, relative_noise, trial_batch
from utils.guidance.lewis.visitor import LewisVisitor
from utils.guidance.method import guidance_methods
from utils.models.decoder import find_decoder
from utils.pair.batches import micro_batches
from utils.pair.config import read_pair_config
from utils.passes.block_runner import run_blocks

SAMPLES = token_lists((11, 5, 17, 8))


def plain_norms(folder, dtype, batch, decoder):
    """|| |W| sqrt(s) ||_F of every component of a whole model, in float64 from its inputs on."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if dtype is torch.float32:  # the very weights of the other one
        model.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    real = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
    found = {}

    def hook(key):
        def take(module, args):
            weight = module.weight.double()
            weight = weight.T if type(module).__name__ == "Conv1D" else weight
            moments = args[0].double()[real].square().mean(dim=0)
            found[key] = float((weight.square() * moments).sum().sqrt())

        return take

    for layer in range(len(decoder.blocks)):
        for part in decoder.components:
            module = model.get_submodule(f"{decoder.blocks_path}.{layer}.{part.path}")
            module.register_forward_pre_hook(hook((layer, part.name)))
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=real.long(), use_cache=False)
    return found


def opened_with_components(folder):
    """A model in bfloat16 with every linear part of its blocks, and its weights."""
    decoder, weights = opened(folder, torch.bfloat16)
    return find_decoder(decoder.model, None, {}, "test model"), weights


def trial_norms(folder, sparsity=0.0):
    decoder, weights = opened_with_components(folder)
    batches = micro_batches(SAMPLES, 64, 0)
    with RoundingTrial(decoder, trial_batch(batches), CPU) as trial:
        visitor = LewisVisitor(decoder, sum(map(len, SAMPLES)), sum(map(len, SAMPLES)), sparsity)
        run_blocks(decoder, weights, batches, VisitorWithTrial(visitor, trial), CPU)
    assert all(value.is_meta for value in decoder.model.parameters())
    assert not any("forward" in vars(module) for module in decoder.blocks)
    norms = {key: tuple(map(float, both)) for key, both in trial.norms.items()}
    return decoder, trial_batch(batches), norms, {key: float(value) for key, value in visitor.norms.items()}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_both_norms_are_those_of_plain_models(family, tmp_path):
    save_any(family, tmp_path)
    decoder, batch, norms, _ = trial_norms(tmp_path)
    assert len(batch.lengths) == 2 and batch.lengths[0] == 17
    rounded, exact = (plain_norms(tmp_path, dtype, batch, decoder) for dtype in (torch.bfloat16, torch.float32))
    assert norms.keys() == rounded.keys()
    for key, (ours, ours_exact) in norms.items():
        assert ours_exact == pytest.approx(exact[key], rel=1e-5), key
        assert ours == pytest.approx(rounded[key], rel=1e-5), key
    assert max(abs(one / other - 1) for one, other in norms.values()) > 1e-5  # there is rounding to see


def test_pruning_is_followed(tmp_path):
    """From the second block on the trial's inputs are those of pruned blocks, in both dtypes."""
    save_any("llama", tmp_path)
    _, _, plain, _ = trial_norms(tmp_path)
    _, _, pruned, _ = trial_norms(tmp_path, sparsity=0.5)
    for key, both in pruned.items():
        assert both[0] == pytest.approx(both[1], rel=0.02)
        assert key[0] > 0 or both == plain[key]  # taken before the block is pruned
    assert max(abs(pruned[key][way] / plain[key][way] - 1) for key in plain if key[0] > 0 for way in (0, 1)) > 0.01


def test_the_text_is_measured_as_without_a_trial(tmp_path):
    save_any("gemma3", tmp_path)
    decoder, weights = opened_with_components(tmp_path)
    tokens = sum(map(len, SAMPLES))
    visitor = LewisVisitor(decoder, tokens, tokens, 0.0)
    run_blocks(decoder, weights, micro_batches(SAMPLES, 64, 0), visitor, CPU)
    assert {key: float(value) for key, value in visitor.norms.items()} == trial_norms(tmp_path)[3]


def test_the_share_of_a_delta_that_is_rounding():
    places = [(0, "q"), (1, "q"), (2, "q"), (3, "q")]
    expert = dict(zip(places, [(5.2, 5.0), (2.0, 2.0), (1.5, 1.0), (1.0, 1.0)], strict=True))
    base = dict(zip(places, [(4.1, 4.0), (3.0, 3.0), (1.0, 1.0), (1.0, 1.0)], strict=True))
    assert list(relative_noise(expert, base).values()) == pytest.approx([0.1, 0.0, 1.0, 0.0])


@pytest.fixture
def measured(tmp_path, monkeypatch):
    def measure(dtype):
        save_pair(tmp_path / dtype)
        monkeypatch.chdir(tmp_path / dtype)
        config = read_pair_config("pair.yaml")
        measure_pair(MeasureOptions(config, guidance_methods()["lewis"], {}, Path("dfs"), device="cpu", dtype=dtype))
        return pd.read_csv("dfs/lewis_noise.csv")

    return measure


def test_in_bfloat16_every_delta_has_its_noise_and_much_of_it_is_warned_of(measured, capfd):
    table = measured("bfloat16")
    assert len(table) == 2 * 2 * 7 and set(table["model"]) == {"code", "math"}
    said = capfd.readouterr()
    for name, own in table.groupby("model"):
        assert (
            f"{name}: rounding of the forward pass makes up to {own['noise'].max():.1%} of a delta (median" in said.out
        )
        over = int((own["noise"] > 0.1).sum())
        warning = f"{name}: rounding makes more than 10% of {over} of 14 deltas"
        assert (warning in said.err) == (over > 0)
    assert (table["noise"] > 0).any()


def test_command_2_says_it_too_and_edited_noise_is_refused(measured, capfd):
    table = measured("bfloat16")
    (recipe,) = decide_here("lewis")
    said = capfd.readouterr().out
    for name, own in table.groupby("model"):
        assert f"{name}: up to {own['noise'].max():.1%} of a delta is rounding" in said
    table.assign(noise=-1.0).to_csv("dfs/lewis_noise.csv", index=False)
    with refused("table-bad-value"):
        decide_here("lewis", overwrite=True)
    Path("dfs/lewis_noise.csv").unlink()
    assert decide_here("lewis", overwrite=True) == [recipe] and "rounding" not in capfd.readouterr().out


def test_in_float32_there_is_none(measured, capfd):
    assert measured("float32").empty and "rounding" not in capfd.readouterr().out
