"""What the evaluator was asked to do, and the files it writes."""

from dataclasses import dataclass, field

from utils.bounded_files import read_json
from utils.commands.scorers import ScoringOptions
from utils.errors import UserError
from utils.evaluation.candidates import UNIFORM
from utils.publishing.manifest import MANIFEST, file_sha256
from utils.publishing.target import refuse_existing, refuse_others_manifest

COMMAND = "utils/evaluator.py"
SCORES, SAMPLES = "scores.csv", "samples.parquet"
ACCURACY = "lm_eval_samples.parquet"
REPORT = "report.html"
FILES = (SCORES, SAMPLES, ACCURACY, REPORT, UNIFORM, MANIFEST)


@dataclass(frozen=True)
class EvaluateOptions(ScoringOptions):
    """What the evaluator was asked to do; `candidates` are as typed."""

    candidates: tuple[str, ...] = ()
    against: str | None = None
    controls: bool = True
    lm_eval_batch: int = field(kw_only=True)  # its default is the flag's
    random_seed: int = 0
    confirm_run_unsafe_code: bool = False
    overwrite: bool = False


def refuse_out_dir(options: EvaluateOptions) -> None:
    """Refuse a folder of files that are not an earlier evaluation's, or that somebody has changed since."""
    refuse_others_manifest(options.out_dir, lambda manifest: manifest.get("command") == COMMAND)
    try:
        files = read_json(options.out_dir / MANIFEST, MANIFEST)["files"]
        files = files if isinstance(files, dict) else {}
    except (UserError, KeyError):
        files = {}
    ours = all(file_sha256(options.out_dir / name) == digest for name, digest in files.items() if
               (options.out_dir / name).is_file())  # fmt: skip
    refuse_existing(options.out_dir, list(FILES), overwrite=options.overwrite or (bool(files) and ours))
