"""Every flag once: frozen settings of each step, checked before any work starts."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass
from pathlib import Path

from dschat.cli import flag, group
from dschat.errors import UserError
from dschat.rlhf.ppo_log import AnswerPrinting
from dschat.rlhf.ppo_trainer import PPOConfig
from dschat.rlhf.rlhf_engine import RoleConfig
from dschat.rlhf.rollout import SamplingConfig
from dschat.utils.advice import first_lora_rate
from dschat.utils.data.data_utils import DataSpec
from dschat.utils.data.formats import PROMPT_FORMATS
from dschat.utils.data.grouping import ByRows, ByTokens, Grouping, Packed
from dschat.utils.data.sources import Reading
from dschat.utils.data.tokenise import TRAIN_ON
from dschat.utils.distributed import launched_rank, print_rank_0
from dschat.utils.ds_utils import EngineConfig
from dschat.utils.engine import Recipe, Schedule, check_optimizer_block, num_windows
from dschat.utils.metrics import Continued, require_package
from dschat.utils.module.lora import ALL_LINEAR, LoraConfig
from dschat.utils.optim import SCHEDULES, OptimizerConfig, schedule_factory
from dschat.utils.progress import LogConfig
from dschat.utils.save_plan import SavePlan, plan_saving
from dschat.utils.state_folder import NEWEST
from dschat.utils.training_state import StateConfig

SWITCH = {"action": "store_true"}


@dataclass(frozen=True)
class LoraArguments:
    """Flags of the adapters of one model."""

    lora_dim: int = flag(0, "rank of the adapters; 0 trains all weights")
    lora_alpha: float | None = flag(None, "scaling is alpha / dim (default: dim)", type=float)
    lora_dropout: float = flag(0.0, "dropout on the adapters' input")
    lora_init: str = flag(
        "A", "the matrix that starts random, the other is zero", choices=["A", "B"]
    )
    use_rslora: bool = flag(False, "scale by alpha / sqrt(dim)", **SWITCH)
    use_dora: bool = flag(False, "DoRA: train the lengths of the weights' rows too", **SWITCH)
    lora_module_name: list[str] = flag(
        [ALL_LINEAR],
        "substrings of layer names that get adapters, or all-linear; embeddings by their name",
        nargs="+",
        type=str,
    )
    modules_to_save: list[str] = flag(
        [], "names of modules that train whole, beside the adapters", nargs="+", type=str
    )
    quantize_base: str | None = flag(
        None,
        "keep the wrapped weights in so many bits (needs bitsandbytes; ZeRO 0 to 2)",
        type=str,
        choices=["4bit", "8bit"],
    )
    lora_learning_rate: float | None = flag(
        None,
        "learning rate of A (default: the learning rate given, else what suits the ratio)",
        type=float,
    )
    loraplus_lr_ratio: float = flag(16.0, "LoRA+: learning rate of B over that of A")
    lora_embedding_learning_rate: float = flag(1e-6, "learning rate of adapters on embeddings")

    def config(self) -> LoraConfig | None:
        """The adapters asked for, or None."""
        if self.lora_dim == 0:
            return None
        return LoraConfig(
            dim=self.lora_dim,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            init=self.lora_init,
            use_rslora=self.use_rslora,
            module_names=_parts(self.lora_module_name),
            use_dora=self.use_dora,
            modules_to_save=_parts(self.modules_to_save),
            quantize=self.quantize_base,
        )


def _parts(names: list[str]) -> tuple[str, ...]:
    """Given apart or with commas between them."""
    return tuple(part for name in names for part in name.split(",") if part)


@dataclass(frozen=True)
class ModelArguments:
    """Flags of how one model is trained."""

    zero_stage: int = flag(0, "ZeRO stage", choices=[0, 1, 2, 3])
    gradient_checkpointing: bool = flag(False, "recompute activations in backward", **SWITCH)
    dropout: float | None = flag(None, "override every dropout probability", type=float)
    learning_rate: float | None = flag(
        None,
        "learning rate of all that trains (default: {full_rate:g}, of adapters another)",
        type=float,
    )
    weight_decay: float = flag(0.0, "weight decay, except on biases and normalisation")
    head_learning_rate: float | None = flag(
        None, "learning rate of a reward or value head (default: the learning rate)", type=float
    )
    full_rate: float = 1e-5  # no flag: each step sets its own
    lora: LoraArguments = group(LoraArguments)

    def optimizer_config(self) -> OptimizerConfig:
        """Rates of every group; where none is given, those that suit the step and the ratio."""
        given, lora_given = self.learning_rate, self.lora.lora_learning_rate
        first = first_lora_rate(self.full_rate, self.lora.loraplus_lr_ratio)
        rates_A = [rate for rate in (lora_given, given, first) if rate is not None]
        # Beside a rate of the adapters' own, the other one is that of what trains whole.
        full_is_given = given is not None and lora_given is not None
        return OptimizerConfig(
            learning_rate=self.full_rate if given is None else given,
            weight_decay=self.weight_decay,
            lora_learning_rate=rates_A[0],
            loraplus_lr_ratio=self.lora.loraplus_lr_ratio,
            lora_embedding_learning_rate=self.lora.lora_embedding_learning_rate,
            head_learning_rate=self.head_learning_rate,
            full_rate=given if full_is_given else self.full_rate,
        )


@dataclass(frozen=True)
class StateArguments:
    """Flags of training states: saving them, and resuming from one."""

    save_steps: int = flag(
        0,
        "steps (in step 3 iterations) between training states under OUTPUT_DIR/checkpoints; "
        "0: none",
    )
    save_total_limit: int = flag(1, "keep so many of them, the newest")
    resume: str | None = flag(
        None,
        "go on from this training state; without a value from the newest, if there is one",
        type=str,
        nargs="?",
        const=NEWEST,
    )
    resume_with_new_rates: bool = flag(
        False, "resume with the learning rates and ratios given now, not the saved ones", **SWITCH
    )

    def __post_init__(self):
        if self.save_steps < 0:
            raise UserError(f"save_steps is {self.save_steps}: give 0 (never) or more")
        if self.save_total_limit < 1:
            raise UserError(f"save_total_limit is {self.save_total_limit}: give at least 1")
        if self.resume_with_new_rates and self.resume is None:
            raise UserError("resume_with_new_rates: nothing is resumed; add --resume")


@dataclass(frozen=True)
class RunArguments:
    """Flags that every step shares."""

    output_dir: str | None = flag(None, "where the trained model is written", type=str)
    seed: int = flag(1234, "seed of data order, splits, initialisation and sampling")
    dtype: str = flag(
        "auto", "auto is bf16 where the device has it", choices=["auto", "fp32", "bf16", "fp16"]
    )
    num_train_epochs: int = flag(1, "passes over the training data")
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step")
    gradient_clipping: float = flag(1.0, "largest gradient norm")
    lr_scheduler_type: str = flag("cosine", "shape of the schedule", choices=list(SCHEDULES))
    num_warmup_steps: int = flag(0, "optimizer steps of linear warm-up")
    offload: bool = flag(
        False, "keep optimizer states on the CPU (parameters too at ZeRO-3)", **SWITCH
    )
    only_optimize_lora: bool = flag(False, "train adapters and heads only (the default)", **SWITCH)
    train_base_model: bool = flag(False, "with LoRA: train the base weights as well", **SWITCH)
    lora_save: str = flag(
        "both",
        "with LoRA, write merged weights, the adapter in PEFT's format, or both",
        choices=["both", "merged", "adapter"],
    )
    deepspeed_config: str | None = flag(None, "DeepSpeed JSON merged over ours", type=str)
    enable_tensorboard: bool = flag(False, "write TensorBoard events", **SWITCH)
    tensorboard_path: str = flag("tensorboard", "folder of the TensorBoard events")
    wandb_project: str | None = flag(None, "log to this Weights & Biases project", type=str)
    add_eot_token: bool = flag(False, "end answers with --eot_token instead of the eos", **SWITCH)
    eot_token: str = flag("<|endoftext|>", "the token of --add_eot_token")
    log_every: int = flag(10, "optimizer steps between metrics")
    deepspeed: bool = flag(False, "accepted: DeepSpeed is always used", **SWITCH)
    local_rank: int = flag(-1, "accepted: the launcher's environment decides")
    compute_fp32_loss: bool = flag(
        False, "losses are always computed in fp32", retired=True, **SWITCH
    )
    states: StateArguments = group(StateArguments)

    def __post_init__(self):
        for name in ("num_train_epochs", "gradient_accumulation_steps", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.num_warmup_steps < 0:
            raise UserError(f"num_warmup_steps is {self.num_warmup_steps}: give 0 or more")
        if self.output_dir is None and self.state_config().in_use:
            flag_name = "save_steps" if self.states.save_steps else "resume"
            raise UserError(
                f"{flag_name}: training states lie in the output folder; add --output_dir"
            )
        if self.only_optimize_lora and self.train_base_model:
            raise UserError("only_optimize_lora and train_base_model contradict: drop one")
        if self.enable_tensorboard:
            require_package("tensorboard", "--enable_tensorboard")
        if self.wandb_project is not None:
            require_package("wandb", "--wandb_project")

    @property
    def answer_end(self) -> str | None:
        """The token that ends answers in place of the tokenizer's eos."""
        return self.eot_token if self.add_eot_token else None

    def recipe(self, model: ModelArguments) -> Recipe:
        """How one model trains; the optimizer of a DeepSpeed JSON must agree with the flags."""
        recipe = Recipe(
            optimizer=model.optimizer_config(),
            lora=model.lora.config(),
            train_base=self.train_base_model,
            gradient_checkpointing=model.gradient_checkpointing,
        )
        if model.lora.quantize_base is not None:
            self._check_quantized(model)
        if self.deepspeed_config is not None:
            check_optimizer_block(self.deepspeed_config, recipe.optimizer)
        return recipe

    def _check_quantized(self, model: ModelArguments) -> None:
        """Stop where frozen weights in few bits cannot serve."""
        given = f"quantize_base {model.lora.quantize_base}"
        if model.lora.lora_dim == 0:
            raise UserError(f"{given}: packed weights cannot train; add adapters with lora_dim")
        if self.train_base_model:
            raise UserError(f"{given}: packed weights cannot train; drop train_base_model")
        if model.zero_stage == 3:
            raise UserError(
                f"{given}: ZeRO-3 shards what weights it can gather, and packed ones it cannot; "
                "use zero_stage 0, 1 or 2"
            )
        require_package("bitsandbytes", "--quantize_base")

    def save_plan(self, model_name: str, recipe: Recipe, *inside: str) -> SavePlan:
        """What one model's folder will hold; it is output_dir, or each of these folders inside."""
        folders = (
            [Path(self.output_dir, name) for name in inside or ("",)] if self.output_dir else []
        )
        return plan_saving(
            self.lora_save,
            model_name,
            recipe.lora,
            train_base=recipe.train_base,
            output_dirs=folders,
        )

    def schedule(self, total_steps: int) -> Schedule:
        """The learning-rate schedule over so many optimizer steps."""
        return schedule_factory(self.lr_scheduler_type, self.num_warmup_steps, total_steps)

    def state_config(self) -> StateConfig:
        """When training states are written, and what the run resumes from."""
        states = self.states
        return StateConfig(
            output_dir=self.output_dir,
            save_steps=states.save_steps,
            save_total_limit=states.save_total_limit,
            resume=states.resume,
            with_new_rates=states.resume_with_new_rates,
        )

    def log_config(self, continued: Continued | None = None) -> LogConfig:
        """Where the run's figures go; a resumed run's continue those of another."""
        return LogConfig(
            output_dir=self.output_dir,
            tensorboard_dir=self.tensorboard_path if self.enable_tensorboard else None,
            wandb_project=self.wandb_project,
            log_every=self.log_every,
            continued=continued,
        )

    def engine_config(self, model: ModelArguments, dtype: str, micro_batch: int) -> EngineConfig:
        """DeepSpeed's numbers for one model."""
        return EngineConfig(
            zero_stage=model.zero_stage,
            dtype=dtype,
            offload=self.offload,
            micro_batch_size=micro_batch,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            gradient_clipping=self.gradient_clipping,
            user_config=self.deepspeed_config,
        )


