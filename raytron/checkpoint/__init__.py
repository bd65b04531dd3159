"""Checkpoints that are verified before they are believed: saved on one mesh, loaded on any other.

storage, local_storage,           where files live: in a file system or an object store (no torch)
object_store, files
coverage, record, owner,          what a generation is, on paper and where it lives, and who writes it (no torch)
generation
catalog                           which generations are committed, good, left over; retention (no torch)
describe                          a generation as text (no torch)
peers                             the ranks that save or load together; failures reach all of them
deal, staging, saver              who writes what; host buffers; saves in the foreground and behind the training
planner, store, safetensors_file  torch's distributed checkpointing for loads: what to read, and where
checkpointer, whole               save, load; a model's full tensors in one process
"""
