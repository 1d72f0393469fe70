"""Which folder plays which role, how each one is kept, and the checks of it before weights load."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dschat.errors import UserError
from dschat.models.causal_lm import check_context, load_config
from dschat.models.reward_model import DISK_HEAD, check_reward_head, read_head
from dschat.models.reward_statistics import RewardStatistics
from dschat.rlhf.one_trunk import check_one_trunk
from dschat.rlhf.retokenise import Retokeniser
from dschat.text.formats import set_format
from dschat.text.tokenizer import check_same_tokenizer, load_hf_tokenizer
from dschat.train.engine import Recipe, Schedule
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.module.model_source import resolve_model, same_model

LAYOUTS = ("auto", "all", "none")  # of trunks


@dataclass(frozen=True)
class RoleConfig:
    """One trained role: where it comes from and how it trains."""

    model: str
    engine: EngineConfig
    recipe: Recipe
    schedule: Schedule
    offload_frozen: bool = False  # the actor's frozen copy lives on the CPU between uses
    fresh_head: bool = False  # the critic starts with a random value head
    value_scaling: RewardStatistics | None = None  # by which the critic's folder was trained


@dataclass(frozen=True)
class FrozenConfig:
    """A role that is only ever scored: where it comes from and where its weights live."""

    model: str
    zero_stage: int = 0
    dtype: str = "bf16"
    offload: bool = False  # on the CPU between uses


@dataclass(frozen=True)
class Cast:
    """Every role as it is built.

    Attributes:
        critic: None where no critic is trained. reward: None where no model gives rewards.
        share_trunk: `auto`: adapters switched off give reference and reward model; `none`: frozen
            copies; `all`: as `auto`, and one base's weights for every role.
        retokenise: for a reward model that reads other tokens than the actor's.
        scaling: of the reward model's scores; None: they are taken as they are.
    """

    actor: RoleConfig
    critic: RoleConfig | None
    reward: FrozenConfig | None
    share_trunk: str = "auto"
    retokenise: Retokeniser | None = None
    scaling: RewardStatistics | None = None

    @property
    def trained(self) -> dict[str, RoleConfig]:
        """The roles that train."""
        roles = {"actor": self.actor, "critic": self.critic}
        return {name: role for name, role in roles.items() if role is not None}

    @property
    def reference(self) -> FrozenConfig:
        """The actor's frozen copy, where there is one."""
        engine = self.actor.engine
        offload = self.actor.offload_frozen
        return FrozenConfig(self.actor.model, engine.zero_stage, engine.dtype, offload)

    @property
    def reference_is_actors(self) -> bool:
        """Whether the reference is the actor with its adapters off."""
        return self.share_trunk != "none" and self.actor.recipe.base_is_frozen

    @property
    def reward_is_critics(self) -> bool:
        """Whether the reward model is the critic, its adapters off, with the head it came with."""
        is_kept = self.share_trunk != "none" and self._starts_as_reward_model
        return is_kept and self.critic.recipe.base_is_frozen

    @property
    def value_scaling(self) -> RewardStatistics | None:
        """What the critic's values are scaled by, so that they start in the units of the scores."""
        if self.scaling is None or self.critic is None or self.critic.fresh_head:
            return None
        return self.scaling if self._starts_as_reward_model else self.critic.value_scaling

    @property
    def _starts_as_reward_model(self) -> bool:
        if self.critic is None or self.reward is None or self.critic.fresh_head:
            return False
        return same_model(self.critic.model, self.reward.model)


@dataclass(frozen=True)
class RoleNames:
    """The folder or hub id of every role; None as in `Cast`."""

    actor: str
    critic: str | None
    reward: str | None
    fresh_head: bool = False
    share_trunk: str = "auto"

    def check(
        self, tokenizer: PreTrainedTokenizerBase, answer_end: str | None = None
    ) -> Retokeniser | None:
        """Stop at folders that cannot play their roles; before any weights are loaded.

        Args:
            tokenizer: the actor's. answer_end: the token that ends answers instead of its eos.

        Returns:
            What turns sampled sequences into the reward model's, None where it reads them as they
            are.

        Raises:
            UserError: naming the folder and the remedy.
        """
        _check_language_model(self.actor)
        if self.critic is not None:
            self._check_critic(tokenizer, answer_end)
        if self.share_trunk == "all":
            check_one_trunk([n for n in (self.actor, self.critic, self.reward) if n is not None])
        if self.reward is None:
            return None
        check_reward_head(self.reward)
        if self.critic is not None and same_model(self.reward, self.critic):
            return None  # compared above
        reader = load_hf_tokenizer(self.reward)
        set_format(reader)
        longest = getattr(load_config(self.reward), "max_position_embeddings", None)
        retokenise = Retokeniser.between(tokenizer, reader, self.reward, longest)
        if retokenise is not None and self.share_trunk == "all":
            raise UserError(
                f"share_trunk all: the tokenizer of {self.reward} is not that of {self.actor}; "
                "roles on one base share its tokenizer, use --share_trunk auto"
            )
        return retokenise

    def check_context(self, tokens: int, retokenise: Retokeniser | None) -> None:
        """Stop when sequences of so many tokens are longer than a role's positions.

        A reward model with a tokenizer of its own is left out: what it reads is cut to its length.
        """
        names = [self.actor, self.critic, self.reward if retokenise is None else None]
        for name in dict.fromkeys(n for n in names if n is not None):
            check_context(name, tokens, "max_prompt_seq_len and max_answer_seq_len")

    def _check_critic(self, tokenizer: PreTrainedTokenizerBase, answer_end: str | None) -> None:
        try:
            check_same_tokenizer(tokenizer, self.critic, answer_end)
        except UserError as error:
            # A value stands at each of the actor's tokens, so the critic cannot read others.
            raise UserError(f"{error}, or keep it for rewards alone: {self._apart()}") from error
        has_head = read_head(self.critic) is not None
        if has_head and self.fresh_head:
            raise UserError(
                f"init_head_randomly: critic {self.critic} has a head; drop the flag, or give a "
                "language model as critic"
            )
        if not has_head and not self.fresh_head:
            raise UserError(
                f"reward model {self.critic}: no {DISK_HEAD} or v_head.weight in it; train one "
                "with step 2 first, or let rewards come from elsewhere: --reward_model_name_or_path"
                f" REWARD_MODEL --critic_model_name_or_path {self.critic} --init_head_randomly"
            )

    def _apart(self) -> str:
        return (
            f"--reward_model_name_or_path {self.critic} --critic_model_name_or_path {self.actor} "
            "--init_head_randomly"
        )


def _check_language_model(name: str) -> None:
    """Stop at a reward model in the place of the actor."""
    load_config(name)  # whose message about a folder without one is better than what follows
    source = resolve_model(name)
    for adapter in source.read_adapters():
        if adapter.is_reward:
            raise UserError(
                f"adapter {adapter.name}: is a reward model's, which cannot be the actor; give "
                "step 1's folder"
            )
    if not source.adapters and read_head(name) is not None:
        raise UserError(
            f"model {name}: is a reward model (it holds a head), which cannot be the actor; give "
            "step 1's folder"
        )
