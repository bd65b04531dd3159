"""The tests' Ray forks its workers off a warm process; each is a process of its own all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import ray

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import this module


class Actor:
    def process(self):
        return os.getpid(), os.getppid(), os.getpgid(0)

    def warm(self):
        """Whether it was forked off a process that had torch; whatever Ray preloads comes later."""
        modules = list(sys.modules)
        return modules.index("torch") < modules.index("ray")

    def environment(self, name):
        return os.environ.get(name)


def actor(**options):
    return ray.remote(num_cpus=0)(Actor).options(**options).remote()


def test_workers_are_forked_off_one_process_and_die_alone(local_ray, warm):
    actors = [actor() for _ in range(3)]
    pids, parents, groups = zip(*ray.get([each.process.remote() for each in actors]), strict=True)
    assert set(parents) == {warm.pid}
    assert len(set(pids)) == 3
    assert pids == groups, "Ray ends the group of a worker that is gone"
    assert ray.get([each.warm.remote() for each in actors]) == [True] * 3
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actors[0].process.remote())
    assert ray.get(actors[1].process.remote())[0] == pids[1]
    later = actor()
    assert ray.get(later.process.remote())[1] == warm.pid
    for each in (*actors, later):
        ray.kill(each)


def test_a_worker_with_an_environment_of_its_own_is_started_as_ever(local_ray, warm):
    own = actor(runtime_env={"env_vars": {"RAYTRON_TEST": "of its own"}})
    assert ray.get(own.environment.remote("RAYTRON_TEST")) == "of its own"
    assert ray.get(own.process.remote())[1] != warm.pid
    ray.kill(own)


def test_what_imports_ray_is_not_preloaded(tmp_path):
    command = [sys.executable, "-m", "raytron.testing.warm.server", tmp_path / "socket", "raytron.data.feed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "raytron.data.feed imports ray" in done.stderr
