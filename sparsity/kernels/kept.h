// Which rows of a weight are read, and the factors of each token for them.
#pragma once
#include <cmath>
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
    std::vector<int> row;
    std::vector<float> value;
    std::vector<Group> groups;  // those with a kept entry
    long count = 0;             // without the padding

    template <class T>
    Kept(const T* x, long n, long group, int rows, const float* threshold, long thresholds, const float* center,
         long centers) {
        row.reserve(n + rows);
        value.reserve((n + rows) * B);
        for (long start = 0; start < n; start += group) {
            Group here{start / group, int(row.size()), 0, {}};
            for (long i = start; i < std::min(n, start + group); i++) {
                float t = threshold ? threshold[thresholds == 1 ? 0 : i] : -1.f;
                float c = center ? center[centers == 1 ? 0 : i] : 0.f, v[B];
                bool any = false;
                for (int b = 0; b < B; b++) {
                    v[b] = to_float(x[b * n + i]) - c;
                    if (std::fabs(v[b]) <= t) v[b] = 0.f;
                    else any = true;
                }
                if (!any) continue;
                row.push_back(int(i));
                value.insert(value.end(), v, v + B);
                for (int b = 0; b < B; b++) here.sum[b] += v[b];
            }
            if (int(row.size()) == here.first) continue;
            count += row.size() - here.first;
            while ((row.size() - here.first) % rows) {
                row.push_back(row.back());
                value.insert(value.end(), B, 0.f);
            }
            here.last = int(row.size());
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
