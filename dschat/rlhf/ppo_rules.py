"""Causes of trouble in PPO runs, in the order of cause and effect: symptom, words, remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dschat.rlhf.ppo_history import History
from dschat.rlhf.ppo_series import LONG

FOREIGN_GAP = 0.1  # nats a token; bf16 alone makes 0.015
ALL_EQUAL = 0.9  # of the prompts
NO_SCORES = MASKED = 0.9  # of the answers
MANY_CLIPPED = 0.1  # of the reward model's scores
MANY_RATIOS = 0.3  # of the tokens
SHRUNK, GROWN = 1 / 3, 2.0  # times the first length
SOME_ENDS, NO_ENDS = 0.1, 0.01  # of the answers


@dataclass(frozen=True)
class RunFacts:
    """Parts of a run that decide which remedies it has; the properties are these remedies.

    Attributes:
        can_scale: the reward model's folder has statistics that the run does not use.
        is_scaled: it uses them.
        rate: setting of the actor's learning rate.
        filters: settings by which answers come from a part of the distribution.
    """

    has_reward_model: bool = True
    has_reward_function: bool = False
    can_scale: bool = False
    is_scaled: bool = False
    fuses_adapters: bool = False
    has_kl_target: bool = False
    masks_truncated: bool = False
    ppo_epochs: int = 1
    rate: str = "actor_learning_rate"
    filters: tuple[str, ...] = ()
    samples_ahead: bool = False

    @property
    def slower(self) -> str:
        """Against updates that are too long."""
        return f"lower {self.rate}" + (" or ppo_epochs" if self.ppo_epochs > 1 else "")

    @property
    def closer(self) -> str:
        """Against a policy that leaves the reference."""
        return "lower kl_target" if self.has_kl_target else "raise kl_coef"

    @property
    def ends(self) -> str:
        """Against answers that do not end."""
        if self.masks_truncated:  # no penalty reaches what is not trained on
            return "drop mask_truncated_answers"
        return "raise missing_eos_penalty"

    @property
    def longer(self) -> str:
        """Against answers that the limit cuts; a reward model knows none beyond its pairs'."""
        where = " where step 2's answers are longer" if self.has_reward_model else ""
        return f"raise max_answer_seq_len{where}"

    @property
    def rewards(self) -> str:
        """Sources of the rewards."""
        model = "the reward model (rw_eval.py)" if self.has_reward_model else ""
        function = "reward_function" if self.has_reward_function else ""
        return " and ".join(filter(None, (model, function)))

    @property
    def unclipped(self) -> str:
        """Against scores beyond the clip."""
        if self.can_scale:
            return "give reward_scaling auto, or raise reward_clip"
        if self.is_scaled:
            return "raise it, or train step 2 longer, the spread of whose scores is their unit"
        return "raise it"

    @property
    def unfiltered(self) -> str:
        """Against answers from a part of the distribution."""
        if self.filters:
            return f"drop {', '.join(self.filters)}"
        return "look for dropout that is left on, or an engine that samples otherwise"

    @property
    def same_policy(self) -> str:
        """Against an engine of another policy."""
        if self.fuses_adapters:
            return "drop fuse_lora_for_generation"
        if self.samples_ahead:  # then it is that of one update
            return f"drop rollouts_ahead, or {self.slower}"
        return "look at the rollout engine's weights and temperature"


@dataclass(frozen=True)
class Rule:
    """One cause.

    Attributes:
        says: with figures by their names (`History.words`). remedy: with `RunFacts` as `facts`.
        explains: names of the rules that show what follows from this one.
    """

    name: str
    is_seen: Callable[[History], bool]
    says: str
    remedy: str
    explains: tuple[str, ...] = ()

    def warning(self, history: History, facts: RunFacts) -> str | None:
        """Return the warning with its remedy; None where the rule does not apply."""
        if not self.is_seen(history):
            return None
        return f"{self.says.format_map(history.words())}; {self.remedy.format(facts=facts)}"


