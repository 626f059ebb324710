"""Embedding with the rows of a text's tokens alone: the same hidden states, and nothing else read of the table."""

from __future__ import annotations

import pytest
import torch
from command import tiny

from calibration.model.checkpoint import CheckpointReader
from calibration.model.opening import open_model
from calibration.model.skeleton import Skeleton, load_parameters
from calibration.model.token_rows import only_rows, token_table
from calibration.progress import Silent
from calibration.text.crops import TokenBatches
from calibration.walk.float_blocks import FloatBlocks
from calibration.walk.outer_tensors import OuterTensors
from calibration.walk.states import HiddenStates
from ptq.methods.rotate import Rotate

IDS = torch.tensor([[7, 3, 3, 250, 8, 9], [0, 259, 7, 8, 8, 1]])


def test_rows_of_a_file_are_those_of_the_tensor(tmp_path):
    reader = CheckpointReader(tiny(tmp_path / "m"))
    name = "model.embed_tokens.weight"
    whole = reader.tensor(name)
    for wanted in ([0], [259], [3, 4, 5, 9, 200, 201], list(range(260)), []):
        found = reader.rows(name, torch.tensor(wanted, dtype=torch.int64))
        assert torch.equal(found, whole[wanted]) and found.dtype == whole.dtype
    with pytest.raises(AssertionError, match="no such row"):
        reader.rows(name, torch.tensor([3, 260]))


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "bloom"])
def test_states_are_those_of_the_whole_table(tmp_path, family):
    """Scaled embeddings, norms and positions behind them included; the table itself is never read."""
    reader, config, spec = open_model(tiny(tmp_path / "m", family, pad_token_id=200))
    skeleton = Skeleton(config, spec, torch.float32, torch.device("cpu"))
    found = token_table(skeleton.model)
    assert found is not None
    path, module = found
    table = next(name for name in reader.infos if spec.root_module_name(name) == path)
    whole, read = reader.tensor(table), reader.tensor
    reader.tensor = lambda name: pytest.fail("the whole table was read") if name == table else read(name)  # type: ignore[method-assign]
    states = FloatBlocks(reader, skeleton).enter(TokenBatches(IDS, {}), Silent())
    assert module.weight.is_meta and module.weight.shape == whole.shape and not module._forward_pre_hooks
    reader.tensor = read  # type: ignore[method-assign]
    with only_rows(module, torch.arange(len(whole)), whole):  # all rows: as the class looks them up
        stem = {spec.root_module_name(n): reader.tensor(n) for n in skeleton.stem_names(reader.infos) if n != table}
        load_parameters(skeleton.model, stem)
        expected = HiddenStates.from_tokens(skeleton, TokenBatches(IDS, {}), 4)
    assert torch.equal(states.batches[0], expected.batches[0])


def test_another_token_is_refused_instead_of_having_the_row_of_its_neighbour():
    table, tokens = torch.nn.Embedding(20, 4), torch.tensor([2, 5, 9])
    with only_rows(table, tokens, table.weight.detach()[tokens]):
        assert torch.equal(table(torch.tensor([[9, 2]])), table(input=torch.tensor([[9, 2]])))
        for other in (3, 10, 0):
            with pytest.raises(AssertionError, match="not in the text"):
                table(torch.tensor([[2, other]]))
    assert table(torch.tensor([3])).shape == (1, 4)


def test_a_rotated_embedding_has_the_same_rows(tmp_path):
    reader, _, spec = open_model(tiny(tmp_path / "m"))
    outer, wanted = OuterTensors(reader, spec, (Rotate(),)), IDS.unique()
    rows = outer.rows("model.embed_tokens.weight", wanted)
    assert torch.equal(rows, outer.tensor("model.embed_tokens.weight")[wanted])
    assert not torch.equal(rows, reader.tensor("model.embed_tokens.weight")[wanted])
