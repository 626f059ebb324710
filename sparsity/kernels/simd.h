// One vector of floats, and weights loaded two vectors at a time, for AVX-512, AVX2 or plain C++.
//
// A bfloat16 is the upper half of a float, so a register of 2 N of them holds N floats twice: the even ones after a
// shift, the odd ones after clearing the lower halves. `load_pair` returns these two vectors without any shuffle. The
// other operand must be in the same order ("pair order"): `to_pairs` and `from_pairs` convert, once per call. For
// float weights pair order is the plain order.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

using bf16 = uint16_t;

static inline float to_float(float value) { return value; }
static inline float to_float(bf16 value) {
    uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
static inline void store(float* at, float value) { *at = value; }
static inline void store(bf16* at, float value) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    *at = std::isnan(value) ? bf16(0x7fc0) : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__)
struct Vec {
    static constexpr int N = 16;
    __m512 v;
    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec all(float a) { return {_mm512_set1_ps(a)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    Vec fma(Vec a, Vec b) const { return {_mm512_fmadd_ps(a.v, b.v, v)}; }  // this + a b
    Vec operator+(Vec a) const { return {_mm512_add_ps(v, a.v)}; }
    float sum() const { return _mm512_reduce_add_ps(v); }
};
static inline void load_pair(const bf16* p, Vec& even, Vec& odd) {
    __m512i raw = _mm512_loadu_si512(p);
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(int(0xffff0000u))));
}
static inline Vec load_wide(const bf16* p) {
    __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
static inline Vec load_wide(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
#elif defined(__AVX2__)
struct Vec {
    static constexpr int N = 8;
    __m256 v;
    static Vec zero() { return {_mm256_setzero_ps()}; }
    static Vec all(float a) { return {_mm256_set1_ps(a)}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    Vec fma(Vec a, Vec b) const { return {_mm256_fmadd_ps(a.v, b.v, v)}; }
    Vec operator+(Vec a) const { return {_mm256_add_ps(v, a.v)}; }
    float sum() const {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
};
static inline void load_pair(const bf16* p, Vec& even, Vec& odd) {
    __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even.v = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
    odd.v = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(int(0xffff0000u))));
}
static inline Vec load_wide(const bf16* p) {
    __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
static inline Vec load_wide(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
#else
struct Vec {
    static constexpr int N = 4;
    float v[4];
    static Vec zero() { return {{0, 0, 0, 0}}; }
    static Vec all(float a) { return {{a, a, a, a}}; }
    static Vec load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
    void store(float* p) const { std::memcpy(p, v, sizeof v); }
    Vec fma(Vec a, Vec b) const {
        Vec r;
        for (int i = 0; i < 4; i++) r.v[i] = v[i] + a.v[i] * b.v[i];
        return r;
    }
    Vec operator+(Vec a) const { return fma(a, all(1)); }
    float sum() const { return (v[0] + v[1]) + (v[2] + v[3]); }
};
static inline void load_pair(const bf16* p, Vec& even, Vec& odd) {
    for (int i = 0; i < 4; i++) even.v[i] = to_float(p[2 * i]), odd.v[i] = to_float(p[2 * i + 1]);
}
template <class T> static inline Vec load_wide(const T* p) {  // N consecutive bfloat16 or unsigned bytes
    if constexpr (sizeof(T) == 2) return {{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
    else return {{float(p[0]), float(p[1]), float(p[2]), float(p[3])}};
}
#endif

static inline void load_pair(const float* p, Vec& first, Vec& second) {
    first = Vec::load(p), second = Vec::load(p + Vec::N);
}

constexpr int PAIR = 2 * Vec::N;

// Where column c of a block of PAIR columns stands in pair order.
template <class W> static inline int pair_position(int c) {
    return sizeof(W) == 4 ? c : (c & 1) * Vec::N + c / 2;
}
