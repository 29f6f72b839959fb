// See simt_interface.h.
#include "simt_interface.h"

#include <string>
#include <utility>
#include <vector>

#include "context.h"
#include "executor.h"
#include "race_checker.h"

namespace {
std::vector<std::pair<char*, size_t>> watched;  // poisoned around, for AddressSanitizer
}

void simt_configure(int order, uint64_t seed, int poison) {
  simt::settings = {static_cast<simt::Order>(order), seed, static_cast<uint8_t>(poison)};
}

void simt_watch(const char* name, void* data, int64_t bytes, int writable, int initialised, const uint8_t* elements) {
  simt::race::watch_global(name, data, size_t(bytes), writable, initialised, elements);
#if SIMT_ASAN
  char* const p = static_cast<char*>(data);
  __asan_poison_memory_region(p - simt::kPadding, simt::kPadding);
  __asan_poison_memory_region(p + bytes, simt::kPadding);
#endif
  simt::add_global(data, size_t(bytes));
  watched.emplace_back(static_cast<char*>(data), size_t(bytes));
}

void simt_forget() {
  simt::race::forget_global();
  simt::forget_globals();
#if SIMT_ASAN
  for (const auto& [p, bytes] : watched) __asan_unpoison_memory_region(p - simt::kPadding, bytes + 2 * simt::kPadding);
#endif
  watched.clear();
}

const char* simt_findings() {
  static std::string text;
  text = simt::race::findings();
  simt::race::clear_findings();
  return text.c_str();
}

void simt_statistics(int64_t* four) {
  four[0] = simt::statistics.launches;
  four[1] = simt::statistics.blocks;
  four[2] = simt::statistics.barriers;
  four[3] = simt::statistics.collectives;
}
