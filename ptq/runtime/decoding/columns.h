// Products of 4-bit codes that lie by columns of the weight (`Int4Rows` in mode "input") with the inputs in use, as
// integers of 15 or 8 bits: what rows.h does for whole rows.
//
// An input in use has a line of codes over the outputs. Lines are taken in pairs: with their bytes side by side, one
// instruction multiplies two inputs for sixteen outputs and adds them in 16 bits. Two pairs are added to the sums at a time,
// along their lines, which is how memory is read fastest. Pairs whose sums fit 16 bits, and that share a step, and a scale
// per output, make a run.
#pragma once
#include "int4.h"
#include "rows.h"

constexpr int MOST_AHEAD = 32;  // pairs that are fetched in front of those in use

// Some inputs that are not zero: which, and high | low << 8.
struct Used {
    int count = 0, up[2] = {}, down[2] = {};  // sums of either byte where it is positive, and where it is negative
    alignas(32) uint32_t column[PIECE + 8], bytes[PIECE + 8];

    // Columns `start` to `end` of x, at most a piece. Without branches: half of them would be guessed wrong.
    template <int BYTES> void take(const Input& x, long start, long end);
};
#if defined(__AVX2__)
struct Positions {  // of the bits of a byte that are set
    uint8_t of[256][8] = {};
    constexpr Positions() {
        for (int bits = 0; bits < 256; bits++)
            for (int i = 0, n = 0; i < 8; i++)
                if (bits >> i & 1) of[bits][n++] = uint8_t(i);
    }
};
static constexpr Positions POSITIONS;
static inline __m256i widen(const void* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }
static inline int total(__m256i v) {  // of the sums of eight bytes each
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return _mm_cvtsi128_si32(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
}
template <int BYTES> inline void Used::take(const Input& x, long start, long end) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i more[2] = {}, less[2] = {};
    count = 0;
    for (long c = start; c < end; c += 32) {  // behind the last column there are zeros
        __m256i either = zero;
        for (int b = 0; b < BYTES; b++) {
            const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>((b ? x.low : x.high).data() + c));
            more[b] = _mm256_add_epi64(more[b], _mm256_sad_epu8(_mm256_max_epi8(v, zero), zero));
            less[b] = _mm256_add_epi64(less[b], _mm256_sad_epu8(_mm256_sub_epi8(zero, _mm256_min_epi8(v, zero)), zero));
            either = _mm256_or_si256(either, v);
        }
        uint32_t mask = ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(either, zero)));
        for (long at = c; at < c + 32; at += 8, mask >>= 8) {
            const __m256i from = widen(POSITIONS.of[mask & 255]);
            __m256i both = widen(x.high.data() + at);
            if (BYTES == 2) both = _mm256_or_si256(both, _mm256_slli_epi32(widen(x.low.data() + at), 8));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(column + count), _mm256_add_epi32(from, _mm256_set1_epi32(int(at))));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + count), _mm256_permutevar8x32_epi32(both, from));
            count += __builtin_popcount(mask & 255);
        }
    }
    for (int b = 0; b < BYTES; b++) up[b] = total(more[b]), down[b] = total(less[b]);
}
#else
template <int BYTES> inline void Used::take(const Input& x, long start, long end) {
    count = up[0] = up[1] = down[0] = down[1] = 0;
    for (long i = start; i < end; i++) {
        const int n[2] = {x.high[i], BYTES == 2 ? x.low[i] : 0};
        for (int b = 0; b < BYTES; b++) up[b] += std::max(n[b], 0), down[b] -= std::min(n[b], 0);
        column[count] = uint32_t(i), bytes[count] = uint8_t(n[0]) | uint8_t(n[1]) << 8;
        count += (n[0] | n[1]) != 0;
    }
}
#endif

// The inputs that are not zero, two and two.
struct Pairs {
    struct Run {
        long cut;         // see Input
        int first, last;  // pairs
        int32_t sum;      // of n
    };
    std::vector<Run> runs;
    std::vector<uint32_t> line, high, low;  // two of each pair: where they begin; bytes of both inputs, twice
    int count = 0;                          // a run has an even number

