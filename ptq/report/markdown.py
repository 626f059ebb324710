"""report.md: the whole run on one page of plain text."""

from __future__ import annotations

from collections.abc import Iterator

from calibration.record import Evaluation, LinearRecord, RunRecord
from ptq.report import figures, wording
from ptq.report.figures import code, plain, table

WORST = 10


def render(record: RunRecord) -> str:
    """The report as GitHub-flavoured Markdown. The same record gives the same bytes."""
    sections = [_title(record), _result(record), quality(record), _errors(record), scope(record), _loads(record)]
    sections += [recipe(record), calibration(record), versions(record), reproduce(record)]
    return "\n\n".join(filter(None, sections)) + "\n"


def _title(record: RunRecord) -> str:
    model = record.model
    facts = [str(model[key]) for key in ("architecture", "dtype") if model.get(key)]
    if model.get("parameters"):
        facts.insert(1, f"{figures.large_count(model['parameters'])} parameters")
    lines = [f"# {plain(model.get('name', 'model'))}: {plain(wording.method_label(record))}"]
    lines.append(f"{plain(', '.join(facts))}." if facts else "")
    if model.get("fingerprint"):
        lines.append(f"Checkpoint fingerprint {code(model['fingerprint'])}.")
    return "\n\n".join(filter(None, lines))


def _result(record: RunRecord) -> str:
    return "## Result\n\n" + sizes(record)


def sizes(record: RunRecord) -> str:
    """Format, sizes and bits as a table of two columns. Sizes may be missing in a record of an interrupted run."""
    result, before = record.result, record.model.get("bytes")
    shrinkage = figures.shrinkage(before, result.get("bytes"))
    rows = [("Format", plain(result.get("format", figures.DASH)))]
    if result.get("format_reason"):
        rows.append(("Why this format", plain(result["format_reason"])))
    rows += [
        ("Size before", figures.size(before)),
        ("Size after", f"{figures.size(result.get('bytes'))} ({shrinkage})" if shrinkage else figures.DASH),
        ("of which quantized linears", figures.size(result.get("quantized_bytes"))),
        ("Bits per quantized weight", figures.bits(result.get("bits_per_weight"))),
        ("Quantized", wording.coverage(record)),
    ]
    if result.get("verified") is not None:
        rows.append(("Read back and compared", f"{plain(wording.value(result['verified']))} linears"))
    return table(["", ""], rows) + "\n\nSizes are of all tensors; 1 GB is 10⁹ bytes."


def quality(record: RunRecord, own: str = "this run") -> str:
    """A perplexity table per protocol, each with its protocol spelled out; ``own`` is what the result is called."""
    parts = ["## Quality"]
    for result in wording.results(record.evaluations):
        rows = [_evaluation(e, result.reference, own) for e in result.evaluations]
        header = ["Model", "Perplexity", "Δ", "KL mean (nats)", "KL 99th pct.", "Top-1 agreement", "ΔNLL ± s.e. (nats)"]
        parts += [table(header, rows, right=range(1, 7)), plain(wording.protocol_sentence(result.protocol))]
    if len(parts) == 1:
        parts.append("Not measured in this run. `ptq eval` measures the result under a named protocol.")
    else:
        parts.append("Δ, KL and top-1 are against the float model on the same tokens.")
    return "\n\n".join(parts)


def _evaluation(e: Evaluation, reference: float | None, own: str) -> list[str]:
    name = own if e.model == wording.QUANTIZED else plain(wording.model_label(e.model))
    change = None if e.model == wording.FLOAT else figures.difference(e.perplexity, reference)
    cells = [f"**{name}**" if e.model == wording.QUANTIZED else name, figures.perplexity(e.perplexity)]
    cells.append(figures.signed(change))
    d = e.divergence
    if d is None:
        return cells + [figures.DASH] * 4
    cells += [figures.nats(d.kl_mean), figures.nats(d.kl_p99), figures.percent(d.top1_agreement)]
    return [*cells, f"{figures.signed(d.delta_nll, 4)} ± {d.delta_nll_se:.4f}"]


