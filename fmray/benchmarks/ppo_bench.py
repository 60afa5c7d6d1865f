"""What both sides of `fmray benchmark ppo` work on, written into one folder: the same policy, the same prompts.

folder/
    peer/        the policy as transformers 4 reads it, dropout off: the weights are a link to ours
    prompts/     train.jsonl and test.jsonl: the first words of movie reviews (made-up ones where sizes are small)
    policy/ causal/ tokenizer/   tiny models, where sizes are small
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fmray.config.prompts import PromptConfig, ReviewPromptSource
from fmray.config.rlhf import RlhfConfig
from fmray.data.prompts import open_prompts
from fmray.models.language import save_language_model
from fmray.models.towers import locate

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class PpoSizes:
    """How big everything is, and how often it is measured."""

    real: bool = True
    """FLAN-T5-small, SmolLM2-135M and movie reviews; False: tiny models and made-up prompts, no asset needed."""
    prompts: int = 1024
    batch: int = 32
    mini_batch: int = 8
    new_tokens: int = 24
    epochs: int = 4
    threads: int = 2
    repeats: int = 5
    decode_rounds: int = 5
    ray_repeats: int = 2
    ray_iterations: int = 6
    """Of each run on Ray; the first is not counted."""
    replicas: int = 64
    request: int = 8
    """Samples of a request to a sleeping replica."""
    requests_per_replica: int = 10
    picture_side: int = 224
    sleep: tuple[float, float] = (0.5, 1.0)
    """Shortest and longest sleep, in seconds."""
    dispatch_repeats: int = 3
    publish_repeats: int = 5
    buckets_mib: tuple[int, ...] = (256, 64)
    """`rollout.bucket_mib`; the first is held to the bar."""


FULL = PpoSizes()
QUICK = PpoSizes(
    real=False, prompts=64, batch=8, mini_batch=4, new_tokens=6, epochs=2, threads=1, repeats=1, decode_rounds=1,
    ray_repeats=1, ray_iterations=3, replicas=3, requests_per_replica=2, picture_side=32, sleep=(0.05, 0.1),
    dispatch_repeats=1, publish_repeats=2, buckets_mib=(1,),
)  # fmt: skip


@dataclass(slots=True)
class PpoBench:
    """What the parts of one run share."""

    folder: Path
    sizes: PpoSizes
    notes: list[str] = field(default_factory=list)
    peer: dict[str, str] = field(default_factory=dict)

    @property
    def policy(self) -> str:
        """The encoder-decoder policy's source."""
        return "asset:flan_t5_small" if self.sizes.real else str(self.folder / "policy")

    @property
    def causal(self) -> str:
        """The decoder-only policy's source."""
        return "asset:smollm2_135m" if self.sizes.real else str(self.folder / "causal")

    def make(self) -> None:
        """Write the folder."""
        if not self.sizes.real:
            write_tiny_models(self.folder)
        write_prompts(self.folder / "prompts", self.sizes)
        write_peer(Path(locate(self.policy, "policy.source")), self.folder / "peer")

    def config(self, name: str, precision: Precision = "fp32", *, learns: bool = True) -> RlhfConfig:
        """A run with trl's learning rate and KL controller. `learns=False`: with updates too small to change a weight."""
        sizes = self.sizes
        rollout: dict[str, Any] = {"precision": precision, "batch_size": sizes.batch}
        rollout |= {"request_size": sizes.batch, "max_new_tokens": sizes.new_tokens}
        rule = {"kind": "python", "function": "fmray.benchmarks.trl_side.rule:vowel_share"}
        kl = {"coefficient": 0.2, "controller": "adaptive", "target": 6.0, "horizon": 10_000}
        optimizer = {"lr": 1.41e-5 if learns else 1e-30, "schedule": "constant", "gradient_clipping": 0.0}
        return RlhfConfig.model_validate(
            {
                "run": {"name": name, "storage": str(self.folder / "runs")},
                "runtime": {"threads": sizes.threads, "device": "cpu"},
                "report": {"progress": False},
                "prompts": {
                    "source": {"kind": "jsonl", "path": str(self.folder / "prompts")},
                    "template": "Continue the movie review: {}",
                    "max_tokens": 48,
                },
                "policy": {"source": self.policy},
                "critic": {"kind": "shared"},
                "reference": {"precision": precision},
                "rollout": rollout,
                "rewards": {"vowels": rule | {"normalize": "none", "pool": {"replicas": 0}}},
                "ppo": {
                    "epochs": sizes.epochs,
                    "mini_batch_size": sizes.mini_batch,
                    "kl": kl,
                },
                "optimizer": optimizer | {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
                "engine": {"precision": precision},
                "train": {"iterations": 10_000, "evaluate_prompts": 0, "samples_every": 10_000},
            }
        )

    def save(self, config: RlhfConfig) -> str:
        """The configuration as a file for another process; its path."""
        path = self.folder / f"{config.run.name}.json"
        path.write_text(config.model_dump_json(indent=1), encoding="utf-8")
        return str(path)


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies in bfloat16 by itself; torch emulates it elsewhere, slower than float32."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text(encoding="utf-8").split()) if path.exists() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


# ---------------------------------------------------------------------------------------------------------------- prompts


def write_prompts(folder: Path, sizes: PpoSizes) -> None:
    """As many prompts as asked, and a few for the test split."""
    if sizes.real:
        source = PromptConfig(source=ReviewPromptSource(), max_prompts=sizes.prompts)
        texts = [prompt.text for prompt in open_prompts(source, "train")]
    else:
        texts = [" ".join(f"w{(i * 7 + k) % 40}" for k in range(2 + i % 4)) for i in range(sizes.prompts)]
    folder.mkdir()
    for split, chosen in {"train": texts, "test": texts[:8]}.items():
        lines = [json.dumps({"prompt": text}) + "\n" for text in chosen]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------- models


def write_peer(ours: Path, theirs: Path) -> None:
    """The same model for transformers 4: its tokenizer class, its key for the untied head, no dropout."""
    theirs.mkdir()
    config = json.loads((ours / "config.json").read_text(encoding="utf-8"))
    config |= {"tie_word_embeddings": False, "dropout_rate": 0.0}
    (theirs / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = json.loads((ours / "tokenizer_config.json").read_text(encoding="utf-8"))
    words["tokenizer_class"] = "PreTrainedTokenizerFast"
    (theirs / "tokenizer_config.json").write_text(json.dumps(words), encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json"):
        (theirs / name).symlink_to((ours / name).resolve())


def write_tiny_models(folder: Path) -> None:
    """A T5 and a Llama of two layers that say words w0 … w59."""
    torch.manual_seed(0)
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    words = special | {f"w{i}": i + len(special) for i in range(60)}
    heads = {"num_layers": 2, "num_heads": 2, "d_kv": 16, "feed_forward_proj": "gated-gelu"}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=len(words), d_model=32, d_ff=48, **heads, **ids))
    t5.lm_head.weight = torch.nn.Parameter(torch.randn(len(words), 32) * 0.3)  # untied, as FLAN-T5's is
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), bos_token_id=1, eos_token_id=1, **width))
    _save(t5, words, folder / "policy", ends=True)
    _save(llama, words, folder / "causal", ends=False)


def _save(model: PreTrainedModel, words: dict[str, int], folder: Path, *, ends: bool) -> None:
    tokenizer = Tokenizer(WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if ends:
        tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    weights = {name: value.detach() for name, value in model.named_parameters()}
    save_language_model(model, weights, fast, folder)
