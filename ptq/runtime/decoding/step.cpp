// One decoding step of one sequence: a list of operations on a workspace of floats, carried out by all threads together.
// program.py makes the list; its structures mirror those here.
#include <omp.h>

#include <cmath>

#include "products.h"

namespace {

enum Kinds : long { LINEAR = 0, GATED = 1, ROTATE = 2, ATTEND = 3, NORM = 4 };
enum Activation : long { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

// source, target: places in the workspace.
struct Op {
    long kind, source, target, barrier;
    Matrix first, second;          // LINEAR: first; GATED: gate and up
    const float *norm, *norm_keys; // weights of RMS norms in front; of queries and keys for ROTATE
    float epsilon, scale, softcap;
    int add, activation, half_keys; // LINEAR, NORM: target += ; half_keys: the cache is bfloat16
    long keys, values;             // ROTATE: places of new keys and values
    const float *cosine, *sine;    // [positions, rotary]
    void *key_cache, *value_cache; // [key heads, positions, width]
    long heads, key_heads, width, rotary, positions, window;
    const float* gate;             // GATED: rows of `second` are read where act(first) is above this; none: all
    long gates;
};

thread_local Input input;
thread_local std::vector<float> scores, reordered, made;

float square_mean(const float* x, long n) {
    Vec sum = Vec::zero();
    long i = 0;
    for (; i + Vec::N <= n; i += Vec::N) sum = sum.fma(Vec::load(x + i), Vec::load(x + i));
    float total = sum.sum();
    for (; i < n; i++) total += x[i] * x[i];
    return total / float(n);
}

void rms_norm(const float* x, const float* weight, float epsilon, long n, float* y) {
    const float factor = 1.f / std::sqrt(square_mean(x, n) + epsilon);
    for (long i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
}

float activated(float x, long how) {
    switch (how) {
        case SILU: return x / (1.f + std::exp(-x));
        case GELU: return 0.5f * x * (1.f + std::erf(x * 0.70710678f));
        case GELU_TANH: return 0.5f * x * (1.f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
        default: return std::max(x, 0.f);
    }
}

// Every thread makes the input anew, which takes less time than handing it over would; not if the last one is the same.
void take_input(const Op& op, const float* work, bool same) {
    if (!same) {
        float* x = input.fresh(op.first.columns);
        if (op.norm) rms_norm(work + op.source, op.norm, op.epsilon, op.first.columns, x);
        else std::copy(work + op.source, work + op.source + op.first.columns, x);
    }
    if (op.gate) prepare(op.second, input);
}

// The first of the outputs that a thread makes.
long begin_of(const Op& op, int thread, int threads) {
    const long unit = std::max(unit_of(op.first), op.kind == GATED ? unit_of(op.second) : 1);
    return std::min(op.first.rows, (op.first.rows + unit - 1) / unit * thread / threads * unit);
}

template <class T> void rotate_head(const float* x, float* y, T* cache, const Op& op, const float* norm, long position) {
    const long half = op.rotary / 2;
    const float *c = op.cosine + position * op.rotary, *s = op.sine + position * op.rotary;
    float head[1024];
    if (norm) rms_norm(x, norm, op.epsilon, op.width, head);
    else std::copy(x, x + op.width, head);
    for (long i = 0; i < half; i++) {
        const float a = head[i], b = head[half + i];
        head[i] = a * c[i] - b * s[i];
        head[half + i] = b * c[half + i] + a * s[half + i];
    }
    for (long i = 0; i < op.width; i++)
        if (cache) store(cache + i, head[i]);
        else y[i] = head[i];
}

template <class T> void rotate(const Op& op, float* work, long position, int thread, int threads) {
    const long units = op.heads + 2 * op.key_heads, from = thread * units / threads, to = (thread + 1) * units / threads;
    T *keys = static_cast<T*>(op.key_cache), *values = static_cast<T*>(op.value_cache);
    for (long u = from; u < to; u++) {
        if (u < op.heads) {
            float* q = work + op.source + u * op.width;
            rotate_head<T>(q, q, nullptr, op, op.norm, position);
            continue;
        }
        const long h = (u - op.heads) / 2, line = (h * op.positions + position) * op.width;
        if ((u - op.heads) % 2 == 0) rotate_head(work + op.keys + h * op.width, (float*)nullptr, keys + line, op, op.norm_keys, position);
        else
            for (long i = 0; i < op.width; i++) store(values + line + i, work[op.values + h * op.width + i]);
    }
}

// Rows of the cache are taken in pairs of vectors, as weights are; queries and sums stand in that order.
template <class T> void attend(const Op& op, float* work, long position, int thread, int threads) {
    const long from = thread * op.heads / threads, to = (thread + 1) * op.heads / threads, width = op.width;
    const long start = op.window ? std::max(0L, position + 1 - op.window) : 0, count = position + 1 - start;
    scores.resize(count), reordered.resize(2 * width);
    float *query = reordered.data(), *sum = query + width;
    for (long h = from; h < to; h++) {
        const long line = h / (op.heads / op.key_heads) * op.positions * width;
        const T *keys = static_cast<const T*>(op.key_cache) + line, *values = static_cast<const T*>(op.value_cache) + line;
        const float* q = work + op.source + h * width;
        for (long c = 0; c < width; c++) query[c / PAIR * PAIR + pair_position<T>(c % PAIR)] = q[c] * op.scale;
        float most = -INFINITY, total = 0;
        for (long t = 0; t < count; t++) {
            const T* row = keys + (start + t) * width;
            Vec a = Vec::zero(), b = Vec::zero();
            for (long c = 0; c < width; c += PAIR) {
                Vec even, odd;
                load_pair(row + c, even, odd);
                a = a.fma(Vec::load(query + c), even), b = b.fma(Vec::load(query + c + Vec::N), odd);
            }
            float score = (a + b).sum();
            if (op.softcap > 0) score = op.softcap * std::tanh(score / op.softcap);
            scores[t] = score, most = std::max(most, score);
        }
        for (long t = 0; t < count; t++) total += scores[t] = std::exp(scores[t] - most);
        std::fill(sum, sum + width, 0.f);
        for (long t = 0; t < count; t++) {
            const T* row = values + (start + t) * width;
            const Vec p = Vec::all(scores[t] / total);
            for (long c = 0; c < width; c += PAIR) {
                Vec even, odd;
                load_pair(row + c, even, odd);
                Vec::load(sum + c).fma(p, even).store(sum + c);
                Vec::load(sum + c + Vec::N).fma(p, odd).store(sum + c + Vec::N);
            }
        }
        float* y = work + op.target + h * width;
        for (long c = 0; c < width; c++) y[c] = sum[c / PAIR * PAIR + pair_position<T>(c % PAIR)];
    }
}

void carry_out(const Op& op, float* work, long position, bool same, int thread, int threads) {
    const long from = begin_of(op, thread, threads), to = begin_of(op, thread + 1, threads);
    float* y = work + op.target;
    switch (op.kind) {
        case LINEAR:
            take_input(op, work, same);
            made.resize(to - from);
            product(op.first, input, from, to, made.data());
            for (long r = from; r < to; r++) y[r] = made[r - from] + (op.add ? y[r] : 0.f);
            break;
        case GATED:
            take_input(op, work, same);
            made.resize(2 * (to - from));
            product(op.first, input, from, to, made.data());
            for (long r = 0; r < to - from; r++) made[r] = activated(made[r], op.activation);
            if (op.gate) {
                if (from < to) kept_rows(op.second, input, made.data(), op.gate, op.gates, from, to, y + from);
                break;
            }
            product(op.second, input, from, to, made.data() + (to - from));
            for (long r = from; r < to; r++) y[r] = made[r - from] * made[to - from + r - from];
            break;
        case ROTATE:
            op.half_keys ? rotate<bf16>(op, work, position, thread, threads) : rotate<float>(op, work, position, thread, threads);
            break;
        case ATTEND:
            op.half_keys ? attend<bf16>(op, work, position, thread, threads) : attend<float>(op, work, position, thread, threads);
            break;
        case NORM:
            if (thread) break;
            const long n = op.width;
            rms_norm(work + op.source, op.norm, op.epsilon, n, input.fresh(n));
            for (long i = 0; i < n; i++) y[i] = input.plain[i] + (op.add ? y[i] : 0.f);
    }
}

}  // namespace

extern "C" void ptq_step(const Op* ops, long count, float* work, long position, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int thread = omp_get_thread_num(), all = omp_get_num_threads();
        const Op* last = nullptr;  // that made this thread's input
        for (const Op* op = ops; op < ops + count; op++) {
            const bool linear = op->kind == LINEAR || op->kind == GATED;
            const bool same = linear && last && last->source == op->source && last->norm == op->norm &&
                              last->first.columns == op->first.columns;
            carry_out(*op, work, position, same, thread, all);
            if (linear) last = op;
            if (op->barrier) {
#pragma omp barrier
                last = nullptr;
            }
        }
    }
}

// y [tokens, rows] in float32 for x [tokens, columns] in float32. Some rows at a time, which stay in the cache for all tokens.
extern "C" void ptq_products(const Matrix* w, const float* x, float* y, long tokens, int threads) {
    constexpr long TOKENS = 64, ROWS = 16;
    std::vector<Input> inputs(std::min(tokens, TOKENS));
    for (long start = 0; start < tokens; start += TOKENS) {
        const long count = std::min(TOKENS, tokens - start), blocks = (w->rows + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(static)
            for (long t = 0; t < count; t++) {
                std::copy(x + (start + t) * w->columns, x + (start + t + 1) * w->columns, inputs[t].fresh(w->columns));
                prepare(*w, inputs[t]);
            }
#pragma omp for schedule(static)
            for (long block = 0; block < blocks; block++)
                for (long t = 0; t < count; t++) {
                    const long from = block * ROWS, to = std::min(w->rows, from + ROWS);
                    dots(*w, inputs[t], from, to, y + (start + t) * w->rows + from);
                }
        }
    }
}
