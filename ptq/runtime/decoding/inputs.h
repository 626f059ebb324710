// The vector that rows of a weight are multiplied with, see rows.h.
#pragma once
#include <algorithm>
#include <vector>

#include "simd.h"

constexpr int PIECE = 64;
template <int BYTES> constexpr float MOST = BYTES == 2 ? 127 * 128 : 127;
static inline long pieces_of(long columns) { return (columns + PIECE - 1) / PIECE; }

// One vector in every form that a weight may ask for.
struct Input {
    std::vector<float> plain, pairs, step, sums;  // of each cut: its step, and the sum of its n
    std::vector<int8_t> high, low;
    std::vector<int16_t> whole;         // n of even columns, then of odd ones, of 32 each
    long size = 0, cut = 0, bytes = 0;  // columns that share a step, and bytes of an n; 0: there are no codes
    bool paired = false, widened = false;

    float* fresh(long n) {  // zeros behind it, to whole pieces
        plain.resize(pieces_of(n) * PIECE), std::fill(plain.begin() + n, plain.end(), 0.f);
        size = n, cut = 0, paired = false;
        return plain.data();
    }
    void pair() {  // blocks of PAIR values in the order in which bfloat16 weights are taken apart; the rest as it is
        if (paired) return;
        pairs = plain, paired = true;
        for (long c = 0; c + PAIR <= size; c += PAIR)
            for (int i = 0; i < PAIR; i++) pairs[c + pair_position<bf16>(i)] = plain[c + i];
    }
    // `width`: a multiple of half a piece, or all.
    template <int BYTES> void code(long width) {
        if (cut == width && bytes == BYTES) return;
        cut = width, bytes = BYTES, widened = false;
        const long padded = pieces_of(size) * PIECE, cuts = (size + width - 1) / width;
        high.resize(padded), low.resize(padded), step.resize(cuts), sums.resize(cuts);
        for (long g = 0; g < cuts; g++) {
            const long start = g * width, count = g + 1 < cuts ? width : padded - start;
            const float largest = most_of(plain.data() + start, count);
            step[g] = largest / MOST<BYTES>;
            sums[g] = float(round<BYTES>(start, count, largest > 0 ? MOST<BYTES> / largest : 0));
        }
    }
    void widen() {
        if (widened) return;
        whole.resize(high.size()), widened = true;
        for (size_t c = 0; c < high.size(); c += 32)
            for (int i = 0; i < 16; i++)
                for (int odd = 0; odd < 2; odd++) {
                    const size_t at = c + 2 * i + odd;
                    whole[c + 16 * odd + i] = int16_t(bytes == 2 ? 128 * high[at] + low[at] : high[at]);
                }
    }

  private:
    // Of positive floats the larger one has the larger bits, and NaN more than all.
#if defined(__AVX2__)
    static int32_t folded(__m256i v, bool maximum) {
        alignas(32) int32_t each[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(each), v);
        int32_t result = each[0];
        for (int i = 1; i < 8; i++) result = maximum ? std::max(result, each[i]) : result + each[i];
        return result;
    }
    static float most_of(const float* x, long count) {
        const __m256i sign = _mm256_set1_epi32(0x7fffffff);
        __m256i most = _mm256_setzero_si256();
        for (long i = 0; i < count; i += 8)
            most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(x + i)), sign));
        const int32_t bits = folded(most, true);
        float largest;
        std::memcpy(&largest, &bits, sizeof largest);
        return largest;
    }
    static void pack(const __m256i n[4], int8_t* to) {  // packing keeps halves of registers apart
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
    }
    template <int BYTES> int32_t round(long start, long count, float inverse) {
        const __m256 factor = _mm256_set1_ps(inverse);
        __m256i total = _mm256_setzero_si256();
        for (long c = start; c < start + count; c += 32) {
            __m256i n[4], upper[4];
            for (int k = 0; k < 4; k++) {
                n[k] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(plain.data() + c + 8 * k), factor));
                total = _mm256_add_epi32(total, n[k]);
                if (BYTES == 1) continue;
                upper[k] = _mm256_srai_epi32(_mm256_add_epi32(n[k], _mm256_set1_epi32(64)), 7);
                n[k] = _mm256_sub_epi32(n[k], _mm256_slli_epi32(upper[k], 7));
            }
            if (BYTES == 2) pack(upper, high.data() + c);
            pack(n, (BYTES == 2 ? low : high).data() + c);
        }
        return folded(total, false);
    }
#else
    static float most_of(const float* x, long count) {
        int32_t most = 0;
        for (long i = 0; i < count; i++) {
            int32_t bits;
            std::memcpy(&bits, x + i, sizeof bits);
            most = std::max(most, bits & 0x7fffffff);
        }
        float largest;
        std::memcpy(&largest, &most, sizeof largest);
        return largest;
    }
    template <int BYTES> int32_t round(long start, long count, float inverse) {
        int32_t total = 0;
        for (long i = start; i < start + count; i++) {
            const float moved = plain[i] * inverse + 12582912.f;  // to nearest: below 1.5 * 2^23 is the integer
            int32_t n;
            std::memcpy(&n, &moved, sizeof n);
            n -= 0x4b400000;
            const int upper = BYTES == 2 ? (n + 64) >> 7 : n;
            high[i] = int8_t(upper), low[i] = BYTES == 2 ? int8_t(n - (upper << 7)) : int8_t(0);
            total += n;
        }
        return total;
    }
#endif
};