@dataclass(frozen=True)
class DataArguments:
    """Flags of the data of every step."""

    data_path: list[str] = flag(
        ["Dahoas/rm-static"], "files, folders or hub ids of preference data", nargs="*", type=str
    )
    data_split: str = flag("2,4,4", "proportions of the training data for steps 1, 2 and 3")
    data_output_path: str = flag("/tmp/data_files/", "cache of tokenised data")
    dataset_columns: list[str] = flag(
        [],
        "which columns hold what: prompt=question.text chosen=best rejected=worst "
        "(default: recognised)",
        nargs="+",
        type=str,
    )
    dataset_function: str | None = flag(
        None, "module:name of your function from a row to prompt, chosen, rejected", type=str
    )
    prompt_format: str | None = flag(
        None,
        "dschat: Human: and Assistant:; chat: the chat template (default: the model's own, else "
        "chat where the tokenizer has a template)",
        type=str,
        choices=list(PROMPT_FORMATS),
    )
    preprocessing_num_workers: int | None = flag(
        None,
        "processes that tokenise, on each node (default: by cores, 1 for small sets)",
        type=int,
    )
    streaming: bool = flag(
        False,
        "tokenise rows as they are read and keep nothing on disk; needs --max_steps",
        **SWITCH,
    )
    max_train_samples: int | None = flag(None, "use at most so many training rows", type=int)
    max_eval_samples: int | None = flag(None, "use at most so many evaluation rows", type=int)

    def check_streaming(self, run: RunArguments, max_steps: int, batching: str | None) -> None:
        """Stop where rows that nobody has counted cannot serve.

        Args:
            batching: the flag that asks for batches other than by rows.
        """
        if not self.streaming:
            return
        refused = {
            "max_train_samples": (self.max_train_samples is not None, "give max_steps alone"),
            "preprocessing_num_workers": (
                self.preprocessing_num_workers is not None,
                "each rank tokenises its own rows; drop it",
            ),
            "num_train_epochs": (run.num_train_epochs > 1, "max_steps is the only limit; drop it"),
            "save_steps or resume": (
                run.state_config().in_use,
                "a stream cannot go on from its middle, nor be told from an edited one; drop it",
            ),
            batching: (batching is not None, "it needs all lengths of an epoch; drop it"),
        }
        if max_steps < 1:
            raise UserError("streaming: nobody knows how many rows there are; give max_steps")
        for name, (is_given, why) in refused.items():
            if is_given:
                raise UserError(f"streaming and {name}: {why}")

    def spec(self, seed: int, max_seq_len: int, **more) -> DataSpec:
        """What the data room needs to know."""
        return DataSpec(
            data_path=tuple(self.data_path),
            data_split=self.data_split,
            data_output_path=self.data_output_path,
            seed=seed,
            max_seq_len=max_seq_len,
            max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples,
            reading=Reading(tuple(self.dataset_columns), self.dataset_function),
            workers=self.preprocessing_num_workers,
            streaming=self.streaming,
            **more,
        )


