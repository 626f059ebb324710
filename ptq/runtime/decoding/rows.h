// Dot products of rows of a weight with one vector: floats as they are, codes of 4 or 8 bits against the vector in 15.
//
// The vector is cut into the weight's groups; within one it is `step * (128 high + low)` with `high` in [-127, 127] and
// `low` in [-64, 63], so products of codes are exact integers, and what is lost is at most 2^-15 of the group's largest
// value: less than bfloat16 activations lose. W = (code - zero) * scale, so
//   sum x W = scale * step * (sum n code - zero * sum n)   with n = 128 high + low.
#pragma once
#include <algorithm>
#include <vector>

#include "simd.h"

enum Kind : long { FLOAT32 = 0, BFLOAT16 = 1, INT4 = 2, INT8 = 3, WORDS4 = 4 };

// W [rows, columns]. INT4: a line has 32 bytes per 64 columns, byte i holding column i (low half) and 32 + i; INT8: a
// byte per column. Both are padded to whole pieces of 64. scale and zero [rows, columns / group]; no zero: 8 or 128.
// WORDS4: the layout of sparsity/kernels/int4.py. Transposed weights (floats or WORDS4) are stored by their columns.
struct Matrix {
    const void *data, *scale;
    const uint8_t* zero;
    const float* bias;
    long rows, columns, group, kind, wide;  // wide: scales are floats, not bfloat16
    const float *threshold, *center;        // of inputs, one or one each; no threshold: all are in use
    long thresholds, centers, transposed;
};

constexpr int PIECE = 64;
constexpr float MOST = 127 * 128;
#if defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 1;
#endif
static inline long pieces_of(long columns) { return (columns + PIECE - 1) / PIECE; }

// One vector in every form that a weight may ask for.
struct Input {
    std::vector<float> plain, pairs, step, sums;
    std::vector<int8_t> high, low;
    std::vector<int32_t> starts;  // per group, LANES values: minus the common zero point times the sum of n, and zeros
    long size = 0, group = 0;     // group: of the codes that are there, 0 none
    bool paired = false;

    float* fresh(long n) {
        plain.resize(size = n), group = 0, paired = false;
        return plain.data();
    }
    void pair() {  // blocks of PAIR values in the order in which bfloat16 weights are taken apart; the rest as it is
        if (paired) return;
        pairs = plain, paired = true;
        for (long c = 0; c + PAIR <= size; c += PAIR)
            for (int i = 0; i < PAIR; i++) pairs[c + pair_position<bf16>(i)] = plain[c + i];
    }
    void code(long width, float middle) {
        if (group == width && this->middle == middle) return;
        group = width, this->middle = middle;
        const long padded = pieces_of(size) * PIECE, groups = size / width;
        high.assign(padded, 0), low.assign(padded, 0), step.resize(groups), sums.resize(groups);
        bits.resize(width), starts.assign(groups * LANES, 0);
        for (long g = 0; g < groups; g++) {
            const float* x = plain.data() + g * width;
            int8_t *upper = high.data() + g * width, *lower = low.data() + g * width;
            int32_t most = 0, total = 0;  // of positive floats the larger one has the larger bits
            std::memcpy(bits.data(), x, width * sizeof(float));
            for (long i = 0; i < width; i++) most = std::max(most, bits[i] & 0x7fffffff);
            float largest;
            std::memcpy(&largest, &most, sizeof largest);
            step[g] = largest / MOST;
            const float inverse = largest > 0 ? MOST / largest : 0;
            round(x, inverse, width);
            for (long i = 0; i < width; i++) {
                const int n = bits[i] - 0x4b400000, rounded = (n + 64) >> 7;
                upper[i] = int8_t(rounded), lower[i] = int8_t(n - (rounded << 7));
                total += n;
            }
            sums[g] = step[g] * float(total);
            if (exact_start()) starts[g * LANES] = -int32_t(middle) * total;
        }
    }
    // Whether the part that a common zero point takes away fits 32 bits beside the products.
    bool exact_start() const { return float(group) * MOST * middle < 1e9f; }

