"""`dschat`, and `python -m dschat`, which launchers take too."""

import signal


def main() -> None:
    """Start the command; Ctrl-C while it is imported ends the process and says nothing."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dschat.command import door

    door.main()


if __name__ == "__main__":
    main()
