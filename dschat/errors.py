"""The one error a user can cause: bad input, reported in one line before work starts."""


class UserError(ValueError):
    """Bad input: the message names the value, the place and the remedy, on one line.

    Entry points turn it into `error: <message>` on stderr and exit code 2 (see `cli.run_cli`).
    """
