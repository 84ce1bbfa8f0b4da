"""Block by block equals a plain forward, for every family, with pads neither attended nor counted."""

import copy

import pytest
import torch
from torch import nn

from tests.plain_gradients import token_lists
from tests.refusals import refused
from tests.selected import few
from tests.tiny_checkpoints import FAMILIES, save_tiny
from utils.guidance.lewis.visitor import LewisVisitor
from utils.models.decoder import find_decoder, weight_matrix
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import stored_layout
from utils.models.weight_source import StreamedWeights, build_skeleton
from utils.pair.batches import MicroBatch, micro_batches
from utils.passes import block_runner
from utils.passes.block_runner import run_blocks

CPU = torch.device("cpu")
LENGTHS = (17, 30, 5, 23, 11)  # longer than the sliding windows (8) of Gemma 2 and 3


def opened(folder, dtype=torch.float32):
    checkpoint = open_checkpoint(str(folder))
    model = build_skeleton(checkpoint, dtype, trust_remote_code=False)
    decoder = find_decoder(model, None, {}, "test model")
    return decoder, StreamedWeights(stored_layout(model, checkpoint), CPU, dtype)


def streamed(folder, encoded, tokens_at_once=64, sparsity=0.0):
    """Final hidden states per micro-batch and the norms."""
    decoder, weights = opened(folder)
    batches = micro_batches(encoded, tokens_at_once, pad_id=0)
    tokens = sum(map(len, encoded))
    visitor = LewisVisitor(decoder, tokens, tokens, sparsity)
    finals = run_blocks(decoder, weights, batches, visitor, CPU)
    return decoder, batches, finals, visitor.norms


def plain(folder, encoded, paths):
    """The oracle: transformers loads the whole model and runs each sample alone; hooks keep every input."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = {path: [] for path in paths}
    for path in paths:
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: inputs[path].append(args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        finals = [model.base_model(input_ids=torch.tensor([ids]))[0][0] for ids in encoded]
    return model, inputs, finals


@pytest.mark.parametrize("family", few(FAMILIES, "llama", "gemma3", "gpt2", "gpt_neox", "phi3_tied"))
def test_block_by_block_equals_a_plain_forward(family, tmp_path):
    save_tiny(family, tmp_path)
    encoded = token_lists(LENGTHS)
    decoder, batches, finals, norms = streamed(tmp_path, encoded)
    assert sorted(part.path for part in decoder.components) == sorted(FAMILIES[family][2])
    names = {
        (layer, part.name): f"{decoder.blocks_path}.{layer}.{part.path}"
        for layer in range(len(decoder.blocks))
        for part in decoder.components
    }
    model, inputs, expected = plain(tmp_path, encoded, names.values())
    by_ids = {tuple(ids): hidden for ids, hidden in zip(encoded, expected, strict=True)}
    for batch, final in zip(batches, finals, strict=True):
        for row in range(len(batch.input_ids)):
            length = batch.lengths[row]
            ids = tuple(batch.input_ids[row, :length].tolist())
            torch.testing.assert_close(final[row, :length], by_ids[ids], atol=2e-5, rtol=2e-4)
    assert norms.keys() == names.keys()
    for key, path in names.items():
        x = torch.cat(inputs[path]).double()
        weight = weight_matrix(model.get_submodule(path)).detach().double()
        moment = (x * x).sum(0) / len(x)
        metric = weight.abs() * moment.sqrt()
        assert float(norms[key]) == pytest.approx(float(metric.norm()), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_micro_batch_size_does_not_matter(family, tmp_path):
    save_tiny(family, tmp_path)
    encoded = token_lists(LENGTHS)
    results = [streamed(tmp_path, encoded, tokens_at_once=size)[3] for size in (1, 40, 10_000)]
    for other in results[1:]:
        for key, norm in results[0].items():
            assert float(other[key]) == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("free", [2**40, 1000])
def test_one_block_at_a_time_where_two_do_not_fit(tmp_path, monkeypatch, free):
    save_tiny("llama", tmp_path)
    encoded = token_lists(LENGTHS)
    before = streamed(tmp_path, encoded)[3]
    events = []

    class Noted(StreamedWeights):
        def fetch(self, names):
            events.append(f"fetch {names[0].split('.')[2]}" if ".layers." in names[0] else "fetch around")
            return super().fetch(names)

    monkeypatch.setattr(block_runner, "available_bytes", lambda device: free)
    decoder, weights = opened(tmp_path)
    batches, tokens = micro_batches(encoded, 64, pad_id=0), sum(map(len, encoded))
    visitor = LewisVisitor(decoder, tokens, tokens, 0.0)
    noted = Noted(weights.layout, CPU, torch.float32)
    run_blocks(decoder, noted, batches, visitor, CPU, on_block=lambda layer: events.append(f"done {layer}"))
    assert visitor.norms == before
    apart = [f"{what} {layer}" for layer in range(len(decoder.blocks)) for what in ("fetch", "done")]
    assert (events == ["fetch around", *apart]) == (free == 1000)


def test_whether_the_next_block_fits_is_seen_at_each_block(tmp_path, monkeypatch):
    """As another model's blocks, side by side, may have taken the memory by then."""
    save_tiny("llama", tmp_path)
    decoder, weights = opened(tmp_path)
    free, fetched, fetch = [2**40], [], weights.fetch
    monkeypatch.setattr(weights, "fetch", lambda names: fetched.append(names) or fetch(names))
    monkeypatch.setattr(block_runner, "available_bytes", lambda device: free[0])
    layers = len(decoder.blocks)
    with block_runner.BlocksInTurn(decoder, weights, [*range(layers)] * 2, CPU) as turn:
        for place in range(2 * layers):
            free[0] = 2**40 if place < layers else 1000
            with turn.next_block():
                if place >= layers:
                    assert len(fetched) == place + 1
    weights.close()
    assert len(fetched) == 2 * layers


