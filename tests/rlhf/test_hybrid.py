"""The proof that a rollout engine must pass, and when the hybrid engine is refused."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

from dschat.data.collators import PromptBatch
from dschat.errors import UserError
from dschat.rlhf.generation import SamplingConfig, TransformersRollout
from dschat.rlhf.hybrid import HybridRollout, check_hybrid_available, check_parity, proven_hybrid
from dschat.utils.ds_utils import EngineConfig, HybridConfig, get_train_ds_config
from tests.helpers import tiny
from tests.rlhf.tiny_roles import prompts

ENGINE = EngineConfig(zero_stage=0, micro_batch_size=1, dtype="bf16")


def plain(seed: int = 0) -> TransformersRollout:
    return TransformersRollout(tiny.tiny_llama(seed), tiny.byte_tokenizer())


@dataclass(frozen=True)
class Wrong:
    """Plain generation with one fault."""

    inner: TransformersRollout
    logit_error: float = 0.0
    wrong_token: bool = False
    short: bool = False

    def generate(self, prompts: PromptBatch, sampling: SamplingConfig) -> torch.Tensor:
        sequences = self.inner.generate(prompts, sampling)
        if self.wrong_token:
            sequences[1, -2] += 1
        return sequences[:, :-1] if self.short else sequences

    def next_logits(self, prompts: PromptBatch) -> torch.Tensor:
        logits = self.inner.next_logits(prompts)
        logits[2, 7] += self.logit_error
        return logits


def test_a_right_engine_passes():
    check_parity(plain(), plain(), prompts(), 6, "fast_engine")


@pytest.mark.parametrize(
    "fault, message",
    [
        ({"logit_error": 1e-3}, r"fast_engine: its logits behind a prompt differ .* by 0.001, "),
        ({"logit_error": float("nan")}, "fast_engine: its logits behind a prompt .* by nan"),
        ({"wrong_token": True}, r"fast_engine: token 5 of a greedy answer is \d+, plain"),
        ({"short": True}, r"fast_engine: it returns \(4, \d+\) ids for a prompt, plain"),
    ],
)
def test_a_wrong_engine_is_refused(fault, message):
    with pytest.raises(UserError, match=message):
        check_parity(Wrong(plain(), **fault), plain(), prompts(), 6, "fast_engine")


def test_an_engine_of_other_weights_is_refused():
    with pytest.raises(UserError, match="fast_engine: its logits"):
        check_parity(plain(seed=1), plain(), prompts(), 6, "fast_engine")


def test_the_hybrid_engine_is_refused_without_a_gpu():
    with pytest.raises(UserError, match=r"enable_hybrid_engine: .* need a CUDA GPU, .* on cpu"):
        check_hybrid_available()


@dataclass(eq=False)
class Kernels:
    """What a DeepSpeedHybridEngine shows: kernels in place between `eval()` and `train()`."""

    module: nn.Module
    error: float = 0.0
    failure: Exception | None = None
    modes: list[str] = field(default_factory=list)
    _inference_containers: tuple[str, ...] = ("a layer",)

    def __post_init__(self):
        self._generate, self.module.generate = self.module.generate, self.generate
        self._plain = self.module.lm_head.forward

    def generate(self, *args: object, **kwargs: object) -> torch.Tensor:
        self.modes.append("kernels" if "forward" in vars(self.module.lm_head) else "plain")
        return self._generate(*args, **kwargs)

    def eval(self) -> None:
        print("E2E latency")
        self.module.eval()
        self.module.lm_head.forward = self._kernel

    def _kernel(self, states: torch.Tensor) -> torch.Tensor:
        if self.failure is not None:
            raise self.failure
        return self._plain(states) + self.error

    def train(self) -> None:
        self.module.train()
        vars(self.module.lm_head).pop("forward", None)


def test_a_hybrid_engine_that_agrees_generates(capsys):
    kernels = Kernels(tiny.tiny_llama())
    engine = TransformersRollout(kernels, tiny.byte_tokenizer())
    proven = proven_hybrid(engine, prompts(), 6)
    assert isinstance(proven, HybridRollout)
    assert kernels.modes == ["kernels"]  # the plain half of the proof went past them
    proven.generate(prompts(), SamplingConfig(2))
    assert kernels.modes == ["kernels"] * 2
    # Scoring, behind a generation, is the module's own, in eval mode.
    assert "forward" not in vars(kernels.module.lm_head) and not kernels.module.training
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"error": 0.1}, "^enable_hybrid_engine: its logits .* by 0.1, rounding allows"),
        ({"failure": RuntimeError("no kernel\nimage")}, r"fail on LlamaForCausalLM \(no kernel\)"),
        ({"_inference_containers": ()}, "no inference kernels for LlamaForCausalLM; drop"),
    ],
)
def test_a_hybrid_engine_that_does_not_is_refused(changes, message):
    engine = TransformersRollout(Kernels(tiny.tiny_llama(), **changes), tiny.byte_tokenizer())
    with pytest.raises(UserError, match=message):
        proven_hybrid(engine, prompts(), 6)


def test_its_settings_reach_deepspeed():
    hybrid = HybridConfig(512, inference_tp_size=2, pin_parameters=False)
    config = get_train_ds_config(replace(ENGINE, hybrid=hybrid), world_size=2)["hybrid_engine"]
    assert config == {
        "enabled": True,
        "max_out_tokens": 512,
        "inference_tp_size": 2,
        "release_inference_cache": False,
        "pin_parameters": False,
        "tp_gather_partition_size": 8,
    }
    assert "hybrid_engine" not in get_train_ds_config(ENGINE, world_size=2)
