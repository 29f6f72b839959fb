/* Reads raw images and prints the class of each: an example of the call in network.h, and a test of a port.

   usage: network [--logits] [FILE]

   FILE (standard input if there is none) holds one image after another as bytes 0..255: row by row, and the channels
   of a pixel together. Each line of the output is the number of the largest logit, the first if several are equal;
   --logits adds all of them as hexadecimal floats, which show every bit.

   On a PC:

     cc -std=c99 -O2 network.c main.c -o network

   With -DSEMIHOSTING it needs neither C library nor linker script and runs on a bare Cortex-M; the emulator or the
   debugger at the other end opens the files. For the Cortex-M4 board of QEMU, whose flash is at 0:

     arm-none-eabi-gcc -mcpu=cortex-m4 -mfloat-abi=hard -mfpu=fpv4-sp-d16 -std=c99 -O2 -DSEMIHOSTING -nostartfiles \
       -Wl,--section-start=.vectors=0,-Ttext=0x400,-Tbss=0x20000000,-e,reset network.c main.c -o network.elf
     qemu-system-arm -M mps2-an386 -nographic -kernel network.elf \
       -semihosting-config enable=on,target=native,arg=network,arg=images.bin
*/
#include <stdint.h>

#include "network.h"

static uint8_t arena[NETWORK_ARENA_SIZE];
static uint8_t image[NETWORK_INPUT_SIZE];
static float logits[NETWORK_OUTPUT_SIZE];

static int run(int argc, char** argv);  // the program, below; returns the exit status

#ifdef SEMIHOSTING

enum { SYS_OPEN = 1, SYS_WRITE = 5, SYS_READ = 6, SYS_GET_CMDLINE = 0x15, SYS_EXIT = 0x18 };
enum { READ_BINARY = 1, WRITE = 4, APPEND = 8, FAILED = 0x20024, SUCCEEDED = 0x20026 };

static uint64_t stack[512];
static char command_line[256];
static uintptr_t file, output, errors;

// The host reads operation and argument from r0 and r1 at this instruction, and answers in r0.
static uintptr_t semihost(uintptr_t operation, const void* argument) {
  register uintptr_t r0 __asm__("r0") = operation;
  register const void* r1 __asm__("r1") = argument;
  __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}

static uintptr_t length_of(const char* text) {
  uintptr_t length = 0;
  while (text[length]) length++;
  return length;
}

// ":tt" is the console: standard input, output or error, by the mode.
static uintptr_t opened(const char* name, uintptr_t mode) {
  uintptr_t block[3];
  block[0] = (uintptr_t)name;
  block[1] = mode;
  block[2] = length_of(name);
  return semihost(SYS_OPEN, block);
}

static void write_to(uintptr_t handle, const char* text) {
  uintptr_t block[3];
  block[0] = handle;
  block[1] = (uintptr_t)text;
  block[2] = length_of(text);
  semihost(SYS_WRITE, block);
}

static void print(const char* text) { write_to(output, text); }
static void complain(const char* text) { write_to(errors, text); }

static int open_file(const char* name) {
  file = opened(name ? name : ":tt", READ_BINARY);
  return file != UINTPTR_MAX;
}

static unsigned long read_file(uint8_t* to, unsigned long size) {
  unsigned long done = 0;
  while (done < size) {
    uintptr_t block[3], left;
    block[0] = file;
    block[1] = (uintptr_t)(to + done);
    block[2] = size - done;
    left = semihost(SYS_READ, block);
    if (left >= size - done) break;  // the end, or an error
    done = size - left;
  }
  return done;
}

static void stop(uintptr_t reason) {
  semihost(SYS_EXIT, (const void*)reason);
  for (;;) {
  }
}

static void fault(void) {
  complain("fault\n");
  stop(FAILED);
}

