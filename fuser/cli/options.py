"""Options that several commands share: which model, in which size, on how many threads."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fuser.ir.score_quantization import ScoreQuantization

MODEL_HELP = (
    "A built-in configuration (bert-base, minilm, vit-b16, gpt2, transformer-encoder; random weights) "
    "or module:callable, which returns an nn.Module or a pair (nn.Module, inputs)."
)
Batch = Annotated[int | None, typer.Option(min=1, help="Batch size.", show_default="1")]
Seq = Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence, patches of an image.", show_default=False)]
Padding = Annotated[bool, typer.Option("--padding", help="Give a padding mask, as batches of text have.")]
MaskText = Annotated[
    str,
    typer.Option(
        help="Restrict self-attention: sliding-window:LEFT:RIGHT, longformer:WINDOW:GLOBAL, "
        "bigbird:BLOCK:WINDOW:GLOBALS:RANDOM:SEED, dilated:WINDOW:DILATION, strided:STEP, fixed:STEP, causal."
    ),
]
Size = Annotated[int | None, typer.Option(min=1, help="Size of a built-in configuration.", show_default=False)]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16; on CUDA also float16.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=4096, help="Threads of PyTorch and of kernels.", show_default="PyTorch's")
]


class Scores(str, enum.Enum):
    """What computes the scores of attention with few bits, as it is by default."""

    INT8 = "int8"
    DEQ = "deq"
    SANGER = "sanger"

    @property
    def quantization(self) -> ScoreQuantization:
        from fuser.ir.int8_attention import Int8Attention
        from fuser.ir.prediction import DEQ, Sanger

        if self is Scores.INT8:
            return Int8Attention()
        return DEQ() if self is Scores.DEQ else Sanger()
