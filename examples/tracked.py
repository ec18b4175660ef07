"""Options of the examples that track to MLflow, and their store: all of it is in one folder."""

import argparse
from pathlib import Path

import mlflow

EXPERIMENT = "private training"


def parser() -> argparse.ArgumentParser:
    """Parser of OUTPUT and --seed."""
    made = argparse.ArgumentParser()
    made.add_argument("output", nargs="?", type=Path, default=Path("out"), metavar="OUTPUT")
    made.add_argument("--seed", type=int, help="of noise and draws, for tests: then no secret")
    return made


def options() -> argparse.Namespace:
    """OUTPUT, a folder that exists then, and --seed."""
    chosen = parser().parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    return chosen


def track_in(output: Path) -> None:
    """Have MLflow keep runs in `output`/mlflow.db, and their files in `output`/artifacts."""
    output = output.resolve()
    mlflow.set_tracking_uri(f"sqlite:///{output}/mlflow.db")
    if mlflow.get_experiment_by_name(EXPERIMENT) is None:
        mlflow.create_experiment(EXPERIMENT, artifact_location=(output / "artifacts").as_uri())
    mlflow.set_experiment(EXPERIMENT)
