// What the machine can do with nothing else to do: multiply-adds that stay in registers, and passes over a buffer.
//
// Compiled by ceilings.py for the instruction set in use: `vec` is one register of it. A sum of what was done is
// returned, so that nothing is left out.
#include <cstdint>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int width = 64;
#elif defined(__AVX__)
constexpr int width = 32;
#else
constexpr int width = 16;
#endif

template <class T>
using Vec [[gnu::vector_size(width)]] = T;

constexpr int accumulators = 12;  // two a cycle for the five cycles that one takes, and all in 16 registers

template <class F>
double on_threads(int threads, F&& work) {
  std::vector<double> sums(threads);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&, i] { sums[i] = work(i); });
  sums[0] = work(0);
  for (std::thread& other : others) other.join();
  double sum = 0;
  for (double x : sums) sum += x;
  return sum;
}

template <class T, int n>
double sum_of(const Vec<T> (&sums)[n]) {
  Vec<T> all = sums[0];
#pragma GCC unroll 12
  for (int i = 1; i < n; ++i) all += sums[i];
  double sum = 0;
  for (int i = 0; i < int(width / sizeof(T)); ++i) sum += all[i];
  return sum;
}

template <class T>
double multiply_adds(int64_t rounds, int threads) {
  return on_threads(threads, [&](int) {
    const Vec<T> x = Vec<T>{} + T(0.5), y = Vec<T>{} + T(1);
    Vec<T> sums[accumulators];
#pragma GCC unroll 12
    for (int i = 0; i < accumulators; ++i) sums[i] = Vec<T>{} + T(i);  // each another, or one would do
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
      for (int i = 0; i < accumulators; ++i) sums[i] = sums[i] * x + y;
    }
    return sum_of<T>(sums);
  });
}

}  // namespace

extern "C" {

// Multiply-adds of one thread in a round, by the size of an element.
int64_t multiply_adds_of_a_round(int bytes) { return int64_t(accumulators) * (width / bytes); }

double multiply_adds_float32(int64_t rounds, int threads) { return multiply_adds<float>(rounds, threads); }

double multiply_adds_float64(int64_t rounds, int threads) { return multiply_adds<double>(rounds, threads); }

// `passes` over `bytes` from an aligned address; each thread has its part, of whole blocks of eight registers.
double read_memory(const char* data, int64_t bytes, int64_t passes, int threads) {
  const int64_t block = 8 * width, part = bytes / block / threads * block;
  return on_threads(threads, [&](int thread) {
    Vec<float> sums[8] = {};
    for (int64_t pass = 0; pass < passes; ++pass) {
      for (int64_t at = thread * part; at < (thread + 1) * part; at += block) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sums[i] += *reinterpret_cast<const Vec<float>*>(data + at + i * width);
      }
    }
    return sum_of<float>(sums);
  });
}

double write_memory(char* data, int64_t bytes, int64_t passes, int threads) {
  const int64_t block = 8 * width, part = bytes / block / threads * block;
  return on_threads(threads, [&](int thread) {
    for (int64_t pass = 0; pass < passes; ++pass) {
      const Vec<float> value = Vec<float>{} + float(pass);
      for (int64_t at = thread * part; at < (thread + 1) * part; at += block) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) *reinterpret_cast<Vec<float>*>(data + at + i * width) = value;
        asm("" : : "r"(data + at) : "memory");  // written at every pass
      }
    }
    return 0.0;
  });
}
}
