// To be preloaded: makes an allocation of the operators' library fail.  Counted are those whose caller lies in it, and
// torch's of tensors, which torch gets by posix_memalign.
#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <cerrno>
#include <new>

#define EXPORTED __attribute__((visibility("default")))

namespace {

std::atomic<bool> watching{false};
std::atomic<long> count{0}, failing{-1};
thread_local bool asking = false;  // dladdr may allocate

bool fails() { return watching && count++ == failing; }

bool fails_for(const void* caller) {
  if (!watching || asking) return false;
  asking = true;
  Dl_info info;
  const bool ours = dladdr(caller, &info) && info.dli_fname && strstr(info.dli_fname, "/_C.abi3.so");
  asking = false;
  return ours && fails();
}

template <typename F>
F* next(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

// From now on allocations are counted, and number n, from 0 on, fails; stop_watching() returns how many there were.
EXPORTED void fail_allocation(long n) { count = 0, failing = n, watching = true; }
EXPORTED long stop_watching() {
  watching = false;
  return count;
}

EXPORTED void* aligned_alloc(size_t alignment, size_t size) {
  if (fails_for(__builtin_return_address(0))) {
    errno = ENOMEM;
    return nullptr;
  }
  return next<void*(size_t, size_t)>("aligned_alloc")(alignment, size);
}

EXPORTED int posix_memalign(void** p, size_t alignment, size_t size) {
  return fails() ? ENOMEM : next<int(void**, size_t, size_t)>("posix_memalign")(p, alignment, size);
}

}  // extern "C"

EXPORTED void* operator new(size_t size) {
  void* const p = fails_for(__builtin_return_address(0)) ? nullptr : malloc(size);
  if (!p) throw std::bad_alloc();
  return p;
}
