"""Warm processes for the tests' Ray: its workers are forked off one process that has imported what they need.

A worker costs Ray seconds of a core before it does anything, and nearly all of them are imports: of Ray, twice, then of
torch and of Raytron. `World` forks its ranks instead, and this does the same for the workers of a Ray:

    raylet ── starts ──► start.py ── its command, environment and output ──► server.py ── fork ──► the worker

Ray itself is imported after the fork: it reads the environment when it is. From there on a worker is what it is with any
Ray, a process of its own that is killed and stopped as such. One with a runtime environment of its own is started as ever,
and so is every worker of a Ray that a test starts in another process. `raytron.testing.warm.pool.Warm` switches it on.
"""
