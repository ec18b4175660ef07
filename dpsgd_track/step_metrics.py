"""Loss, clip fraction and epsilon of a training's steps, as they are tracked and drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of one step of a private training.

    `loss` and `clip_fraction` are measured on training samples, and no noise protects them: track
    them where only people may look who may see the data. `epsilon` depends on no sample.
    """

    step: int
    """Noisy steps taken on the model, this one included."""
    loss: float
    """Mean over the step's samples; NaN for a step without any."""
    clip_fraction: float
    """Share of the step's samples with a clip factor below 1; NaN for a step without any."""
    epsilon: float
    """Epsilon of all steps so far, at `delta`."""
    delta: float
    """Probability at which epsilon may fail."""

    @property
    def logged(self) -> dict[str, float]:
        """The metrics by name, as `mlflow.log_metrics` takes them."""
        return {
            "loss": self.loss,
            "clip_fraction": self.clip_fraction,
            "epsilon": self.epsilon,
        }
