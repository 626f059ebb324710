// Products of one to eight tokens with 4-bit codes that unpack only the rows in use: what one thread does; see int4.py
// for the layout.
//
// W = (code - zero) * scale with groups along the inputs. Within a group only codes matter,
//   sum over i of x[i] W[i] = scale * (sum x[i] code[i] - zero * sum x[i]),
// so a scale is read once per group and output, whatever the number of rows in use. A row's factor times the sixteen
// values of a code is a table in a register: unpacking and multiplying are one look-up per sixteen weights.
#pragma once
#include <algorithm>
#include <vector>

#include "kept.h"

namespace int4 {

constexpr int PIECE = 128;  // columns of 64 bytes
constexpr int ROWS = 4;     // rows per pass over the sums
constexpr int WIDTH = 4096;

#if defined(__AVX512F__)
struct Codes {
    __m512i v;
    Codes() = default;
    explicit Codes(const uint8_t* p, int) : v(_mm512_loadu_si512(p)) {}
};
struct Table {  // factor * (code - middle)
    __m512 v;
    Table() = default;
    Table(float factor, float middle)
        : v(_mm512_mul_ps(_mm512_set1_ps(factor), _mm512_sub_ps(_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                                                _mm512_set1_ps(middle)))) {}
    Vec operator()(Codes codes, int k) const {  // of nibble k; the look-up ignores the higher bits
        return {_mm512_permutexvar_ps(_mm512_srli_epi32(codes.v, 4 * k), v)};
    }
    Vec plus(Vec a, Codes codes, int k) const { return a + (*this)(codes, k); }
};
#elif defined(__AVX2__)
struct Codes {
    __m256i v;
    Codes() = default;
    explicit Codes(const uint8_t* p, int part) : v(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + part)) {}
};
struct Table {
    __m256 factor, shift;
    Table() = default;
    Table(float f, float middle) : factor(_mm256_set1_ps(f)), shift(_mm256_set1_ps(-f * middle)) {}
    Vec operator()(Codes codes, int k) const { return plus({shift}, codes, k); }
    Vec plus(Vec a, Codes codes, int k) const {  // one instruction, where the middle is 0
        __m256i code = _mm256_and_si256(_mm256_srli_epi32(codes.v, 4 * k), _mm256_set1_epi32(15));
        return {_mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(code), a.v)};
    }
};
#else
struct Codes {
    uint32_t v[4];
    Codes() = default;
    explicit Codes(const uint8_t* p, int part) { std::memcpy(v, p + 16 * part, 16); }
};
struct Table {
    float factor, middle;
    Table() = default;
    Table(float f, float m) : factor(f), middle(m) {}
    Vec operator()(Codes codes, int k) const {
        Vec r;
        for (int i = 0; i < 4; i++) r.v[i] = factor * (float(codes.v[i] >> (4 * k) & 15) - middle);
        return r;
    }
    Vec plus(Vec a, Codes codes, int k) const { return a + (*this)(codes, k); }
};
#endif
constexpr int PARTS = 16 / Vec::N;  // registers of codes per piece

// sums[0:width] += sum over ROWS rows of value * code; width in whole pieces.
inline void add_rows(const uint8_t* const* row, const uint8_t* const* next, const float* value, int tokens, int width, float* sums) {
    Table table[ROWS];
    for (int r = 0; r < ROWS; r++) table[r] = Table(value[r * tokens], 0.f);
    for (int c = 0; c < width; c += PIECE) {
        for (int part = 0; part < PARTS; part++) {
            float* at = sums + c + part * Vec::N;
            Vec a[8];
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) a[k] = Vec::load(at + 16 * k);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                Codes codes(row[r] + c / 2, part);
                if (part == 0) __builtin_prefetch(next[r] + c / 2, 0, 0);
#pragma GCC unroll 8
                for (int k = 0; k < 8; k++) a[k] = table[r].plus(a[k], codes, k);
            }
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) a[k].store(at + 16 * k);
        }
    }
}

// total[0:width] += scale * (sums - zero * factors), and sums back to 0.
inline void add_group(const bf16* scale, const uint8_t* zero, float factors, int width, float* sums, float* total) {
    const Vec minus = Vec::all(-factors), eight = Vec::all(8.f), none = Vec::zero();
    int c = 0;
    for (; c + Vec::N <= width; c += Vec::N) {
        const Vec sum = Vec::load(sums + c).fma(minus, zero ? load_wide(zero + c) : eight);
        Vec::load(total + c).fma(load_wide(scale + c), sum).store(total + c);
        none.store(sums + c);
    }
    for (; c < width; c++) {
        total[c] += to_float(scale[c]) * (sums[c] - (zero ? float(zero[c]) : 8.f) * factors);
        sums[c] = 0.f;
    }
}

