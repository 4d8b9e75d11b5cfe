from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from ranks import Pool  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """`ranks(world).run(fn, *args)`: see ranks.py."""
    pool = Pool()
    yield pool
    pool.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
