"""The methods of activation sparsity, by the names that recipes and ``--method`` use."""

from __future__ import annotations

from sparsity.gate import GatePass
from sparsity.methods.cats import Cats
from sparsity.methods.chess import Chess, ChessWithAttention
from sparsity.methods.fatrelu import FatRelu
from sparsity.methods.scap import Scap
from sparsity.methods.teal import Teal
from sparsity.methods.wina import Wina

METHODS: dict[str, type[GatePass]] = {
    "cats": Cats,
    "chess": Chess,
    "chess-qo": ChessWithAttention,
    "scap": Scap,
    "teal": Teal,
    "wina": Wina,
    "fatrelu": FatRelu,
}

__all__ = ["METHODS", "Cats", "Chess", "ChessWithAttention", "FatRelu", "Scap", "Teal", "Wina"]
