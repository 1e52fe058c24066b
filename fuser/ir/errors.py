"""Every error that fuser raises derives from :class:`FuserError`."""

from __future__ import annotations


class FuserError(Exception):
    """Base of fuser's errors. A message says what was wrong with the user's model, mask or machine, and what to do."""


class CaptureError(FuserError):
    """A model could not be captured as a graph."""


class InternalError(FuserError):
    """A fault of fuser: something else than an error that it raises on purpose went wrong while it made a program."""


class CalibrationError(FuserError, ValueError):
    """The inputs given for a calibration are none that the model can run on."""


class TargetError(FuserError, ValueError):
    """A target lacks instructions that were asked for by name."""


class PackingError(FuserError):
    """The rows of a model that are padding cannot be left out: something else follows from them."""


class MaskError(FuserError, ValueError):
    """A mask is malformed or does not fit the tensors that it is used with."""


class ScoreError(FuserError, ValueError):
    """A score rule is none, or its constants are out of range."""


class MechanismError(FuserError, ValueError):
    """The arguments of an attention mechanism are impossible, or what it was called with does not fit them."""


class PlanError(FuserError, ValueError):
    """An attention plan is malformed, or does not cover exactly the pairs that its mask allows."""


class SchemeError(FuserError, ValueError):
    """A fusion scheme cannot be decoded or belongs to another region."""


class ToolchainError(FuserError):
    """A compiler or ninja is missing, broken or too old."""


class BuildError(FuserError):
    """A generated kernel did not compile; carries the compiler's output and the path of the source."""


class CacheError(FuserError):
    """The kernel cache is unusable: foreign owner, writable by others, damaged, or of another format."""


class KernelError(FuserError):
    """A kernel reported failure at run time, or was called with tensors that it was not built for."""


class ResultError(KernelError):
    """An operator of PyTorch gave a tensor of another shape or dtype than when the model was captured."""


class DeviceMemoryError(KernelError, MemoryError):
    """A GPU has not enough free memory for a call; what the call had taken is given back."""


class IndexRangeError(KernelError, IndexError):
    """An index, such as a token id, is outside the table that it looks up: an IndexError, as in eager PyTorch."""


class SearchError(FuserError, ValueError):
    """A search cannot run or go on: its storage, its study, its limits or all of its trials are at fault."""