  private:
    float middle = 0;
    std::vector<int32_t> bits;
    void round(const float* x, float inverse, long width) {  // to nearest: what is left below 1.5 * 2^23 is the integer
        float moved[256];
        for (long start = 0; start < width; start += 256) {
            const long count = std::min(256L, width - start);
            for (long i = 0; i < count; i++) moved[i] = x[start + i] * inverse + 12582912.f;
            std::memcpy(bits.data() + start, moved, count * sizeof(float));
        }
    }
};

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
static inline Sum widened(__m256i high, __m256i low) {
    return add(_mm256_madd_epi16(high, _mm256_set1_epi16(128)), _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
}
static inline __m256i product(__m256i codes, const int8_t* n) {
    return _mm256_maddubs_epi16(codes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(n)));
}
static inline void nibbles(const uint8_t* p, __m256i& lower, __m256i& upper) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask = _mm256_set1_epi8(15);
    lower = _mm256_and_si256(raw, mask), upper = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
}
static inline Sum half(__m256i codes, const int8_t* high, const int8_t* low) {
    return widened(product(codes, high), product(codes, low));
}
template <int N> static inline Sum pieces4(const uint8_t* p, const int8_t* high, const int8_t* low) {
    static_assert(N <= 4, "eight products of 15 * 127 * 2 fit 16 bits");
    __m256i upper, lower;
#pragma GCC unroll 4
    for (int k = 0; k < N; k++) {
        __m256i a, b;
        nibbles(p + k * PIECE / 2, a, b);
        const __m256i u = _mm256_add_epi16(product(a, high + k * PIECE), product(b, high + k * PIECE + 32));
        const __m256i l = _mm256_add_epi16(product(a, low + k * PIECE), product(b, low + k * PIECE + 32));
        upper = k ? _mm256_add_epi16(upper, u) : u, lower = k ? _mm256_add_epi16(lower, l) : l;
    }
    return widened(upper, lower);
}
static inline Sum start_at(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline void halves4(const uint8_t* p, const int8_t* high, const int8_t* low, Sum& first, Sum& second) {
    __m256i a, b;
    nibbles(p, a, b);
    first = half(a, high, low), second = half(b, high + 32, low + 32);
}
static inline Sum half8(const uint8_t* p, const int8_t* high, const int8_t* low) {  // a byte is 16 times a nibble and one
    __m256i a, b;
    nibbles(p, a, b);
    return add(half(a, high, low), _mm256_slli_epi32(half(b, high, low), 4));
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
static inline void halves4(const uint8_t* p, const int8_t* high, const int8_t* low, Sum& first, Sum& second) {
    first = second = 0;
    for (int i = 0; i < 32; i++) {
        first += (p[i] & 15) * (128 * high[i] + low[i]);
        second += (p[i] >> 4) * (128 * high[32 + i] + low[32 + i]);
    }
}
template <int N> static inline Sum pieces4(const uint8_t* p, const int8_t* high, const int8_t* low) {
    Sum sum = 0;
    for (int k = 0; k < N; k++) {
        Sum first, second;
        halves4(p + k * PIECE / 2, high + k * PIECE, low + k * PIECE, first, second);
        sum += first + second;
    }
    return sum;
}
static inline Sum start_at(const int32_t* p) { return *p; }
static inline Sum half8(const uint8_t* p, const int8_t* high, const int8_t* low) {
    Sum sum = 0;
    for (int i = 0; i < 32; i++) sum += p[i] * (128 * high[i] + low[i]);
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

// factors[g] = scale * step for up to `count` groups from `first` on.
template <class S> static inline void factors_of(const S* scale, const float* step, long count, float* factors) {
    long g = 0;
    for (; g + Vec::N <= count; g += Vec::N) Vec::zero().fma(load_any(scale + g), Vec::load(step + g)).store(factors + g);
    for (; g < count; g++) factors[g] = to_float(scale[g]) * step[g];
}

// The sum of scale * zero * sums over a row's groups.
template <class S> static inline float shift_of(const S* scale, const uint8_t* zero, float middle, const Input& x, long groups) {
    Vec total = Vec::zero();
    float rest = 0;
    long g = 0;
    for (; g + Vec::N <= groups; g += Vec::N) {
        const Vec z = zero ? load_wide(zero + g) : Vec::all(middle);
        total = total.fma(Vec::zero().fma(load_any(scale + g), z), Vec::load(x.sums.data() + g));
    }
    for (; g < groups; g++) rest += to_float(scale[g]) * (zero ? float(zero[g]) : middle) * x.sums[g];
    return rest + total.sum();
}

// sum of n * code over columns that are whole pieces, or whole halves of pieces for codes of 8 bits
template <long KIND> static inline Sum columns_of(const uint8_t* codes, const Input& x, long from, long to) {
    const int8_t *high = x.high.data(), *low = x.low.data();
    Sum sum = none();
    long c = from;
    if (KIND == INT8) {
        for (; c < to; c += PIECE / 2) sum = add(sum, half8(codes + c, high + c, low + c));
        return sum;
    }
    for (; c + 4 * PIECE <= to; c += 4 * PIECE) sum = add(sum, pieces4<4>(codes + c / 2, high + c, low + c));
    for (; c < to; c += PIECE) sum = add(sum, pieces4<1>(codes + c / 2, high + c, low + c));
    return sum;
}

// N pieces per group; 0: groups of half a piece, two per piece; -1: any number.
template <class S, long KIND, int N> static inline float dot_groups(const Matrix& w, const Input& x, long row) {
    constexpr long AT_ONCE = 64, LONGEST = 2048;  // groups, and columns whose sum fits 32 bits
    const long groups = w.columns / w.group, line = pieces_of(w.columns) * (KIND == INT4 ? PIECE / 2 : PIECE);
    const uint8_t* codes = static_cast<const uint8_t*>(w.data) + row * line;
    const S* scale = static_cast<const S*>(w.scale) + row * groups;
    const int8_t *high = x.high.data(), *low = x.low.data();
    const bool starts = !w.zero && x.exact_start();
    const int32_t* start = x.starts.data();
    float factors[AT_ONCE];
    Total total;
    for (long first = 0; first < groups; first += AT_ONCE) {
        const long count = std::min(AT_ONCE, groups - first);
        factors_of(scale + first, x.step.data() + first, count, factors);
        for (long g = 0; g < count; g++) {
            const long c = (first + g) * w.group;
            const Sum begin = starts ? start_at(start + (first + g) * LANES) : none();
            if constexpr (N > 0) {
                total.take(factors[g], add(begin, pieces4<N>(codes + c / 2, high + c, low + c)));
            } else if constexpr (N == 0) {
                Sum one, two;
                halves4(codes + c / 2, high + c, low + c, one, two);
                total.take(factors[g], add(begin, one));
                if (++g < count) total.take(factors[g], starts ? add(start_at(start + (first + g) * LANES), two) : two);
            } else {
                total.take(factors[g], begin);
                for (long from = c; from < c + w.group; from += LONGEST)
                    total.take(factors[g], columns_of<KIND>(codes, x, from, std::min(c + w.group, from + LONGEST)));
            }
        }
    }
    const float middle = KIND == INT8 ? 128.f : 8.f;
    return total.sum() - (starts ? 0.f : shift_of(scale, w.zero ? w.zero + row * groups : nullptr, middle, x, groups));
}

template <class S, long KIND, int N>
static inline void code_rows(const Matrix& w, const Input& x, long from, long to, float* y) {
    for (long r = from; r < to; r++) y[r - from] = dot_groups<S, KIND, N>(w, x, r);
}

template <class S> static inline void code_rows(const Matrix& w, const Input& x, long from, long to, float* y) {
    if (w.kind == INT8) return code_rows<S, INT8, -1>(w, x, from, to, y);
    switch (w.group) {
        case PIECE / 2: return code_rows<S, INT4, 0>(w, x, from, to, y);
        case PIECE: return code_rows<S, INT4, 1>(w, x, from, to, y);
        case 2 * PIECE: return code_rows<S, INT4, 2>(w, x, from, to, y);
        default: return code_rows<S, INT4, -1>(w, x, from, to, y);
    }
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
