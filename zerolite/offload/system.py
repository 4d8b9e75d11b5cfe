"""What the operating system must give to workers, and what to do where it does not."""

import contextlib
import errno
import resource
from collections.abc import Iterator

from zerolite.errors import WorkerError

REMEDIES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n, now {files})",
    errno.ENFILE: "the machine has no more open files: raise fs.file-max",
    errno.EAGAIN: "raise the limit of processes (ulimit -u, now {processes}; in a container, of its pids)",
    errno.ENOMEM: "free memory, or raise the limit of the container's memory",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f, now {file_bytes}), which counts for shared memory too",
    **dict.fromkeys(
        (errno.EPERM, errno.EACCES, errno.ENOSYS),
        "the kernel or the container's seccomp profile forbids it: offload needs memfd_create, eventfd and pidfd_open "
        "(Linux 5.3, Docker 20.10)",
    ),
}


@contextlib.contextmanager
def needed(what: str) -> Iterator[None]:
    """Inside `with`, an OSError becomes a WorkerError: what was needed, the system's answer, a remedy."""
    try:
        yield
    except OSError as error:
        limits = {
            "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "processes": resource.getrlimit(resource.RLIMIT_NPROC)[0],
            "file_bytes": resource.getrlimit(resource.RLIMIT_FSIZE)[0],
        }
        remedy = REMEDIES.get(error.errno or 0, "train without offload where it cannot be had").format(**limits)
        raise WorkerError(f"{what} cannot be had: {error.strerror or error} (errno {error.errno}): {remedy}") from error
