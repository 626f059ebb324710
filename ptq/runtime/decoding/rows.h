// Dot products of rows of a weight with one vector: floats as they are, codes of 4 or 8 bits against the vector in 15 bits
// or, where that is asked for, in 8.
//
// 15 bits: the vector is cut into the weight's groups; within one it is `step * n`, n = 128 high + low with `high` in
// [-127, 127] and `low` in [-64, 63], so products of codes are exact integers, and what is lost is at most 2^-15 of the
// group's largest value: less than bfloat16 activations lose. 8 bits: it is cut into pieces of 64 columns, or of 32 where
// groups are not whole pieces, and n = high alone; up to 2^-8 of the largest value is lost. W = (code - zero) * scale, so
//   sum x W = scale * step * (sum n code - zero * sum n).
#pragma once
#include <algorithm>

#include "inputs.h"

enum Kind : long { FLOAT32 = 0, BFLOAT16 = 1, INT4 = 2, INT8 = 3, WORDS4 = 4 };

// W [rows, columns]. INT4: a line has 32 bytes per 64 columns, byte i holding column i (low half) and 32 + i; INT8: a
// byte per column. Both are padded to whole pieces of 64. scale and zero [rows, columns / group]; no zero: 8 or 128.
// WORDS4: the layout of sparsity/kernels/int4.py. Transposed weights (floats or WORDS4) are stored by their columns.
struct Matrix {
    const void *data, *scale;
    const uint8_t* zero;
    const float* bias;
    long rows, columns, group, kind, wide;  // wide: scales are floats, not bfloat16
    long narrow;                            // inputs of codes are rounded to 8 bits, not to 15
    const float *threshold, *center;        // of inputs, one or one each; no threshold: all are in use
    long thresholds, centers, transposed;
};

// Rows that are multiplied at a time. With 8 bits sums would wait for each other; with 15 there is more to multiply than
// to wait for, and one row after the other is read faster than four at once.
template <int BYTES> constexpr int TOGETHER = BYTES == 2 ? 1 : 4;
constexpr int AHEAD = 4;  // rows that are fetched in front of the one in use

