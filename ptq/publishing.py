"""``ptq upload``: a finished checkpoint into a repository of the Hugging Face hub, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader
from calibration.model.contents import checkpoint_files
from calibration.model.gguf import open_file
from calibration.model.reading import inside
from calibration.record import REPORT_FILE, TIMINGS_FILE, read_record
from ptq.formats.reading import quantized_linears
from ptq.report.card import Facts, model_card
from ptq.session import PLAN_FILE

REPORTS = ("README.md", REPORT_FILE, "report.md", "report.html")
STAYS_HERE = (PLAN_FILE, TIMINGS_FILE)
"""What says something of this machine, and nothing of the model."""
TOKEN = "make a token with write access at https://huggingface.co/settings/tokens, then `hf auth login` or HF_TOKEN=..."
_NO_RIGHT = (401, 403)  # a token that the hub does not know, or that may not write there


@dataclass(frozen=True)
class Upload:
    """What `upload` sent: the address, and names in the repository with their bytes."""

    url: str
    files: dict[str, int]


def upload(
    model: str | Path,
    repo: str,
    *,
    private: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    language: Sequence[str] = (),
) -> Upload:
    """Send a folder that ptq wrote, or one GGUF file, to the hub in one commit.

    The repository is made where there is none. The card names the base model, where the run knows it or
    ``base_model`` is given. What describes this machine (``plan.json``, ``timings.json``) is not sent.

    Args:
        repo: ``org/name``.
        private: of a repository that is made; one that exists keeps what it has.
        base_model: hub id of the float model, where the run read it from a folder.
        license, language: for the card, where the base model's card did not say: an identifier of the hub, ISO 639
            codes.

    Raises:
        ToolkitError: no checkpoint, a damaged or unfinished one; no token; the hub cannot be reached or refuses.
    """
    for option, name in (("REPO", repo), ("--base-model", base_model)):
        if name is not None:
            _check_id(option, name)
    _check_token(repo)
    path = Path(model)
    files = _gguf_files(path) if path.suffix.lower() == ".gguf" else _folder_files(path)
    card = _card(path, files.get("README.md"), Facts(base_model, license, tuple(language)))
    contents: dict[str, Path | bytes] = {**files, "README.md": card}
    return Upload(_send(repo, private, contents), {name: _size(content) for name, content in sorted(contents.items())})


def _check_id(option: str, name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        known = name.count("/") == 1
    except HFValidationError:
        known = False
    if not known:
        raise ToolkitError(f"{option} {name}: not a hub id", "write org/name: letters, digits, and . _ - between them")


def _check_token(repo: str) -> None:
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise ToolkitError(f"{repo}: no token of the hub on this machine", TOKEN)


def check_push(repo: str) -> None:
    """Refuse before a run what `upload` would refuse behind it: the name, and a token that is missing or that the hub
    does not know.

    Raises:
        ToolkitError: one of these, or the hub cannot be reached.
    """
    import huggingface_hub

    _check_id("--push", repo)
    _check_token(repo)
    with _hub(repo):
        huggingface_hub.HfApi().whoami()


def _folder_files(folder: Path) -> dict[str, Path]:
    """Name in the repository -> file, of a folder whose headers are in order."""
    if folder.name.endswith(".partial") or not folder.is_dir():
        what = "an unfinished run" if folder.is_dir() else "no such folder"
        raise ToolkitError(f"{folder}: {what}", "name a folder that `ptq quantize` or `ptq export` wrote")
    reader = CheckpointReader(folder)
    quantized = quantized_linears(reader)
    reader.close()
    if quantized is None and not (folder / REPORT_FILE).is_file():
        raise ToolkitError(f"{folder}: a float model that ptq did not write", "name a folder that `ptq quantize` wrote")
    reports = [folder / name for name in REPORTS if (folder / name).is_file() and inside(folder / name, folder)]
    adapters = [path for path in sorted(folder.glob("adapter/*")) if path.is_file() and inside(path, folder)]
    found = {*checkpoint_files(folder), *reports, *adapters}
    return {str(path.relative_to(folder)): path for path in sorted(found) if path.name not in STAYS_HERE}


def _gguf_files(file: Path) -> dict[str, Path]:
    if not file.is_file():
        raise ToolkitError(f"{file}: no such file", "name a file that `ptq quantize --format gguf` wrote")
    open_file(file)
    report = file.with_suffix(".report.html")
    return {file.name: file} | ({report.name: report} if report.is_file() else {})


def _card(path: Path, readme: Path | None, facts: Facts) -> bytes:
    """The card with what is known now: the one in the folder, else one made from a GGUF file's record."""
    from huggingface_hub import ModelCard

    if readme is None:
        record = path.with_suffix(".report.json")
        if path.suffix.lower() == ".gguf" and record.is_file():
            run = read_record(record)
            name = run.model["name"]
            base = name if run.model.get("source") == "hub" else f"./{name}"
            return model_card(run, base, {path.name: path.stat().st_size}, facts).encode()
        text = f"---\ntags: [quantized, ptq]\n---\n\n# {path.stem}\n\nQuantized weights, written by ptq.\n"
    else:
        text = readme.read_text(encoding="utf-8")
    card = ModelCard(text, ignore_metadata_errors=True)
    if facts.base_model is not None:
        card.data["base_model"], card.data["base_model_relation"] = facts.base_model, "quantized"
    if facts.license is not None:
        card.data["license"] = facts.license
    if facts.language:
        card.data["language"] = list(facts.language)
    return str(card).encode()


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _send(repo: str, private: bool, contents: dict[str, Path | bytes]) -> str:
    """One commit with all files; the address of the repository."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    operations: list[Any] = [
        huggingface_hub.CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in sorted(contents.items())
    ]
    with _hub(repo):
        url = api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        api.create_commit(repo, operations, commit_message="Quantized model, written by ptq", repo_type="model")
    return str(url)


@contextmanager
def _hub(repo: str) -> Iterator[None]:
    """Errors of the hub, and of the way there, as one message."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        if code in _NO_RIGHT:
            raise ToolkitError(f"{repo}: the hub does not let this token write there ({code})", TOKEN) from error
        reason = str(error).splitlines()[0]
        raise ToolkitError(f"{repo}: the hub refused ({reason})", "try again; nothing of it was committed") from error
    except Exception as error:  # the transports of huggingface_hub have errors of their own
        reason = (str(error).splitlines() or [""])[0]
        fix = "connect, or set HF_ENDPOINT; the same command sends what is missing"
        raise ToolkitError(f"{repo}: the hub cannot be reached ({type(error).__name__}: {reason})", fix) from error