RULES = (
    Rule(
        "foreign answers",
        lambda h: h.stays("decode_gap", above=FOREIGN_GAP),
        "another policy answers than the one that trains: log-probabilities of tokens are "
        "{decode_gap:.2f} nats off those by which they were sampled",
        "{facts.same_policy}",
        explains=("negative KL", "ran away", "long updates"),
    ),
    Rule(
        "negative KL",
        lambda h: h.has_negative_kl,
        "KL to the reference is negative ({kl_per_token:.3f} nats a token): answers are not drawn "
        "from the distribution that is scored",
        "{facts.unfiltered}",
    ),
    Rule(
        "no scores",
        lambda h: h.stays("unscored", LONG, above=NO_SCORES),
        "{unscored:.0%} of the answers have no score, and teach nothing",
        "see why reward_function gives None, or leave rows out that nothing can judge",
        explains=("equal rewards", "equal within prompts", "standstill", "reward fell"),
    ),
    Rule(
        "masked answers",
        lambda h: h.stays("masked", above=MASKED),
        "{masked:.0%} of the answers are cut at max_answer_seq_len, and not trained on",
        "{facts.longer}, or drop mask_truncated_answers",
        explains=("no ends", "standstill", "answers grew"),
    ),
    Rule(
        "clipped rewards",
        lambda h: h.stays("reward_clipped", above=MANY_CLIPPED),
        "{reward_clipped:.0%} of the reward model's scores lie beyond reward_clip, which makes "
        "them equal",
        "{facts.unclipped}",
        explains=("equal rewards", "equal within prompts", "standstill"),
    ),
    Rule(
        "ran away",
        lambda h: h.ran_away,
        "the policy has left the reference ({kl_per_token:.2g} nats a token) and not for the "
        "reward, {first_reward:.3g} at first and {reward:.3g} now: its updates are too long",
        "{facts.slower}, or {facts.closer}",
        explains=(
            *("clipped rewards", "answers shrank", "answers grew", "gamed reward", "long updates"),
            *("entropy collapse", "equal rewards", "equal within prompts", "reward fell"),
            *("no ends", "blind critic"),
        ),
    ),
    Rule(
        "answers shrank",
        lambda h: h.change("answer_length") < SHRUNK or h.shrinks,
        "answers shrank from {first_answer_length:.0f} to {answer_length:.2g} tokens while the "
        "reward went from {first_reward:.3g} to {reward:.3g}",
        "see whether {facts.rewards} pays for short answers, or {facts.closer}",
        explains=("gamed reward", "entropy collapse", "equal rewards", "reward fell"),
    ),
    Rule(
        "answers grew",
        lambda h: h.change("answer_length") > GROWN or h.loses_ends or h.runs_on,
        "answers grew from {first_answer_length:.0f} to {answer_length:.0f} tokens, {ended:.0%} "
        "end instead of {first_ended:.0%}, while the reward went from {first_reward:.3g} to "
        "{reward:.3g}",
        "see whether {facts.rewards} pays for length; {facts.ends}, or {facts.longer}",
        explains=("gamed reward", "no ends", "reward fell"),
    ),
    Rule(
        "gamed reward",
        lambda h: h.is_gamed,
        "the reward rose from {first_reward:.3g} to {reward:.3g} while the policy left the "
        "reference (KL {kl_per_token:.2g} nats a token; its answers have "
        "{ref_nats_per_token:.2g} there, {first_ref_nats_per_token:.2g} at first): the reward is "
        "being gamed",
        "read the answers (print_answers), {facts.closer} or stop earlier",
        explains=(
            *("clipped rewards", "long updates", "entropy collapse", "equal rewards"),
            *("equal within prompts", "blind critic"),
        ),
    ),
    Rule(
        "long updates",
        lambda h: h.stays("clip_fraction", above=MANY_RATIOS),
        "the ratios of {clip_fraction:.0%} of the tokens are clipped: updates are too long",
        "{facts.slower}, or give update_kl_limit",
        explains=("entropy collapse", "reward fell", "no ends", "blind critic"),
    ),
    Rule(
        "entropy collapse",
        lambda h: h.collapses,
        "entropy fell from {first_entropy:.3g} to {entropy:.3g} nats a token while the reward went "
        "from {first_reward:.3g} to {reward:.3g}: the policy says one and the same",
        "{facts.closer} or {facts.slower}",
        explains=(
            *("equal rewards", "equal within prompts", "no ends", "reward fell"),
            "blind critic",
        ),
    ),
    Rule(
        "equal rewards",
        lambda h: h.has_equal_rewards,
        "all answers have the reward {reward:.3g}: there is nothing to learn from",
        "check {facts.rewards}",
        explains=("equal within prompts", "standstill", "blind critic"),
    ),
    Rule(
        "equal within prompts",
        lambda h: h.stays("frac_reward_zero_std", LONG, above=ALL_EQUAL),
        "{frac_reward_zero_std:.0%} of the prompts have answers of one and the same reward, and "
        "teach nothing",
        "take other prompts, more answers_per_prompt, or a reward of finer steps",
        explains=("standstill",),
    ),
    Rule(
        "reward fell",
        lambda h: h.fell,
        "the reward fell from {first_reward:.3g} to {reward:.3g}: the policy unlearns what is "
        "rewarded",
        "{facts.slower}, or take more answers an iteration",
        explains=("blind critic",),
    ),
    Rule(
        "no ends",
        lambda h: h.first.get("ended", 0.0) > SOME_ENDS and h.stays("ended", below=NO_ENDS),
        "{ended:.1%} of the answers end instead of {first_ended:.0%} (mean length "
        "{answer_length:.0f} tokens)",
        "{facts.ends}, or {facts.closer}",
    ),
    Rule(
        "standstill",
        lambda h: h.stands_still,
        "the policy is where it began (KL {kl_per_token:.1e} nats a token), and so is the reward",
        "raise {facts.rate}, or train longer",
    ),
    Rule(
        "blind critic",
        lambda h: h.is_critic_blind,
        "explained variance stays at 0 or below ({explained_variance:.2f}): the critic predicts no "
        "better than a constant",
        "raise critic_learning_rate, or lower it where critic_loss does not fall; "
        "critic_warmup_iterations lets it train first",
    ),
)
