"""Checkpoints that are verified before they are believed: saved on one mesh, loaded on any other.

coverage, files, record, owner    what a generation is, on paper and on disk, and who writes it (no torch)
catalog                           which generations are committed, good, left over; retention (no torch)
describe                          a generation as text (no torch)
peers                             the ranks that save or load together; failures reach all of them
planner, store, safetensors_file  torch's distributed checkpointing: what to write and read, and where
checkpointer, whole               save, load; a model's full tensors in one process
"""
