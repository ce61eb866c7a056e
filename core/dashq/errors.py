"""The errors that a user can mend: each says what was asked, where, and what was possible."""


class DashqError(Exception):
    """An error that the user can mend; the command line prints it without a traceback and exits with 2."""


class RecipeError(DashqError):
    """The recipe cannot be read, or asks for something that does not exist."""


class PlanError(DashqError):
    """The recipe does not fit the model."""


class CheckpointError(DashqError):
    """A checkpoint is missing, broken, or of a kind that cannot be read."""


class TextError(DashqError):
    """A text source cannot be reached, or does not hold enough text."""


class OutputError(DashqError):
    """The output folder cannot be used."""


class PluginError(DashqError):
    """A plugin is broken, or two plugins disagree."""


class MissingPackageError(DashqError):
    """A package that the command or the recipe needs is not installed."""


class UsageError(DashqError):
    """The command line, or the call, asks for something that does not exist or is not possible."""
