"""The configuration of a run as one device would have it."""

from __future__ import annotations

import dataclasses

from raytron.config import RunConfig


def alone(config: RunConfig) -> RunConfig:
    """The same model, state and batch on one device, without anything that says how a run's work is cut."""
    plain = RunConfig()
    return dataclasses.replace(
        config,
        mesh=plain.mesh,
        pipeline=plain.pipeline,
        data_parallel=dataclasses.replace(plain.data_parallel, zero=0),
        memory=plain.memory,
        observe=dataclasses.replace(config.observe, gradient_noise=False),  # which is seen between devices
        micro_batch_size=1,
    )
