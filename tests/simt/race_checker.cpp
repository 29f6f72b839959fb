// The race and bounds checker: see race_checker.h.  Not itself compiled with -fsanitize=thread.
#include "race_checker.h"

#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "executor.h"

namespace simt {
namespace race {
namespace {

constexpr size_t kMostFindings = 50;

// One access.  block 0: none.
struct Touch {
  uint32_t block, epoch;  // running number of the block over all launches; barriers of the block before
  uint32_t clock;         // collectives of the thread before, plus one
  uint32_t pc;            // offset in the library
  uint16_t thread;
};
// The history of a byte: the last write, and two reads.  A write that is unordered with any past read of the launch is
// unordered with one of these two (exact unless collectives have partial masks).
struct Cell {
  Touch write, read, other;
  bool copying;  // a cp.async to it is in flight
};

struct Region {
  std::string name;
  const char* data;
  size_t bytes;
  bool shared, writable, initialised;
  std::vector<uint8_t> elements;
  std::unique_ptr<Cell[], void (*)(void*)> cells;  // calloc: pages appear when they are touched
};

struct Checker {
  std::vector<Region> regions;
  Region* last = nullptr;
  uint32_t block = 0, first_block = 1, epoch = 0;
  uint32_t seen[32][32][32];  // [warp][lane][other]: the other's clock when a collective last joined them
  const char *module_begin = nullptr, *module_end = nullptr;
  std::set<std::tuple<std::string, std::string, uint32_t, uint32_t>> known;
  std::string findings;
};
Checker the_checker;
inline Checker& checker() { return the_checker; }

int find_module(dl_phdr_info* info, size_t, void*) {
  const char* const here = reinterpret_cast<const char*>(&find_module);
  const char *begin = nullptr, *end = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    const char* const from = reinterpret_cast<const char*>(info->dlpi_addr + segment.p_vaddr);
    if (!begin || from < begin) begin = from;
    if (from + segment.p_memsz > end) end = from + segment.p_memsz;
  }
  if (here < begin || here >= end) return 0;
  checker().module_begin = reinterpret_cast<const char*>(info->dlpi_addr);
  checker().module_end = end;
  return 1;
}

uint32_t offset_of(const void* pc) {
  // - 1: the line of the call, not of the next instruction
  return pc ? uint32_t(static_cast<const char*>(pc) - 1 - checker().module_begin) : 0;
}

std::string describe(const char* what, const Touch& t) {
  char text[120];
  snprintf(text, sizeof text, "%s by thread %u of block %u at {0x%x}", what, t.thread, t.block - checker().first_block,
           t.pc);
  return text;
}

// Once per pair of places in the code.
void report(const char* kind, const Region& region, int64_t offset, const char* what, const Touch& now,
            const char* what_before = nullptr, const Touch& before = {}) {
  Checker& c = checker();
  if (c.known.size() >= kMostFindings || !c.known.emplace(kind, region.name, now.pc, before.pc).second) return;
  c.findings += std::string(kind) + " on " + (region.shared ? "shared " : "global ") + region.name + ", byte " +
                std::to_string(offset) + " of " + std::to_string(region.bytes) + ": " + describe(what, now) +
                (what_before ? " and " + describe(what_before, before) : "") + "\n";
}

// Is there no barrier between the earlier access and now at which one thread waits for the other?
bool unordered(const Touch& earlier, const Touch& now, bool shared) {
  const Checker& c = checker();
  if (earlier.block < c.first_block) return false;  // none, or of another launch
  if (earlier.block != now.block) return !shared;   // every block has shared memory of its own
  if (earlier.thread == now.thread || earlier.epoch != now.epoch) return false;
  if (earlier.thread / 32 != now.thread / 32) return true;
  return c.seen[now.thread / 32][now.thread % 32][earlier.thread % 32] < earlier.clock;
}

void remember_read(Cell& cell, const Touch& now, bool shared) {
  Touch &read = cell.read, &other = cell.other;
  const uint32_t first = shared ? now.block : checker().first_block;
  if (read.block < first) {
    read = now, other = {};
  } else if (other.block >= first && other.block != read.block) {
    // readers in two blocks: any later write is unordered with one of them
  } else if (read.block != now.block) {
    other = now;
  } else if (read.epoch != now.epoch) {
    read = now, other = {};
  } else if (other.block >= first && other.thread / 32 != read.thread / 32) {
    // readers in two warps between the same barriers: so is it here
  } else if (read.thread == now.thread) {
    read = now;
  } else {
    other = read, read = now;
  }
}

Region* region_at(const char* at) {
  Checker& c = checker();
  const auto holds = [at](const Region& r) { return at >= r.data - kPadding && at < r.data + r.bytes + kPadding; };
  if (c.last && holds(*c.last)) return c.last;
  for (Region& r : c.regions)
    if (holds(r)) return c.last = &r;
  return nullptr;
}

void watch(const char* name, const void* data, size_t bytes, bool shared, bool writable, bool initialised,
           const uint8_t* elements) {
  Checker& c = checker();
  std::unique_ptr<Cell[], void (*)(void*)> cells(static_cast<Cell*>(calloc(bytes + 1, sizeof(Cell))), free);
  if (!cells) abort();
  std::vector<uint8_t> mask;
  if (elements) mask.assign(elements, elements + bytes);
  c.regions.push_back(
      {name, static_cast<const char*>(data), bytes, shared, writable, initialised, std::move(mask), std::move(cells)});
  c.last = nullptr;
}
void forget(bool shared) {
  std::erase_if(checker().regions, [shared](const Region& r) { return r.shared == shared; });
  checker().last = nullptr;
}

void access_byte(Region& r, int64_t i, Kind kind, const Touch& now) {
  Cell& cell = r.cells[i];
  const bool writes = kind != Kind::kRead;
  const char* const what = writes ? "write" : "read";
  if (cell.copying) {
    cell.copying = false;
    if (kind != Kind::kCopyArrived && cell.write.block == now.block)
      report("unfinished cp.async", r, i, what, now, "copy", cell.write);
  }
  if (unordered(cell.write, now, r.shared)) report("race", r, i, what, now, "write", cell.write);
  if (writes) {
    if (unordered(cell.read, now, r.shared)) report("race", r, i, what, now, "read", cell.read);
    if (unordered(cell.other, now, r.shared)) report("race", r, i, what, now, "read", cell.other);
    cell.write = now;
    cell.copying = kind == Kind::kCopyIssued;
    return;
  }
  if (r.shared ? cell.write.block != now.block : !r.initialised && !cell.write.block)
    report("uninitialised read", r, i, what, now);
  remember_read(cell, now, r.shared);
}

}  // namespace

void begin_launch() {
  Checker& c = checker();
  if (!c.module_begin) dl_iterate_phdr(find_module, nullptr);
  c.first_block = c.block + 1;
}
void begin_block() {
  Checker& c = checker();
  ++c.block;
  c.epoch = 0;
  memset(c.seen, 0, sizeof c.seen);
  for (auto& warp : c.seen)
    for (int i = 0; i < 32; ++i) warp[i][i] = 1;
}
void block_barrier() { ++checker().epoch; }
void warp_barrier(int warp, uint32_t mask) {
  auto& seen = checker().seen[warp];
  uint32_t joined[32] = {};
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1)
      for (int j = 0; j < 32; ++j) joined[j] = joined[j] > seen[i][j] ? joined[j] : seen[i][j];
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) {
      memcpy(seen[i], joined, sizeof joined);
      ++seen[i][i];
    }
}

