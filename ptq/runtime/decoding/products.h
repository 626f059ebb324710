// Products of one vector with a weight in any of its forms, and what thresholds of activation sparsity leave out of them.
#pragma once
#include "columns.h"
#include "gemv.h"
#include "rows.h"

static_assert(gemv::ROWS == int4::ROWS, "one list of kept rows serves both");

// Of outputs, as many as one thread must make together: transposed weights are read in whole cache lines, codes in pieces.
static inline long unit_of(const Matrix& w) {
    if (!w.transposed) return 1;
    return w.kind == WORDS4 ? int4::PIECE : 64 / long(sizeof(bf16));
}

static inline void code(const Matrix& w, Input& x) {
    const bool pieces = w.group % PIECE == 0 || w.group == w.columns;
    if (w.narrow) x.code<1>(pieces ? PIECE : PIECE / 2);
    else x.code<2>(w.group);
}

static inline void prepare(const Matrix& w, Input& x) {
    if (w.kind == BFLOAT16 && !w.transposed) x.pair();
    if (w.kind == INT4 || w.kind == INT8) code(w, x);
    if (w.kind == INT8) x.widen();
}

template <class W>
static inline void float_columns(const Matrix& w, const Kept<1>& kept, long from, long to, float* y) {
    for (long c = from; c < to; c += gemv::WIDTH)
        gemv::input_block<W, 1>(static_cast<const W*>(w.data) + c, w.rows, kept, w.bias ? w.bias + c : nullptr, y + c - from, 0,
                                int(std::min<long>(gemv::WIDTH, to - c)));
}

// The inputs in use, less their center, 0 for the others; what is in use is decided before anything is rounded.
static inline void keep(const Matrix& w, const Input& x, Input& kept) {
    float* to = kept.fresh(x.size);
    const long step = w.centers > 1;
    for (long i = 0; i < x.size; i++) to[i] = w.center ? x.plain[i] - w.center[i * step] : x.plain[i];
    if (!w.threshold) return;
    if (w.thresholds > 1)
        for (long i = 0; i < x.size; i++) to[i] = std::fabs(to[i]) <= w.threshold[i] ? 0.f : to[i];
    else
        for (long i = 0; i < x.size; i++) to[i] = std::fabs(to[i]) <= *w.threshold ? 0.f : to[i];
}

// y = bias + sum over the inputs in use: lines of the transposed weight.
static inline void kept_columns(const Matrix& w, const Input& x, long from, long to, float* y) {
    if (w.kind == WORDS4) {
        static thread_local Input kept;
        keep(w, x, kept);
        code(w, kept);
        return w.narrow ? coded_columns<1>(w, kept, from, to, y) : coded_columns<2>(w, kept, from, to, y);
    }
    const Kept<1> kept(x.plain.data(), w.columns, w.columns, gemv::ROWS, w.threshold, w.thresholds, w.center, w.centers);
    w.kind == FLOAT32 ? float_columns<float>(w, kept, from, to, y) : float_columns<bf16>(w, kept, from, to, y);
}

// y[0 : to - from] = gate (x W^T + bias) at the rows whose gate is in use, 0 elsewhere; `gate` is of these rows, the
// thresholds are one, or of all rows; none: all are in use.
static inline void kept_rows(const Matrix& w, const Input& x, const float* gate, const float* threshold, long thresholds,
                             long from, long to, float* y) {
    const float* own = threshold && thresholds > 1 ? threshold + from : threshold;
    const Kept<1> kept(gate, to - from, to - from, gemv::ROWS, own, thresholds, nullptr, 0);
    const float* bias = w.bias ? w.bias + from : nullptr;
    std::fill(y, y + (to - from), 0.f);
    if (w.kind == FLOAT32)
        gemv::output_range<float, 1>(static_cast<const float*>(w.data) + from * w.columns, w.columns, 0, kept, x.plain.data(), 0,
                                     bias, y, 0, kept.padded);
    if (w.kind == BFLOAT16)
        gemv::output_range<bf16, 1>(static_cast<const bf16*>(w.data) + from * w.columns, w.columns, 0, kept, x.pairs.data(), 0,
                                    bias, y, 0, kept.padded);
    if (w.kind != WORDS4) return;
    const long groups = w.columns / w.group, line = (w.columns + int4::PIECE - 1) / int4::PIECE * (int4::PIECE / 2);
    const int4::Wide<1> wide(x.plain.data(), w.columns, w.group, w.zero);
    for (int k = 0; k < kept.padded; k += int4::ROWS)
        int4::output_rows<float, 1>(static_cast<const uint8_t*>(w.data) + from * line, static_cast<const bf16*>(w.scale) + from * groups,
                                    w.zero ? w.zero + from * groups : nullptr, w.columns, w.group, kept, wide, bias, y, 0, k);
}

// Small values become the center, for weights that are read whole all the same.
static inline void prune(const Matrix& w, const Input& x, Input& pruned) {
    float* to = pruned.fresh(x.size);
    for (long i = 0; i < x.size; i++) {
        const float center = w.center ? w.center[w.centers > 1 ? i : 0] : 0.f;
        to[i] = std::fabs(x.plain[i] - center) <= w.threshold[w.thresholds > 1 ? i : 0] ? center : x.plain[i];
    }
}

// y[0 : to - from] = outputs `from` to `to`, in whole units.
static inline void product(const Matrix& w, Input& x, long from, long to, float* y) {
    static thread_local Input pruned;
    static thread_local std::vector<float> ones;
    if (from == to) return;
    if (w.transposed) return kept_columns(w, x, from, to, y);
    if (w.kind == WORDS4) {
        ones.assign(to - from, 1.f);
        return kept_rows(w, x, ones.data(), nullptr, 0, from, to, y);
    }
    if (w.threshold) prune(w, x, pruned);
    Input& seen = w.threshold ? pruned : x;
    prepare(w, seen);
    dots(w, seen, from, to, y);
}
