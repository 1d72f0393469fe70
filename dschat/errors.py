"""The one error a user can cause: bad input, reported in one line before work starts."""


class UserError(ValueError):
    """Bad input: the message names the value, the place and the remedy, on one line.

    Entry points turn it into `error: <message>` on stderr and exit code 2 (see `cli.run_cli`).
    """


def brief(error: Exception, with_type: bool = False) -> str:
    """Reduce an error to the first line of its message, or to its type where it has none.

    A line that ends in a colon takes the next one along.

    Args:
        with_type: put the type before the message.
    """
    kind, message = type(error).__name__, str(error).strip()
    if not message:
        return kind
    line, *rest = message.splitlines()
    if rest and line.endswith(":"):
        line += f" {rest[0].strip()}"
    return f"{kind}: {line}" if with_type else line
