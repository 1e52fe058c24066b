"""The arguments of every mechanism: their types, defaults, limits and flags, in one place."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from fuser.ir.errors import MechanismError


def option(default: Any, description: str, **metadata: Any) -> Any:
    """A field that is also a flag of the command line. ``flag`` is the flag's default where it differs."""
    return dataclasses.field(default=default, metadata={"help": description, **metadata})


def types(configuration: type[Configuration]) -> dict[str, Any]:
    """The types of a configuration's fields."""
    return typing.get_type_hints(configuration)


def choices(annotation: Any) -> tuple[Any, ...]:
    """What a field of this type can be, or nothing where that is no list."""
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Arguments of a mechanism. Raises MechanismError for those that no module can have."""

    def __post_init__(self) -> None:
        for name, annotation in types(type(self)).items():
            value, allowed = getattr(self, name), choices(annotation)
            if allowed and value not in allowed:
                raise MechanismError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        self.check()

    def check(self) -> None:
        """Raise MechanismError for arguments that do not fit each other."""

    def at_least(self, limit: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value < limit:
                raise MechanismError(f"{name} is {value}; it must be at least {limit}")

    def probability(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise MechanismError(f"{name} is {getattr(self, name)}; a probability of dropout is in [0, 1)")


def check_heads(width: int, heads: int, name: str) -> None:
    """Raise MechanismError unless ``width`` channels make ``heads`` equal heads."""
    if width < 1 or heads < 1 or width % heads:
        raise MechanismError(f"{name} = {width} channels cannot be divided among num_heads = {heads}")


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfiguration(Configuration):
    """What all mechanisms with one projection of queries, keys and values have."""

    dim: int
    num_heads: int
    fp32: bool = option(False, "has no effect; kept for command lines of the reference")
    qkv_bias: bool = True
    attn_drop: float = 0.0
    """Dropout of the weights, which softmax attention alone has."""
    proj_drop: float = 0.0

    def check(self) -> None:
        check_heads(self.dim, self.num_heads, "dim")
        self.probability("attn_drop", "proj_drop")


@dataclass(frozen=True, kw_only=True)
class LocalConfiguration(SoftmaxConfiguration):
    """Windows: of ``window_size`` tokens, or of ``window_size`` × ``window_size`` with ``attn_2d``."""

    use_rpe: bool = option(False, "learned biases for relative positions inside windows")
    window_size: int = option(2, "tokens in a window, along one axis", flag=4)
    attn_2d: bool = option(False, "windows are squares of a grid of tokens")
    overlap_window: bool = option(False, "keys of a window reach half a window beyond it, on each side")
    exact_rpe: bool = option(False, "index relative positions without the reference's aliases and shifts")

    def check(self) -> None:
        super().check()
        self.at_least(1, "window_size")

    @property
    def extension(self) -> int:
        """Tokens beyond a window on each side that its queries see."""
        return max(1, self.window_size // 2) if self.overlap_window else 0


@dataclass(frozen=True, kw_only=True)
class EvaConfiguration(LocalConfiguration):
    adaptive_proj: Literal["default", "no-ln", "none"] = option("default", "how chunks' means become landmarks")
    num_landmarks: int = option(49, "chunks that the sequence is summarized by")
    use_t5_rpe: bool = option(False, "biases for buckets of relative positions, as in T5")

    def check(self) -> None:
        super().check()
        self.at_least(1, "num_landmarks")
        if self.use_t5_rpe and (self.use_rpe or self.attn_2d):
            other = "use_rpe" if self.use_rpe else "attn_2d"
            raise MechanismError(f"use_t5_rpe and {other} exclude each other: T5's buckets are distances in a sequence")


@dataclass(frozen=True, kw_only=True)
class PerformerConfiguration(SoftmaxConfiguration):
    approx_attn_dim: int = option(64, "number of random features")
    proj_method: Literal["favorp", "relu", "fourier", "dpfp", "mlp-fourier", "relu-only", "sigmoid-only"] = option(
        "favorp", "feature map"
    )
    cos_weighting: bool = option(False, "weigh distances by a cosine, as cosFormer does")
    sample_scheme: Literal["default", "fixed", "learnable"] = option(
        "default", "random directions: new ones for each training step, fixed, learned"
    )

    def check(self) -> None:
        super().check()
        self.at_least(1, "approx_attn_dim")
        width = self.dim // self.num_heads
        if self.proj_method == "dpfp" and self.approx_attn_dim < 2 * width:
            raise MechanismError(
                f"dpfp makes multiples of {2 * width} features; approx_attn_dim = {self.approx_attn_dim}"
            )
        if self.proj_method == "mlp-fourier" and self.approx_attn_dim % 2:
            raise MechanismError(f"mlp-fourier makes an even number of features, not {self.approx_attn_dim}")


@dataclass(frozen=True, kw_only=True)
class ScatterbrainConfiguration(LocalConfiguration, PerformerConfiguration):
    def check(self) -> None:
        super().check()
        if self.proj_method != "favorp" or self.cos_weighting:
            raise MechanismError(
                "scatterbrain needs features that approximate exp(q · k), as what windows see is subtracted from them: "
                "proj_method='favorp' without cos_weighting"
            )


@dataclass(frozen=True, kw_only=True)
class RandomizedConfiguration(SoftmaxConfiguration):
    num_samples: int = option(1, "1: sample one key for each query; 0: the mean key; -1: the expected key")

    def check(self) -> None:
        super().check()
        self.at_least(-1, "num_samples")


@dataclass(frozen=True, kw_only=True)
class LaraConfiguration(SoftmaxConfiguration):
    num_landmarks: int = option(49, "proposals; the square of a whole number for grids of tokens")
    kernel_size: int | None = option(None, "has no effect; kept for command lines of the reference")
    pool_module_type: Literal["light", "dense"] = option(
        "light", "landmarks of each head alone, or of all heads together"
    )
    mis_type: Literal["mis-opt", "mis-biased", "mis-bh"] = option("mis-opt", "weights of the proposals")
    proposal_gen: Literal[
        "pool",
        "pool-mixed",
        "pool-vmixed",
        "no-param-pool",
        "no-param-pool-mixed",
        "no-param-pool-vmixed",
        "adaptive-1d",
    ] = option("pool", "how landmarks are made")
    use_antithetics: bool = option(False, "train with pairs of opposite noise")
    use_multisample: bool = option(False, "train with two samples of each proposal")
    alpha_coeff: float = option(1.0, "share of the correction in mis-opt")

    def check(self) -> None:
        super().check()
        self.at_least(1, "num_landmarks")
        if self.proposal_gen == "adaptive-1d" and self.pool_module_type == "dense":
            raise MechanismError("adaptive-1d projects each head alone: pool_module_type must be 'light'")


@dataclass(frozen=True, kw_only=True)
class CausalEvaConfiguration(Configuration):
    """Named as in fairseq, whose attention this one replaces. ``chunk_size`` overrides ``num_chunks``."""

    embed_dim: int
    num_heads: int
    kdim: int | None = None
    vdim: int | None = None
    dropout: float = 0.0
    bias: bool = True
    self_attention: bool = False
    """Keys and values are projections of the queries' tokens, whatever is given as key and value."""
    q_noise: float = 0.0
    """Share of a weight's blocks that training drops, so that it can be quantized by blocks."""
    qn_block_size: int = 8
    adaptive_proj: Literal["qk", "no-ln"] = option("qk", "how chunks' means become landmarks")
    num_chunks: int | None = option(None, "chunks that the sequence is summarized by")
    chunk_size: int | None = option(None, "tokens in a chunk")
    causal: bool = option(False, "tokens see earlier ones only")
    use_t5_rpe: bool = option(False, "biases for buckets of relative positions, as in T5")
    window_size: int = option(4, "tokens in a window")
    overlap_window: bool = option(False, "keys of a window reach one window further back")
    exact_rpe: bool = option(False, "count relative positions from the query, also where windows overlap")

    def check(self) -> None:
        check_heads(self.embed_dim, self.num_heads, "embed_dim")
        self.probability("dropout", "q_noise")
        self.at_least(1, "window_size", "qn_block_size")
        if self.self_attention and {self.kdim, self.vdim} - {None, self.embed_dim}:
            raise MechanismError("self_attention needs kdim and vdim to be embed_dim")
        if self.q_noise and (self.embed_dim % self.qn_block_size):
            raise MechanismError(f"embed_dim = {self.embed_dim} is no multiple of qn_block_size = {self.qn_block_size}")
        if self.chunk_size is not None:
            if self.chunk_size < 1 or self.window_size % self.chunk_size:
                raise MechanismError(
                    f"chunk_size = {self.chunk_size} must divide window_size = {self.window_size}, so "
                    "that no chunk lies in two windows"
                )
        elif self.num_chunks is None:
            raise MechanismError("causal_eva needs chunk_size or num_chunks")
        else:
            self.at_least(1, "num_chunks")

    @property
    def extension(self) -> int:
        """Tokens before a window that its queries see."""
        return self.window_size if self.overlap_window else 0