@dataclass(frozen=True)
class BatchArguments:
    """Batch sizes and length limit of steps 1 and 2."""

    model_name_or_path: str = flag(MISSING, "model folder or hub id", type=str)
    per_device_train_batch_size: int = flag(16, "rows per device and micro-batch")
    per_device_eval_batch_size: int = flag(16, "rows per device in evaluation")
    max_seq_len: int = flag(512, "tokens of prompt and answer together")
    eval_interval: int = flag(0, "optimizer steps between evaluations; 0: per epoch only")
    max_steps: int = flag(0, "stop after so many optimizer steps; 0: after the data")
    max_tokens_per_batch: int | None = flag(
        None,
        "training batches of as many rows as fit, padded, in so many tokens per device, in place "
        "of --per_device_train_batch_size",
        type=int,
    )

    def __post_init__(self):
        for field in dataclasses.fields(self)[1:4]:
            if getattr(self, field.name) < 1:
                raise UserError(f"{field.name} is {getattr(self, field.name)}: give at least 1")
        if self.max_steps < 0:
            raise UserError(f"max_steps is {self.max_steps}: give 0 (no limit) or more")
        self.grouping()

    @property
    def own_batching(self) -> str | None:
        """The flag that asks for batches other than by rows."""
        return None if self.max_tokens_per_batch is None else "max_tokens_per_batch"

    def grouping(self, sequences: int = 1, packing: bool = False) -> Grouping:
        """How training rows become batches; `sequences` is how many a row becomes.

        Raises:
            UserError: too few tokens for the longest row, or two ways at once.
        """
        limit, longest = self.max_tokens_per_batch, sequences * self.max_seq_len
        if limit is not None and limit < longest:
            of_what = "a pair" if sequences == 2 else "a row"
            raise UserError(
                f"max_tokens_per_batch is {limit}: {of_what} may have {longest} tokens; give at "
                "least that, or a smaller max_seq_len"
            )
        if packing and limit is not None:
            raise UserError(
                "packing and max_tokens_per_batch: packed rows are all of max_seq_len already; "
                "drop one, per_device_train_batch_size counts packed rows"
            )
        if packing:
            return Packed(self.per_device_train_batch_size, self.max_seq_len)
        if limit is not None:
            return ByTokens(limit, sequences)
        return ByRows(self.per_device_train_batch_size)


