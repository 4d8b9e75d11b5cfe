"""Whether autograd runs on this thread now."""

import torch


def is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
