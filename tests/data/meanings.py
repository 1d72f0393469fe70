"""What a stored row says, as a tuple to compare with."""


def meaning(row: dict) -> tuple:
    """(prompt, chosen, rejected, whole) of a stored row; a conversation as (role, text) pairs."""
    prompt = row["prompt"]
    if row["turns"] is not None:
        assert prompt is None
        prompt = tuple((turn["role"], turn["text"]) for turn in row["turns"])
    return prompt, row["chosen"], row["rejected"], row["whole"]
