"""Sums in lanes, and runs of several processes: the same bytes whatever their number."""

from __future__ import annotations

import shutil

import pytest
import torch
from several_processes import batches_of_two_windows, command_on_a_tiny_llama, digests, together
from tiny_runs import text_file, tiny_checkpoint

from calibration.distributed import LANES, Processes, lanes_of, owners_by_cost
from calibration.nested import moved, nbytes
from calibration.walk import lanes
from calibration.walk.ranges import EqualBins, Extremes, Midpoints, TokenMaxima
from calibration.walk.statistics import AbsMax, CrossGram, Gram, Mean, Sample
from ptq.analysis.activations import SiteStatistics

KINDS = (Gram, Mean, AbsMax, Sample, EqualBins, Extremes, Midpoints, TokenMaxima)


@pytest.mark.parametrize("batches", [1, 3, 7, 8, 9, 64, 100])
def test_lanes_hold_every_batch_once(batches):
    found = lanes_of(batches)
    assert [i for lane in found for i in lane] == list(range(batches))
    assert len(found) == min(LANES, batches) and all(found)
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_lanes_add_up_to_one_sum_over_all_batches(kind):
    batches = [torch.randn(9, 4, generator=torch.Generator().manual_seed(i)) * 2.0**i for i in range(11)]
    whole = kind(4, torch.device("cpu"))
    for x in batches:
        whole.update(x)

    def run(lane, fresh):
        for i in lane:
            fresh["x"].update(batches[i])

    total = lanes.sum_of_lanes(lanes_of(11), Processes(), lambda: {"x": kind(4, torch.device("cpu"))}, run)["x"]
    assert total.tokens == whole.tokens == 99 and total.finite()
    for name, value in vars(whole).items():
        found = getattr(total, name)
        if isinstance(value, list):
            value, found = torch.cat(value), torch.cat(found)
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def test_cross_grams_add_up():
    one, two = (CrossGram(3, torch.device("cpu")) for _ in range(2))
    x = torch.eye(3)
    one.update_pair(x, 2 * x)
    two.update_pair(x, 4 * x)
    lanes.merge(one, two)
    assert torch.equal(one.matrix, 4 * torch.eye(3)) and one.tokens == 6


def site_statistics(numbers: range) -> SiteStatistics:
    """Of sequences with these numbers, of 12."""
    found = SiteStatistics(8, 12, residual=True, parts=False, device=torch.device("cpu"))
    for i in numbers:
        x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(i)) * 0.05
        x[0, 3, 2] = 300.0 * i
        found.update(x, torch.arange(16), torch.arange(32).view(2, 16) + i)
    return found


def test_statistics_of_a_site_add_up():
    whole, total = site_statistics(range(6)), site_statistics(range(3))
    total.merge(site_statistics(range(3, 6)))
    for name in ("later", "histogram"):
        for key, value in vars(getattr(whole, name)).items():
            torch.testing.assert_close(getattr(getattr(total, name), key), value)
    for name in ("abs_sum", "low", "high", "first_max", "large", "flagged"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name))
    for name in ("token_max", "sample"):
        assert torch.equal(torch.cat(getattr(total, name)), torch.cat(getattr(whole, name)))
    assert (total.extremes, total.largest) == (whole.extremes, whole.largest) and whole.extremes
    for ours, theirs in ((total.whole, whole.whole), (total.rest, whole.rest)):
        assert ours.norms.kurtosis == pytest.approx(theirs.norms.kurtosis) and ours.norms.sequences == 12
        assert (ours.six_sigma.positions, ours.six_sigma.tokens) == (
            theirs.six_sigma.positions,
            theirs.six_sigma.tokens,
        )
    assert total.massive.positions == whole.massive.positions and total.massive.count == whole.massive.count > 0


def test_a_statistic_that_does_not_add_up_is_not_added():
    with pytest.raises(TypeError, match="object"):
        lanes.merge(object(), object())


def test_tasks_go_to_the_process_with_the_least_to_do():
    assert owners_by_cost([5, 1, 1, 9, 3], 2) == [1, 1, 0, 0, 1]
    assert owners_by_cost([1, 1, 1], 5) == [0, 1, 2] and owners_by_cost([], 3) == []


def test_results_are_handed_over_without_the_rest_of_what_they_were_cut_from():
    whole = torch.arange(100)
    cut = moved({"codes": (whole[3:5], None, "text")}, torch.device("cpu"))["codes"]
    assert torch.equal(cut[0], whole[3:5]) and cut[1:] == (None, "text")
    assert cut[0].untyped_storage().nbytes() == 2 * whole.itemsize == nbytes({"codes": cut})


