"""Checkpoints that are verified before they are believed: saved on one mesh, loaded on any other.

coverage, record, files   what a generation is, on paper and on disk          (no torch)
catalog                   which generations are committed, good, left over    (no torch)
describe                  a generation as text                                (no torch)
planner, store            torch's distributed checkpointing: what to write and read, and where
checkpointer, whole       save, load; a model's full tensors in one process
"""
