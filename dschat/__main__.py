"""`python -m dschat`, which launchers take too, is the command `dschat`."""

from dschat.command.door import main

if __name__ == "__main__":
    main()
