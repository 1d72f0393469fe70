"""Settings of the policy's objective beyond PPO's: those of GRPO and its successors."""

from __future__ import annotations

from dataclasses import dataclass

from dschat.errors import UserError
from dschat.rlhf.estimators import DEVIATIONS, Estimator
from dschat.settings import Settings, setting


@dataclass(frozen=True)
class PolicyConfig(Settings):
    """Which ratios, which mean and which answers the policy's loss is made of."""

    cliprange_high: float | None = setting(
        None, "clip range of the policy ratio above 1 (default: cliprange), DAPO's", above=0
    )
    importance_level: str = setting(
        "token",
        "of the policy ratio: of each token, or of the entire answer per token (sequence, GSPO)",
        choices=("token", "sequence"),
    )
    loss_aggregation: str = setting(
        "token",
        "the policy's loss is a mean over all tokens of an optimizer step (token); over its "
        "answers of the mean over their tokens (answer), or of their sum over max_answer_seq_len "
        "(constant, Dr. GRPO)",
        choices=("token", "answer", "constant"),
    )
    advantage_std: str = setting(
        "population",
        "standard deviation of a group that grpo divides by: of its answers (population), with "
        "n - 1 (sample), or none (Dr. GRPO)",
        choices=tuple(DEVIATIONS),
    )
    mask_truncated_answers: bool = setting(
        False, "answers cut at max_answer_seq_len are compared, but not trained on"
    )
    dynamic_sampling_rounds: int = setting(
        0,
        "rounds of further prompts, at most, in place of those whose answers are all worth the "
        "same (DAPO); 0 is off",
        at_least=0,
    )

    def check(self, estimator: Estimator, missing_eos_penalty: float) -> None:
        """Refuse what makes no sense with an estimator.

        Raises:
            UserError: naming the setting and the remedy.
        """
        name = estimator.name
        if self.advantage_std != "population" and not estimator.is_normalised:
            raise UserError(
                f"advantage_std is {self.advantage_std}, but advantage_estimator {name} divides by "
                "no deviation of a group: drop advantage_std, or use grpo"
            )
        if self.importance_level == "sequence" and estimator.needs_critic:
            raise UserError(
                f"importance_level is sequence, but with advantage_estimator {name} each token has "
                "an advantage of its own: drop importance_level, or use rloo or grpo"
            )
        if self.dynamic_sampling_rounds and estimator.min_answers < 2:
            raise UserError(
                f"dynamic_sampling_rounds is {self.dynamic_sampling_rounds}, but "
                f"advantage_estimator {name} compares no answers to one prompt: drop it, or use "
                "rloo or grpo"
            )
        if self.mask_truncated_answers and missing_eos_penalty and estimator.min_answers < 2:
            raise UserError(
                f"missing_eos_penalty is {missing_eos_penalty}, but mask_truncated_answers leaves "
                f"the answers that pay it out, and advantage_estimator {name} compares none with "
                "them: drop one of the two"
            )