@dataclass(frozen=True)
class EvaluationArguments:
    """Flags of scripts that load one model and evaluate it."""

    model_name_or_path: str = flag(MISSING, "model folder or hub id", type=str)
    batch_size: int = flag(16, "rows per batch")
    max_seq_len: int = flag(512, "tokens of prompt and answer together")
    dtype: str = flag(
        "auto", "auto is bf16 where the device has it", choices=["auto", "fp32", "bf16", "fp16"]
    )
    seed: int = flag(1234, "seed of splits; as in training")
    add_eot_token: bool = flag(False, "end answers with --eot_token instead of the eos", **SWITCH)
    eot_token: str = flag("<|endoftext|>", "the token of --add_eot_token")

    @property
    def answer_end(self) -> str | None:
        """The token that ends answers in place of the tokenizer's eos."""
        return self.eot_token if self.add_eot_token else None


@dataclass(frozen=True)
class SFTSettings:
    """Step 1, supervised fine-tuning."""

    batch: BatchArguments = group(BatchArguments)
    data: DataArguments = group(DataArguments)
    model: ModelArguments = group(ModelArguments, full_rate=9.65e-6)
    run: RunArguments = group(RunArguments, tensorboard_path="step1_tensorboard")
    sft_only_data_path: list[str] = flag(
        [], "data used in this step alone (prompt and response)", nargs="*", type=str
    )
    train_on: str | None = flag(
        None,
        "which answers of a conversation train (default: all_turns where rows are conversations, "
        "last_turn where they are prompt and answer)",
        type=str,
        choices=list(TRAIN_ON),
    )
    train_on_prompt: bool = flag(False, "train on prompt tokens as well", **SWITCH)
    packing: bool = flag(
        False, "train on rows packed to --max_seq_len, kept apart by mask and positions", **SWITCH
    )
    print_loss: bool = flag(False, "print the loss of every optimizer step", **SWITCH)

    def __post_init__(self):
        self.grouping()
        batching = "packing" if self.packing else self.batch.own_batching
        self.data.check_streaming(self.run, self.batch.max_steps, batching)

    def grouping(self) -> Grouping:
        """How training rows become batches."""
        return self.batch.grouping(packing=self.packing)


