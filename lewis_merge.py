"""Command 2: turn what was measured into a merge recipe for mergekit.

    python3 lewis_merge.py --delta_dfs_in_dir output/gemma_2b/delta_dfs --config_file configs/gemma_2b.yaml \\
        --out_dir output/gemma_2b/merge_configs --gamma 0.3 --epsilon 0.8 --merge_method ties

Reads the delta tables, gives each measured tensor a density between gamma and epsilon, proves that every filter hits
its tensor and nothing else, and writes `<config>_<gamma>_<epsilon>_generated_<method>_merge_config.yaml`, which stock
mergekit-yaml runs, too. Where that would not do what it says, its first line says why, and `--portable` writes the nearest
recipe for it beside the other. The offline example, with a uniform recipe to compare with and a heatmap:

    python3 lewis_merge.py --delta_dfs_in_dir output/demo/delta_dfs --config_file configs/demo.yaml \\
        --out_dir output/demo/merge_configs --control uniform --plot

Other guidance (`--guidance`, as command 1 measured) makes `<config>_generated_<method>_<guidance>_merge_config.yaml`.
"""

if __name__ == "__main__":  # before all that takes time to import
    from utils.signals import end_on_signals

    end_on_signals()

from utils.errors import run_command
from utils.flags import FlagParser, number, path
from utils.guidance.chosen import chosen_to_decide, declare_flags
from utils.recipes.recipe import CONTROLS, DTYPE, DTYPES
from utils.recipes.routers import router_option


def main() -> None:
    """Parse the flags into one checked value and make one call."""
    parser = FlagParser(prog="lewis_merge.py", description=__doc__)
    _declare_own_flags(parser)
    declare_flags(parser, "decide")
    flags = parser.parse()

    from utils.pair.config import read_pair_config

    config = read_pair_config(flags.config_file)

    from utils.commands.decide import decide
    from utils.commands.options import DecideOptions
    from utils.guidance.folder import measured_by
    from utils.guidance.recipe_choices import RecipeOptions

    chosen = chosen_to_decide(flags, config, measured_by(flags.delta_dfs_in_dir))

    decide(
        DecideOptions(
            config=config,
            recipe=RecipeOptions(
                method=chosen.method,
                method_options=chosen.options,
                merge_method=flags.merge_method,
                mean_density=chosen.mean_density if flags.mean_density is None else flags.mean_density,
                lambda_=getattr(flags, "lambda"),
                dtype=flags.dtype,
                out_dtype=flags.out_dtype,
                router=flags.router,
            ),
            delta_dfs_in_dir=flags.delta_dfs_in_dir,
            out_dir=flags.out_dir,
            control=flags.control,
            portable=flags.portable,
            plot=flags.plot,
            overwrite=flags.overwrite,
            accept_edited=flags.accept_edited,
            trust_remote_code=flags.trust_remote_code,
            quiet=flags.quiet,
            said=chosen.said,
        )
    )


def _declare_own_flags(parser: FlagParser) -> None:
    parser.flag(
        "delta_dfs_in_dir",
        "folder that lewis_importance.py wrote, or one of *_delta.csv files",
        type=path,
        required=True,
    )
    parser.flag("config_file", "the pair config that was measured with", type=path, required=True)
    parser.flag("out_dir", "folder to write the recipe into; made if needed", type=path, required=True)
    parser.flag(
        "merge_method",
        "for densities: ties, dare_ties, dare_linear, della, della_linear, breadcrumbs or breadcrumbs_ties; for weights: "
        "task_arithmetic, ties, dare_ties or dare_linear; with saliency_budget also guided_mean, this project's own "
        "[default: ties for densities, task_arithmetic for weights]",
    )
    parser.flag(
        "mean_density",
        "share of the measured parameters to keep, per expert: lewis's densities are scaled to it (gamma and epsilon "
        "then only shape them and stay in the file name), saliency_budget shares it out, weights go with it",
        type=number(0, 1, low_open=True),
    )
    parser.flag(
        "control",
        "also write an unguided recipe to compare with; uniform: the same mean density and mean weight everywhere; "
        "lines: weights that grow with depth (LiNeS), with the same means",
        choices=CONTROLS,
    )
    parser.switch(
        "portable",
        "also write the nearest recipe that stock mergekit-yaml runs, where the guided one is for utils/merger.py alone: a "
        "mixture's experts share their mean, a merge method of this project's gives way to mergekit's",
    )
    parser.flag("lambda", "factor on the merged delta, above 0", type=number(0, low_open=True))
    parser.flag(
        "dtype",
        "precision to merge in; float32 keeps small changes of models that are stored in it",
        choices=DTYPES,
        default=DTYPE,
    )
    parser.flag(
        "out_dtype",
        "dtype of the merged model's file, where it is another one: merged entries, computed in --dtype, are rounded to "
        "it; a wider one than --dtype adds no precision",
        choices=DTYPES,
    )
    parser.flag(
        "router",
        "how routers of mixtures of experts are merged; base: the base's are kept; merge: like everything else; weight:x: "
        "merged with this weight [default: base, unless all models share one]",
        type=router_option,
        metavar="base|merge|weight:x",
    )
    parser.switch("plot", "also draw each expert's densities or weights as a heatmap (PNG)")
    parser.switch("overwrite", "replace files of the same names in --out_dir")
    parser.switch(
        "accept_edited", "take tables and models that differ from what the manifest.json recorded: you edited them"
    )
    parser.switch("trust_remote_code", "run Python code that comes with a model's config")


if __name__ == "__main__":
    run_command(main, one_result=True)
