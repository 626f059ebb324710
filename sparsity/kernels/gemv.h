// Products of one to eight tokens with a float32 or bfloat16 weight that read only the rows in use: what one thread does.
//
// Sums are float32. Vectors that rows are multiplied with are in pair order, see simd.h.
#pragma once
#include <algorithm>
#include <vector>

#include "kept.h"

namespace gemv {

constexpr int ROWS = 4;       // rows added per pass over the sums: four streams, one load and store of a sum
constexpr int WIDTH = 4096;   // columns per pass: their sums stay in the first-level cache
constexpr int LINE = 64;

// Non-temporal: a weight is used once per token, and would only push out what is used again.
template <class W> inline void prefetch(const W* p) {
    for (size_t byte = 0; byte < PAIR * sizeof(W); byte += LINE)
        __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 0);
}

// sums[b, 0:width] (pair order, `stride` apart) += sum over the kept rows of value * wt[row, 0:width].
template <class W, int B>
void add_rows(const W* wt, long out, const Kept<B>& kept, int width, float* sums, long stride) {
    constexpr int R = B <= 2 ? ROWS : ROWS / 2;
    const int padded = kept.padded, whole = width / PAIR * PAIR;
    for (int first = 0; first < padded; first += R) {
        const W *row[R], *next[R];
        for (int r = 0; r < R; r++) {
            row[r] = wt + kept.row[first + r] * out;
            next[r] = wt + kept.row[std::min(first + R + r, padded - 1)] * out;
        }
        const float* value = kept.value.get() + long(first) * B;
        for (int c = 0; c < whole; c += PAIR) {
            Vec a[B][2];
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) a[b][0] = Vec::load(sums + b * stride + c), a[b][1] = Vec::load(sums + b * stride + c + Vec::N);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                Vec w0, w1;
                load_pair(row[r] + c, w0, w1);
                prefetch(next[r] + c);
#pragma GCC unroll 8
                for (int b = 0; b < B; b++) {
                    Vec v = Vec::all(value[r * B + b]);
                    a[b][0] = a[b][0].fma(v, w0), a[b][1] = a[b][1].fma(v, w1);
                }
            }
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) a[b][0].store(sums + b * stride + c), a[b][1].store(sums + b * stride + c + Vec::N);
        }
        for (int c = whole; c < width; c++)
            for (int r = 0; r < R; r++)
                for (int b = 0; b < B; b++) sums[b * stride + c] += value[r * B + b] * to_float(row[r][c]);
    }
}

// y[b, 0:width] (`step` apart) = bias + sum over the kept rows of value * wt[row, 0:width]; rows are `out` apart.
template <class W, int B, class Y>
void input_block(const W* wt, long out, const Kept<B>& kept, const float* bias, Y* y, long step, int width) {
    const int stride = (width + PAIR - 1) / PAIR * PAIR, whole = width / PAIR * PAIR;
    std::vector<float> sums(size_t(stride) * B, 0.f);
    add_rows<W, B>(wt, out, kept, width, sums.data(), stride);
    for (int b = 0; b < B; b++)
        for (int c = 0; c < width; c++) {
            int at = c < whole ? c / PAIR * PAIR + pair_position<W>(c % PAIR) : c;
            store(y + b * step + c, sums[b * stride + at] + (bias ? bias[c] : 0.f));
        }
}

// dots[r, b] = <x[b], row[r]> for R rows; x in pair order up to the last whole PAIR, `stride` apart.
template <class W, int B, int R>
void dot_rows(const W* const* row, const W* const* next, const float* x, long stride, long in, float* dots) {
    const long whole = in / PAIR * PAIR;
    Vec a[R][B][2];
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) a[r][b][0] = a[r][b][1] = Vec::zero();
    for (long c = 0; c < whole; c += PAIR) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Vec w0, w1;
            load_pair(row[r] + c, w0, w1);
            prefetch(next[r] + c);
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) {
                a[r][b][0] = a[r][b][0].fma(Vec::load(x + b * stride + c), w0);
                a[r][b][1] = a[r][b][1].fma(Vec::load(x + b * stride + c + Vec::N), w1);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            float total = (a[r][b][0] + a[r][b][1]).sum();
            for (long c = whole; c < in; c++) total += x[b * stride + c] * to_float(row[r][c]);
            dots[r * B + b] = total;
        }
}

// h[b, j] (`out` apart) = value * (<x[b], w[j]> + bias[j]) for the entries `first` to `last` of the kept rows j.
template <class W, int B, class Y>
void output_range(const W* w, long in, long out, const Kept<B>& kept, const float* x, long stride, const float* bias, Y* h,
                  int first, int last) {
    constexpr int R = B <= 2 ? 4 : 2;
    const int padded = kept.padded;
    for (int k = first; k < last; k += R) {
        const W *row[R], *next[R];
        for (int r = 0; r < R; r++) {
            row[r] = w + kept.row[k + r] * in;
            next[r] = w + kept.row[std::min(k + R + r, padded - 1)] * in;
        }
        float dots[R * B];
        dot_rows<W, B, R>(row, next, x, stride, in, dots);
        for (int r = 0; r < R && k + r < kept.count; r++)
            for (int b = 0; b < B; b++) {
                long j = kept.row[k + r];
                float gate = kept.value[long(k + r) * B + b];
                store(h + b * out + j, gate == 0.f ? 0.f : gate * (dots[r * B + b] + (bias ? bias[j] : 0.f)));
            }
    }
}

}  // namespace gemv
