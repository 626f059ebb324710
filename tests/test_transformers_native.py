"""Native folders in plain transformers: a sentence without ``import ptq``, the model with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import environment
from tiny_runs import logits, quantize, tiny_checkpoint
from transformers import AutoModelForCausalLM

from ptq.runtime.load import load_model

PLAIN = "from transformers import AutoModelForCausalLM as M; M.from_pretrained({!r})"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"scheme": "w4a16-g32"}),
        ("llama-tied-bias", {"scheme": "w8a8kv8", "embeddings": "w8a16-g32"}),
        ("gemma3", {"scheme": "w3a16-g32", "embeddings": "w8a16-g32"}),
        ("opt", {"scheme": "w4a16-g32"}),
    ],
)
def test_from_pretrained_gives_the_model_that_load_model_gives(family, settings, tmp_path):
    model = tiny_checkpoint(family, tmp_path / "model")
    quantize(model, tmp_path / "native", method="rtn", format="native", **settings)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    expected = load_model(tmp_path / "native", dtype=torch.float32).model
    assert torch.equal(logits(found), logits(expected))
    assert not list(found.state_dict()) or not any(p.is_meta for p in found.parameters())


@pytest.mark.slow
def test_without_the_import_there_is_a_sentence_and_no_model(tmp_path):
    model = tiny_checkpoint("llama", tmp_path / "model")
    quantize(model, tmp_path / "native", method="rtn", format="native")
    refused = run(PLAIN.format(str(tmp_path / "native")))
    assert refused.returncode != 0
    assert "import ptq before from_pretrained" in refused.stderr.splitlines()[-1]


def test_the_import_is_light_and_works_before_and_after_transformers(tmp_path):
    light = "import sys, ptq; assert not {'torch', 'transformers'} & set(sys.modules); "
    later = "import transformers.quantizers.auto as a; assert 'ptq' in a.AUTO_QUANTIZER_MAPPING"
    assert run(light + later).returncode == 0
    before = "import transformers.quantizers.auto as a; import ptq; assert 'ptq' in a.AUTO_QUANTIZER_MAPPING"
    assert run(before).returncode == 0


def test_embeddings_and_head_are_stored_with_codes(tmp_path):
    model = tiny_checkpoint("llama-tied-bias", tmp_path / "model")
    record = quantize(model, tmp_path / "native", method="rtn", embeddings="w8a16-g32", format="native")
    plain = quantize(model, tmp_path / "plain", method="rtn", format="native")
    saved = plain.result["bytes"] - record.result["bytes"]
    assert saved == 288 * 64 * 4 - 288 * 64 * (8 + 16 / 32) / 8
    found, expected = (load_model(Path(tmp_path / name), dtype=torch.float32).model for name in ("native", "plain"))
    table = expected.get_input_embeddings().weight
    ids = torch.arange(288)
    assert (found.get_input_embeddings()(ids) - table).abs().max() < 0.005 * table.abs().max()
    x = torch.randn(3, 64)
    rows = found.get_input_embeddings()(ids)
    assert torch.allclose(found.get_output_embeddings()(x), x @ rows.T, atol=1e-5)  # tied: the same codes