void watch_shared(const char* name, const void* data, size_t bytes) {
  watch(name, data, bytes, true, true, false, nullptr);
}
void forget_shared() { forget(true); }
void watch_global(const char* name, const void* data, size_t bytes, bool writable, bool initialised,
                  const uint8_t* elements) {
  watch(name, data, bytes, false, writable, initialised, elements);
}
void forget_global() { forget(false); }

void access(const void* address, size_t bytes, Kind kind, const void* pc) {
  const int thread = running_thread();
  if (thread < 0 || on_own_stack(address)) return;
  const Checker& c = checker();
  const char* const at = static_cast<const char*>(address);
  Region* const r = region_at(at);
  if (!r) {
    // constants and threadIdx are the library's own
    if (kind == Kind::kRead && at >= c.module_begin && at + bytes <= c.module_end) return;
    if (kind == Kind::kRead && in_launch_parameters(address, bytes)) return;
    fail("%s of %zu bytes outside every array, at {0x%x}", kind == Kind::kRead ? "read" : "write", bytes,
         offset_of(pc));
  }
  const uint32_t clock = c.seen[thread / 32][thread % 32][thread % 32];
  const Touch now = {c.block, c.epoch, clock, offset_of(pc), uint16_t(thread)};
  const int64_t offset = at - r->data;
  const char* const what = kind == Kind::kRead ? "read" : "write";
  if (offset < 0 || size_t(offset) + bytes > r->bytes) return report("out of bounds", *r, offset, what, now);
  if (kind != Kind::kRead && !r->writable) return report("write to an input", *r, offset, what, now);
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (!r->elements.empty() && !r->elements[i])
      return report("out of bounds, between the elements", *r, int64_t(i), what, now);
    access_byte(*r, i, kind, now);
  }
}

const char* findings() { return checker().findings.c_str(); }
void clear_findings() {
  checker().findings.clear();
  checker().known.clear();
}

namespace {
void aligned_access(const void* address, size_t bytes, Kind kind, const void* pc) {
  if (reinterpret_cast<uintptr_t>(address) % bytes && running_thread() >= 0 && !on_own_stack(address))
    fail("access of %zu bytes at an address that is not aligned, at {0x%x}", bytes, offset_of(pc));
  access(address, bytes, kind, pc);
}
}  // namespace

}  // namespace race
}  // namespace simt

using simt::race::Kind;
#define PC __builtin_return_address(0)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, unsigned long bytes) { simt::race::access(p, bytes, Kind::kRead, PC); }
void __tsan_write_range(void* p, unsigned long bytes) { simt::race::access(p, bytes, Kind::kWrite, PC); }
#define ACCESSES(bytes)                                                                         \
  void __tsan_read##bytes(void* p) { simt::race::aligned_access(p, bytes, Kind::kRead, PC); }   \
  void __tsan_write##bytes(void* p) { simt::race::aligned_access(p, bytes, Kind::kWrite, PC); } \
  void __tsan_unaligned_read##bytes(void* p) { simt::race::access(p, bytes, Kind::kRead, PC); } \
  void __tsan_unaligned_write##bytes(void* p) { simt::race::access(p, bytes, Kind::kWrite, PC); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
}