// y[b, 0:width] (`out` apart) = bias + sum over the kept rows of value * row; `start`, in whole pieces, is the first column.
template <class T, int B>
void input_block(const uint8_t* codes, long line, const bf16* scale, const uint8_t* zero, long out, const Kept<B>& kept,
                 const float* bias, T* y, long start, int width) {
    const int padded = (width + PIECE - 1) / PIECE * PIECE, last = kept.padded - 1;
    std::vector<float> total(size_t(width) * B, 0.f), sums(size_t(padded) * B, 0.f);
    const uint8_t* base = codes + start / 2;
    for (const auto& group : kept.groups) {
        for (int k = group.first; k < group.last; k += ROWS) {
            const uint8_t *row[ROWS], *next[ROWS];
            for (int r = 0; r < ROWS; r++) {
                row[r] = base + kept.row[k + r] * line;
                next[r] = base + kept.row[std::min(k + ROWS + r, last)] * line;
            }
            for (int b = 0; b < B; b++)  // the rows are in the cache for the second token
                add_rows(row, next, kept.value.get() + long(k) * B + b, B, padded, sums.data() + b * padded);
        }
        const long at = group.index * out + start;
        for (int b = 0; b < B; b++)
            add_group(scale + at, zero ? zero + at : nullptr, group.sum[b], width, sums.data() + b * padded, total.data() + b * width);
    }
    for (int b = 0; b < B; b++)
        for (int c = 0; c < width; c++) store(y + b * out + c, total[b * width + c] + (bias ? bias[start + c] : 0.f));
}

// dots[r] = sum over groups of scale * sum of x (code - 8), for R rows; x padded with zeros to whole pieces. V is the
// number of nibbles that share a scale within a piece: 2, 4 or 8 for groups of 32, 64, and of 128 or more inputs.
template <int R, int V>
void dot_rows(const uint8_t* const* row, const uint8_t* const* next, const bf16* const* scale, const float* x, long in,
              long group, float* dots) {
    const Table level(1.f, 8.f);
    Vec total[R];
    for (int r = 0; r < R; r++) total[r] = Vec::zero();
    const long groups = in / group;
    for (long c = 0; c < in; c += PIECE) {
        const long first = V < 8 ? c / PIECE * (8 / V) : c / group;
        for (int part = 0; part < PARTS; part++) {
            Vec sum[R];
            Codes codes[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                codes[r] = Codes(row[r] + c / 2, part);
                if (part == 0) __builtin_prefetch(next[r] + c / 2, 0, 0);
            }
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) {
                const Vec factor = Vec::load(x + c + 16 * k + part * Vec::N);
                const long g = std::min(first + k / V, groups - 1);  // padding is 0 whatever its scale
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    if (k % V == 0) sum[r] = Vec::zero();
                    sum[r] = sum[r].fma(factor, level(codes[r], k));
                    if (k % V == V - 1) total[r] = total[r].fma(Vec::all(to_float(scale[r][g])), sum[r]);
                }
            }
        }
    }
    for (int r = 0; r < R; r++) dots[r] = total[r].sum();
}

// x [B, in] as `output_rows` takes it: padded with zeros to whole pieces, and its sums over groups where there are zero points.
template <int B> struct Wide {
    std::vector<float> x, sums;

    template <class T> Wide(const T* from, long in, long group, bool zeros) {
        const long padded = (in + PIECE - 1) / PIECE * PIECE, groups = in / group;
        x.assign(padded * B, 0.f), sums.assign(zeros ? groups * B : 0, 0.f);
        for (int b = 0; b < B; b++)
            for (long i = 0; i < in; i++) {
                x[b * padded + i] = to_float(from[b * in + i]);
                if (zeros) sums[b * groups + i / group] += x[b * padded + i];
            }
    }
};

// h[b, j] (`out` apart) = value * (<x[b], w[j]> + bias[j]) for ROWS entries of the kept rows j, from entry k on.
template <class T, int B>
void output_rows(const uint8_t* codes, const bf16* scale, const uint8_t* zero, long in, long group, const Kept<B>& kept,
                 const Wide<B>& wide, const float* bias, T* h, long out, int k) {
    const long padded = (in + PIECE - 1) / PIECE * PIECE, line = padded / 2, groups = in / group;
    const auto dot = group == 32 ? dot_rows<ROWS, 2> : group == 64 ? dot_rows<ROWS, 4> : dot_rows<ROWS, 8>;
    const uint8_t *row[ROWS], *next[ROWS];
    const bf16* s[ROWS];
    for (int r = 0; r < ROWS; r++) {
        row[r] = codes + kept.row[k + r] * line;
        next[r] = codes + kept.row[std::min(k + ROWS + r, kept.padded - 1)] * line;
        s[r] = scale + kept.row[k + r] * groups;
    }
    for (int b = 0; b < B; b++) {
        float dots[ROWS];
        dot(row, next, s, wide.x.data() + b * padded, in, group, dots);
        for (int r = 0; r < ROWS; r++) {
            long j = kept.row[k + r];
            float g = kept.value[long(k + r) * B + b];
            if (g == 0.f) continue;  // padding, or not this token's
            for (long i = 0; zero && i < groups; i++)
                dots[r] += to_float(s[r][i]) * float(8 - zero[j * groups + i]) * wide.sums[b * groups + i];
            store(h + b * out + j, g * (dots[r] + (bias ? bias[j] : 0.f)));
        }
    }
}

}  // namespace int4