@pytest.fixture(autouse=True)
def short_batches(monkeypatch):
    batches_of_two_windows(monkeypatch)


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    return command_on_a_tiny_llama(tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("awq+gptq", "w4a16-g32"),
        pytest.param("rotate+gptq", "w4a4", marks=pytest.mark.slow),
        pytest.param("smoothquant", "w8a8", marks=pytest.mark.slow),
        pytest.param("gptaq+lorc", "w4a16-g32", marks=pytest.mark.slow),
    ],
)
def test_several_processes_write_the_bytes_of_one(command, tmp_path, method, scheme):
    found = {}
    for size in (1, 3):
        results = together(size, [*command, "--method", method, "--scheme", scheme], tmp_path)
        assert [code for code, _ in results] == [0] * size, results
        assert all(not text for _, text in results[1:]), "only the first process prints"
        found[size] = digests(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / f"out-{size}")
    assert found[1] == found[3] and "report.json" in found[1]


SHARED = {
    "scap": ["sparsify", "--method", "scap", "--target", "0.5"],
    "chess": ["sparsify", "--method", "chess-qo", "--target", "0.5"],
    "teal": ["sparsify", "--method", "teal", "--target", "0.4"],
    "gptq+scap": ["quantize", "--method", "gptq+scap", "--scheme", "w4a16-g32", "--target", "0.5"],
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in SHARED])
def test_thresholds_have_the_same_bytes(command, tmp_path, name):
    kind, *options = SHARED[name]
    found = []
    for size in (1, 3):
        results = together(size, [kind, *command[1:], *options, "--samples", "40"], tmp_path)
        assert [code for code, _ in results] == [0] * size, results
        found.append(digests(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    assert found[0] == found[1] and "sparsity.safetensors" in found[0]


@pytest.mark.slow
def test_an_analysis_has_the_same_bytes(command, tmp_path):
    found = []
    for size in (1, 3):
        results = together(size, ["analyze", *command[1:], "--samples", "40"], tmp_path)
        assert [code for code, _ in results] == [0] * size, results
        found.append(digests(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    assert found[0] == found[1] and "channels.safetensors" in found[0]


FITS = {
    "fit": ["fit", "--bpw", "3.25", "--schemes", "w2a16-g32,w3a16-g32,w4a16-g32", "--out", "out/fit.toml"],
    "study": ["study", "sensitivity", "--schemes", "w2a16-g32,w4a16-g32", "--windows", "6"],
    "analyze": ["analyze", "--sensitivity", "w3a16-g32"],
}


@pytest.mark.parametrize("name", ["fit", "study", pytest.param("analyze", marks=pytest.mark.slow)])
def test_a_fit_has_the_same_bytes(command, tmp_path, name):
    """Ten windows in eight lanes. The study writes every number to its last digit; what a fit chooses hangs on them."""
    found, where = [], FITS[name].index("sensitivity") + 1 if name == "study" else 1
    for size in (1, 3):
        if name == "fit":
            (tmp_path / "out").mkdir()
        results = together(size, [*FITS[name][:where], *command[1:], "--samples", "10", *FITS[name][where:]], tmp_path)
        assert [code for code, _ in results] == [0] * size, results
        assert all(not text for _, text in results[1:]), "only the first process prints"
        found.append(digests(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    assert found[0] == found[1] and found[0]


@pytest.mark.slow
def test_experts_that_some_processes_do_not_see(tmp_path):
    """Two windows are two lanes: the third process has none, and prices linears all the same."""
    model, text = tiny_checkpoint("mixtral", tmp_path / "model"), text_file(tmp_path)
    options = ["--samples", "2", "--seq-len", "16", "--dataset", str(text), "--schemes", "w3a16-g32", "--out", "out"]
    found = []
    for size in (1, 3):
        results = together(size, ["study", "sensitivity", str(model), *options], tmp_path)
        assert [code for code, _ in results] == [0] * size, results
        found.append(digests(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    assert found[0] == found[1] and "3 processes, and work for 2" in results[0][1]


def test_scores_are_the_same_to_the_last_digit(command, tmp_path):
    sparse, model = tmp_path / "sparse", command[1]
    text = command[command.index("--dataset") + 1]
    options = ["--seq-len", "32", "--dataset", text]
    made = ["sparsify", model, *options, "--method", "cats", "--target", "0.5", "--samples", "40", "--out", str(sparse)]
    assert together(1, made, tmp_path)[0][0] == 0
    found = []
    for size in (1, 3):
        words = ["eval", str(sparse), "--reference", model, *options, "--json", "scores.json"]
        results = together(size, words, tmp_path)
        assert [code for code, _ in results] == [0] * size, results
        assert "perplexity" in results[0][1] and all(not text for _, text in results[1:])
        found.append((tmp_path / "scores.json").read_text())
    assert found[0] == found[1] and "weights_skipped" in found[0] and "kl_p99" in found[0]
