"""The one exception that is a user's to mend."""


class UserError(ValueError):
    """What was wrong, where, and what to do, in one line. Launchers print it alone, without a traceback."""