    // `apart`: bytes from one line to the next.
    template <int BYTES> void take(const Input& x, long apart) {
        constexpr int SAFE = 8;  // pairs whose sums of products of 15 and 127 fit 16 bits, whatever they are
        const long span = std::min<long>(x.cut, PIECE), most = x.size / 2 + x.size / 16 + MOST_AHEAD + 2;
        Used used;
        runs.clear(), line.resize(2 * most), high.resize(most), low.resize(most);
        int pairs = 0;
        for (long start = 0; start < x.size; start += span) {
            used.take<BYTES>(x, start, std::min(x.size, start + span));
            const long cut = start / x.cut;
            if (!used.count && std::isfinite(x.step[cut])) continue;  // NaN shows
            const int first = pairs, count = (used.count + 3) / 4 * 2;
            for (int k = used.count; k < 2 * count; k++) used.column[k] = used.column[k - 1], used.bytes[k] = 0;
            uint32_t *lines = line.data() + 2 * first, *highs = high.data() + first, *lows = low.data() + first;
            for (int k = 0; k < 2 * count; k++) lines[k] = used.column[k] * uint32_t(apart);
            for (int k = 0; k < count; k++) {
                const uint32_t a = used.bytes[2 * k], b = used.bytes[2 * k + 1];
                highs[k] = ((a & 255) | (b & 255) << 8) * 0x10001u;
                lows[k] = (a >> 8 | (b & 0xff00)) * 0x10001u;
            }
            pairs += count;
            if (15 * std::max({used.up[0], used.up[1], used.down[0], used.down[1]}) <= 32767) {
                const int high_sum = used.up[0] - used.down[0], low_sum = used.up[1] - used.down[1];
                runs.push_back({cut, first, pairs, BYTES == 2 ? 128 * high_sum + low_sum : high_sum});
                continue;
            }
            for (int k = first; k < pairs; k += SAFE) {
                Run run{cut, k, std::min(k + SAFE, pairs), 0};
                for (int i = 2 * (k - first); i < 2 * (run.last - first); i++)
                    run.sum += (BYTES == 2 ? 128 : 1) * int8_t(used.bytes[i]) + int8_t(used.bytes[i] >> 8);
                runs.push_back(run);
            }
        }
        this->count = pairs;
        if (pairs) std::fill_n(line.begin() + 2 * pairs, 2 * MOST_AHEAD, line[2 * pairs - 1]);
    }
};

// Sums of a block of outputs for the pairs of a run, in 16 bits for either byte of n.
struct alignas(64) Block {
    static constexpr int PIECES = 8;
    int16_t high[PIECES * int4::PIECE], low[PIECES * int4::PIECE];
};

// += n * code for two pairs and `pieces` of 64 bytes from `codes` on; the lines of pairs `ahead` are fetched.
#if defined(__AVX2__)
static inline __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// Codes of a byte's lower and upper half for two inputs side by side: of words 0, 1, 4, 5 and of 2, 3, 6, 7.
static inline void side_by_side(__m256i first, __m256i second, __m256i codes[4]) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i both[2] = {_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second)};
    for (int u = 0; u < 2; u++)
        codes[u] = _mm256_and_si256(both[u], mask), codes[2 + u] = _mm256_and_si256(_mm256_srli_epi16(both[u], 4), mask);
}
static inline void add_products(const __m256i a[4], const __m256i b[4], __m256i x, __m256i y, int16_t* to) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m256i* sum = reinterpret_cast<__m256i*>(to) + i;
        const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(a[i], x), _mm256_maddubs_epi16(b[i], y));
        _mm256_store_si256(sum, _mm256_add_epi16(_mm256_load_si256(sum), both));
    }
}
template <int BYTES>
static inline void add_pairs(const uint8_t* codes, const Pairs& pairs, int k, int ahead, int pieces, Block& to) {
    const uint8_t *line[4], *next[4];
    for (int i = 0; i < 4; i++) line[i] = codes + pairs.line[2 * k + i], next[i] = codes + pairs.line[2 * (k + ahead) + i];
    __m256i x[2], y[2] = {};
    for (int i = 0; i < 2; i++) x[i] = _mm256_set1_epi32(int(pairs.high[k + i]));
    if (BYTES == 2)
        for (int i = 0; i < 2; i++) y[i] = _mm256_set1_epi32(int(pairs.low[k + i]));
    for (long p = 0; p < pieces; p++) {
        for (int i = 0; i < 4; i++) __builtin_prefetch(next[i] + 64 * p);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const long at = 64 * p + 32 * half;
            __m256i a[4], b[4];
            side_by_side(load(line[0] + at), load(line[1] + at), a), side_by_side(load(line[2] + at), load(line[3] + at), b);
            add_products(a, b, x[0], x[1], to.high + 2 * at);
            if (BYTES == 2) add_products(a, b, y[0], y[1], to.low + 2 * at);
        }
    }
}

