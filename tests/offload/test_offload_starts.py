"""Workers that cannot be started: a WorkerError that says what was needed, and nothing stays behind."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess

import psutil
import pytest
import torch
from zerolite_kernels import cpu

import zerolite
from zerolite import WorkerError

pytestmark = pytest.mark.skipif(cpu.path() is None, reason="the host kernels were not built")


def attempt() -> None:
    zerolite.shard(torch.nn.Linear(4, 4), stage=2, offload=zerolite.Offload(workers=2, threads=1))


def held() -> tuple[int, int]:
    """(descriptors, living children) of this process."""
    process = psutil.Process()
    return process.num_fds(), len([c for c in process.children() if c.status() != psutil.STATUS_ZOMBIE])


def failing(real, code: int, succeed: int):
    """`real`, which raises after so many calls."""
    left = succeed

    def call(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("owner", "name", "code", "hint"),
    [
        (subprocess, "Popen", errno.EAGAIN, "ulimit -u"),
        (os, "pidfd_open", errno.EPERM, "seccomp"),
        (os, "memfd_create", errno.ENOSYS, "seccomp"),
        (os, "eventfd", errno.EMFILE, "ulimit -n"),
        (os, "ftruncate", errno.EFBIG, "ulimit -f"),
    ],
)
def test_a_start_that_fails_leaves_no_worker_and_no_descriptor(monkeypatch, owner, name, code, hint):
    gc.collect()
    before, real = held(), getattr(owner, name)
    for succeed in (0, 1):  # the second one fails where the first has left something
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing(real, code, succeed))
            with pytest.raises(WorkerError, match=hint) as failure:
                attempt()
        assert os.strerror(code) in str(failure.value)
        del failure
        gc.collect()
        assert held() == before


def test_the_limit_of_open_files_is_named():
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = held()
    for spare in range(2, 9):
        taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + spare, hard))
        try:
            attempt()
        except WorkerError as error:
            assert "ulimit -n" in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
        gc.collect()
        assert held() == before
