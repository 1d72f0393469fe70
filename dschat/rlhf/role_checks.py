"""Checks of the roles' model folders, before weights load."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.models.causal_lm import check_context, check_model_folder
from dschat.models.config import check_kind, load_config
from dschat.models.reward_head import check_language_model, check_reward_head, read_head
from dschat.models.weight_files import DISK_HEAD, HEAD
from dschat.rlhf.one_trunk import check_one_trunk
from dschat.rlhf.retokenise import Retokeniser
from dschat.rlhf.role_settings import RoleNames
from dschat.text.formats import set_format
from dschat.text.tokenizer import check_same_tokenizer, load_hf_tokenizer
from dschat.utils.module.model_source import same_model


def check_roles(
    names: RoleNames, tokenizer: PreTrainedTokenizerBase, answer_end: str | None = None
) -> Retokeniser | None:
    """Refuse folders that cannot serve in their roles; before any weights are loaded.

    Args:
        tokenizer: the actor's. answer_end: the token that ends answers instead of its eos.

    Returns:
        For a reward model that reads other tokens than the actor's; else None.

    Raises:
        UserError: naming the folder and the remedy.
    """
    for name in (names.actor, names.critic, names.reward):
        if name is not None:
            check_kind(name)
    check_language_model(names.actor, "which cannot be the actor; give step 1's folder")
    check_model_folder(names.actor, tokenizer)
    if names.critic is not None:
        _check_critic(names, names.critic, tokenizer, answer_end)
    if names.share_trunk == "all":
        check_one_trunk([n for n in (names.actor, names.critic, names.reward) if n is not None])
    if names.reward is None:
        return None
    check_reward_head(names.reward)
    if names.critic is not None and same_model(names.reward, names.critic):
        return None  # compared above
    reader = load_hf_tokenizer(names.reward)
    check_model_folder(names.reward, reader)
    set_format(reader)
    longest = getattr(load_config(names.reward), "max_position_embeddings", None)
    retokenise = Retokeniser.between(tokenizer, reader, names.reward, longest)
    if retokenise is not None and names.share_trunk == "all":
        raise UserError(
            f"share_trunk all: the tokenizer of {names.reward} is not that of {names.actor}; "
            "roles on one base share its tokenizer, use share_trunk auto"
        )
    return retokenise


def check_role_contexts(names: RoleNames, tokens: int, retokenise: Retokeniser | None) -> None:
    """Raise an error when sequences of so many tokens are longer than a role's positions.

    A reward model with a tokenizer of its own is left out: its input is truncated.
    """
    roles = [names.actor, names.critic, names.reward if retokenise is None else None]
    for name in dict.fromkeys(n for n in roles if n is not None):
        check_context(name, tokens, "max_prompt_seq_len and max_answer_seq_len")


def _check_critic(
    names: RoleNames, critic: str, tokenizer: PreTrainedTokenizerBase, answer_end: str | None
) -> None:
    try:
        check_same_tokenizer(tokenizer, critic, answer_end)
    except UserError as error:
        # A value stands at each of the actor's tokens, so the critic cannot read others.
        raise UserError(
            f"{error}, or keep it for rewards alone: reward_model_name_or_path {critic}, "
            f"critic_model_name_or_path {names.actor}, init_head_randomly"
        ) from error
    check_model_folder(critic, tokenizer)
    has_head = read_head(critic) is not None
    if has_head and names.fresh_head:
        raise UserError(
            f"init_head_randomly: critic {critic} has a head; drop the flag, or give a "
            "language model as critic"
        )
    if not has_head and not names.fresh_head:
        raise UserError(
            f"reward model {critic}: no {DISK_HEAD} or {HEAD} in it; train one with "
            "step 2 first, or let rewards come from elsewhere: reward_model_name_or_path "
            f"REWARD_MODEL, critic_model_name_or_path {critic}, init_head_randomly"
        )
