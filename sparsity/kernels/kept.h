// Which rows of a weight are read, and the factors of each token for them.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "simd.h"

// Kept entries of B vectors x [B, n]: row numbers of their union, and values [rows, B], 0 where a token does not keep
// it. The mask is |v| <= threshold in float32, so NaN is kept and shows. The list is padded to a multiple of `rows` with
// the last row times 0, which costs no memory traffic and saves the callers a remainder loop; with groups, at the end
// of each group of `group` consecutive entries, so that a pass never crosses from one into the next.
template <int B> struct Kept {
    struct Group {
        long index;
        int first, last;  // positions in `row`
        float sum[B];     // of values
    };
    std::unique_ptr<int[]> row;
    std::unique_ptr<float[]> value;
    std::vector<Group> groups;  // those with a kept entry
    int padded = 0;             // length of `row`
    long count = 0;             // without the padding

    template <class T>
    Kept(const T* x, long n, long group, int rows, const float* threshold, long thresholds, const float* center,
         long centers) {
        static const float none = -1.f, zero = 0.f;
        const float *t = threshold ? threshold : &none, *c = center ? center : &zero;
        const long t_step = threshold && thresholds > 1, c_step = center && centers > 1;
        const long room = n + (n + group - 1) / group * rows;
        row.reset(new int[room]), value.reset(new float[room * B]);
        for (long start = 0; start < n; start += group) {
            Group here{start / group, padded, 0, {}};
            // written without branches: half of them would be guessed wrong
            for (long i = start; i < std::min(n, start + group); i++) {
                float* v = value.get() + long(padded) * B;
                bool any = false;
                for (int b = 0; b < B; b++) {
                    float shifted = to_float(x[b * n + i]) - c[i * c_step];
                    bool keep = !(std::fabs(shifted) <= t[i * t_step]);
                    any |= keep;
                    v[b] = keep ? shifted : 0.f;
                    here.sum[b] += v[b];
                }
                row[padded] = int(i);
                padded += any;
            }
            if (padded == here.first) continue;
            count += padded - here.first;
            for (; (padded - here.first) % rows; padded++) {
                row[padded] = row[padded - 1];
                std::fill_n(value.get() + long(padded) * B, B, 0.f);
            }
            here.last = padded;
            groups.push_back(here);
        }
    }
};

// Calls f with the number of tokens as a compile-time constant. Returns -1 for numbers that are not compiled.
template <class F> long with_tokens(long tokens, F f) {
    switch (tokens) {
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2>());
        case 4: return f(std::integral_constant<int, 4>());
        case 8: return f(std::integral_constant<int, 8>());
        default: return -1;
    }
}
