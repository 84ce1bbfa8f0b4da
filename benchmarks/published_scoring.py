"""The published LEWIS scoring procedure, re-implemented plainly from its description, as a baseline to time.

    python3 benchmarks/published_scoring.py --base FOLDER --expert FOLDER --rows FILE.jsonl --dtype bfloat16

For each model: load all of it, pad every sample to 512 tokens with EOS, and for each block run one sample at a time
while hooks sum x^2 per input channel, take the norm of |W| * sqrt(s), zero the smallest half of each row by a stable
sort, and run every sample through the block again. It computes what `parity: reference` computes (a test compares
them), the way arXiv 2503.03874 and its released code describe it: no batching, no streaming, no chunking.
"""

import argparse
import json
import time
from pathlib import Path

import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SEQLEN, SEED = 512, 42


def padded_samples(folder: str, rows: Path, nsamples: int) -> list[torch.Tensor]:
    """`nsamples` shuffled rows ("question answer", or "text code"), each [1, 512] with EOS pads."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    data = [json.loads(line) for line in rows.read_text().splitlines()]
    chosen = numpy.random.default_rng(SEED).permutation(len(data))[:nsamples]
    texts = [
        f"{row['question']} {row['answer']}" if "question" in row else f"{row['text']} {row.get('code', '')}"
        for row in (data[int(i)] for i in chosen)
    ]
    return [
        tokenizer(text, return_tensors="pt", max_length=SEQLEN, padding="max_length", truncation=True).input_ids
        for text in texts
    ]


@torch.no_grad()
def score(folder: str, samples: list[torch.Tensor], dtype: torch.dtype, device: str, ratio: float) -> dict:
    """Norm of every linear weight of every block, by (layer, module path)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    body, blocks = model.base_model, model.base_model.layers
    inputs, calls = [], []

    class Caught(Exception):
        pass

    def catch(module, args, kwargs):
        inputs.append(args[0])
        calls.append(kwargs)
        raise Caught

    handle = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids in samples:
        try:
            body(input_ids=ids.to(device), use_cache=False)
        except Caught:
            continue
    handle.remove()
    norms = {}
    for layer, block in enumerate(blocks):
        linears = {name: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        sums = {name: torch.zeros(m.in_features, device=device) for name, m in linears.items()}

        def observer(name, sums=sums):
            def observe(module, args, output):
                x = args[0].reshape(-1, args[0].shape[-1]).float()
                sums[name] += x.square().sum(0) / len(samples)

            return observe

        handles = [m.register_forward_hook(observer(name)) for name, m in linears.items()]
        for x, kwargs in zip(inputs, calls, strict=True):
            block(x, **kwargs)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            metric = linear.weight.abs() * sums[name].sqrt().reshape(1, -1)
            norms[layer, name] = float(metric.norm())
            lowest = torch.sort(metric, dim=-1, stable=True).indices[:, : int(metric.shape[1] * ratio)]
            mask = torch.zeros_like(metric, dtype=torch.bool).scatter_(1, lowest, True)
            linear.weight[mask] = 0
        inputs = [block(x, **kwargs) for x, kwargs in zip(inputs, calls, strict=True)]
    return norms


def main() -> None:
    """Score a base and an expert and print the seconds that scoring (loading apart from imports) took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="model folder")
    parser.add_argument("--expert", required=True, help="model folder")
    parser.add_argument("--rows", required=True, type=Path, help="JSON lines of GSM8K or MBPP layout")
    parser.add_argument("--nsamples", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sparsity_ratio", type=float, default=0.5)
    parser.add_argument("--out", type=Path, help="write the norms there as JSON")
    args = parser.parse_args()
    start = time.perf_counter()
    result = {}
    for folder in (args.base, args.expert):
        samples = padded_samples(folder, args.rows, args.nsamples)
        norms = score(folder, samples, getattr(torch, args.dtype), args.device, args.sparsity_ratio)
        result[folder] = {f"{layer} {name}": norm for (layer, name), norm in norms.items()}
    peak = ""
    if args.device.startswith("cuda"):
        torch.cuda.synchronize(args.device)
        peak = f", peak GPU memory {torch.cuda.max_memory_allocated(args.device) / 1e9:.3f} GB"
    print(f"{sum(sample.numel() for sample in samples)} tokens in {len(samples)} samples")
    print(f"measured in {time.perf_counter() - start:.2f} s{peak}")
    if args.out:
        args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
