"""Outliers of weights: what a scale per tensor, row or column has to cover."""

from __future__ import annotations

import torch

from calibration.walk.segment import Segment
from ptq.analysis.activations import SIGMAS, outlier_channels
from ptq.analysis.moments import deviation, kurtosis
from ptq.analysis.record import OutlierChannel, WeightRecord
from ptq.analysis.sites import TOP, disparity, short


def weight_record(name: str, block: int, w: torch.Tensor) -> WeightRecord:
    """Numbers of one weight ``[out, in]``, float32."""
    size = w.abs()
    mean, s = deviation(w)
    by_column, column_max = size.mean(0), size.amax(0)
    found = outlier_channels(by_column)
    ordered = found[by_column[found].argsort(descending=True)][:TOP].tolist()
    columns = (
        OutlierChannel(c, short(float(by_column[c] / by_column.mean())), short(float(column_max[c])), 1.0)
        for c in ordered
    )
    return WeightRecord(
        name=name,
        block=block,
        shape=(w.shape[0], w.shape[1]),
        max_abs=short(float(size.max())),
        kurtosis=short(kurtosis(w)),
        six_sigma=int(((w - mean).abs() > SIGMAS * s).sum()),
        row_disparity=disparity(size.amax(1)),
        column_disparity=disparity(column_max),
        columns=tuple(columns),
    )


def weight_records(segment: Segment) -> list[WeightRecord]:
    """One record per linear of the block."""
    linears = segment.spec.linears
    return [weight_record(segment.full_name(n), segment.index, segment.weight(n)) for n in linears]
