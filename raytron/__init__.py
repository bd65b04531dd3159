"""Raytron trains transformers on a Ray cluster with actors."""

__version__ = "0.1.0"
