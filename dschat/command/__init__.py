"""The command `dschat`: one door to every program."""