def _errors(record: RunRecord) -> str:
    by = wording.metric(record)
    entries = wording.worst(record, WORST)
    if not entries:
        return ""
    header = ["Linear", "Shape", "Scheme", "Bits", "Output error", "Weight error", "Notes"]
    title = f"## Linears with the largest {by.name}" if len(record.linears) > WORST else f"## Linears by {by.name}"
    definitions = f"The {by.name} is {by.definition}."
    return "\n\n".join([title, definitions, table(header, map(_linear, entries), right=[1, 3, 4, 5])])


def _linear(entry: LinearRecord) -> list[str]:
    notes = wording.value(entry.notes) if entry.notes else ""
    errors = [figures.error(entry.relative_error), figures.error(entry.weight_error)]
    shape = f"{entry.shape[0]} × {entry.shape[1]}"
    return [code(entry.name), shape, plain(entry.scheme), figures.bits(entry.bits_per_weight), *errors, plain(notes)]


def scope(record: RunRecord) -> str:
    """What was quantized and how, what stayed in float and why."""
    parts = ["## Quantized, and left in float"]
    rows = [
        [code(name), plain(wording.scheme_sentence(name)), figures.count(n), figures.large_count(weights)]
        for name, n, weights in wording.schemes(record)
    ]
    if rows:
        parts.append(table(["Scheme", "In words", "Linears", "Weights"], rows, right=[2, 3]))
    else:
        parts.append("No linear was quantized.")
    if record.left:
        left = [
            [plain(entry.get("what", "")), plain(entry.get("why", "")), figures.count(entry.get("count"))]
            for entry in record.left
        ]
        parts.append(table(["Left in float", "Why", "Tensors"], left, right=[2]))
    return "\n\n".join(parts)


def _loads(record: RunRecord) -> str:
    rows = [[plain(name), plain(wording.answer(word, why))] for name, _, word, why in wording.loads(record)]
    return "## Which programs load it\n\n" + table(["Program", "Loads it"], rows) if rows else ""


def recipe(record: RunRecord) -> str:
    """The passes in order with all their settings, and the scheme rules."""
    parts = ["## Recipe"]
    passes = [f"{i}. {line}" for i, line in enumerate(_passes(record), 1)]
    if passes:
        parts.append("\n".join(passes))
    rules = [[code(name), plain(scheme)] for name, scheme in wording.rules(record)]
    if rules:
        parts.append(table(["Linears", "Scheme"], rows=rules))
    forwards = record.result.get("forward_passes")
    if forwards is not None:
        parts.append(f"Forward passes over the calibration data per block: {plain(wording.value(forwards))}.")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _passes(record: RunRecord) -> Iterator[str]:
    for entry in record.recipe.get("passes", []):
        listed = ", ".join(code(f"{key} = {item}", cell=False) for key, item in wording.settings(entry))
        name = f"**{plain(entry.get('name', '?'))}** {plain(wording.pass_sentence(entry))}".rstrip()
        yield f"{name}: {listed}" if listed else name


def calibration(record: RunRecord) -> str:
    """The calibration text, or that there was none."""
    rows = [[plain(label), code(text)] for label, text in wording.calibration(record)]
    body = table(["", ""], rows) if rows else "This recipe needs no data."
    return f"## Calibration\n\n{body}"


def versions(record: RunRecord) -> str:
    if not record.versions:
        return ""
    rows = [[plain(name), plain(version)] for name, version in sorted(record.versions.items())]
    return "## Versions\n\n" + table(["Package", "Version"], rows)


def reproduce(record: RunRecord) -> str:
    """The command, ready to paste."""
    command = record.recipe.get("command")
    return "## Reproduce\n\n" + figures.block(str(command), "sh") if command else ""
