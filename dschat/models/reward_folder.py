"""Form of a saved reward model: the class that loads it, the names of its tensors.

A folder is transformers' sequence-classification format with one label (`score.weight`), where the
family has a class that takes trunk and head as they are and reads the score where it was trained.
Other families are saved as the trunk, which `AutoModel` loads, and the head as `v_head.weight`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from dschat.models.config import load_config
from dschat.models.loading import set_special_tokens
from dschat.models.padding import classifier_tokenizer
from dschat.models.reward_model import TRUNK, class_for, trunk_class
from dschat.models.weight_files import DISK_HEAD, HEAD
from dschat.utils.distributed import print_rank_0
from dschat.utils.module.adapter import REWARD_HEAD


@dataclass(frozen=True)
class RewardForm:
    """Form of a reward model on disk.

    Attributes:
        saved_as: class of transformers that loads the folder.
        has_head: the class is a classifier, with the head; else it is the trunk's.
        config, tokenizer: as they are saved; their padding is not the end token.
    """

    saved_as: type[PreTrainedModel]
    has_head: bool
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase

    def twin(self) -> PreTrainedModel:
        """Build the class without storage: names and format of what is saved."""
        with torch.device("meta"):
            return self.saved_as(self.config)

    def on_disk(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename the live model's tensors to their names in the folder."""
        trunk, head = self.saved_as.base_model_prefix, REWARD_HEAD
        if not self.has_head:
            trunk, head = "", HEAD.removesuffix(".weight")
        names = {name: disk_name(name, trunk, head) for name in state}
        return {disk: state[name] for name, disk in names.items() if disk is not None}

    def name_in_adapter(self, name: str) -> str | None:
        """Name of a module in an adapter's folder: as in a classifier, even if the family has none.

        None: it is not saved.
        """
        return disk_name(name, self.saved_as.base_model_prefix, REWARD_HEAD)


def disk_name(name: str, trunk: str, head: str) -> str | None:
    """Rename a module or tensor of the live model; None: it is not saved."""
    first, _, rest = name.partition(".")
    if first == "reward_head":
        return None
    return ".".join(filter(None, [{TRUNK: trunk, "v_head": head}[first], rest]))


def reward_form(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> RewardForm:
    """Decide on the form of a reward model of this shape; builds it on `meta`.

    Raises:
        UserError: transformers has no trunk of this shape.
    """
    tokenizer, config = classifier_tokenizer(tokenizer), copy.deepcopy(config)
    config.num_labels = 1
    set_special_tokens(config, tokenizer)
    trunk = trunk_class(config)
    mapping = AutoModelForSequenceClassification._model_mapping
    if type(config) in mapping:
        classifier = class_for(mapping, config)
        if _takes(classifier, trunk, config) and _reads_the_end(classifier, config):
            return RewardForm(classifier, True, config, tokenizer)
    return RewardForm(trunk, False, config, tokenizer)


def _takes(
    classifier: type[PreTrainedModel], trunk: type[PreTrainedModel], config: PretrainedConfig
) -> bool:
    """Return whether a classifier's tensors are the trunk's and the head's weight, no others."""
    with torch.device("meta"):
        theirs, ours = classifier(config).state_dict(), trunk(config).state_dict()
    prefix = classifier.base_model_prefix
    return theirs.keys() == {f"{prefix}.{name}" for name in ours} | {DISK_HEAD}


@torch.no_grad()
def _reads_the_end(classifier: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Check that a classifier reads the score at the end token, beside padding as well."""
    with torch.device("meta"):
        model = classifier(config)
    setattr(model, classifier.base_model_prefix, _Positions())
    model.score = nn.Identity()
    special = config.get_text_config()
    end, pad = special.eos_token_id, special.pad_token_id
    word = next(i for i in range(3) if i not in (end, pad))
    rows = [[word, word, end]]
    if pad is not None:
        rows += [[word, word, end, pad, pad], [pad, pad, word, word, end]]
    for row in rows:
        mask = torch.tensor([[int(i != pad) for i in row]])
        position = model(input_ids=torch.tensor([row]), attention_mask=mask).logits.item()
        if position != row.index(end):
            return False
    return True


class _Positions(nn.Module):
    """Stands in for a trunk: a token's hidden state is its position, (B, T) -> (B, T, 1)."""

    def forward(self, input_ids: torch.Tensor, *_: object, **__: object) -> BaseModelOutputWithPast:
        positions = torch.arange(input_ids.shape[1], dtype=torch.float32)
        hidden = positions.expand(input_ids.shape)[..., None]
        return BaseModelOutputWithPast(last_hidden_state=hidden)


def tell_reward_form(model_name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print, before training, how the saved folder will differ from what readers expect.

    Raises:
        UserError: transformers has no trunk of this shape.
    """
    form = reward_form(load_config(model_name_or_path), tokenizer)
    if not form.has_head:
        print_rank_0(
            "reward model: transformers has no sequence classifier that takes a "
            f"{form.config.model_type} as it is; the folder will hold the trunk and, as {HEAD}, "
            "its head, which every program here loads"
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        token, other = tokenizer.eos_token, form.tokenizer.pad_token
        will = "they can read one text at a time" if token == other else f"it will pad with {other}"
        print_rank_0(
            f"reward model: {token} ends answers and is the padding, which other readers of the "
            f"saved folder would take for the end of a text; {will}"
        )
