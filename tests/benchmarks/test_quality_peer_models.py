"""What peers read from text, and the model folders made of it, on a tiny pair whose experts know their text."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quality_clock import Clock, OutOfTimeError
from benchmarks.quality_models import Trained
from benchmarks.quality_pairs import lay_out, measured
from benchmarks.quality_peer_models import peers_of_one, peers_of_two, regmean_along
from benchmarks.quality_peer_text import calibration_rows, expert_texts, input_grams, load, sample_loss, text_sums
from benchmarks.quality_peers import regression_mean
from benchmarks.quality_texts import TaskTexts, Texts
from tests.tiny_pairs import save_pair
from utils.recipes.gram_file import input_gram
from utils.recipes.saliency_vectors import VectorKey


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    texts = {
        name: tuple(f"{word} {number} and {number}?" for number in range(6))
        for name, word in (("code", "Return"), ("math", "What is"))
    }
    tasks = {name: TaskTexts(rows, rows, rows[:3], rows[3:]) for name, rows in texts.items()}
    trained = Trained(folder / "base", {name: folder / name for name in tasks})
    load(trained.base).save_pretrained(trained.base)  # in float32
    found = lay_out(trained, Texts(texts["code"], tasks, "a test"), folder / "work")
    for name, rows in calibration_rows(found).items():
        learn(trained.base, rows, trained.experts[name])
    return found


def learn(base, rows, target):
    model = load(base)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(6):
        optimizer.zero_grad()
        sum(sample_loss(model, row) for row in rows).backward()
        optimizer.step()
    model.save_pretrained(target)


def weights(folder):
    return {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}


def test_sums_are_those_of_every_samples_own_gradient(pair):
    rows = calibration_rows(pair)["math"]
    model = load(pair.trained.experts["math"])
    found = text_sums(model, rows)
    name = "model.layers.1.mlp.down_proj.weight"
    weight, total = model.get_parameter(name), 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]))
        total += torch.autograd.grad(loss, weight)[0].square()
    torch.testing.assert_close(found.squares[name], total)


def test_outputs_are_gradients_of_each_tokens_own_loss(pair):
    """By the chain rule: a sample's gradient of a weight is the sum over tokens of g x', here of the last layer's only token."""
    rows, name = [row[:2] for row in calibration_rows(pair)["math"]], "model.layers.1.mlp.down_proj"
    model, total = load(pair.trained.experts["math"]), 0
    found = text_sums(model, rows)
    for row in rows:
        seen = []
        handle = model.get_submodule(name).register_forward_hook(lambda module, given, out, seen=seen: seen.append(out))
        loss = sample_loss(model, row)
        handle.remove()
        gradient = torch.autograd.grad(loss, seen[0])[0][
            0
        ].double()  # of two tokens; what the second says is not judged
        total += gradient.T @ gradient / 2
    torch.testing.assert_close(found.outputs[f"{name}.weight"], total / len(rows))


def test_grams_of_an_embeddings_rows_are_those_of_its_own_gradients(pair):
    rows, total = calibration_rows(pair)["math"], 0
    model = load(pair.trained.experts["math"])
    (name, found), *_ = text_sums(model, rows).row_grams.items()
    for row in rows:
        gradient = torch.autograd.grad(sample_loss(model, row), model.get_parameter(name))[0].double()
        total += gradient.T @ gradient
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-12)


def test_inputs_are_those_that_command_1_measures_at_base_and_expert(pair):
    rows = calibration_rows(pair)["math"]
    ours = [text_sums(load(folder), rows).inputs for folder in (pair.trained.base, pair.trained.experts["math"])]
    file = measured(pair, "gram_mean", "cpu") / "math_grams.safetensors"
    for name, gram in ours[0].items():
        both = gram + ours[1][name]
        torch.testing.assert_close(input_gram(VectorKey(file, name)).gram.double(), both, rtol=1e-4, atol=1e-6)


