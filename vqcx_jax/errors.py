"""Errors that a user can mend. Scripts print them on one line and exit with code 2."""


class UserError(ValueError):
    """Bad input: one line that names the argument, its value and what is accepted."""


class ConfigError(UserError):
    """A configuration field that is unknown, of the wrong type or impossible."""


class DataError(UserError):
    """A corpus, tokenizer or assignment that cannot be read or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint that is missing, unreadable or of another architecture."""


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; names the step and the last good checkpoint."""