// sums[0 : PIECE] of piece p in 32 bits, in the order of its columns, and back to 0. See int4.py: of 32 outputs a register
// of sums has word 4 lane + 2 u + i / 4 and byte i % 4 of it in entry i of each lane.
template <int BYTES> static inline void spread(Block& from, int p, int32_t* sums) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const __m256i weights = _mm256_set1_epi32(BYTES == 2 ? 1 << 16 | 128 : 1), zero = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {  // half of a line's piece, half byte
        __m256i in[2][2] = {{zero, zero}, {zero, zero}};
        for (int b = 0; b < BYTES; b++)
            for (int u = 0; u < 2; u++) {
                __m256i* sum = reinterpret_cast<__m256i*>((b ? from.low : from.high) + p * int4::PIECE) + 2 * k + u;
                in[b][u] = _mm256_shuffle_epi8(_mm256_load_si256(sum), order), _mm256_store_si256(sum, zero);
            }
        for (int byte = 0; byte < 4; byte++) {
            __m256i of[2];
            for (int b = 0; b < 2; b++)
                of[b] = byte < 2 ? _mm256_unpacklo_epi32(in[b][0], in[b][1]) : _mm256_unpackhi_epi32(in[b][0], in[b][1]);
            const __m256i both = byte % 2 ? _mm256_unpackhi_epi16(of[0], of[1]) : _mm256_unpacklo_epi16(of[0], of[1]);
            __m256i* to = reinterpret_cast<__m256i*>(sums + 32 * byte + 8 * (k / 2) + 16 * (k % 2));
            _mm256_store_si256(to, _mm256_madd_epi16(both, weights));
        }
    }
}
#else
template <int BYTES>
static inline void add_pairs(const uint8_t* codes, const Pairs& pairs, int k, int, int pieces, Block& to) {
    for (int i = 0; i < 4; i++) {
        const uint8_t* line = codes + pairs.line[2 * k + i];
        const int high = int8_t(pairs.high[k + i / 2] >> 8 * (i % 2)), low = int8_t(pairs.low[k + i / 2] >> 8 * (i % 2));
        for (int c = 0; c < pieces * int4::PIECE; c++) {
            const int code = line[c / 2] >> 4 * (c % 2) & 15;
            to.high[c] = int16_t(to.high[c] + high * code);
            if (BYTES == 2) to.low[c] = int16_t(to.low[c] + low * code);
        }
    }
}
template <int BYTES> static inline void spread(Block& from, int p, int32_t* sums) {
    int16_t *high = from.high + p * int4::PIECE, *low = from.low + p * int4::PIECE;
    for (int i = 0; i < int4::PIECE; i++) {  // byte i / 2: word i / 8, half bytes i % 8
        sums[16 * (i % 8) + i / 8] = BYTES == 2 ? 128 * high[i] + low[i] : high[i];
        high[i] = low[i] = 0;
    }
}
#endif

template <class T> static inline void fetch_lines(const T* p, long count) {
    for (long i = 0; i < count; i += 64 / long(sizeof(T))) __builtin_prefetch(p + i);
}

// total[0 : width] += step * scale * (sums - zero * sum)
static inline void add_run(const bf16* scale, const uint8_t* zero, float step, int32_t sum, const int32_t* sums, int width, float* total) {
    if (zero)
        for (int c = 0; c < width; c++) total[c] += to_float(scale[c]) * step * float(sums[c] - int32_t(zero[c]) * sum);
    else
        for (int c = 0; c < width; c++) total[c] += to_float(scale[c]) * step * float(sums[c] - 8 * sum);
}

// y[0 : to - from] = bias + sum over the inputs x, which are codes; both ends in whole pieces, or at the end.
template <int BYTES> static inline void coded_columns(const Matrix& w, const Input& x, long from, long to, float* y) {
    constexpr long AHEAD = 6144;  // bytes that are fetched in front of those in use
    static thread_local Pairs pairs;
    static thread_local Block block;
    const long line = (w.rows + int4::PIECE - 1) / int4::PIECE * (int4::PIECE / 2);
    pairs.take<BYTES>(x, line);
    for (long c = from; c < to; c++) y[c - from] = w.bias ? w.bias[c] : 0.f;
    for (long start = from; start < to; start += Block::PIECES * int4::PIECE) {
        const int width = int(std::min<long>(to - start, Block::PIECES * int4::PIECE)), pieces = (width + int4::PIECE - 1) / int4::PIECE;
        const int ahead = int(std::min<long>(MOST_AHEAD, 2 + AHEAD / (int4::PIECE * pieces)) / 2 * 2);
        const uint8_t* codes = static_cast<const uint8_t*>(w.data) + start / 2;
        for (int k = 0; k < 2 * std::min(ahead, pairs.count); k++)
            for (int p = 0; p < pieces; p++) __builtin_prefetch(codes + pairs.line[k] + 64 * p);
        const auto scales = [&](size_t run) { return pairs.runs[run].cut * x.cut / w.group * w.rows + start; };
        const auto fetch = [&](size_t run) {
            if (run >= pairs.runs.size()) return;
            fetch_lines(static_cast<const bf16*>(w.scale) + scales(run), width);
            if (w.zero) fetch_lines(w.zero + scales(run), width);
        };
        fetch(0);
        for (size_t r = 0; r < pairs.runs.size(); r++) {
            const Pairs::Run run = pairs.runs[r];
            fetch(r + 1);
            for (int k = run.first; k < run.last; k += 2) add_pairs<BYTES>(codes, pairs, k, ahead, pieces, block);
            for (int p = 0; p < pieces; p++) {
                const long c = p * int4::PIECE, at = scales(r) + c;
                alignas(32) int32_t sums[int4::PIECE];
                spread<BYTES>(block, p, sums);
                add_run(static_cast<const bf16*>(w.scale) + at, w.zero ? w.zero + at : nullptr, x.step[run.cut], run.sum, sums,
                        int(std::min<long>(int4::PIECE, width - c)), y + start + c - from);
            }
        }
    }
}
