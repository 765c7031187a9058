"""``diffrep convert`` and ``diffrep tokenize`` as Typer reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from diffrep.launch.parsing import integers

Perform = Callable[[str, dict[str, Any], bool], None]  # name of a verb, its arguments, whether JSON is wanted

_option = typer.Option
_AsJson = Annotated[bool, _option("--json", help="Print JSON for programs.")]


def add_token_verbs(app: typer.Typer, perform: Perform) -> None:
    """Two verbs more."""

    @app.command()
    def convert(
        source: Annotated[str, typer.Argument(metavar="FILE|FOLDER", help="Official .pth/.ckpt, or a folder of ours.")],
        out: Annotated[Path, _option(metavar="FOLDER|FILE", help="What to write; it must not exist.")],
        heads: Annotated[str | None, _option(help="Of a width not released: N, or ADDP's,the predictor's.")] = None,
        decoder_heads: Annotated[str | None, _option(help="As --heads, of the decoder.")] = None,
        as_json: _AsJson = False,
    ) -> None:
        """Official files of ADDP and MAGE into folders: tokenizer, token_predictor, addp; and back.

        Example: diffrep convert addp-vit-base-16.pth --out addp_base
        """
        given = {"heads": heads, "decoder_heads": decoder_heads}
        named = {name: integers(text, f"--{name.replace('_', '-')}") for name, text in given.items() if text}
        perform("convert", {"source": source, "out": out, **named}, as_json)

    @app.command()
    def tokenize(
        images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Files, folders or a data reference.")],
        tokenizer: Annotated[str, _option(metavar="REF", help="Folder, run, official file or VQModel folder.")],
        out: Annotated[Path | None, _option(metavar="PNG", help="Write a single image's reconstruction.")] = None,
        image_size: Annotated[int | None, _option(min=1, help="Resize and crop; default as stored.")] = None,
        split: Annotated[str, _option(help="Of a data reference: train, validation, test.")] = "validation",
        as_json: _AsJson = False,
    ) -> None:
        """Encode images to ids and decode them: reconstruction error, and how much of the codebook is used.

        Example: diffrep tokenize photo.png --tokenizer addp_base --image-size 256 --out again.png
        """
        given = {"images": images, "tokenizer": tokenizer, "out": out, "image_size": image_size, "split": split}
        perform("tokenize", given, as_json)
