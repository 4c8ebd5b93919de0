"""Train the DynTS predictor of a model: `python -m kvlib.train.predictor --profile smollm2`.

Every stage resumes: run the same command again after an interruption.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from kvlib.config import folder_name
from kvlib.errors import ConfigError
from kvlib.record import RecordError
from kvlib.train.recipe import load_profile, plan, train_predictor


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvlib.train.predictor", description=__doc__.split(":")[0])
    parser.add_argument("--profile", default="tiny", help="a name in the file of profiles (default: tiny)")
    parser.add_argument("--profiles", type=Path, default=Path("notebooks/predictors.yml"), help="file of profiles")
    parser.add_argument("--model", help="another model for the profile, e.g. the weights of another training seed")
    parser.add_argument(
        "--work", type=Path, help="folder of traces, labels and checkpoint (default: in runs/predictor)"
    )
    parser.add_argument("--out", type=Path, help="folder to write the head into (default: that of --work)")
    parser.add_argument("--plan", action="store_true", help="print what would be done and its cost, and stop")
    arguments = parser.parse_args()
    try:
        profile, expected = load_profile(arguments.profiles, arguments.profile)
        name = arguments.profile
        if arguments.model:
            profile = dataclasses.replace(profile, model=arguments.model)
        own = f"{name}-{folder_name(arguments.model)}" if arguments.model else name
        work = arguments.work or Path("runs/predictor") / own
        out = arguments.out or work
        if arguments.plan:
            print(plan(profile, expected, name, work, out))
            return 0
        train_predictor(profile, name, work, out)
    except (ConfigError, RecordError) as error:
        print(f"kvlib.train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
