"""Learning rate schedules: a pure function of the step.

Steps count from 0; step s is the s-th update. Warmup is linear and reaches the peak at step `warmup_steps`:

    cosine         peak → final along half a cosine            (Loshchilov and Hutter, arXiv 1608.03983)
    linear         peak → final along a line
    wsd            peak, then → final along a line over the last 1 − stable_fraction   (MiniCPM, arXiv 2404.06395)
    inverse_sqrt   peak · √(warmup / step)                     (Vaswani et al., arXiv 1706.03762)
    constant       peak

After the horizon the first three stay at `final`. Where `lr.changes` give a key another value from some step on, the later
steps have the rates of a schedule that had it from the beginning.
"""

from __future__ import annotations

import math

from raytron.config import LearningRateConfig


def learning_rate(config: LearningRateConfig, horizon: int, step: int) -> float:
    """The rate of update `step`, which decays over `horizon` steps, warmup included."""
    given, config = config, config.at(step)
    if config.decay_steps != given.decay_steps:
        horizon = config.decay_steps or horizon
    warmup = config.warmup_steps
    if step < warmup:
        return config.peak * (step + 1) / (warmup + 1)
    if config.decay == "constant":
        return config.peak
    if config.decay == "inverse_sqrt":
        return config.peak * math.sqrt(max(1, warmup) / max(1, warmup, step))
    progress = min(1.0, (step - warmup) / max(1, horizon - warmup))
    if config.decay == "wsd":
        progress = max(0.0, (progress - config.stable_fraction) / (1 - config.stable_fraction))
    if config.decay == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return config.peak + (config.final - config.peak) * progress
