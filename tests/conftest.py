from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that asked CUDA itself has forks without it

import crosses  # noqa: E402
import limits  # noqa: E402
import pytest  # noqa: E402
import pytest_timeout  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # the first optimizer of a process loads it, and this is the first process
from ranks import Pool  # noqa: E402
from zygote import zygote  # noqa: E402

from zerolite import Adam, Lamb, Lion, load, measure, save, shard  # noqa: E402, F401  # each loads when it is asked for

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Without `-m gpu` a GPU is seen by no test, no rank and no script that a test starts: they are of the CPU."""
    asked = config.option.markexpr.replace("(", " ").replace(")", " ").split()
    if "gpu" not in asked or "not" in asked[: asked.index("gpu")]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """`ranks(world).run(fn, *args)`: see ranks.py."""
    pool = Pool()
    yield pool
    pool.close()


def axes_of(case: pytest.Item) -> tuple[tuple[int, ...], ...]:
    """Which value of each of its `parametrize` marks a case has."""
    marks = [mark.args[0] for mark in case.iter_markers("parametrize")]
    axes = [mark.replace(",", " ").split() if isinstance(mark, str) else mark for mark in marks]
    return tuple(tuple(id(case.callspec.params[name]) for name in axis) for axis in axes)


@pytest.hookimpl(trylast=True)  # what is deselected already covers nothing
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip_without_device(items)
    if crosses.FULL:
        return
    tests = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("skip"):
            tests[item.parent, item.originalname].append(item)
    left_out = set()
    for cases in tests.values():
        strength = 1 if cases[0].get_closest_marker("each") else 2
        chosen = set(crosses.cover([axes_of(case) for case in cases], strength))
        left_out |= {case for case in cases if axes_of(case) not in chosen}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def skip_without_device(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not its keywords, which hold the names of folders
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and -m gpu"))


def pytest_collection_finish() -> None:
    zygote()  # now: everything is imported, and nothing has run


def pytest_unconfigure() -> None:
    zygote().close()


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool:
    """The outer limit, too, is longer on a busy machine."""
    longer = settings._replace(timeout=settings.timeout * limits.load())
    return pytest_timeout.pytest_timeout_set_timer(item, longer)