void reset(void);
void reset(void) {
  uintptr_t block[2];
  char *argv[4], *next = command_line;
  int argc = 0;
#ifdef __ARM_FP
  *(volatile uint32_t*)0xE000ED88u |= 0xFu << 20;  // CPACR: switches the floating-point unit on
  __asm__ volatile("dsb\n\tisb" ::: "memory");
#endif
  output = opened(":tt", WRITE);
  errors = opened(":tt", APPEND);
  block[0] = (uintptr_t)command_line;
  block[1] = sizeof command_line;
  if (semihost(SYS_GET_CMDLINE, block) != 0) command_line[0] = 0;
  for (;;) {
    while (*next == ' ') *next++ = 0;
    if (!*next || argc == 4) break;
    argv[argc++] = next;
    while (*next && *next != ' ') next++;
  }
  stop(run(argc, argv) ? FAILED : SUCCEEDED);
}

// What the processor reads when it starts: top of the stack, first instruction, what to do at a fault.
union vector {
  const void* stack;
  void (*handler)(void);
};
__attribute__((section(".vectors"), used)) static const union vector vectors[16] = {
    {stack + 512},      {.handler = reset}, {.handler = fault}, {.handler = fault},
    {.handler = fault}, {.handler = fault}, {.handler = fault},
};

#else

#include <stdio.h>

static FILE* file;

static void print(const char* text) { fputs(text, stdout); }
static void complain(const char* text) { fputs(text, stderr); }

static int open_file(const char* name) {
  file = name ? fopen(name, "rb") : stdin;
  return file != NULL;
}

static unsigned long read_file(uint8_t* to, unsigned long size) { return (unsigned long)fread(to, 1, size, file); }

int main(int argc, char** argv) { return run(argc, argv); }

#endif

static const char* decimal(unsigned long value) {
  static char text[24];
  char* digit = text + sizeof text - 1;
  do *--digit = (char)('0' + value % 10);
  while (value /= 10);
  return digit;
}

// Prints as %a does, which the printf of a board may lack; a subnormal number begins with 0x0.
static void print_float(float value) {
  union {
    float value;
    uint32_t bits;
  } as;
  as.value = value;
  const uint32_t fraction = (as.bits & 0x7fffff) << 1;  // six hexadecimal digits
  const int biased = (int)(as.bits >> 23 & 0xff);
  const int exponent = biased ? biased - 127 : fraction ? -126 : 0;
  char digits[8] = ".";
  int count = 0;
  while (count < 6 && fraction << (8 + 4 * count)) {
    digits[count + 1] = "0123456789abcdef"[fraction >> (20 - 4 * count) & 15];
    count++;
  }
  print(as.bits >> 31 ? " -" : " ");
  if (biased == 0xff) {
    print(fraction ? "nan" : "inf");
    return;
  }
  print(biased ? "0x1" : "0x0");
  if (count) print(digits);
  print(exponent < 0 ? "p-" : "p+");
  print(decimal((unsigned long)(exponent < 0 ? -exponent : exponent)));
}

static int equal(const char* a, const char* b) {
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

static int run(int argc, char** argv) {
  const char* name = 0;
  int with_logits = 0;
  for (int i = 1; i < argc; i++) {
    if (equal(argv[i], "--logits")) {
      with_logits = 1;
    } else if (name || argv[i][0] == '-') {
      complain("usage: network [--logits] [FILE]\n");
      return 2;
    } else {
      name = argv[i];
    }
  }
  if (!open_file(name)) {
    complain("expected a file of images, got none: ");
    complain(name);
    complain("\n");
    return 1;
  }
  unsigned long size;
  while ((size = read_file(image, sizeof image)) == sizeof image) {
    network_run_image(image, logits, arena);
    unsigned long best = 0;
    for (unsigned long i = 1; i < NETWORK_OUTPUT_SIZE; i++)
      if (logits[i] > logits[best]) best = i;
    print(decimal(best));
    for (unsigned long i = 0; with_logits && i < NETWORK_OUTPUT_SIZE; i++) print_float(logits[i]);
    print("\n");
  }
  if (size) {
    complain("expected whole images of ");
    complain(decimal(sizeof image));
    complain(" bytes, got a last one of ");
    complain(decimal(size));
    complain("\n");
  }
  return size != 0;
}
