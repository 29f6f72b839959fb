// Runs the blocks of a launch one after another, and the threads of a block as fibers, each up to its next barrier.  A
// fiber that waits switches directly to the next one that can run; control returns to the launcher when none can.
#include "executor.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "context.h"
#include "race_checker.h"
#include "simt.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Settings settings;
Statistics statistics;

namespace {

constexpr size_t kMostThreads = 1024, kMostShared = 48 << 10;
constexpr size_t kPage = 64 << 10;  // at least the system's
// A kernel's stack holds its accumulators; AddressSanitizer puts red zones around each variable.
constexpr size_t kStack = SIMT_ASAN ? 512 << 10 : 128 << 10;

enum class State : uint8_t { kReady, kInBlockBarrier, kInCollective, kReturned };

struct Copy {
  void* shared;
  const void* global;
  size_t bytes;
  bool valid;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  uint3 index;
  int number = 0;  // in the block; its warp is number / 32
  State state = State::kReturned;
  const char* waits_in = "";  // the barrier's name
  Where where;
  uint32_t mask = 0;  // of the collective
  Combine combine = nullptr;
  void* payload = nullptr;
  std::vector<Copy> copies;    // in flight, oldest first
  std::vector<size_t> groups;  // the number of copies of each committed group, oldest first
  size_t uncommitted = 0;
};

struct SharedArray {
  const void* key;
  const char* name;
  size_t bytes;
  std::vector<char*> freed;  // by free_shared()
  char* data;
  int64_t block;  // the last to touch it
};

struct Random {
  uint64_t state;
  uint32_t below(uint32_t bound) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return uint32_t(((state * 0x2545f4914f6cdd1dull >> 32) * bound) >> 32);
  }
  template <typename T>
  void shuffle(std::vector<T>& v) {
    for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[below(uint32_t(i))]);
  }
};

// The running launch, and what is reused from one launch to the next.
struct Launch {
  const char* name = "";
  void (*thread)(const void*) = nullptr;
  const void* call = nullptr;
  size_t call_bytes = 0;
  std::vector<SharedArray> shared;
  size_t shared_bytes = 0;

  std::vector<Fiber> fibers;  // never shrinks: stacks are reused
  std::vector<int> turns;     // the order of this block's threads
  size_t threads = 0, turn = 0, ready = 0, alive = 0, in_barrier = 0;
  int votes = 0, vote = 0;
  Random random = {1};
  Context launcher;
  Fiber* self = nullptr;

  std::vector<std::pair<const char*, size_t>> globals;
  std::string error;
};
Launch current;
inline Launch& run() { return current; }

std::string text(const char* format, va_list arguments) {
  char buffer[1000];
  vsnprintf(buffer, sizeof buffer, format, arguments);
  return buffer;
}
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string result = text(format, arguments);
  va_end(arguments);
  return result;
}

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || !strcmp(a.file_name(), b.file_name()));
}
std::string place(const char* name, const Where& where) {
  return text("%s at %s:%u", name, where.file_name(), unsigned(where.line()));
}
std::string waits(const Fiber& f) { return place(f.waits_in, f.where); }

void choose(Fiber* next) {
  run().self = next;
  if (next) threadIdx = next->index;
}

// The next thread that can run, or null.
Fiber* next_fiber() {
  Launch& l = run();
  while (l.ready) {
    while (l.turn < l.threads) {
      Fiber& f = l.fibers[l.turns[l.turn++]];
      if (f.state == State::kReady) return &f;
    }
    l.turn = 0;
    if (settings.order == Order::kRandom) l.random.shuffle(l.turns);
  }
  return nullptr;
}
void yield() {
  Fiber* const from = run().self;
  Fiber* const to = next_fiber();
  if (to == from) return;
  choose(to);
  from->context.switch_to(to ? to->context : run().launcher);
}
void wait(State state, const char* name, Where where) {
  Fiber& f = *run().self;
  f.state = state, f.waits_in = name, f.where = where;
  --run().ready;
}
void wake(Fiber& f) {
  f.state = State::kReady;
  ++run().ready;
}

