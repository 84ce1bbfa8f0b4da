"""Command 3: merge models by a recipe.

    python3 utils/merger.py --output_path output/gemma_2b/merged_models \\
        --merge_config output/gemma_2b/merge_configs/gemma_2b_0.3_0.8_generated_ties_merge_config.yaml

Checks the recipe, the models' headers, the tokenizers, the disk and the output folder first (--dry_run stops there),
lets mergekit merge into a folder beside the output, checks the result, adds a model card and a manifest, and renames it
into place. A failure leaves nothing behind; after a kill the same line resumes with the tensors that were finished, in
the hidden folder .NAME.*.part. A merged folder is checked against its manifest, byte by byte, by

    python3 utils/merger.py --verify output/gemma_2b/merged_models
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: its own folder stands first on the path, the repository has to
    sys.path[0] = str(Path(__file__).parents[1])

if __name__ == "__main__":  # before all that takes time to import
    from utils.signals import end_on_signals

    end_on_signals()

from utils.commands.verify import verify
from utils.errors import run_command
from utils.flags import FlagParser, path, whole_number
from utils.merging.settings import MergeSettings, byte_count, read_settings
from utils.runtime import let_waiting_threads_sleep


def main() -> None:
    """Parse the flags into one checked value and make one call."""
    if folder := verified_folder():
        verify(folder)
        return
    settings = read_flags()

    let_waiting_threads_sleep()

    from utils.commands.merge import merge

    merge(settings)


def verified_folder() -> Path | None:
    """The folder of `--verify`, None if the command line does not hold it."""
    if not any(word.split("=")[0] == "--verify" for word in sys.argv[1:]):
        return None
    parser = FlagParser(prog="utils/merger.py", description=__doc__)
    _declare_verify(parser, required=True)
    if others := [word for word in sys.argv[1:] if word.startswith("--") and not parser.knows(word)]:
        parser.error(
            f"--verify checks a folder and does nothing else: leave out {', '.join(others)}", "verify-not-alone"
        )
    return parser.parse().verify


def read_flags(words: Sequence[str] | None = None) -> MergeSettings:
    """Read the command line, or `words` in its place."""
    parser = FlagParser(prog="utils/merger.py", description=__doc__)
    _declare_flags(parser)
    return read_settings(parser.parse(words))


def _declare_verify(parser: FlagParser, *, required: bool = False) -> None:
    text = "instead of a merge: check a merged folder against its manifest, byte by byte"
    parser.flag("verify", text, type=path, required=required)


def _declare_flags(parser: FlagParser) -> None:
    _declare_verify(parser)  # for --help: see main
    parser.flag("output_path", "folder for the merged model; made if needed", type=path, required=True)
    parser.flag("merge_config", "the merge recipe (YAML), from lewis_merge.py or your own", type=path, required=True)
    parser.switch("copy_tokenizer", "copy the base's tokenizer where the recipe asks for none", default=True)
    parser.switch("adapter", "write an adapter for peft in place of a model, for a recipe of --form low_rank")
    parser.switch("overwrite", "replace an earlier merge in --output_path: the files its manifest lists, no others")
    parser.switch("restart", "discard what an interrupted run of this very merge has finished, instead of resuming it")
    parser.switch("dry_run", "stop after the checks; writes nothing but downloads and --lora_merge_cache")
    parser.flag("random_seed", "seed of methods that draw (dare, della)", type=whole_number(0, 2**32 - 1), default=0)
    parser.switch(
        "fast_selection", "merge in pieces, without sorting, where mergekit would give the same", default=True
    )
    parser.switch("hash_inputs", "also record the SHA-256 of the inputs' weight files, which reads them all")
    parser.switch("write_model_card", "write README.md", default=True)
    parser.flag(
        "evaluation", "folder of an evaluation of this recipe: its figures go into the card and report", type=path
    )
    parser.switch("report", "write report.html: the recipe layer by layer, what was run, the figures of --evaluation")
    parser.flag(
        "out_shard_size", "bytes per weight file, e.g. 500M, 5B, 2G; 0: one file", type=byte_count, default="5B"
    )
    parser.flag("device", "where to compute: auto, cpu, cuda or cuda:n [default: auto]")
    parser.switch("cuda", "the same as --device cuda")
    parser.switch("low_cpu_memory", "keep results on the GPU until a file is full; for less RAM than GPU memory")
    parser.switch("read_to_gpu", "read weights straight to the GPU")
    parser.switch("multi_gpu", "spread the work over all GPUs")
    parser.switch("gpu_rich", "the same as --cuda --low_cpu_memory --read_to_gpu --multi_gpu")
    parser.switch("async_write", "write a file while the next tensors are merged; takes memory for one more")
    parser.flag("write_threads", "threads of --async_write", type=whole_number(1, 256), default=1)
    parser.flag("num_threads", "threads for computing on the CPU [default: torch's choice]", type=whole_number(1, 4096))
    parser.switch("clone_tensors", "copy each tensor before it is saved, for recipes that repeat layers")
    parser.switch("allow_crimes", "merge models of different architectures")
    parser.switch("unsafe_truncate_embeddings", "cut embeddings to the shortest; token ids must mean the same")
    parser.switch("trust_remote_code", "run Python code that comes with a model (off here; the reference has it on)")
    parser.flag("transformers_cache", "folder for downloaded models [default: the hub's cache]", type=path)
    parser.switch(
        "fused_experts",
        "merge the experts of a mixture stacked in one tensor, as mergekit does, instead of each on its own",
    )
    parser.flag(
        "lora_merge_cache",
        "merge LoRA adapters (model+adapter) into their models in this folder first, by mergekit and peft; without it they "
        "change the models as these are read",
        type=path,
    )
    parser.flag("lora_merge_dtype", "precision of that merge", choices=("float32", "bfloat16", "float16"))
    parser.switch("lazy_unpickle", "kept for compatibility: only safetensors are read, which are lazy anyway")
    parser.switch("safe_serialization", "always on: pickles are not written", default=True)
    parser.flag("verbosity", "log lines of mergekit: 0 none, 1 some, 2 all", type=whole_number(0, 2), default=0)


if __name__ == "__main__":
    run_command(main, one_result=True)