def test_sample_order_does_not_matter(tmp_path):
    save_tiny("llama", tmp_path)
    encoded = token_lists(LENGTHS)
    one, other = (streamed(tmp_path, order)[3] for order in (encoded, encoded[::-1]))
    for key, norm in one.items():
        assert float(other[key]) == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_pruning_while_measuring_equals_the_plain_procedure(family, tmp_path):
    """The oracle prunes a resident model block by block with a stable sort and re-runs it from the start."""
    save_tiny(family, tmp_path)
    encoded = token_lists(LENGTHS)
    decoder, _, _, norms = streamed(tmp_path, encoded, sparsity=0.5)
    paths = [f"{decoder.blocks_path}.{layer}.{part.path}" for layer in range(3) for part in decoder.components]
    model, _, _ = plain(tmp_path, encoded, [])
    expected = {}
    for layer in range(3):
        inputs = {}
        handles = [
            model.get_submodule(path).register_forward_hook(
                lambda module, args, output, path=path, inputs=inputs: inputs.setdefault(path, []).append(
                    args[0].reshape(-1, args[0].shape[-1])
                )
            )
            for path in paths
            if path.startswith(f"{decoder.blocks_path}.{layer}.")
        ]
        with torch.no_grad():
            for ids in encoded:
                model.base_model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        for part in decoder.components:
            path = f"{decoder.blocks_path}.{layer}.{part.path}"
            x = torch.cat(inputs[path])
            weight = weight_matrix(model.get_submodule(path)).data
            metric = weight.abs() * ((x * x).sum(0) / len(x)).sqrt()
            expected[layer, part.name] = float(metric.norm())
            lowest = metric.sort(dim=1, stable=True).indices[:, : int(weight.shape[1] * 0.5)]
            weight.scatter_(1, lowest, 0)
    for key, norm in norms.items():
        assert float(norm) == pytest.approx(expected[key], rel=1e-5)


class Watcher:
    """A visitor that notes how many parameters are in memory, and may fail."""

    rewrites = False

    def __init__(self, model, fail_at=None):
        self.model, self.fail_at, self.live = model, fail_at, []

    def observing(self, layer, block):
        import contextlib

        return contextlib.nullcontext()

    def begin(self, batch):
        self.live.append(sum(p.numel() for p in self.model.parameters() if p.device.type != "meta"))

    def finish(self, layer, block):
        if layer == self.fail_at:
            raise RuntimeError("planned")


def test_only_one_block_is_in_the_model_at_a_time(tmp_path):
    save_tiny("llama", tmp_path, layers=6)
    decoder, weights = opened(tmp_path)
    watcher = Watcher(decoder.model)
    run_blocks(decoder, weights, micro_batches(token_lists(LENGTHS), 64, 0), watcher, CPU)
    block = sum(p.numel() for p in decoder.blocks[0].parameters())
    outside = sum(p.numel() for p in decoder.body.parameters()) - 6 * block
    assert set(watcher.live) == {outside + block}
    assert all(p.device.type == "meta" for p in decoder.model.parameters())


def test_a_failure_in_a_block_leaves_the_model_as_it_was(tmp_path):
    save_tiny("llama", tmp_path)
    decoder, weights = opened(tmp_path)
    before = copy.copy(decoder.blocks[0].__dict__)
    with pytest.raises(RuntimeError, match="planned"):
        run_blocks(decoder, weights, micro_batches(token_lists(LENGTHS), 64, 0), Watcher(decoder.model, fail_at=1), CPU)
    assert all(p.device.type == "meta" for p in decoder.model.parameters())
    assert decoder.blocks[0].__dict__.keys() == before.keys()
    assert not any(module._forward_pre_hooks for module in decoder.model.modules())


def test_a_model_that_skips_a_block_is_refused(tmp_path):
    save_tiny("llama", tmp_path)
    decoder, weights = opened(tmp_path)
    decoder.body.config.num_hidden_layers = 2  # Llama's forward slices its blocks by this number
    with refused("model-unsupported", "once each and in order"):
        run_blocks(decoder, weights, micro_batches(token_lists(LENGTHS), 64, 0), Watcher(decoder.model), CPU)


class Wayward(nn.Module):
    """A linear part that is given a row less than there are tokens."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x[:, 1:])


def test_a_part_that_does_not_see_each_token_once_is_refused():
    from utils.passes.second_moments import SecondMoments

    block, moments = Wayward(), SecondMoments(["inner"])
    with moments.attached(block):
        moments.begin(MicroBatch.of([[0, 0, 0], [0, 0, 0]]))
        block(torch.ones(2, 3, 4))
        with refused("model-unsupported", "is given 4 rows for 6 tokens"):
            moments.checked(0, 6)
    with moments.attached(block):
        moments.begin(MicroBatch.of([[0, 0], [0, 0]]))
        block.inner(torch.ones(2, 2, 4))
        with refused("model-unsupported", "saw 4 tokens where the text has 8"):
            moments.checked(0, 8)


def test_pads_are_not_counted():
    from utils.passes.second_moments import SecondMoments

    block, moments = nn.ModuleDict({"inner": nn.Linear(2, 2)}), SecondMoments(["inner"])
    with moments.attached(block):
        moments.begin(MicroBatch.of([[0, 0], [0]]))
        block["inner"](torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [1000.0, 1000.0]]]))
    assert moments.checked(0, 3)["inner"].tolist() == [1 + 9 + 25, 4 + 16 + 36]