void release_block() {
  Launch& l = run();
  const Fiber& first = l.fibers[0];
  for (size_t i = 0; i < l.threads; ++i) {
    const Fiber& f = l.fibers[i];
    if (f.state == State::kReturned)
      fail("barrier divergence: thread %d has returned, the others wait in %s", f.number, waits(*l.self).c_str());
    if (!same(first.where, f.where))
      fail("barrier divergence: thread 0 waits in %s, thread %d in %s", waits(first).c_str(), f.number,
           waits(f).c_str());
  }
  for (size_t i = 0; i < l.threads; ++i) wake(l.fibers[i]);
  l.in_barrier = 0;
  l.vote = l.votes, l.votes = 0;
  ++statistics.barriers;
  race::block_barrier();
}

// Completes the collective of the running lane once all of its lanes have arrived.
void release_collective() {
  Launch& l = run();
  const Fiber& self = *l.self;
  const size_t first = self.number / 32 * 32;
  void* payloads[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (!(self.mask >> i & 1)) continue;
    if (first + i >= l.threads) fail("%s names lane %d, which the block does not have", waits(self).c_str(), i);
    const Fiber& f = l.fibers[first + i];
    if (f.state == State::kReturned) fail("%s names lane %d, which has returned", waits(self).c_str(), i);
    if (f.state != State::kInCollective || f.mask != self.mask) return;
    payloads[i] = f.payload;
  }
  for (int i = 0; i < 32; ++i) {
    if (!(self.mask >> i & 1)) continue;
    const Fiber& f = l.fibers[first + i];
    if (f.combine != self.combine || !same(f.where, self.where))
      fail("warp divergence: lane %d waits in %s, lane %d in %s", self.number % 32, waits(self).c_str(), i,
           waits(f).c_str());
  }
  self.combine(payloads, self.mask);
  for (int i = 0; i < 32; ++i)
    if (self.mask >> i & 1) wake(l.fibers[first + i]);
  ++statistics.collectives;
  race::warp_barrier(self.number / 32, self.mask);
}

[[noreturn]] void thread_returned() {
  Launch& l = run();
  Fiber& self = *l.self;
  if (!self.copies.empty()) fail("returned before %zu asynchronous copies were waited for", self.copies.size());
  self.state = State::kReturned;
  --l.ready, --l.alive;
  const size_t first = self.number / 32 * 32;
  for (size_t i = first; i < std::min(first + 32, l.threads); ++i)
    if (l.fibers[i].state == State::kInCollective && l.fibers[i].mask >> self.number % 32 & 1)
      fail("returned, but %s of lane %zu waits for it", waits(l.fibers[i]).c_str(), i - first);
  if (l.in_barrier)
    for (size_t i = 0; i < l.threads; ++i)
      if (l.fibers[i].state == State::kInBlockBarrier)
        fail("barrier divergence: returned, but thread %zu waits in %s", i, waits(l.fibers[i]).c_str());
  yield();
  abort();  // no fiber switches to a thread that has returned
}

void enter_thread() {
  run().self->context.arrived();
  run().thread(run().call);
  thread_returned();
}

void make_fibers(size_t threads) {
  std::vector<Fiber>& fibers = run().fibers;
  for (size_t i = fibers.size(); i < threads; ++i) {
    void* memory =
        mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) abort();
    fibers.emplace_back();
    fibers.back().stack = static_cast<char*>(memory) + kPage;
  }
}

