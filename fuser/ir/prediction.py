"""Scores predicted with few bits, which decide what attention computes in full, that is with more: DEQ refines the
important ones, Sanger prunes all others.

A row of q or k becomes whole numbers, its *codes*, times a step; the predicted score of a pair is the product of two
rows of codes in integers, times both steps and the scale of attention. What a specification says is one *limit* for
every row of scores, above which they are computed in full, so one kernel serves all rules.

DEQ: Wang, Song, Huang, Liang, "DEQ: Dynamic Element-wise Quantization for Efficient Attention Architecture", ICCD 2023.
Sanger: Lu, Jin, Bi, Luo, Li, Wang, Liang, "Sanger: A Co-Design Framework for Enabling Sparse Attention using
Reconfigurable Architecture", MICRO 2021.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from fuser.ir.errors import ScoreError
from fuser.ir.score_quantization import (
    SMALLEST,
    ScoreQuantization,
    arithmetic,
    have_codes,
    product_of_codes,
    row_codes,
)

BITS = (2, 4, 6, 8)
METHODS = (
    "probability_threshold",
    "adaptive_maximum_threshold",
    "inv_probability_threshold",
    "inv_adaptive_maximum_threshold",
)
GRANULARITIES = ("seq", "head", "batch")
CALIBRATIONS = ("row", "dynamic", "static", "ema")
EMA_DECAY = 0.9999
"""What an average of maxima keeps at every step of calibration."""


class EmptyRow(enum.Enum):
    """What becomes of a row none of whose scores is above its limit."""

    DENSE = "dense"
    ARGMAX = "argmax"
    PREDICTED = "predicted"
    ZERO = "zero"


@dataclass(frozen=True)
class Form:
    """What a kernel must know of a specification when it is built: all but its numbers."""

    bits: int
    high_bits: int | None
    normalize: bool
    per_row: bool
    dynamic: bool
    probability: bool
    before_softmax: bool
    over_rows: bool
    over_heads: bool
    inverse: bool
    prune: bool
    empty_row: EmptyRow

    @property
    def needs_sums(self) -> bool:
        """Whether limits follow from the log-sum-exps of rows, not their maxima alone."""
        return self.probability or (self.over_rows and not self.before_softmax)


@dataclass(frozen=True)
class Prediction(ScoreQuantization):
    """What DEQ and Sanger share.

    Fields:
        method: ``"probability_threshold"``: full above ``threshold``, as a probability under the predicted scores.
            ``"adaptive_maximum_threshold"``: full above ``threshold`` times the largest one. With ``inv_`` before it,
            full where it is *not* above (for ablations).
        threshold: from 0 (everything that may be seen) to 1 (nothing); strictly above it counts.
        granularity: what the largest one is of: ``"seq"`` the row, ``"head"``, or ``"batch"`` the sample, all its
            heads. Only an adaptive maximum has one.
        before_softmax: compare predicted scores, not probabilities. Of a row whose scores are all negative none is
            above a part of the largest.
        bits: width of the codes, 2, 4, 6 or 8, sign included: -L to L with L = 2^(bits - 1) - 1.
        high_bits: what "in full" means: 8, products of codes of 8 bits whose largest one stands at the largest element
            of each row, whatever ``calibration`` says; or None, of q and k as they are given, as the authors' software
            does.
        calibration: where the largest code stands. ``"row"``: at the largest element of each row, so that a row's codes
            depend on nothing else. Otherwise one threshold for all rows of q and one for those of k: ``"dynamic"`` the
            largest element of the call, ``"static"`` the ``thresholds``, ``"ema"`` also these, which :meth:`calibrated`
            keeps as running averages. Elements beyond a threshold are clamped.
        thresholds: of q and of k, above zero.
        normalize: divide rows by their Euclidean length before they are compared with thresholds, and multiply scores
            with it; says nothing with ``"row"``.
        empty_row: what becomes of a row of which nothing is above the limit: ``"argmax"`` computes its largest
            predicted score in full (all of them, if they are equal), ``"dense"`` the whole row; ``"predicted"`` (DEQ)
            leaves the predicted scores, ``"zero"`` (Sanger) gives zeros. Inverse methods ask for none of it.
        unmasked_maximum: scores are compared before softmax without what is added to them, as the authors' software
            does, so that padding can set the maximum. By default, padding cannot.

    A row of zeros, or one below 2^-100, has codes of zero. A row that holds infinity or NaN, or whose length no fp32
    number holds, predicts nothing: its scores are computed in full. Those of rows with infinity or NaN have no codes of
    8 bits either, and do what they do in exact attention. All arithmetic but that of codes is in fp32, or in float64
    for float64 tensors.

    Raises ScoreError for fields that are not of these values.
    """

    method: str = "adaptive_maximum_threshold"
    threshold: float = 0.1
    granularity: str = "seq"
    before_softmax: bool = False
    bits: int = 4
    high_bits: int | None = 8
    calibration: str = "row"
    thresholds: tuple[float, float] | None = None
    normalize: bool = True
    empty_row: str = "argmax"
    unmasked_maximum: bool = False

    _section: ClassVar[str]
    _methods: ClassVar[tuple[str, ...]]
    _empty_rows: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", self._methods),
            ("granularity", GRANULARITIES),
            ("calibration", CALIBRATIONS),
            ("empty_row", self._empty_rows),
        ):
            if getattr(self, name) not in allowed:
                raise ScoreError(f"{name} must be {' or '.join(map(repr, allowed))}, not {getattr(self, name)!r}")
        if type(self.bits) is not int or self.bits not in BITS:
            raise ScoreError(f"bits must be one of {', '.join(map(str, BITS))}, not {self.bits!r}")
        if self.high_bits is not None and (type(self.high_bits) is not int or self.high_bits != 8):
            raise ScoreError(f"high_bits must be 8, or None for scores of q and k as given, not {self.high_bits!r}")
        for name in ("before_softmax", "normalize", "unmasked_maximum"):
            if not isinstance(getattr(self, name), bool):
                raise ScoreError(f"{name} must be True or False, not {getattr(self, name)!r}")
        object.__setattr__(self, "threshold", _number("threshold", self.threshold))
        if not 0.0 <= self.threshold <= 1.0:
            raise ScoreError(
                f"threshold must be from 0 to 1, a part of a probability or a maximum, not {self.threshold}"
            )
        if self.before_softmax and not self.is_adaptive:
            raise ScoreError("before_softmax compares scores with their maximum, so it takes an adaptive maximum")
        if self.unmasked_maximum and not self.before_softmax:
            raise ScoreError("unmasked_maximum is about scores before softmax, so it takes before_softmax=True")
        self._check_thresholds()

    def _check_thresholds(self) -> None:
        if self.thresholds is None:
            if self.calibration == "static":
                raise ScoreError("static calibration takes thresholds=(of q, of k)")
            return
        if self.calibration not in ("static", "ema"):
            raise ScoreError(f"thresholds are those of static and ema calibration, not of {self.calibration!r}")
        if not isinstance(self.thresholds, (tuple, list)) or len(self.thresholds) != 2:
            raise ScoreError(f"thresholds must be two numbers, of q and of k, not {self.thresholds!r}")
        pair = tuple(_number("a threshold of calibration", t) for t in self.thresholds)
        if not all(SMALLEST <= t < math.inf for t in pair):
            raise ScoreError(f"thresholds of calibration must be finite numbers above zero, not {pair}")
        object.__setattr__(self, "thresholds", pair)

    @classmethod
    def from_config(
        cls,
        config: str | Mapping[str, Any],
        *,
        calibration: str = "dynamic",
        thresholds: tuple[float, float] | None = None,
    ) -> Self:
        """The specification of a configuration of the authors' software, computed as that does.

        Args:
            config: a name, such as ``"adamax_nb80"``, ``"refine_2e-3"``, ``"refine_inv_2e-2"`` (DEQ) or
                ``"sanger_2e-3"`` (Sanger), also as a file, ``"bert_base_adamax_nb80.json"``; or a model's configuration
                with the keys ``quant_qk``, ``normalize_qk`` and ``refine_score`` or ``prune_score``; or what the last
                two hold. Keys are taken as they are spelt there (``probablity_threshold``, ``granuality``) or rightly.
            calibration, thresholds: as fields. The authors' models have averages in their checkpoints
                (``calibration="ema"``); ``"dynamic"`` is one step of calibration on each call.

        Raises ScoreError for names and keys that there are not.
        """
        given = dict(_named(config, cls._section) if isinstance(config, str) else config)
        if "quant_qk" in given or cls._section in given:
            if cls._section not in given:
                raise ScoreError(f"the configuration has no {cls._section}, which {cls.__name__} is made of")
            predictor = dict(given.get("quant_qk") or {})
            if not predictor or predictor.pop("method", "sym") != "sym":
                raise ScoreError(f"quant_qk must say the symmetric method 'sym', not {given.get('quant_qk')!r}")
            bits = predictor.pop("bitwidth", 4)
            normalize = given.get("normalize_qk")
            if predictor or normalize not in (None, "inner_product"):
                raise ScoreError(f"unknown keys of quant_qk, {sorted(predictor)}, or normalize_qk, {normalize!r}")
            rule = dict(given[cls._section])
        else:
            bits, normalize, rule = 4, "inner_product", given
        fields: dict[str, Any] = {_KEYS.get(str(key), str(key)): value for key, value in rule.items()}
        if unknown := sorted(fields.keys() - {"method", "threshold", "granularity", "before_softmax"}):
            raise ScoreError(f"{cls._section} has no key {', '.join(unknown)}")
        method = str(fields.pop("method", None)).replace("probablity", "probability")
        if method == "otsu_threshold":
            raise ScoreError("otsu_threshold is refused by the authors' software as well; take another method")
        if "threshold" in fields:
            # A probability above 20 is how the authors write "never".
            fields["threshold"] = min(_number("threshold", fields["threshold"]), 1.0)
        before = bool(fields.get("before_softmax", False))
        return cls(
            method=method,
            bits=bits,
            high_bits=None,
            calibration=calibration,
            thresholds=thresholds,
            normalize=normalize is not None,
            empty_row="dense" if cls.prunes else "predicted",
            unmasked_maximum=before,
            **fields,
        )

    @property
    def is_adaptive(self) -> bool:
        return self.method.endswith("adaptive_maximum_threshold")

    @property
    def is_inverse(self) -> bool:
        return self.method.startswith("inv_")

    @property
    def is_by_row(self) -> bool:
        return self.calibration != "dynamic" and not self.form.over_rows

    @property
    def largest(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1)) - 1

    @property
    def form(self) -> Form:
        return Form(
            bits=self.bits,
            high_bits=self.high_bits,
            normalize=self.normalize and self.calibration != "row",
            per_row=self.calibration == "row",
            dynamic=self.calibration == "dynamic",
            probability=not self.is_adaptive,
            before_softmax=self.before_softmax,
            over_rows=self.is_adaptive and self.granularity != "seq",
            over_heads=self.is_adaptive and self.granularity == "batch",
            inverse=self.is_inverse,
            prune=self.prunes,
            empty_row=EmptyRow.PREDICTED if self.is_inverse else EmptyRow(self.empty_row),
        )

    @property
    def limit(self) -> float:
        """What limits are made with: a factor of scores, or the logarithm of one of probabilities."""
        if self.before_softmax:
            return self.threshold
        return math.log(self.threshold) if self.threshold else -math.inf

    def calibrated(self, q: Tensor, k: Tensor) -> Self:
        """This with running averages of the largest elements of q and k (…, S, D) moved on by one step.

        Raises ScoreError unless ``calibration`` is ``"ema"``, or if q or k is all zero or not finite.
        """
        if self.calibration != "ema":
            raise ScoreError(f"only ema calibration moves thresholds, not {self.calibration!r}")
        found = []
        for x in (q, k):
            x = x.detach().to(arithmetic(x))
            size = self._sizes(x)
            top = float((x / size).nan_to_num(math.nan, math.inf, -math.inf).abs().max()) if x.numel() else 0.0
            if not SMALLEST <= top < math.inf:
                raise ScoreError(
                    f"a step of calibration needs finite rows, not all zero; their largest element is {top}"
                )
            found.append(top)
        of_q, of_k = found
        if self.thresholds is not None:
            of_q, of_k = (t - (1.0 - EMA_DECAY) * (t - top) for t, top in zip(self.thresholds, found, strict=True))
        return dataclasses.replace(self, thresholds=(of_q, of_k))

    def _sizes(self, x: Tensor) -> Tensor:
        """What rows (…, S, D) are divided by: (…, S, 1); one where a row is as small as zero."""
        if self.normalize:
            size = x.double().square().sum(-1, keepdim=True).sqrt().to(x.dtype)
        else:
            size = torch.ones_like(x[..., :1]).masked_fill(~x.isfinite().all(-1, keepdim=True), math.nan)
        return size.masked_fill(size < SMALLEST, 1.0)

    def codes(self, x: Tensor, which: int) -> tuple[Tensor, Tensor]:
        """Whole numbers -L … L (…, S, D) and the step of every row, (…, S, 1): x is about their product.

        ``which`` is 0 for q and 1 for k. Codes have the gradient of what they are rounded from, steps none. Raises
        ScoreError for averages that no step has begun.
        """
        if self.calibration == "row":
            return row_codes(x, have_codes(x), self.largest)
        with torch.no_grad():
            size = self._sizes(x)
            sound = size.isfinite() & have_codes(x)
            small = sound & (x.abs().amax(-1, keepdim=True) < SMALLEST)
            factor = self.largest / self._threshold(x, size, sound, which)
            step = (size / factor).masked_fill(small, 0.0).masked_fill(~sound, math.nan)
        exact = (x / size).masked_fill(~sound | small, 0.0) * factor
        rounded = exact.detach().round().clamp(-self.largest, self.largest)
        return rounded + (exact - exact.detach()), step

    def in_full(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        exact = super().in_full(q, k, scale)
        if self.high_bits is None:
            return exact
        high = product_of_codes(row_codes(q, have_codes(q)), row_codes(k, have_codes(k)), scale)
        return torch.where(high.detach().isnan(), exact, high)

    def rounded_in_full(self, x: Tensor) -> Tensor:
        if self.high_bits is None:
            return x
        sound = have_codes(x)
        codes, step = row_codes(x, sound)
        return torch.where(sound, codes * step, x)

    def check_calibrated(self) -> None:
        """Raise ScoreError if thresholds are still to be found."""
        if self.calibration == "ema" and self.thresholds is None:
            raise ScoreError("ema calibration has no thresholds yet; take what calibrated(q, k) returns")

    def _threshold(self, x: Tensor, size: Tensor, sound: Tensor, which: int) -> Tensor:
        if self.calibration == "dynamic":
            elements = (x / size).masked_fill(~sound, 0.0).abs()
            top = elements.max() if x.numel() else x.new_zeros(())
            return torch.where(top < SMALLEST, 1.0, top)
        self.check_calibrated()
        assert self.thresholds is not None
        return torch.full((), self.thresholds[which], dtype=x.dtype, device=x.device)

    def chosen(self, scores: Tensor) -> Tensor:
        """Which of the predicted scores (B, H, Sq, Sk) are to be computed in full: bool. Those at -inf may not be seen,
        and are not; those that are NaN are."""
        scores = scores.detach()
        if not scores.numel():
            return torch.zeros_like(scores, dtype=torch.bool)
        top = scores.masked_fill(scores.isnan(), -math.inf).amax(-1, keepdim=True)
        over = {"seq": (), "head": (-2,), "batch": (-3, -2)}[self.granularity]
        if self.before_softmax:
            limit = self.limit * (top.amax(over, keepdim=True) if over else top)
        elif self.is_adaptive and not over:
            limit = top + self.limit
        else:
            sums = torch.logsumexp(scores, -1, keepdim=True)
            limit = sums + self.limit
            if self.is_adaptive:
                peaks = (top - sums).masked_fill(~(sums > -math.inf), -math.inf)
                limit = limit + peaks.amax(over, keepdim=True)
        if self.is_inverse:
            return ~(scores > limit) & ~torch.isneginf(scores)
        empty = ~(top > limit)
        if self.empty_row == "argmax":
            below = torch.nextafter(top, torch.full_like(top, -math.inf)).masked_fill(top == 0, -SMALLEST)
            limit = torch.where(empty, below, limit)
        elif self.empty_row == "dense":
            limit = limit.masked_fill(empty, -math.inf)
        return ~(scores <= limit) & ~torch.isneginf(scores)


@dataclass(frozen=True)
class DEQ(Prediction):
    """Dynamic element-wise quantization: important scores are computed in full, all others keep their predicted value.

    By default a score is important when its predicted probability is above a tenth of the largest in its row. The
    authors' default is ``DEQ.from_config("adamax_nb80")``, whose limit is one for a sample; without training for it,
    that refines next to nothing. See :class:`Prediction` for the fields.
    """

    _section = "refine_score"
    _methods = METHODS
    _empty_rows = ("argmax", "dense", "predicted")

    def mixed(self, exact: Tensor, predicted: Tensor, chosen: Tensor) -> Tensor:
        return torch.where(chosen, exact, predicted)


@dataclass(frozen=True)
class Sanger(Prediction):
    """Dynamic pruning: scores whose predicted probability is above a threshold are computed in full, all others are
    left out. See :class:`Prediction` for the fields."""

    method: str = "probability_threshold"
    threshold: float = 2e-3

    prunes = True
    _section = "prune_score"
    _methods = METHODS[:2]
    _empty_rows = ("argmax", "dense", "zero")

    def mixed(self, exact: Tensor, predicted: Tensor, chosen: Tensor) -> Tensor:
        return exact


_KEYS = {"granuality": "granularity", "max_pct": "threshold"}
_NUMBER = r"(?P<number>\d+(?:\.\d+)?e-?\d+)"
_NAMES = {
    "refine_score": (
        r"adamax_(?P<inverse>inv_)?(?P<before>n?)(?P<over>[bhs])(?P<percent>\d{1,2})",
        rf"refine_(?P<inverse>inv_)?{_NUMBER}",
    ),
    "prune_score": (rf"sanger_{_NUMBER}",),
}


def _named(name: str, section: str) -> dict[str, Any]:
    """What ``section`` holds in the configuration of that name."""
    short = re.sub(r"^(bert_base|bert_large|bert_tiny|gpt2|bart_base)_", "", name.removesuffix(".json"))
    found = next((m for pattern in _NAMES[section] if (m := re.fullmatch(pattern, short))), None)
    if found is None:
        examples = {"refine_score": "adamax_nb80 or refine_2e-3", "prune_score": "sanger_2e-3"}[section]
        raise ScoreError(f"there is no configuration {name!r} with {section}; one is named as {examples}")
    parts = found.groupdict()
    inverse = "inv_" if parts.get("inverse") else ""
    if "number" in parts:
        return {"method": f"{inverse}probability_threshold", "threshold": float(parts["number"])}
    return {
        "method": f"{inverse}adaptive_maximum_threshold",
        "threshold": int(parts["percent"]) / 100,
        "granularity": {"b": "batch", "h": "head", "s": "seq"}[parts["over"]],
        "before_softmax": bool(parts["before"]),
    }


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ScoreError(f"{name} must be a number, not {value!r}")
    return float(value)
