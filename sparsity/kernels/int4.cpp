// Products of one to eight tokens with 4-bit codes, by all threads, and codes as floats; see int4.h.
#include <omp.h>

#include "int4.h"

using namespace int4;

namespace {

template <class T, int B>
long input_tokens(const T* x, const uint8_t* codes, const bf16* scale, const uint8_t* zero, long group, const float* bias,
                  T* y, long in, long out, const float* threshold, long thresholds, const float* center, long centers,
                  int threads) {
    Kept<B> kept(x, in, group, ROWS, threshold, thresholds, center, centers);
    const long line = (out + PIECE - 1) / PIECE * (PIECE / 2);
    long share = ((out + threads - 1) / threads + PIECE - 1) / PIECE * PIECE, blocks = (share + WIDTH - 1) / WIDTH;
    long width = (share / blocks + PIECE - 1) / PIECE * PIECE, pieces = (out + width - 1) / width;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long p = 0; p < pieces; p++)
        input_block<T, B>(codes, line, scale, zero, out, kept, bias, y + p * width, p * width, int(std::min(width, out - p * width)));
    return kept.count;
}

template <class T, int B>
long output_tokens(const T* x, const uint8_t* codes, const bf16* scale, const uint8_t* zero, long group, const float* bias,
                   const T* gate, T* h, long in, long out, const float* threshold, long thresholds, int threads) {
    Kept<B> kept(gate, out, out, ROWS, threshold, thresholds, nullptr, 0);
    const Wide<B> wide(x, in, group, zero);
    std::fill(h, h + B * out, T(0));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8) if (threads > 1)
    for (int k = 0; k < kept.padded; k += ROWS)
        output_rows<T, B>(codes, scale, zero, in, group, kept, wide, bias, h, out, k);
    return kept.count;
}

// w [lines, width] in T; line i has scales scale[i / per, :], one for each `group` columns.
template <class T>
void dequantize(const uint8_t* codes, const bf16* scale, const uint8_t* zero, T* w, long lines, long width, long per,
                long group, int threads) {
    const long line = (width + PIECE - 1) / PIECE * (PIECE / 2), scales = (width + group - 1) / group;
    const Table level(1.f, 8.f);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long i = 0; i < lines; i++) {
        const bf16* s = scale + i / per * scales;
        const uint8_t* z = zero ? zero + i / per * scales : nullptr;
        for (long c = 0; c < width; c += PIECE) {
            float levels[PIECE];
            for (int part = 0; part < PARTS; part++) {
                Codes piece(codes + i * line + c / 2, part);
#pragma GCC unroll 8
                for (int k = 0; k < 8; k++) level(piece, k).store(levels + 16 * k + part * Vec::N);
            }
            const int end = int(std::min<long>(PIECE, width - c));
            if (group == 1)
                for (int k = 0; k < end; k++)
                    store(w + i * width + c + k, (levels[k] + (z ? float(8 - z[c + k]) : 0.f)) * to_float(s[c + k]));
            else
                for (int k = 0; k < end; k++) {
                    long g = (c + k) / group;
                    store(w + i * width + c + k, (levels[k] + (z ? float(8 - z[g]) : 0.f)) * to_float(s[g]));
                }
        }
    }
}

}  // namespace

#define INT4(NAME, T)                                                                                                  \
    extern "C" long int4_input_##NAME(const T* x, const uint8_t* codes, const bf16* scale, const uint8_t* zero,        \
                                      long group, const float* bias, T* y, long tokens, long in, long out,             \
                                      const float* threshold, long thresholds, const float* center, long centers,      \
                                      int threads) {                                                                   \
        return with_tokens(tokens, [&](auto n) {                                                                       \
            return input_tokens<T, n.value>(x, codes, scale, zero, group, bias, y, in, out, threshold, thresholds,     \
                                            center, centers, threads);                                                 \
        });                                                                                                            \
    }                                                                                                                  \
    extern "C" long int4_output_##NAME(const T* x, const uint8_t* codes, const bf16* scale, const uint8_t* zero,       \
                                       long group, const float* bias, const T* gate, T* h, long tokens, long in,       \
                                       long out, const float* threshold, long thresholds, int threads) {               \
        return with_tokens(tokens, [&](auto n) {                                                                       \
            return output_tokens<T, n.value>(x, codes, scale, zero, group, bias, gate, h, in, out, threshold,          \
                                             thresholds, threads);                                                     \
        });                                                                                                            \
    }                                                                                                                  \
    extern "C" long int4_dequantize_##NAME(const uint8_t* codes, const bf16* scale, const uint8_t* zero, T* w,         \
                                           long lines, long width, long per, long group, int threads) {                \
        dequantize<T>(codes, scale, zero, w, lines, width, per, group, threads);                                       \
        return lines;                                                                                                  \
    }

INT4(float32, float)
INT4(bfloat16, bf16)