void run_block(dim3 block) {
  Launch& l = run();
  ++statistics.blocks;
  race::begin_block();
  for (size_t i = 0; i < l.threads; ++i) {
    Fiber& f = l.fibers[i];
    f.number = int(i);
    f.index = {unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y)};
    f.state = State::kReady;
    f.copies.clear(), f.groups.clear(), f.uncommitted = 0;
    // Stack tops that differ modulo 4096 do not evict each other from the caches.
    f.context.start(f.stack, kStack - i * 192 % 8192, enter_thread);
    l.turns[i] = int(settings.order == Order::kReverse ? l.threads - 1 - i : i);
  }
  if (settings.order == Order::kRandom) l.random.shuffle(l.turns);
  l.turn = 0, l.ready = l.alive = l.threads, l.in_barrier = 0, l.votes = 0;
  choose(next_fiber());
  l.launcher.switch_to(l.self->context);
  if (!l.alive || !l.error.empty()) return;
  std::vector<const Fiber*> seen;
  std::string message;
  for (size_t i = 0; i < l.threads; ++i) {
    const Fiber& f = l.fibers[i];
    const auto known = [&](const Fiber* s) { return s->state == f.state && same(s->where, f.where); };
    if (f.state == State::kReturned || std::any_of(seen.begin(), seen.end(), known)) continue;
    seen.push_back(&f);
    message += text("%s thread %d in %s", seen.size() > 1 ? "," : "", f.number, waits(f).c_str());
  }
  l.error = text("%s: block (%u, %u, %u): deadlock: for ever wait%s", l.name, blockIdx.x, blockIdx.y, blockIdx.z,
                 message.c_str());
}

void free_shared() {
  for (SharedArray& a : run().shared) {
    if (!SIMT_ASAN && (written(a.data - kPadding, a.data, settings.poison) ||
                       written(a.data + a.bytes, a.data + a.bytes + kPadding, settings.poison)))
      if (run().error.empty()) run().error = text("%s: writes beyond the shared array %s", run().name, a.name);
    for (char* p : a.freed) free(p);
  }
  race::forget_shared();
  run().shared.clear();
  run().shared_bytes = 0;
}

}  // namespace

const char* error() { return run().error.empty() ? nullptr : run().error.c_str(); }
void clear_error() { run().error.clear(); }
int running_thread() { return run().self ? run().self->number : -1; }
bool on_own_stack(const void* address) {
  const char* const a = static_cast<const char*>(address);
  return run().self && a >= run().self->stack && a < run().self->stack + kStack;
}
bool in_launch_parameters(const void* address, size_t bytes) {
  const char* const a = static_cast<const char*>(address);
  const char* const call = static_cast<const char*>(run().call);
  return a >= call && a + bytes <= call + run().call_bytes;
}
void add_global(const void* data, size_t bytes) { run().globals.emplace_back(static_cast<const char*>(data), bytes); }
void forget_globals() { run().globals.clear(); }
bool written(const char* begin, const char* end, uint8_t poison) {
  return std::any_of(begin, end, [poison](char c) { return uint8_t(c) != poison; });
}

void fail(const char* format, ...) {
  Launch& l = run();
  va_list arguments;
  va_start(arguments, format);
  l.error = text("%s: block (%u, %u, %u), thread %d: ", l.name, blockIdx.x, blockIdx.y, blockIdx.z, running_thread()) +
            text(format, arguments);
  va_end(arguments);
  Fiber* const from = l.self;
  if (!from) abort();
  choose(nullptr);
  from->context.switch_to(l.launcher);  // and never back: the block's other fibers are abandoned
  abort();
}

int block_barrier(int predicate, const char* name, Where where) {
  Launch& l = run();
  wait(State::kInBlockBarrier, name, where);
  l.votes |= predicate != 0;
  if (++l.in_barrier == l.alive) release_block();
  yield();
  return l.vote;
}

void warp_collective(uint32_t mask, const char* name, Combine combine, void* payload, Where where) {
  Fiber& f = *run().self;
  wait(State::kInCollective, name, where);
  f.mask = mask, f.combine = combine, f.payload = payload;
  if (!(mask >> f.number % 32 & 1)) fail("%s has no bit for the lane that calls it", waits(f).c_str());
  release_collective();
  yield();
}

int lane() { return run().self->number % 32; }

void* shared_array(const void* key, const char* name, size_t bytes) {
  Launch& l = run();
  SharedArray* array = nullptr;
  for (SharedArray& a : l.shared)
    if (a.key == key) array = &a;
  if (!array) {
    l.shared_bytes += (bytes + 15) / 16 * 16;
    if (l.shared_bytes > kMostShared)
      fail("%zu bytes of shared memory with %s, more than %zu", l.shared_bytes, name, kMostShared);
    const size_t padding = SIMT_ASAN ? 0 : kPadding;  // the sanitizer's red zones are closer
    char* const memory = static_cast<char*>(malloc(bytes + 2 * padding));
    memset(memory, settings.poison, bytes + 2 * padding);
    l.shared.push_back({key, name, bytes, {memory}, memory + padding, -1});
    array = &l.shared.back();
    race::watch_shared(name, array->data, bytes);
  }
  if (array->block != statistics.blocks) {
    array->block = statistics.blocks;
    memset(array->data, settings.poison, bytes);
  }
  return array->data;
}

