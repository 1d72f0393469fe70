"""Output of a PPO run: one line an iteration, all figures in the metrics, sampled answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from dschat.report.records import ANSWERS, HELD_OUT
from dschat.rlhf.answers import AnswerFile, choose_answers, format_answers
from dschat.rlhf.experience import Experience
from dschat.rlhf.ppo_health import HealthMonitor
from dschat.rlhf.ppo_rules import NO_ENDS
from dschat.rlhf.rlhf_engine import DeepSpeedRLHFEngine
from dschat.train import phases
from dschat.train.metrics import MetricLogger, StepLog, console_line, format_value
from dschat.train.model_config import ModelConfig
from dschat.train.overflow import skips
from dschat.train.progress import training_work
from dschat.utils.distributed import all_reduce_sum
from dschat.utils.optim import group_rates
from dschat.utils.perf import Gpus, RolloutWork, Step3Times, print_throughput_step3

ANSWER_ROWS = 3  # shown at a time
HELD_OUT_ROWS = 64  # kept of an evaluation
PARTS = ("reward_model", "reward_function")  # in the line where there are both
SHOWN = (
    "reward",
    *PARTS,
    "kl",
    "entropy",
    "clip_fraction",
    "critic_loss",
    "answer_length",
    "ended",
)


def token_counts(experiences: list[Experience]) -> list[float]:
    """Tokens of prompts and answers together, of answers alone, and rows, on all ranks."""
    return all_reduce_sum(
        [
            float(sum(e.attention_mask[e.real].sum().item() for e in experiences)),
            float(sum(e.answer_mask.sum().item() for e in experiences)),
            float(sum(e.real.sum().item() for e in experiences)),
        ]
    )


class PPOLog(StepLog):
    """Times the stages of each iteration and shows its statistics.

    Args:
        answers_interval: iterations between sampled answers on the screen; 0: none.
        functions: names of the reward functions.
    """

    def __init__(
        self,
        metrics: MetricLogger,
        answers_interval: int,
        roles: DeepSpeedRLHFEngine,
        configs: dict[str, ModelConfig],
        gpus: Gpus,
        iterations: int,
        health: HealthMonitor | None = None,
        functions: Sequence[str] = (),
    ):
        super().__init__(metrics, iterations, "ppo")
        self.roles, self.rank = roles, metrics.rank
        self.answers_interval = answers_interval
        self.iterations, self.gpus = iterations, gpus
        self.works = {n: training_work(e, configs[n]) for n, e in roles.trained.items()}
        self.health, self.functions = health or HealthMonitor(), functions
        self._answers = self._held_out = None
        if metrics.output_dir is not None and self.rank == 0:
            self._held_out = self._opened(HELD_OUT)
            if answers_interval:
                self._answers = self._opened(ANSWERS)
        self._rates: dict[str, float] = {}  # at the iteration's first optimizer step
        self._start = self._rolled_out = 0.0

    def _opened(self, name: str) -> AnswerFile:
        """Open a file of answers, which a resumed run goes on with from its checkpoint's copy."""
        assert self.metrics.output_dir is not None
        continued = self.metrics.continued
        if continued is None or continued.metrics is None:
            resumed_at = None if continued is None else continued.step
            return AnswerFile(self.metrics.output_dir, resumed_at, name)
        saved = continued.metrics.with_name(name)
        return AnswerFile(self.metrics.output_dir, continued.step, name, saved)

    def begin(self) -> None:
        """Note the start of an iteration, and its learning rates."""
        self._rates = {
            f"lr/{role}/{group}": rate
            for role, engine in self.roles.trained.items()
            for group, rate in group_rates(engine.optimizer).items()
        }
        self._start = time.perf_counter()

    def rolled_out(self) -> None:
        """Note the end of rollouts and scoring."""
        self._rolled_out = time.perf_counter()
        phases.mark(phases.ROLLOUTS)

    def iteration(
        self,
        iteration: int,
        statistics: dict[str, float],
        experiences: list[Experience],
        ppo_epochs: int,
        trained: list[Experience] | None = None,
    ) -> None:
        """Show one iteration: its statistics, rates, stage times and throughput.

        Args:
            experiences: all that was sampled. trained: what was learned from, where that is less.
        """
        now = time.perf_counter()
        phases.mark(phases.TRAINING)
        generation = sum(e.generation_seconds for e in experiences)
        times = Step3Times(generation, now - self._rolled_out, now - self._start)
        tokens, answer_tokens, rows = token_counts(experiences)
        learned = (tokens, rows) if trained is None else token_counts(trained)[::2]
        seconds = {
            "seconds/generation": times.generation,
            "seconds/scoring": times.end_to_end - times.generation - times.training,
            "seconds/training": times.training,
            "answer_tokens_per_s": answer_tokens / times.generation,
        }
        skipped = {
            f"{role}_{name}": count
            for role, engine in self.roles.trained.items()
            for name, count in skips(engine).items()
        }
        if self.metrics.is_due(iteration, self.iterations):
            self.metrics.log(iteration, statistics | self._rates | seconds | skipped)
        self.bar.update(1)
        shown = {n: statistics[n] for n in self._shown(statistics)}
        line = " | ".join(f"{name} {format_value(value)}" for name, value in shown.items())
        self.say(f"iteration {iteration}/{self.iterations} | {line}")
        if iteration == self.iterations or iteration % (10 * self.metrics.config.log_every) == 0:
            rollout = RolloutWork(
                prompt_tokens=int(tokens - answer_tokens),
                new_tokens=int(answer_tokens),
                samples=int(rows),
                steps=sum(e.generation_steps for e in experiences),
            )
            passes = dict.fromkeys(self.works, float(ppo_epochs))
            passes["actor"] *= statistics["actor_updates"]  # it may rest, or stop early
            self._show_throughput(rollout, learned, passes, times)
        self._warn(iteration, statistics | skipped)
        self._show_answers(iteration, experiences)

    def _show_throughput(
        self,
        rollout: RolloutWork,
        learned: Sequence[float],
        passes: dict[str, float],
        times: Step3Times,
    ) -> None:
        """Show the throughput of an iteration.

        Args:
            learned: tokens and rows that were learned from. passes: over them, by role.
        """
        tokens, rows = learned
        works = {
            name: replace(work, tokens=int(tokens * passes[name]), samples=int(rows * passes[name]))
            for name, work in self.works.items()
        }
        self.bar.clear()
        critic = works.get("critic")
        print_throughput_step3(works["actor"], critic, rollout, times, self.gpus, self.rank)

    def _shown(self, statistics: dict[str, float]) -> list[str]:
        """Names in the line; parts of the reward where there are several."""
        single = "reward_function" in statistics
        parts = [] if single else [n for n in statistics if n.startswith("rewards/")]
        hidden = () if single or parts else PARTS
        names = [n for n in SHOWN if n in statistics and n not in hidden]
        at = 1 + ("reward_model" in names)
        return names[:at] + parts + names[at:] if "reward" in names else parts + names

    def evaluation(
        self, iteration: int, statistics: dict[str, float], rollouts: Sequence[Experience] = ()
    ) -> None:
        """Show an evaluation on held-out prompts, and keep some of its answers on this rank."""
        phases.mark(phases.EVALUATION)
        shown = {n: value for n, value in statistics.items() if not n.endswith("_error")}
        self.say("eval " + console_line(iteration, self.iterations, shown))
        if self._held_out is not None and rollouts:
            tokenizer, names = self.roles.tokenizer, self.functions
            answers = choose_answers(rollouts, HELD_OUT_ROWS, tokenizer, iteration, names)
            self._held_out.replace(iteration, answers)
        self.metrics.log(iteration, statistics, kind="eval")

    def _warn(self, iteration: int, statistics: dict[str, float]) -> None:
        """Show what is wrong with an iteration; warnings are kept in the metrics too."""
        if iteration == 1 and statistics["ended"] < NO_ENDS:
            self.say(
                "note: no answer of the first iteration ended within "
                f"{statistics['answer_length']:.0f} tokens, so that they are scored as they break "
                f"off; {self.health.facts.longer}, or check that step 1 trained with this end "
                f"token, {self.roles.tokenizer.eos_token}, or give missing_eos_penalty"
            )
        for warning in self.health.observe(iteration, statistics):
            self.say(f"warning, iteration {iteration}: {warning}")
            self.metrics.warn(iteration, warning)

    def _show_answers(self, iteration: int, experiences: list[Experience]) -> None:
        if self.rank != 0 or not self.answers_interval or iteration % self.answers_interval:
            return
        tokenizer = self.roles.tokenizer
        answers = choose_answers(experiences, ANSWER_ROWS, tokenizer, iteration, self.functions)
        self.say(format_answers(answers))
        if self._answers is not None:
            self._answers.write(answers)
