// Products of one to eight tokens with a float32 or bfloat16 weight that read only the rows in use.
//
// gemv_input:  y = bias + sum over kept i of (x[i] - center[i]) * wt[i, :]     wt [in, out], row-major
// gemv_output: h[j] = g[j] * <x, w[j, :]> for kept j, 0 elsewhere               w  [out, in], row-major
//
// Both are one pass over contiguous rows. The mask (|v| > threshold, compared in float32) and the list of kept rows
// are made here; with several tokens a row is read where any of them keeps it. Sums are float32.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "kept.h"

namespace {

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

template <class W, int B>
void input_block(const W* wt, long out, const Kept<B>& kept, const float* bias, W* y, long start, int width) {
    const int stride = (width + PAIR - 1) / PAIR * PAIR, whole = width / PAIR * PAIR;
    std::vector<float> sums(size_t(stride) * B, 0.f);
    add_rows<W, B>(wt + start, out, kept, width, sums.data(), stride);
    for (int b = 0; b < B; b++)
        for (int c = 0; c < width; c++) {
            int at = c < whole ? c / PAIR * PAIR + pair_position<W>(c % PAIR) : c;
            store(y + b * out + start + c, sums[b * stride + at] + (bias ? bias[start + c] : 0.f));
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

template <class W, int B>
void output_range(const W* w, long in, long out, const Kept<B>& kept, const float* x, long stride, const float* bias, W* h,
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

template <class W, int B>
long input_tokens(const W* x, const W* wt, const float* bias, W* y, long in, long out, const float* threshold,
                  long thresholds, const float* center, long centers, int threads) {
    Kept<B> kept(x, in, in, ROWS, threshold, thresholds, center, centers);
    // equal shares of columns per thread, in whole cache lines, then blocks of WIDTH within a share
    long share = ((out + threads - 1) / threads + 63) / 64 * 64, blocks = (share + WIDTH - 1) / WIDTH;
    long width = (share / blocks + 63) / 64 * 64, pieces = (out + width - 1) / width;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long p = 0; p < pieces; p++)
        input_block<W, B>(wt, out, kept, bias, y, p * width, int(std::min(width, out - p * width)));
    return kept.count;
}

template <class W, int B>
long output_tokens(const W* x, const W* w, const float* bias, const W* gate, W* h, long in, long out,
                   const float* threshold, long thresholds, int threads) {
    Kept<B> kept(gate, out, out, ROWS, threshold, thresholds, nullptr, 0);
    const long stride = (in + PAIR - 1) / PAIR * PAIR, whole = in / PAIR * PAIR;
    std::vector<float> ordered(size_t(stride) * B, 0.f);
    for (int b = 0; b < B; b++)
        for (long c = 0; c < in; c++)
            ordered[b * stride + (c < whole ? c / PAIR * PAIR + pair_position<W>(int(c % PAIR)) : c)] = to_float(x[b * in + c]);
    std::fill(h, h + B * out, W(0));
    constexpr int CHUNK = 32;
    const int padded = kept.padded, chunks = (padded + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int c = 0; c < chunks; c++)
        output_range<W, B>(w, in, out, kept, ordered.data(), stride, bias, h, c * CHUNK, std::min(padded, (c + 1) * CHUNK));
    return kept.count;
}

}  // namespace

#define INPUT_GEMV(NAME, W)                                                                                            \
    extern "C" long NAME(const W* x, const W* wt, const float* bias, W* y, long tokens, long in, long out,             \
                         const float* threshold, long thresholds, const float* center, long centers, int threads) {    \
        return with_tokens(tokens, [&](auto n) {                                                                       \
            return input_tokens<W, n.value>(x, wt, bias, y, in, out, threshold, thresholds, center, centers, threads); \
        });                                                                                                            \
    }
#define OUTPUT_GEMV(NAME, W)                                                                                           \
    extern "C" long NAME(const W* x, const W* w, const float* bias, const W* gate, W* h, long tokens, long in,         \
                         long out, const float* threshold, long thresholds, int threads) {                            \
        return with_tokens(tokens, [&](auto n) {                                                                       \
            return output_tokens<W, n.value>(x, w, bias, gate, h, in, out, threshold, thresholds, threads);            \
        });                                                                                                            \
    }

INPUT_GEMV(gemv_input_float32, float)
INPUT_GEMV(gemv_input_bfloat16, bf16)
OUTPUT_GEMV(gemv_output_float32, float)
OUTPUT_GEMV(gemv_output_bfloat16, bf16)
