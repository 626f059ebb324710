// Products of one to eight tokens with a float32 or bfloat16 weight that read only the rows in use.
//
// gemv_input:  y = bias + sum over kept i of (x[i] - center[i]) * wt[i, :]     wt [in, out], row-major
// gemv_output: h[j] = g[j] * <x, w[j, :]> for kept j, 0 elsewhere               w  [out, in], row-major
//
// Both are one pass over contiguous rows. The mask (|v| > threshold, compared in float32) and the list of kept rows
// are made here; with several tokens a row is read where any of them keeps it. Sums are float32.
#include <omp.h>

#include "gemv.h"

using namespace gemv;

namespace {

template <class W, int B>
long input_tokens(const W* x, const W* wt, const float* bias, W* y, long in, long out, const float* threshold,
                  long thresholds, const float* center, long centers, int threads) {
    Kept<B> kept(x, in, in, ROWS, threshold, thresholds, center, centers);
    // equal shares of columns per thread, in whole cache lines, then blocks of WIDTH within a share
    long share = ((out + threads - 1) / threads + 63) / 64 * 64, blocks = (share + WIDTH - 1) / WIDTH;
    long width = (share / blocks + 63) / 64 * 64, pieces = (out + width - 1) / width;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long p = 0; p < pieces; p++)
        input_block<W, B>(wt + p * width, out, kept, bias ? bias + p * width : nullptr, y + p * width, out,
                          int(std::min(width, out - p * width)));
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
