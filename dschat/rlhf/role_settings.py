"""Settings of the roles: the folder of each, and the checks of folders before weights load."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.models.causal_lm import check_context, check_model_folder
from dschat.models.config import check_kind, load_config
from dschat.models.reward_model import check_language_model, check_reward_head, read_head
from dschat.models.weight_files import DISK_HEAD, HEAD
from dschat.rlhf.estimators import ESTIMATORS, Estimator
from dschat.rlhf.one_trunk import check_one_trunk
from dschat.rlhf.retokenise import Retokeniser
from dschat.settings import Settings, setting
from dschat.text.formats import set_format
from dschat.text.tokenizer import check_same_tokenizer, load_hf_tokenizer
from dschat.utils.module.model_source import same_model


@dataclass(frozen=True)
class RoleSettings(Settings):
    """Settings of the models of the roles."""

    actor_model_name_or_path: str = setting(
        MISSING, "folder or hub id of the SFT model", may_change=True
    )
    critic_model_name_or_path: str | None = setting(
        None,
        "folder or hub id of the reward model that the critic starts from; with rloo and grpo, "
        "which train no critic, of the reward model",
        may_change=True,
    )
    reward_model_name_or_path: str | None = setting(
        None, "folder or hub id of the reward model (default: the critic's)", may_change=True
    )
    init_head_randomly: bool = setting(
        False, "the critic is a language model and gets a random value head"
    )
    share_trunk: str = setting(
        "auto",
        "with LoRA: auto keeps two trunks for four roles, all keeps one (reward model and actor "
        "on one base), none keeps frozen copies",
        choices=("auto", "all", "none"),
    )
    offload_reference_model: bool = setting(False, "keep the reference's weights on the CPU")
    offload_reward_model: bool = setting(False, "keep the reward model's weights on the CPU")

    def names(self, estimator: Estimator, *, has_reward_function: bool) -> RoleNames:
        """Decide the folder of each role.

        Raises:
            UserError: a role without a model, or a setting without effect.
        """
        critic, reward = self.critic_model_name_or_path, self.reward_model_name_or_path
        if estimator.needs_critic and critic is None:
            others = [e.name for e in ESTIMATORS.values() if not e.needs_critic]
            raise UserError(
                "critic_model_name_or_path is required with advantage_estimator "
                f"{estimator.name}; {' and '.join(others)} train no critic"
            )
        if self.init_head_randomly and not estimator.needs_critic:
            raise UserError(
                f"init_head_randomly: advantage_estimator {estimator.name} trains no critic; drop "
                "init_head_randomly"
            )
        if reward is None and not self.init_head_randomly:
            reward = critic
        if reward is None and not has_reward_function:
            cause = "init_head_randomly" if self.init_head_randomly else estimator.name
            raise UserError(
                f"{cause}: nothing gives rewards; add reward_model_name_or_path REWARD_MODEL or "
                "reward_function MODULE:NAME"
            )
        if not estimator.needs_critic and critic not in (None, reward):
            raise UserError(
                f"critic_model_name_or_path {critic}: advantage_estimator {estimator.name} trains "
                f"no critic, and {reward} gives the rewards; drop one of the two"
            )
        return RoleNames(
            self.actor_model_name_or_path,
            critic if estimator.needs_critic else None,
            reward,
            self.init_head_randomly,
            self.share_trunk,
        )


@dataclass(frozen=True)
class RoleNames:
    """Folder or hub id of each role; None as in `RoleSetup`."""

    actor: str
    critic: str | None
    reward: str | None
    fresh_head: bool = False
    share_trunk: str = "auto"

    def check(
        self, tokenizer: PreTrainedTokenizerBase, answer_end: str | None = None
    ) -> Retokeniser | None:
        """Stop at folders that cannot serve in their roles; before any weights are loaded.

        Args:
            tokenizer: the actor's. answer_end: the token that ends answers instead of its eos.

        Returns:
            For a reward model that reads other tokens than the actor's; else None.

        Raises:
            UserError: naming the folder and the remedy.
        """
        for name in (self.actor, self.critic, self.reward):
            if name is not None:
                check_kind(name)
        check_language_model(self.actor, "which cannot be the actor; give step 1's folder")
        check_model_folder(self.actor, tokenizer)
        if self.critic is not None:
            self._check_critic(self.critic, tokenizer, answer_end)
        if self.share_trunk == "all":
            check_one_trunk([n for n in (self.actor, self.critic, self.reward) if n is not None])
        if self.reward is None:
            return None
        check_reward_head(self.reward)
        if self.critic is not None and same_model(self.reward, self.critic):
            return None  # compared above
        reader = load_hf_tokenizer(self.reward)
        check_model_folder(self.reward, reader)
        set_format(reader)
        longest = getattr(load_config(self.reward), "max_position_embeddings", None)
        retokenise = Retokeniser.between(tokenizer, reader, self.reward, longest)
        if retokenise is not None and self.share_trunk == "all":
            raise UserError(
                f"share_trunk all: the tokenizer of {self.reward} is not that of {self.actor}; "
                "roles on one base share its tokenizer, use share_trunk auto"
            )
        return retokenise

    def check_context(self, tokens: int, retokenise: Retokeniser | None) -> None:
        """Stop when sequences of so many tokens are longer than a role's positions.

        A reward model with a tokenizer of its own is left out: its input is truncated.
        """
        names = [self.actor, self.critic, self.reward if retokenise is None else None]
        for name in dict.fromkeys(n for n in names if n is not None):
            check_context(name, tokens, "max_prompt_seq_len and max_answer_seq_len")

    def _check_critic(
        self, critic: str, tokenizer: PreTrainedTokenizerBase, answer_end: str | None
    ) -> None:
        try:
            check_same_tokenizer(tokenizer, critic, answer_end)
        except UserError as error:
            # A value stands at each of the actor's tokens, so the critic cannot read others.
            raise UserError(
                f"{error}, or keep it for rewards alone: reward_model_name_or_path {critic}, "
                f"critic_model_name_or_path {self.actor}, init_head_randomly"
            ) from error
        check_model_folder(critic, tokenizer)
        has_head = read_head(critic) is not None
        if has_head and self.fresh_head:
            raise UserError(
                f"init_head_randomly: critic {critic} has a head; drop the flag, or give a "
                "language model as critic"
            )
        if not has_head and not self.fresh_head:
            raise UserError(
                f"reward model {critic}: no {DISK_HEAD} or {HEAD} in it; train one with "
                "step 2 first, or let rewards come from elsewhere: reward_model_name_or_path "
                f"REWARD_MODEL, critic_model_name_or_path {critic}, init_head_randomly"
            )
