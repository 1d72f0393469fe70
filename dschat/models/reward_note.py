"""Note in a reward model's folder: how to get its scores without this package."""

from __future__ import annotations

from pathlib import Path

from dschat.models.reward_folder import RewardForm
from dschat.models.weight_files import HEAD
from dschat.utils.printable import code_span, printable

NOTE_FILE = "REWARD_MODEL.md"

_NOTE = """\
# A reward model

The score of a text is the value at its last token. A complete answer ends in {end}, the end
token; one that breaks off without it gets a score as well, of less worth. {padding}

{loading}
"""
_CODE = """\
```python
import torch
{imports}

folder = "."  # of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
{model}
texts = ["prompt and answer, written as in training" + tokenizer.eos_token]
batch = tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
{scores}
```"""
_CLASSIFIER = {
    "imports": "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
    "model": "model = AutoModelForSequenceClassification.from_pretrained(folder)",
    "scores": "    scores = model(**batch).logits[:, 0]",
}
_ADAPTER = _CLASSIFIER | {
    "imports": f"from peft import PeftModel\n{_CLASSIFIER['imports']}",
    # The base's own config may name another padding, or none.
    "model": """\
base = AutoModelForSequenceClassification.from_pretrained(
    {base!r}, num_labels=1, pad_token_id=tokenizer.pad_token_id
)
model = PeftModel.from_pretrained(base, folder)""",
}
_TRUNK = {
    "imports": "from safetensors.torch import load_file\n"
    "from transformers import AutoModel, AutoTokenizer",
    "model": f"""\
trunk = AutoModel.from_pretrained(folder)
# Of several files, the one that model.safetensors.index.json names.
head = load_file(f"{{{{folder}}}}/model.safetensors")[{HEAD!r}]  # (1, width)""",
    "scores": """\
    values = trunk(**batch).last_hidden_state @ head.T  # (B, T, 1)
    last = batch["attention_mask"].sum(dim=1) - 1
    scores = values[torch.arange(len(texts)), last, 0]""",
}
_NO_CLASSIFIER = "transformers has no sequence classifier that takes a {family} as it is.\n"
_TRUNK_HOLDS = "This folder holds the trunk, a {model}, and the head.\n\n"
_TO_MERGE = (
    "Put the adapter into its base first: `python -m dschat.merge THIS_FOLDER NEW_FOLDER`.\n"
)


def write_note(form: RewardForm, folder: Path, base: str | None = None) -> None:
    """Write the note.

    Args:
        base: of an adapter; None: the folder holds all weights.
    """
    tokenizer, pad = form.tokenizer, form.config.get_text_config().pad_token_id
    padding = f"Padding is {code_span(tokenizer.pad_token)} (id {pad}), on the right."
    if pad is None:
        padding = "No other token can be the padding: score one text at a time."
    parts = _ADAPTER if base else _CLASSIFIER if form.has_head else _TRUNK
    loading = _CODE.format(**{name: part.format(base=base) for name, part in parts.items()})
    if not form.has_head:
        loading = _TO_MERGE if base else _TRUNK_HOLDS.format(model=form.saved_as.__name__) + loading
        loading = _NO_CLASSIFIER.format(family=printable(form.config.model_type, "")) + loading
    end = f"{code_span(tokenizer.eos_token)} (id {tokenizer.eos_token_id})"
    text = _NOTE.format(end=end, padding=padding, loading=loading)
    (folder / NOTE_FILE).write_text(text, encoding="utf-8")