void copy_async(void* shared, const void* global, size_t bytes, bool valid) {
  Launch& l = run();
  char* const to = static_cast<char*>(shared);
  if (reinterpret_cast<uintptr_t>(to) % bytes) fail("cp_async_%zu: the shared address is not aligned", bytes);
  if (valid && reinterpret_cast<uintptr_t>(global) % bytes)
    fail("cp_async_%zu: the global address is not aligned", bytes);
  const char* const from = static_cast<const char*>(global);
  const auto near = [&](const auto& g) { return from >= g.first - kPadding && from < g.first + g.second + kPadding; };
  if (valid && !l.globals.empty() && std::none_of(l.globals.begin(), l.globals.end(), near))
    fail("cp_async_%zu: from outside every array", bytes);
  const auto holds = [&](const SharedArray& a) { return to >= a.data && to + bytes <= a.data + a.bytes; };
  if (std::none_of(l.shared.begin(), l.shared.end(), holds)) fail("cp_async_%zu: not to a shared array", bytes);
  const void* const pc = __builtin_return_address(0);
  if (valid) race::access(global, bytes, race::Kind::kRead, pc);
  race::access(shared, bytes, race::Kind::kCopyIssued, pc);
  memset(shared, settings.poison, bytes);
  l.self->copies.push_back({shared, global, bytes, valid});
  ++l.self->uncommitted;
}

void copy_async_commit() {
  Fiber& f = *run().self;
  f.groups.push_back(f.uncommitted);
  f.uncommitted = 0;
}

void copy_async_wait(size_t pending) {
  Fiber& f = *run().self;
  if (f.groups.size() <= pending) return;
  const size_t finished = f.groups.size() - pending;
  size_t count = 0;
  for (size_t i = 0; i < finished; ++i) count += f.groups[i];
  for (size_t i = 0; i < count; ++i) {
    const Copy& c = f.copies[i];
    if (c.valid)
      memcpy(c.shared, c.global, c.bytes);
    else
      memset(c.shared, 0, c.bytes);
    race::access(c.shared, c.bytes, race::Kind::kCopyArrived, __builtin_return_address(0));
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + count);
  f.groups.erase(f.groups.begin(), f.groups.begin() + finished);
}

void launch_blocks(const char* name, dim3 grid, dim3 block, void (*thread)(const void*), const void* call,
                   size_t call_bytes) {
  Launch& l = run();
  if (!l.error.empty()) return;
  l.name = name, l.thread = thread, l.call = call, l.call_bytes = call_bytes;
  const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (!threads || threads > kMostThreads || block.z > 64) {
    l.error = text("%s: block (%u, %u, %u): expected 1 to 1024 threads, z at most 64", name, block.x, block.y, block.z);
    return;
  }
  if (!blocks || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    l.error = text("%s: grid (%u, %u, %u): expected 1 to 2^31-1, 65535, 65535 blocks", name, grid.x, grid.y, grid.z);
    return;
  }
  ++statistics.launches;
  gridDim = grid, blockDim = block;
  l.threads = threads, l.turns.resize(threads);
  make_fibers(threads);
  l.random.state = (settings.seed + 1) * 0x9e3779b97f4a7c15ull | 1;
  race::begin_launch();
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = settings.order == Order::kReverse ? blocks - 1 - i : i;
  if (settings.order == Order::kRandom) l.random.shuffle(order);
  for (const size_t b : order) {
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block(block);
    if (!l.error.empty()) break;
  }
  free_shared();
}

}  // namespace simt

cudaError_t cudaGetLastError() { return simt::error() ? cudaErrorLaunchFailure : cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : simt::error() ? simt::error() : "an error of the runtime";
}
