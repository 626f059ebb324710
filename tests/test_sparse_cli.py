"""``ptq generate`` and ``ptq bench`` on checkpoints with thresholds."""

from __future__ import annotations

import re

import pytest
import torch
from command import done, refused, tiny

from calibration.architectures import resolve
from calibration.model.checkpoint import CheckpointReader
from calibration.model.opening import weights_fingerprint
from ptq.runtime.load import load_model
from sparsity.attach import decode_modes
from sparsity.files import Sparsity, save_sparsity
from sparsity.sites import Site


@pytest.fixture
def sparse(tmp_path):
    folder = tiny(tmp_path / "model")
    architecture = resolve(load_model(folder).model.config)
    sites = tuple(Site(path, "input", torch.tensor([0.5])) for path in decode_modes(architecture, ()))
    with CheckpointReader(folder) as reader:
        base = weights_fingerprint(reader)
    save_sparsity(Sparsity("teal", 0.5, base, sites), folder)
    return folder


def test_generate_decodes_sparsely_and_says_so(sparse):
    out = done("generate", sparse, "--prompt", "the history of", "--max-new-tokens", "8", "--dtype", "float32")
    assert re.search(
        r"linears: (native|reference) x 15 decoding sparsely; steps: (one call each|the model's own); ", out
    ), out


def test_bench_shows_dense_and_sparse_beside_the_bound(sparse):
    out = done("bench", sparse, "--new-tokens", "6", "--repeats", "1", "--prompt", "the history of")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["dense", "dense,", "sparse", "[teal,"]
    dense, own, read = (float(v) for v in re.findall(r"([\d.]+) MB/token", out))
    bound = float(re.search(r"bound ([\d.]+)", out)[1])
    assert dense == own > read and abs(bound - own / read) < 0.1, out


def test_bench_of_a_dense_model_has_one_row(tmp_path):
    out = done("bench", tiny(tmp_path / "model"), "--new-tokens", "4", "--repeats", "1", "--prompt", "the history of")
    assert len(out.splitlines()) == 2 and "dense (float)" in out


def test_an_unknown_sparse_kernel_is_refused(sparse):
    assert "did you mean 'native'" in refused("bench", sparse, "--kernel", "natve", "--prompt", "the history of")