template <class W> static inline float dot_floats(const W* row, const Input& x) {
    const float* values = sizeof(W) == 2 ? x.pairs.data() : x.plain.data();
    Vec sum[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    long c = 0;
    for (; c + 2 * PAIR <= x.size; c += 2 * PAIR) {
        Vec w[4];
        load_pair(row + c, w[0], w[1]), load_pair(row + c + PAIR, w[2], w[3]);
        for (int k = 0; k < 4; k++) sum[k] = sum[k].fma(Vec::load(values + c + k * Vec::N), w[k]);
    }
    for (; c + PAIR <= x.size; c += PAIR) {
        Vec w[2];
        load_pair(row + c, w[0], w[1]);
        for (int k = 0; k < 2; k++) sum[k] = sum[k].fma(Vec::load(values + c + k * Vec::N), w[k]);
    }
    float total = ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
    for (; c < x.size; c++) total += to_float(row[c]) * x.plain[c];
    return total;
}

// sum of n * code over one piece of 64 columns, or over its halves, as a vector of partial sums.
#if defined(__AVX2__)
using Sum = __m256i;
static inline Sum none() { return _mm256_setzero_si256(); }
static inline Sum add(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
template <int BYTES> static inline Sum widened(__m256i high, __m256i low) {
    const Sum sum = _mm256_madd_epi16(high, _mm256_set1_epi16(BYTES == 2 ? 128 : 1));
    return BYTES == 2 ? add(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1))) : sum;
}
static inline __m256i product(__m256i codes, const int8_t* n) {
    return _mm256_maddubs_epi16(codes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(n)));
}
static inline void nibbles(const uint8_t* p, __m256i& lower, __m256i& upper) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask = _mm256_set1_epi8(15);
    lower = _mm256_and_si256(raw, mask), upper = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
}
template <int BYTES> static inline Sum half(__m256i codes, const int8_t* high, const int8_t* low) {
    return widened<BYTES>(product(codes, high), BYTES == 2 ? product(codes, low) : none());
}
template <int BYTES, int N> static inline Sum pieces4(const uint8_t* p, const int8_t* high, const int8_t* low) {
    static_assert(N <= 4, "eight products of 15 * 127 * 2 fit 16 bits");
    __m256i upper = none(), lower = none();
#pragma GCC unroll 4
    for (int k = 0; k < N; k++) {
        __m256i a, b;
        nibbles(p + k * PIECE / 2, a, b);
        const __m256i u = _mm256_add_epi16(product(a, high + k * PIECE), product(b, high + k * PIECE + 32));
        upper = k ? _mm256_add_epi16(upper, u) : u;
        if (BYTES == 1) continue;
        const __m256i l = _mm256_add_epi16(product(a, low + k * PIECE), product(b, low + k * PIECE + 32));
        lower = k ? _mm256_add_epi16(lower, l) : l;
    }
    return widened<BYTES>(upper, lower);
}
template <int BYTES>
static inline void halves4(const uint8_t* p, const int8_t* high, const int8_t* low, Sum& first, Sum& second) {
    __m256i a, b;
    nibbles(p, a, b);
    first = half<BYTES>(a, high, low), second = half<BYTES>(b, high + 32, low + 32);
}
// bytes take n as a whole, because products of theirs with another byte do not fit 16 bits two and two
static inline Sum half8(const uint8_t* p, const int16_t* n) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i *even = reinterpret_cast<const __m256i*>(n), *odd = even + 1;
    return add(_mm256_madd_epi16(_mm256_and_si256(raw, _mm256_set1_epi16(255)), _mm256_loadu_si256(even)),
               _mm256_madd_epi16(_mm256_srli_epi16(raw, 8), _mm256_loadu_si256(odd)));
}
struct Total {
    __m256 v = _mm256_setzero_ps();
    void take(float factor, Sum sum) { v = _mm256_fmadd_ps(_mm256_set1_ps(factor), _mm256_cvtepi32_ps(sum), v); }
    float sum() const {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
};
#else
using Sum = int32_t;
static inline Sum none() { return 0; }
static inline Sum add(Sum a, Sum b) { return a + b; }
template <int BYTES> static inline int whole(const int8_t* high, const int8_t* low, int i) {
    return BYTES == 2 ? 128 * high[i] + low[i] : high[i];
}
template <int BYTES>
static inline void halves4(const uint8_t* p, const int8_t* high, const int8_t* low, Sum& first, Sum& second) {
    first = second = 0;
    for (int i = 0; i < 32; i++) {
        first += (p[i] & 15) * whole<BYTES>(high, low, i);
        second += (p[i] >> 4) * whole<BYTES>(high, low, 32 + i);
    }
}
template <int BYTES, int N> static inline Sum pieces4(const uint8_t* p, const int8_t* high, const int8_t* low) {
    Sum sum = 0;
    for (int k = 0; k < N; k++) {
        Sum first, second;
        halves4<BYTES>(p + k * PIECE / 2, high + k * PIECE, low + k * PIECE, first, second);
        sum += first + second;
    }
    return sum;
}
static inline Sum half8(const uint8_t* p, const int16_t* n) {
    Sum sum = 0;
    for (int i = 0; i < 16; i++) sum += p[2 * i] * n[i] + p[2 * i + 1] * n[16 + i];
    return sum;
}
struct Total {
    float v = 0;
    void take(float factor, Sum sum) { v += factor * float(sum); }
    float sum() const { return v; }
};
#endif

static inline Vec load_any(const float* p) { return Vec::load(p); }
static inline Vec load_any(const bf16* p) { return load_wide(p); }

// A row's factors = scale * step for `count` cuts from `first` on, and what its zero points take away with them.
template <class S, long KIND>
static inline float factors_of(const S* scale, const uint8_t* zero, const Input& x, long per, long first, long count, float* factors) {
    const float middle = KIND == INT8 ? 128.f : 8.f, *step = x.step.data() + first, *sums = x.sums.data() + first;
    Vec shift = Vec::zero();
    float rest = 0;
    long g = 0;
    for (; per == 1 && g + Vec::N <= count; g += Vec::N) {
        const Vec factor = Vec::zero().fma(load_any(scale + first + g), Vec::load(step + g));
        factor.store(factors + g);
        const Vec z = zero ? load_wide(zero + first + g) : Vec::all(middle);
        shift = shift.fma(factor, Vec::zero().fma(z, Vec::load(sums + g)));
    }
    for (; g < count; g++) {
        const long group = per == 1 ? first + g : (first + g) / per;
        factors[g] = to_float(scale[group]) * step[g];
        rest += factors[g] * ((zero ? float(zero[group]) : middle) * sums[g]);
    }
    return rest + shift.sum();
}

// sum of n * code over columns that are whole pieces, or whole halves of pieces for codes of 8 bits
template <long KIND, int BYTES> static inline Sum columns_of(const uint8_t* codes, const Input& x, long from, long to) {
    const int8_t *high = x.high.data(), *low = x.low.data();
    Sum sum = none();
    long c = from;
    if (KIND == INT8) {
        for (; c < to; c += PIECE / 2) sum = add(sum, half8(codes + c, x.whole.data() + c));
        return sum;
    }
    for (; c + 4 * PIECE <= to; c += 4 * PIECE) sum = add(sum, pieces4<BYTES, 4>(codes + c / 2, high + c, low + c));
    for (; c < to; c += PIECE) sum = add(sum, pieces4<BYTES, 1>(codes + c / 2, high + c, low + c));
    return sum;
}

// Outputs of R rows side by side, so that a piece of the input is loaded once and sums do not wait for each other.
// N pieces per cut; 0: cuts of half a piece, two per piece; -1: any number.
template <class S, long KIND, int BYTES, int N, int R> static inline void dot_rows(const Matrix& w, const Input& x, long row, float* y) {
    constexpr long AT_ONCE = 64, LONGEST = 2048;  // cuts, and columns whose sum fits 32 bits
    const long cuts = x.step.size(), groups = w.columns / w.group, per = cuts / groups;
    const long line = pieces_of(w.columns) * (KIND == INT4 ? PIECE / 2 : PIECE);
    const uint8_t* codes = static_cast<const uint8_t*>(w.data) + row * line;
    const int8_t *high = x.high.data(), *low = x.low.data();
    float factors[R][AT_ONCE], shift[R] = {};
    Total total[R];
    for (long first = 0; first < cuts; first += AT_ONCE) {
        const long count = std::min(AT_ONCE, cuts - first);
        for (int r = 0; r < R; r++)
            shift[r] += factors_of<S, KIND>(static_cast<const S*>(w.scale) + (row + r) * groups,
                                            w.zero ? w.zero + (row + r) * groups : nullptr, x, per, first, count, factors[r]);
        for (long g = 0; g < count; g++) {
            const long c = (first + g) * x.cut;
            constexpr long EACH = std::max(N, 1) * (KIND == INT8 ? PIECE : PIECE / 2);  // bytes of a cut
            if constexpr (N >= 0)  // one line after the other, whatever the number of rows
                for (int k = 0; k < R * EACH; k += 64) __builtin_prefetch(codes + AHEAD * line + R * (KIND == INT8 ? c : c / 2) + k);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const uint8_t* at = codes + r * line;
                if constexpr (N >= 0) at += KIND == INT8 ? c : c / 2;
                if constexpr (N == 1 && KIND == INT8) {
                    const int16_t* n = x.whole.data() + c;
                    total[r].take(factors[r][g], add(half8(at, n), half8(at + PIECE / 2, n + PIECE / 2)));
                } else if constexpr (N > 0) {
                    total[r].take(factors[r][g], pieces4<BYTES, N>(at, high + c, low + c));
                } else if constexpr (N == 0) {
                    Sum one, two;
                    halves4<BYTES>(at, high + c, low + c, one, two);
                    total[r].take(factors[r][g], one);
                    if (g + 1 < count) total[r].take(factors[r][g + 1], two);
                } else {
                    for (long from = c, end = std::min(c + x.cut, w.columns); from < end; from += LONGEST)
                        total[r].take(factors[r][g], columns_of<KIND, BYTES>(at, x, from, std::min(end, from + LONGEST)));
                }
            }
            if (N == 0) g++;
        }
    }
    for (int r = 0; r < R; r++) y[r] = total[r].sum() - shift[r];
}

