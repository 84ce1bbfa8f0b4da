"""Command 1: measure which layers of each expert carry its skill.

    python3 lewis_importance.py --config configs/gemma_2b.yaml --out_dir output/gemma_2b/delta_dfs

Runs the base and every expert of a pair config over a little calibration text, one decoder block in memory at a time,
and writes `<type>_delta.csv` per expert, `norms.csv` and `manifest.json` into the folder. The offline example:

    python3 lewis_importance.py --config configs/demo.yaml --out_dir output/demo/delta_dfs

Another method measures into a folder of its own (`--guidance`; each writes `<method>_*.csv`):

    python3 lewis_importance.py --config configs/demo.yaml --out_dir output/demo/saliency --guidance saliency_budget
"""

if __name__ == "__main__":  # before all that takes time to import
    from utils.signals import end_on_signals

    end_on_signals()

from utils.errors import run_command
from utils.flags import FlagParser, path
from utils.guidance.chosen import chosen_to_measure, declare_flags
from utils.runtime import let_waiting_threads_sleep


def main() -> None:
    """Parse the flags into one checked value and make one call."""
    parser = FlagParser(prog="lewis_importance.py", description=__doc__)
    parser.flag(
        "config", "pair config: the YAML that names the models, the text and the settings", type=path, required=True
    )
    parser.flag("out_dir", "folder to write the dataframes into; made if needed", type=path, required=True)
    parser.computing_flags(
        "models are measured side by side; replaces --device (without it, on a CPU: as many as threads and memory allow)"
    )
    parser.ray_flags()
    parser.switch("trust_remote_code", "run Python code that comes with a model")
    parser.switch("overwrite", "replace files of the same names in --out_dir")
    parser.switch(
        "restart", "discard what an interrupted run of this very measurement has finished, instead of resuming it"
    )
    declare_flags(parser, "measure")
    flags = parser.parse()

    from utils.pair.config import read_pair_config

    config = read_pair_config(flags.config)
    chosen = chosen_to_measure(flags, config)

    let_waiting_threads_sleep()

    from utils.commands.measure import measure_pair
    from utils.commands.measure_options import MeasureOptions
    from utils.commands.ray_flags import RayFlags

    measure_pair(
        MeasureOptions(
            config=config,
            method=chosen.method,
            method_options=chosen.options,
            out_dir=flags.out_dir,
            device=flags.device,
            dtype=flags.dtype,
            micro_batch_tokens=flags.micro_batch_tokens,
            trust_remote_code=flags.trust_remote_code,
            overwrite=flags.overwrite,
            devices=flags.devices,
            restart=flags.restart,
            quiet=flags.quiet,
            ray=RayFlags.taken(vars(flags)),
            said=chosen.said,
            apart=chosen.apart,
        )
    )


if __name__ == "__main__":
    run_command(main, one_result=True)