@dataclass(frozen=True)
class RewardSettings:
    """Step 2, reward model."""

    batch: BatchArguments = group(BatchArguments)
    data: DataArguments = group(DataArguments)
    model: ModelArguments = group(ModelArguments, full_rate=5e-5)
    run: RunArguments = group(RunArguments, tensorboard_path="step2_tensorboard")
    margin: float = flag(0.0, "margin by which chosen should beat rejected")
    centering_coefficient: float = flag(0.0, "weight of (chosen + rejected)^2")
    eval_iters: int | None = flag(
        None, "evaluation batches at --eval_interval (default: all)", type=int
    )
    num_padding_at_beginning: int = flag(1, "masks come from lengths", retired=True)

    def __post_init__(self):
        self.grouping()
        self.data.check_streaming(self.run, self.batch.max_steps, self.batch.own_batching)

    def grouping(self) -> Grouping:
        """How training pairs become batches."""
        return self.batch.grouping(sequences=2)


@dataclass(frozen=True)
class PPOArguments:
    """Flags of the PPO loop."""

    actor_model_name_or_path: str = flag(MISSING, "folder or hub id of the SFT model", type=str)
    critic_model_name_or_path: str = flag(MISSING, "folder or hub id of the reward model", type=str)
    per_device_generation_batch_size: int = flag(16, "prompts per device and rollout")
    per_device_training_batch_size: int = flag(16, "rows per device and training micro-batch")
    generation_batches: int = flag(1, "rollouts between updates")
    ppo_epochs: int = flag(1, "passes over each set of rollouts")
    max_prompt_seq_len: int = flag(256, "tokens of a prompt; longer ones lose their beginning")
    max_answer_seq_len: int = flag(256, "tokens of an answer")
    temperature: float = flag(1.0, "sampling temperature")
    top_p: float = flag(1.0, "nucleus sampling")
    top_k: int = flag(0, "top-k sampling; 0 is off")
    kl_coef: float = flag(0.1, "KL penalty per token")
    cliprange: float = flag(0.2, "clip range of the policy ratio")
    cliprange_value: float = flag(0.2, "clip range of the values")
    gamma: float = flag(1.0, "discount")
    lam: float = flag(0.95, "GAE's lambda")
    reward_clip: float = flag(5.0, "scores are clipped to this magnitude")
    missing_eos_penalty: float = flag(0.0, "taken from the score of an answer without end")
    eval_interval: int = flag(0, "updates between evaluations; 0: per epoch only")
    max_steps: int = flag(0, "stop after so many updates; 0: after the data")

    def __post_init__(self):
        for name in ("generation_batches", "max_prompt_seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.max_steps < 0:
            raise UserError(f"max_steps is {self.max_steps}: give 0 (no limit) or more")


@dataclass(frozen=True)
class RLHFSettings:
    """Step 3, PPO."""

    ppo: PPOArguments = group(PPOArguments)
    data: DataArguments = group(DataArguments, max_eval_samples=128)
    actor: ModelArguments = group(ModelArguments, prefix="actor_", full_rate=9.65e-6)
    critic: ModelArguments = group(ModelArguments, prefix="critic_", full_rate=5e-6)
    run: RunArguments = group(
        RunArguments, tensorboard_path="step3_tensorboard", num_warmup_steps=100, log_every=1
    )
    offload_reference_model: bool = flag(False, "keep the reference's weights on the CPU", **SWITCH)
    offload_reward_model: bool = flag(False, "keep the reward model's weights on the CPU", **SWITCH)
    enable_ema: bool = flag(False, "keep a moving average of the actor, saved beside it", **SWITCH)
    ema_decay: float = flag(0.992, "decay of the moving average")
    print_answers: bool = flag(False, "print sampled answers", **SWITCH)
    print_answers_interval: int = flag(1, "updates between printed answers")
    enable_test_mode: bool = flag(False, "stop after --test_stop_step updates", **SWITCH)
    test_stop_step: int = flag(0, "updates before a test run stops")
    unsupervised_dataset_name: str | None = flag(None, "mix-in of language modelling", type=str)
    unsupervised_dataset_config_name: str | None = flag(None, "its configuration", type=str)
    unsup_coef: float = flag(27.8, "PPO mixes in no language modelling", retired=True)
    enable_hybrid_engine: bool = flag(
        False, "answers are generated by transformers", retired=True, **SWITCH
    )
    unpin_actor_parameters: bool = flag(
        False, "a setting of DeepSpeed's hybrid engine", retired=True, **SWITCH
    )
    release_inference_cache: bool = flag(
        False, "a setting of DeepSpeed's hybrid engine", retired=True, **SWITCH
    )
    inference_tp_size: int = flag(1, "a setting of DeepSpeed's hybrid engine", retired=True)
    tp_gather_partition_size: int = flag(8, "a setting of DeepSpeed's hybrid engine", retired=True)
    enable_mixed_precision_lora: bool = flag(
        False, "ZeRO-3 keeps its own precision", retired=True, **SWITCH
    )
    align_overflow: bool = flag(
        False, "each engine skips its own overflows", retired=True, **SWITCH
    )
    num_padding_at_beginning: int = flag(1, "masks come from lengths", retired=True)

    def __post_init__(self):
        for name in ("unsupervised_dataset_name", "unsupervised_dataset_config_name"):
            if getattr(self, name) is not None:
                raise UserError(f"{name}: PPO mixes in no language modelling; drop the flag")
        self.data.check_streaming(self.run, self.ppo.max_steps, None)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}: give a number in [0, 1)")
        # What they are made of is checked as well, before the data is read.
        self.ppo_config()
        actor, critic = self.roles("fp32", iterations=1)
        self._say_what_does_nothing(actor, critic)

    def _say_what_does_nothing(self, actor: RoleConfig, critic: RoleConfig) -> None:
        rank = launched_rank()
        for name, model in (("actor", self.actor), ("critic", self.critic)):
            given = {"dropout": model.dropout, "lora_dropout": model.lora.lora_dropout}
            for flag_name in (n for n, value in given.items() if value):
                print_rank_0(
                    f"--{name}_{flag_name} does nothing: PPO compares probabilities of one and "
                    "the same function, so all dropout is off",
                    rank,
                )
        for name, kept, role in (("reference", "actor", actor), ("reward", "critic", critic)):
            if role.offload_frozen and role.recipe.base_is_frozen:
                print_rank_0(
                    f"--offload_{name}_model does nothing: with LoRA the {name} model is the "
                    f"{kept} with its adapters off, not a copy",
                    rank,
                )

    def data_spec(self) -> DataSpec:
        """Prompts alone, cut to their own limit."""
        longest = self.ppo.max_prompt_seq_len + self.ppo.max_answer_seq_len
        return self.data.spec(self.run.seed, longest, max_prompt_len=self.ppo.max_prompt_seq_len)

    def ppo_config(self) -> PPOConfig:
        """The coefficients of PPO."""
        ppo = self.ppo
        return PPOConfig(
            sampling=SamplingConfig(ppo.max_answer_seq_len, ppo.temperature, ppo.top_p, ppo.top_k),
            kl_coefficient=ppo.kl_coef,
            clip_range=ppo.cliprange,
            value_clip_range=ppo.cliprange_value,
            gamma=ppo.gamma,
            lam=ppo.lam,
            reward_clip=ppo.reward_clip,
            missing_eos_penalty=ppo.missing_eos_penalty,
            ppo_epochs=ppo.ppo_epochs,
            rollout_batch_size=ppo.per_device_generation_batch_size,
            micro_batch_size=ppo.per_device_training_batch_size,
            gradient_accumulation_steps=self.run.gradient_accumulation_steps,
            seed=self.run.seed,
        )

    def iterations(self, batches_per_epoch: int | None) -> int:
        """How many iterations the data, if it is counted, or an earlier stop make."""
        limits = []
        if batches_per_epoch is not None:
            per_epoch = num_windows(batches_per_epoch, self.ppo.generation_batches)
            limits.append(self.run.num_train_epochs * per_epoch)
        if self.ppo.max_steps:
            limits.append(self.ppo.max_steps)
        if self.enable_test_mode and self.test_stop_step:
            limits.append(self.test_stop_step)
        return min(limits)

    def roles(self, dtype: str, iterations: int) -> tuple[RoleConfig, RoleConfig]:
        """Actor and critic, with schedules over the optimizer steps of all iterations."""
        ppo, run = self.ppo, self.run
        micro_batches = ppo.generation_batches * num_windows(
            ppo.per_device_generation_batch_size, ppo.per_device_training_batch_size
        )
        steps = num_windows(micro_batches, run.gradient_accumulation_steps)
        schedule = run.schedule(iterations * ppo.ppo_epochs * steps)
        micro_batch = ppo.per_device_training_batch_size
        actor = RoleConfig(
            model=ppo.actor_model_name_or_path,
            engine=run.engine_config(self.actor, dtype, micro_batch),
            recipe=run.recipe(self.actor),
            schedule=schedule,
            offload_frozen=self.offload_reference_model,
        )
        critic = RoleConfig(
            model=ppo.critic_model_name_or_path,
            engine=run.engine_config(self.critic, dtype, micro_batch),
            recipe=run.recipe(self.critic),
            schedule=schedule,
            offload_frozen=self.offload_reward_model,
        )
        return actor, critic

    def printing(self) -> AnswerPrinting:
        """How often sampled answers are printed."""
        return AnswerPrinting(self.print_answers_interval if self.print_answers else 0)