def test_an_experts_weight_is_one_over_its_gain(pair):
    for task, text in expert_texts(pair, "cpu").items():
        losses = []
        for folder in (pair.trained.base, pair.trained.experts[task]):
            model, total, count = load(folder), 0.0, 0
            for row in text.rows:
                total += sample_loss(model, row).item() * (len(row) - 1)
                count += len(row) - 1
            losses.append(total / count)
        assert text.weight == pytest.approx(1 / (losses[0] - losses[1]), rel=1e-4)


def test_sums_at_the_base_are_those_of_its_own_pass_and_both_are_the_sum(pair):
    text = expert_texts(pair, "cpu")["math"]
    alone, name = text_sums(load(pair.trained.base), text.rows), "model.layers.1.mlp.down_proj.weight"
    for kind in ("squares", "inputs", "outputs"):
        at_base = getattr(alone, kind)
        expert, base, both = (text.sums(kind, name, at) for at in ("expert", "base", "both"))
        torch.testing.assert_close(base, at_base[name])
        torch.testing.assert_close(both, expert + base)
        assert not torch.allclose(expert, base)


def test_experts_that_gain_nothing_are_refused(pair):
    swapped = Trained(pair.trained.base, dict.fromkeys(pair.trained.experts, pair.trained.base))
    with pytest.raises(ValueError, match="no gain"):
        expert_texts(replace(pair, trained=swapped), "cpu")


def test_merging_along_gives_one_expert_back(pair):
    base, expert = (weights(folder) for folder in (pair.trained.base, pair.trained.experts["code"]))
    rows = [calibration_rows(pair)["code"]]
    found = regmean_along(load(pair.trained.base), base, [expert], rows, [1.0], lambda name, own: own[0])
    losses = []
    for which in (expert, found):  # also where the inputs have fewer directions than channels
        model = load(pair.trained.base)
        model.load_state_dict(which, strict=False)
        losses.append([sample_loss(model, row).item() for row in rows[0]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_merging_along_takes_inputs_behind_the_blocks_merged_so_far(pair):
    base, *experts = (weights(folder) for folder in (pair.trained.base, *pair.trained.experts.values()))
    rows = list(calibration_rows(pair).values())
    found = regmean_along(load(pair.trained.base), base, experts, rows, [1.0, 2.0], lambda name, own: sum(own) / 2)
    name, grams = "model.layers.1.self_attn.q_proj.weight", []
    model = load(pair.trained.base)
    for own_rows in rows:  # q's inputs are behind block 0 and the norm before it: those of the merged model are given
        mixed = found | {
            key: experts[len(grams)][key] for key in found if key.startswith("model.layers.1.") and "proj" in key
        }
        model.load_state_dict(mixed, strict=False)
        with input_grams(model) as inputs, torch.no_grad():
            for row in own_rows:
                model(input_ids=torch.tensor([row]))
        grams.append(inputs()[name])
    wanted = base[name] + regression_mean([one[name] - base[name] for one in experts], grams, [1.0, 2.0])
    torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-8)


def test_every_peer_makes_a_model_once(pair):
    made = []
    for name, variants in peers_of_two().items():
        if name not in ("Model Stock", "DARE"):
            made.append(variants[-1].recipe(pair, "cpu"))
            assert weights(made[-1]).keys() == weights(pair.trained.base).keys(), name
    made += [variant.recipe(pair, "cpu") for variant in peers_of_one("math", 0.2).values()]
    over = replace(pair, clock=Clock(pair.clock.file, until=0.0))
    for name, variants in peers_of_two().items():
        if name not in ("Model Stock", "DARE"):
            assert variants[-1].recipe(over, "cpu") in made


def test_work_is_not_begun_when_the_time_is_over_but_found(tmp_path):
    clock = Clock(tmp_path / "seconds.json")
    with clock.work("first"):
        pass
    over = Clock(clock.file, until=0.0)
    with over.work("first"):
        pass
    with pytest.raises(OutOfTimeError, match="second"), over.work("second"):
        pytest.fail("begun")
    assert Clock(clock.file).seconds == over.seconds and 0 < over.total < 1
