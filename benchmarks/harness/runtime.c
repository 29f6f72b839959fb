// What a compiler may call in a program without C library: copies and fills, a word at a time where both are aligned.
#include <stddef.h>
#include <stdint.h>

typedef uint32_t word __attribute__((may_alias));

void* memcpy(void* to, const void* from, size_t n) {
  uint8_t* t = to;
  const uint8_t* f = from;
  if ((((uintptr_t)t | (uintptr_t)f) & 3) == 0)
    for (; n >= 4; n -= 4, t += 4, f += 4) *(word*)t = *(const word*)f;
  while (n--) *t++ = *f++;
  return to;
}

void* memmove(void* to, const void* from, size_t n) {
  if ((uintptr_t)to <= (uintptr_t)from) return memcpy(to, from, n);
  uint8_t* t = (uint8_t*)to + n;
  const uint8_t* f = (const uint8_t*)from + n;
  while (n--) *--t = *--f;
  return to;
}

void* memset(void* to, int value, size_t n) {
  uint8_t* t = to;
  if (((uintptr_t)t & 3) == 0)
    for (; n >= 4; n -= 4, t += 4) *(word*)t = (uint8_t)value * 0x01010101u;
  while (n--) *t++ = (uint8_t)value;
  return to;
}