template <class S, long KIND, int BYTES, int N>
static inline void code_rows(const Matrix& w, const Input& x, long from, long to, float* y) {
    long r = from;
    for (; r + TOGETHER<BYTES> <= to; r += TOGETHER<BYTES>) dot_rows<S, KIND, BYTES, N, TOGETHER<BYTES>>(w, x, r, y + r - from);
    for (; r < to; r++) dot_rows<S, KIND, BYTES, N, 1>(w, x, r, y + r - from);
}

template <class S, int BYTES> static inline void code_rows(const Matrix& w, const Input& x, long from, long to, float* y) {
    if (w.kind == INT8)  // n as a whole
        return x.cut == PIECE ? code_rows<S, INT8, 1, 1>(w, x, from, to, y) : code_rows<S, INT8, 1, -1>(w, x, from, to, y);
    if (x.cut == PIECE / 2) return code_rows<S, INT4, BYTES, 0>(w, x, from, to, y);
    if (x.cut == PIECE) return code_rows<S, INT4, BYTES, 1>(w, x, from, to, y);
    if constexpr (BYTES == 2) {
        if (x.cut == 2 * PIECE) return code_rows<S, INT4, BYTES, 2>(w, x, from, to, y);
        code_rows<S, INT4, BYTES, -1>(w, x, from, to, y);
    }
}

template <class S> static inline void code_rows(const Matrix& w, const Input& x, long from, long to, float* y) {
    if (x.bytes == 1) code_rows<S, 1>(w, x, from, to, y);
    else code_rows<S, 2>(w, x, from, to, y);
}

template <class W> static inline void float_rows(const Matrix& w, const Input& x, long from, long to, float* y) {
    for (long r = from; r < to; r++) y[r - from] = dot_floats(static_cast<const W*>(w.data) + r * w.columns, x);
}

// y[0 : to - from] = x W^T + bias at rows `from` to `to`, where the form of x that W asks for is there.
static inline void dots(const Matrix& w, const Input& x, long from, long to, float* y) {
    if (w.kind == FLOAT32) float_rows<float>(w, x, from, to, y);
    else if (w.kind == BFLOAT16) float_rows<bf16>(w, x, from, to, y);
    else if (w.wide) code_rows<float>(w, x, from, to, y);
    else code_rows<bf16>(w, x, from, to, y);
    if (w.bias)
        for (long r = from; r < to; r++) y[r - from] += w.bias[r];
}
