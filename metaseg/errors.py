"""Errors that the user can mend; each message says how. The command line prints it, without a traceback.

And the one end of a run that is no error: it was told to stop, and can go on.
"""

RESUMABLE = 75  # exit code of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h, "try again"


class UserError(ValueError):
    """What the user can mend."""

    def __str__(self) -> str:
        """The message, line by line `printable`: it may quote what files say, and their names."""
        return "\n".join(map(printable, super().__str__().split("\n")))


class ConfigError(UserError):
    """A configuration that cannot work."""


class DataError(UserError):
    """Data that cannot be used as it is; the message lists the places."""


class WeightsError(UserError):
    """Weights that are missing, unreadable or of another network."""


class ComparisonError(UserError):
    """Runs that cannot be compared with each other."""


class DivergedError(UserError):
    """Adaptations, or θ, whose numbers are not finite any more; the message names the task, the step and its rate."""


class MachineError(UserError):
    """What the machine took away: a process that it killed, room on its disk; the message says how to go on."""


class Stopped(SystemExit):
    """Ends a process with the exit code `RESUMABLE`; of several ranks the first has it, and speaks for the run.

    With another code than 0 from any other one, Lightning and torchrun would kill the first before it is done.
    """

    def __init__(self, leads: bool = True) -> None:
        super().__init__(RESUMABLE if leads else 0)


def printable(text: str) -> str:
    """The text with all that a terminal obeys, or no encoding has, as escapes: a file's name may hold anything."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
