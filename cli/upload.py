"""``ptq upload``"""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import quiet_libraries


def upload(
    model: Annotated[str, typer.Argument(help="Folder, or FILE.gguf, that ptq wrote.", metavar="DIR")],
    repo: Annotated[str, typer.Argument(help="org/name on the Hugging Face hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the float model, where the run read it from a folder.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="For the card: the base model's, e.g. apache-2.0.")] = None,
    language: Annotated[str | None, typer.Option(help="For the card: codes, comma-separated: en,de.")] = None,
) -> None:
    """Send a quantized model to the Hugging Face hub, with its card and report, in one commit.

    The folder is checked first. What describes this machine (plan.json, timings.json) stays here.
    """
    quiet_libraries()
    import ptq
    from cli.options import entries

    sent = ptq.upload(
        model,
        repo,
        private=private,
        base_model=base_model,
        license=license,
        language=entries("--language", language) if language else (),
    )
    print(f"{len(sent.files)} files, {sum(sent.files.values()) / 1e9:.2f} GB, sent to {sent.url}")
