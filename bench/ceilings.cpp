// What memory can do: copies past the caches and reads, by all threads together.
//
// Compiled by bench/ceilings.py for the machine it runs on. Each function works through its arrays
// once; each thread takes one contiguous part.
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr size_t kLine = 64;

// The part of `bytes` that thread `index` of `count` handles; all but the last are whole lines.
struct Part {
  size_t begin, end;
  Part(size_t bytes, int index, int count) {
    const size_t lines = (bytes + kLine - 1) / kLine;
    begin = lines * index / count * kLine;
    end = lines * (index + 1) / count * kLine;
    if (end > bytes) end = bytes;
  }
};

}  // namespace

extern "C" {

void copy_memcpy(char* to, const char* from, size_t bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i) {
    const Part part(bytes, i, threads);
    memcpy(to + part.begin, from + part.begin, part.end - part.begin);
  }
}

// Without reading the lines that are written. `to` and `bytes` must be multiples of 64.
void copy_past_caches(char* to, const char* from, size_t bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i) {
    const Part part(bytes, i, threads);
#if defined(__AVX512F__)
    for (size_t at = part.begin; at < part.end; at += kLine) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
    }
    _mm_sfence();
#elif defined(__AVX2__)
    for (size_t at = part.begin; at < part.end; at += kLine / 2) {
      const auto* source = reinterpret_cast<const __m256i*>(from + at);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at), _mm256_loadu_si256(source));
    }
    _mm_sfence();
#else
    memcpy(to + part.begin, from + part.begin, part.end - part.begin);
#endif
  }
}

// `to` and `bytes` must be multiples of 64.
void fill_past_caches(char* to, size_t bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int i = 0; i < threads; ++i) {
    const Part part(bytes, i, threads);
#if defined(__AVX512F__)
    const __m512i ones = _mm512_set1_epi8(1);
    for (size_t at = part.begin; at < part.end; at += kLine) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), ones);
    }
    _mm_sfence();
#else
    memset(to + part.begin, 1, part.end - part.begin);
#endif
  }
}

// Returns the sum, so that nothing is optimised away. `bytes` must be a multiple of 1024.
uint64_t read_all(const char* from, size_t bytes, int threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
  for (int i = 0; i < threads; ++i) {
    const Part part(bytes / 1024 * kLine, i, threads);  // in units of 1024 bytes
    const auto* words = reinterpret_cast<const uint64_t*>(from);
    uint64_t sums[128] = {};
    for (size_t at = part.begin * 2; at < part.end * 2; at += 128) {
      for (int j = 0; j < 128; ++j) sums[j] += words[at + j];
    }
    for (uint64_t sum : sums) total += sum;
  }
  return total;
}

// Additions that wait for each other, one a cycle. Of a register: some cores add constants, one
// after the other, at once.
uint64_t add_one_by_one(uint64_t count) {
  uint64_t sum = 0;
#if defined(__x86_64__)
  const uint64_t one = 1;
  for (uint64_t i = 0; i < count; i += 8) {
    asm volatile(
        "add %1, %0\n add %1, %0\n add %1, %0\n add %1, %0\n"
        "add %1, %0\n add %1, %0\n add %1, %0\n add %1, %0\n"
        : "+r"(sum)
        : "r"(one));
  }
#endif
  return sum;
}
}
