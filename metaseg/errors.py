"""Errors that the user can mend; each message says how. The command line prints it alone, without a traceback."""


class UserError(ValueError):
    """What the user can mend."""


class ConfigError(UserError):
    """A configuration that cannot work."""


class DataError(UserError):
    """Data that cannot be used as it is; the message lists the places."""


class WeightsError(UserError):
    """Weights that are missing, unreadable or of another network."""


class ComparisonError(UserError):
    """Runs that cannot be compared with each other."""
