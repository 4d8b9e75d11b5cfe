"""What packages above the engine register on a model before it is sharded: adapters do."""

from collections.abc import Collection
from typing import Protocol

from torch import nn


class Extension(Protocol):
    """Hooks into the engine's life; each is given the model, so that a copied model is served too."""

    def stays_unsharded(self, model: nn.Module) -> Collection[nn.Parameter]:
        """Parameters that every rank keeps whole at stage 3 too."""

    def adds(self, model: nn.Module) -> Collection[nn.Parameter]:
        """Parameters that are no part of the user's model: an export leaves them out."""

    def after_sharding(self, model: nn.Module) -> None:
        """The model's parameters and buffers have their values now. Collective."""

    def before_export(self, model: nn.Module) -> None:
        """Raise where the parameters alone are not the model that runs."""


def register(model: nn.Module, extension: Extension) -> None:
    """Have the engine call an extension's methods. Idempotent for equal extensions."""
    extensions = extensions_of(model)
    if extension not in extensions:
        model._zerolite_extensions = [*extensions, extension]


def extensions_of(model: nn.Module) -> list[Extension]:
    return getattr(model, "_zerolite_extensions", [])
