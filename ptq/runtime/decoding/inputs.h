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
    long size = 0, cut = 0, bytes = 0;  // columns that share a step, and bytes of an n; 0: there are no codes
    bool paired = false;

    float* fresh(long n) {
        plain.resize(size = n), cut = 0, paired = false;
        return plain.data();
    }
    void pair() {  // blocks of PAIR values in the order in which bfloat16 weights are taken apart; the rest as it is
        if (paired) return;
        pairs = plain, paired = true;
        for (long c = 0; c + PAIR <= size; c += PAIR)
            for (int i = 0; i < PAIR; i++) pairs[c + pair_position<bf16>(i)] = plain[c + i];
    }
    template <int BYTES> void code(long width) {
        if (cut == width && bytes == BYTES) return;
        cut = width, bytes = BYTES;
        const long padded = pieces_of(size) * PIECE, cuts = (size + width - 1) / width;
        high.assign(padded, 0), low.assign(BYTES == 2 ? padded : 0, 0), step.resize(cuts), sums.resize(cuts);
        bits.resize(width);
        for (long g = 0; g < cuts; g++) {
            const long count = std::min(width, size - g * width);
            const float* x = plain.data() + g * width;
            int8_t *upper = high.data() + g * width, *lower = low.data() + g * width;
            int32_t most = 0, total = 0;  // of positive floats the larger one has the larger bits
            std::memcpy(bits.data(), x, count * sizeof(float));
            for (long i = 0; i < count; i++) most = std::max(most, bits[i] & 0x7fffffff);
            float largest;
            std::memcpy(&largest, &most, sizeof largest);
            step[g] = largest / MOST<BYTES>;
            round(x, largest > 0 ? MOST<BYTES> / largest : 0, count);
            for (long i = 0; i < count; i++) {
                const int n = bits[i] - 0x4b400000, rounded = BYTES == 2 ? (n + 64) >> 7 : n;
                upper[i] = int8_t(rounded);
                if (BYTES == 2) lower[i] = int8_t(n - (rounded << 7));
                total += n;
            }
            sums[g] = float(total);
        }
    }

  private:
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
