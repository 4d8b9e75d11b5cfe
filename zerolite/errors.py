"""Run-time failures, all under `ZeroliteError`; a user's mistake is a plain `ValueError` or `TypeError` instead."""


class ZeroliteError(RuntimeError):
    """Root of what can go wrong while zerolite runs."""


class CheckpointError(ZeroliteError):
    """A checkpoint cannot be written, or what is on disk is incomplete, altered, or of another model."""


class WorkerError(ZeroliteError):
    """An optimizer process died, is stuck or failed; what it was stepping is in doubt and is never saved."""


class DataError(ZeroliteError):
    """A row of training data cannot be used; the message names file, line and reason."""
