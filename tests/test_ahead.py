"""Tensors of the next block: told to the system on CPUs, read into pinned memory by a thread for GPUs."""

from __future__ import annotations

import os
from threading import Event

import pytest
import torch
from command import tiny

from calibration.errors import ToolkitError
from calibration.model.checkpoint import CheckpointReader
from calibration.walk.ahead import Ahead

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
Q = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture
def reader(tmp_path):
    tiny(tmp_path / "model", num_hidden_layers=3)
    return CheckpointReader(tmp_path / "model")


@pytest.fixture
def pinned(monkeypatch):
    """Pinning without a GPU: a copy, which is counted."""
    made: list[torch.Tensor] = []

    def pin(tensor):
        made.append(tensor.clone())
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return made


def test_the_system_is_told(reader, monkeypatch):
    told = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, what: told.append((start, size, what)))
    ahead = Ahead(reader, CPU)
    ahead.expect([Q.format(1)])
    info = reader.infos[Q.format(1)]
    assert told == [(info.start, info.nbytes, os.POSIX_FADV_WILLNEED)]
    assert torch.equal(ahead.tensor(Q.format(1)), reader.tensor(Q.format(1)))


def test_systems_that_cannot_be_told(reader, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    ahead = Ahead(reader, CPU)
    ahead.expect([Q.format(1)])
    assert torch.equal(ahead.tensor(Q.format(1)), reader.tensor(Q.format(1)))


def test_a_thread_reads_for_a_gpu(reader, pinned):
    ahead = Ahead(reader, CUDA)
    ahead.expect([Q.format(1)])
    reader.close()  # which ends what its owner reads, and nothing else
    found = ahead.tensor(Q.format(1))
    assert len(pinned) == 1 and found is pinned[0] and torch.equal(found, reader.tensor(Q.format(1)))
    assert torch.equal(ahead.tensor(Q.format(1)), found) and len(pinned) == 1  # handed out once, then read


def test_a_block_is_kept_while_the_next_one_is_read_and_no_longer(reader, pinned):
    ahead = Ahead(reader, CUDA)
    for index in range(3):
        ahead.expect([Q.format(index)])
    assert torch.equal(ahead.tensor(Q.format(1)), pinned[1])
    assert torch.equal(ahead.tensor(Q.format(2)), pinned[2])
    assert ahead.tensor(Q.format(0)) is not pinned[0]


def test_a_file_that_is_gone_is_named(reader, pinned):
    ahead = Ahead(reader, CUDA)
    (reader.folder / reader.infos[Q.format(1)].shard).unlink()
    ahead.expect([Q.format(1)])
    with pytest.raises(ToolkitError, match="cannot read"):
        ahead.tensor(Q.format(1))


def test_a_file_that_is_gone_is_named_when_it_is_read(reader):
    ahead = Ahead(reader, CPU)
    (reader.folder / reader.infos[Q.format(1)].shard).unlink()
    ahead.expect([Q.format(1)])
    with pytest.raises(ToolkitError, match="cannot read"):
        ahead.tensor(Q.format(1))


def test_reading_goes_on_beside_the_work(reader, pinned, monkeypatch):
    reading, go = Event(), Event()
    plain = CheckpointReader.tensor

    def slow(self, name):
        reading.set()
        assert go.wait(10)
        return plain(self, name)

    monkeypatch.setattr(CheckpointReader, "tensor", slow)
    ahead = Ahead(reader, CUDA)
    ahead.expect([Q.format(1)])
    assert reading.wait(10)  # and this thread is here
    go.set()
    assert ahead.tensor(Q.format(1)).shape == (64, 64)
