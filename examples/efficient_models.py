"""The reference's models under fuser.optimize, with its flags: images, translation, and language modelling.

    python examples/efficient_models.py image --model evit_small_p8 --attn-name eva --attn-2d --use-rpe --window-size 7
    python examples/efficient_models.py image --model pvt_medium --attn-name lara --pool-module-type dense
    python examples/efficient_models.py translate --arch transformer_wmt_en_de --attn-name-encoder lara \\
        --encoder-attn-proposal-gen adaptive-1d --encoder-attn-num-landmarks 16
    python examples/efficient_models.py lm --arch transformer_lm_wiki103 --attn-name-decoder causal_eva \\
        --decoder-attn-window-size 128 --decoder-attn-chunk-size 8 --decoder-attn-causal --decoder-attn-use-t5-rpe

--checkpoint takes a file of the reference (its state dict, or one with it as “model”); without one, weights are random.
Prints the times of a call by PyTorch and by fuser, and how far apart their outputs are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fuser
from fuser import evit, pvt, transformer
from fuser.attention import NestedNamespace, add_arguments, names

DECODERS = ("softmax", "local", "causal_eva")
ENCODERS = tuple(name for name in names() if name != "causal_eva")


def parse(arguments: Sequence[str] | None) -> Any:
    """The flags, those of the chosen attentions among them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    image, translate, lm = (tasks.add_parser(name) for name in ("image", "translate", "lm"))
    image.add_argument("--model", default="evit_tiny_p16", choices=[*evit.SIZES, *pvt.SIZES])
    image.add_argument("--attn-name", default="softmax", choices=ENCODERS)
    translate.add_argument("--arch", default="transformer_wmt_en_de", choices=[*transformer.TRANSLATORS])
    translate.add_argument("--attn-name-encoder", default="softmax", choices=ENCODERS)
    lm.add_argument("--arch", default="transformer_lm", choices=[*transformer.LANGUAGE_MODELS])
    for task in (translate, lm):
        task.add_argument("--attn-name-decoder", default="softmax", choices=DECODERS)
        task.add_argument("--tokens", type=int, default=128, help="tokens of a sequence")
    for task in (image, translate, lm):
        task.add_argument("--checkpoint", type=Path)
        task.add_argument("--batch-size", type=int, default=1)
        task.add_argument("--rounds", type=int, default=5)
    found = parser.parse_known_args(arguments)[0]
    if found.task == "image":
        add_arguments(image, found.attn_name)
    if found.task == "translate":
        add_arguments(translate, found.attn_name_encoder, "attn_args_encoder", "encoder-attn")
    if found.task != "image" and found.attn_name_decoder != "softmax":
        task = translate if found.task == "translate" else lm
        add_arguments(task, found.attn_name_decoder, "attn_args_decoder", "decoder-attn")
    # Subparsers make namespaces of their own, which know nothing of nested ones.
    return nested(parser.parse_args(arguments))


def nested(flat: argparse.Namespace) -> NestedNamespace:
    """The same with ``a.b`` as ``b`` of ``a``."""
    found = NestedNamespace()
    for name, value in vars(flat).items():
        setattr(found, name, value)
    return found


def of_decoder(args: Any) -> dict[str, Any]:
    """What a decoder's attention is told."""
    given = vars(getattr(args, "attn_args_decoder", NestedNamespace()))
    return {"window_size": given["window_size"]} if args.attn_name_decoder == "local" else given


def build(args: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model, and inputs for it."""
    if args.task == "image":
        family = evit if args.model in evit.SIZES else pvt
        model = family.build(args.model, args.attn_name, **vars(getattr(args, "attn_args", NestedNamespace())))
        return model, (torch.randn(args.batch_size, model.sizes.channels, model.sizes.image, model.sizes.image),)

    def words(known: Any) -> Tensor:
        return torch.randint(transformer.PAD + 1, known.vocabulary, (args.batch_size, args.tokens))

    if args.task == "translate":
        sizes = transformer.TRANSLATORS[args.arch]
        more = vars(getattr(args, "attn_args_encoder", NestedNamespace()))
        decoder = {"decoder": args.attn_name_decoder, "decoder_arguments": of_decoder(args)}
        model = transformer.translator(args.arch, args.attn_name_encoder, **decoder, **more)
        return model, (words(sizes), words(sizes))
    model = transformer.language_model(args.arch, args.attn_name_decoder, **of_decoder(args))
    return model, (words(transformer.LANGUAGE_MODELS[args.arch]),)


def seconds(run: Callable[[], Tensor], rounds: int) -> float:
    """The median time of a call, after one that is not counted."""
    run()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    torch.manual_seed(0)
    model, inputs = build(args)
    if args.checkpoint:
        stored = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(stored.get("model", stored))
    model.eval()
    fast = fuser.optimize(model, search="model")
    with torch.no_grad():
        want, got = model(*inputs), fast(*inputs)
        error = float((got - want).abs().max() / want.abs().max())
        times = {
            name: seconds(lambda m=m: m(*inputs), args.rounds) for name, m in (("PyTorch", model), ("fuser", fast))
        }
    for name, found in times.items():
        print(f"{name:8}{1e3 * found:10.1f} ms")
    print(f"outputs {tuple(got.shape)}, largest difference {error:.1e} of the largest number")
    if fast.fallbacks:
        raise SystemExit(f"the original ran: {', '.join(fast.fallbacks)}")


if __name__ == "__main__":
    main()
