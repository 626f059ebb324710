// What skipping rows of memory can gain at most: half of the rows, drawn at random and read in order, beside all of them.
//
//     g++ -O3 -march=native -fopenmp benchmarks/row_reads.cpp -o row_reads && ./row_reads [threads]
//
// Each thread reads a part of 400 MB of its own, on huge pages where the system gives them; nothing is multiplied. One line
// per length of a row: seconds for all rows over seconds for half of them. A product that skips rows cannot gain more.
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

constexpr size_t TOTAL = 400u << 20, HUGE = 2u << 20;
constexpr int REPEATS = 7;
static volatile uint64_t sink;

static double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

static double read(const char* memory, const std::vector<std::vector<size_t>>& rows, size_t length) {
    const double start = seconds();
#pragma omp parallel num_threads(int(rows.size()))
    {
        uint64_t sum = 0;
        for (size_t row : rows[omp_get_thread_num()]) {
            const uint64_t* p = reinterpret_cast<const uint64_t*>(memory + row);
            for (size_t i = 0; i < length / 8; i++) sum += p[i];
        }
        sink = sum;
    }
    return seconds() - start;
}

int main(int count, char** words) {
    const int threads = count > 1 ? std::atoi(words[1]) : 2;
    void* mapped = mmap(nullptr, TOTAL + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return std::perror("mmap"), 1;
    char* memory = static_cast<char*>(mapped) + (HUGE - reinterpret_cast<size_t>(mapped) % HUGE);
    madvise(memory, TOTAL, MADV_HUGEPAGE);
    std::fill(memory, memory + TOTAL, 1);
    std::printf("%d threads\n| bytes per row | all rows, GB/s | half of them, GB/s | times as fast |\n| ---: | ---: | ---: | ---: |\n", threads);
    for (size_t length : {64, 128, 192, 320, 768, 1024, 2816, 4096, 8192}) {
        std::vector<std::vector<size_t>> all(threads), half(threads);
        for (int t = 0; t < threads; t++)
            for (size_t at = TOTAL / threads * t / 64 * 64; at + length <= TOTAL / threads * (t + 1); at += length) {
                all[t].push_back(at);
                if (std::rand() & 1) half[t].push_back(at);
            }
        std::vector<double> dense, sparse;
        for (int i = 0; i < REPEATS; i++) dense.push_back(read(memory, all, length)), sparse.push_back(read(memory, half, length));
        std::sort(dense.begin(), dense.end()), std::sort(sparse.begin(), sparse.end());
        const double whole = dense[REPEATS / 2], part = sparse[REPEATS / 2];
        std::printf("| %zu | %.1f | %.1f | %.2f |\n", length, TOTAL / whole / 1e9, TOTAL / 2 / part / 1e9, whole / part);
    }
}
