// What a tile of four output pixels reads, copied to scratch; and the ring that lets a layer overwrite its input.
//
// x reads as rows of W * C bytes. Without a ring, row iy is row iy of x. With one, rows are copied to the ring in order, as
// late as possible, and row iy is slot iy % ring: `next_row` copies what output row oy reads, before any of oy is stored.
//
// Scratch of a tile: word k of column j at to[span * k + place(j)]. ORDER_TAPS: the columns are the tile's four pixels, a set
// of them for each tap. ORDER_ROWS: they are 6 or 9 neighbours in x, a set for each ky. Sets are copied as if they were inside
// of x where that stays within its memory; columns that are not are overwritten then.

struct rows {
  const struct window* window;
  const uint8_t *x, *base;              // the input; where its rows are read: x itself, or the ring
  word* copies;                         // the ring, or null
  int32_t length, slots;                // bytes of a row; H, or the rows of the ring
  int32_t copied;                       // rows of x in the ring so far, older ones overwritten
  int order, span, n;                   // of a set: columns; bytes a column
  int used, words;                      // words of a filter, without and with the zeros behind them
  int sets, merged;                     // sets of a row of taps, and how many of them are copied as one
  int32_t pitch;                        // bytes from column to column
  int32_t last_iy, last_ix, last_from;  // the greatest origin whose rows, columns, bytes are all within x; of `base`
};

static SMALL void start_rows(struct rows* rows, const struct window* window, const uint8_t* x, int ring, word* copies) {
  if (!USES(RINGS)) ring = 0;
  rows->window = window, rows->x = x, rows->copies = ring ? copies : 0;
  rows->base = ring ? (const uint8_t*)copies : x;
  rows->length = (int32_t)window->width * window->channels;
  rows->slots = ring ? ring : window->height;
  rows->copied = 0;
}

static ALWAYS_INLINE int span_of(int order) { return is_taps(order) ? 4 : is_rows_1(order) ? 6 : 9; }

static ALWAYS_INLINE int place_of(int order, int column) {
  return !is_taps(order) && !is_rows_1(order) ? column / 2 + (column & 1) * 5 : column;
}

static ALWAYS_INLINE int has_ring(const struct rows* rows) { return USES(RINGS) && rows->copies; }

// Columns of a window, side by side in scratch.
static ALWAYS_INLINE int sets_of(const struct rows* rows) { return USES(WIDE_TAPS) ? rows->sets : 1; }

static ALWAYS_INLINE int is_whole(const struct rows* rows) { return !USES(ODD_CHANNELS) || (rows->n & 3) == 0; }

// Whether the words of a row of the kernel follow each other in x.
static ALWAYS_INLINE int is_merged(const struct rows* rows) {
  return (!USES(WIDE_TAPS) || rows->merged == rows->sets) && is_whole(rows);
}

static ALWAYS_INLINE int words_of(const struct rows* rows) {
  return is_whole(rows) ? rows->n >> 2 : (rows->n + 3) >> 2;
}

// Columns of x from one column of a set to the next.
static ALWAYS_INLINE int step_of(const struct rows* rows) { return is_taps(rows->order) ? rows->window->stride_x : 1; }

// Sets of n channels.
static SMALL void start_sets(struct rows* rows, int n, int order, int words) {
  const struct window* window = rows->window;
  rows->order = order, rows->span = span_of(order), rows->n = n;
  rows->sets = is_taps(order) ? window->kernel_width : 1;
  rows->merged = n == window->channels && window->dilation_x == 1 && (n & 3) == 0 ? rows->sets : 1;
  rows->used = sets_of(rows) * window->kernel_height * words_of(rows);
  rows->words = is_taps(order) ? words : 0;
  rows->pitch = step_of(rows) * window->channels;
  rows->last_from =
      rows->slots * rows->length - (rows->span - 1) * rows->pitch - (USES(WIDE_TAPS) ? rows->merged : 1) * n;
  rows->last_iy = window->height - 1 - (window->kernel_height - 1) * window->dilation_y;
  rows->last_ix = window->width - 1 - (rows->span - 1) * step_of(rows) - (sets_of(rows) - 1) * window->dilation_x;
}

static ALWAYS_INLINE void copy_words(word* to, const word* from, int32_t n) {
  for (; n > 0; n--) *to++ = *from++;
}

static SMALL void next_row(struct rows* rows, int oy) {
  const struct window* window = rows->window;
  int32_t end = oy * window->stride_y - window->top + rows->slots;
  if (end > window->height) end = window->height;
  for (; rows->copied < end; rows->copied++) {
    const int32_t from = rows->copied * rows->length, to = rows->copied % rows->slots * rows->length;
    if (rows->length % 4 == 0)
      copy_words(rows->copies + to / 4, (const word*)(const void*)(rows->x + from), rows->length / 4);
    else
      copy_bytes((uint8_t*)rows->copies + to, rows->x + from, rows->length);
  }
}

// Where row iy of x is read, in bytes from `base` on, or -1 if it is outside.
static ALWAYS_INLINE int32_t row_at(const struct rows* rows, int32_t iy) {
  if ((uint32_t)iy >= rows->window->height) return -1;
  return (has_ring(rows) ? iy % rows->slots : iy) * rows->length;
}

// Copies n bytes to words `span` apart, with zeros up to a whole word; from null: n times the byte `outside`.
static SMALL void copy_column(word* to, int span, const uint8_t* from, int n, uint32_t outside) {
  for (; n >= 4; n -= 4, to += span) {
    if (!from)
      *to = outside * 0x01010101u;
    else if (!USES(ODD_CHANNELS))
      *to = *(const word*)(const void*)from, from += 4;
    else
      *to = from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24, from += 4;
  }
  if (USES(ODD_CHANNELS) && n > 0) {
    *to = 0;
    for (int i = 0; i < n; i++) *to |= (from ? from[i] : outside) << 8 * i;
  }
}

#if ADDER_TARGET == ADDER_M_ASSEMBLY
// clang-format off
// r0: to, r1: the first column, r2: bytes from column to column, r3: words of a column in a row; stack: rows, bytes from row
// to row. Cycles a word of x: ORDER_TAPS 14 / 4, ORDER_ROWS_1 18 / 6, ORDER_ROWS_2 31 / 9.
#define COLUMNS(name, saved, at, text)                                                                            \
  __attribute__((naked, noinline, unused)) static void name(                                                      \
      word* to __attribute__((unused)), const uint8_t* from __attribute__((unused)),                              \
      int32_t pitch __attribute__((unused)), int words __attribute__((unused)), int rows __attribute__((unused)), \
      int32_t length __attribute__((unused))) {                                                                   \
    __asm__ volatile("push {" saved ", lr}\n\tldr r4, [sp, #" #at                                                 \
                     "]\n1:\n\tadd.w r12, r2, r2, lsl #1\n\tadd.w r12, r12, r1\n\t"                               \
                     "push {r1, r3, r4}\n2:\n\t" text                                                             \
                     "subs r3, #1\n\tbne 2b\n\tpop {r1, r3, r4}\n\tldr r5, [sp, #" #at                            \
                     " + 4]\n\tadd r1, r5\n\t"                                                                    \
                     "subs r4, #1\n\tbne 1b\n\tpop {" saved ", pc}");                                             \
  }
COLUMNS(columns_taps, "r4-r7", 20,
        "ldr r6, [r1, r2, lsl #1]\n\tldr.w r5, [r1, r2]\n\tldr.w r4, [r1], #4\n\tldr.w r7, [r12], #4\n\t"
        "stmia r0!, {r4-r7}\n\t")
COLUMNS(columns_rows_1, "r4-r9", 28,
        "ldr r6, [r1, r2, lsl #1]\n\tldr.w r5, [r1, r2]\n\tldr.w r4, [r1], #4\n\t"
        "ldr r9, [r12, r2, lsl #1]\n\tldr.w r8, [r12, r2]\n\tldr.w r7, [r12], #4\n\tstmia.w r0!, {r4-r9}\n\t")
COLUMNS(columns_rows_2, "r4-r11", 36,
        "add lr, r12, r2\n\tadd.w lr, lr, r2, lsl #1\n\t"
        "ldr r5, [r1, r2, lsl #1]\n\tldr.w r6, [r1, r2, lsl #2]\n\tldr.w r9, [r1, r2]\n\tldr.w r4, [r1], #4\n\t"
        "ldr r11, [r12, r2, lsl #1]\n\tldr.w r10, [r12]\n\t"
        "ldr r8, [lr, r2, lsl #1]\n\tldr.w r7, [lr]\n\tldr.w r12, [lr, r2]\n\tstmia.w r0!, {r4-r12}\n\t"
        "sub r12, lr, r2\n\tsub.w r12, r12, r2, lsl #1\n\tadd.w r12, r12, #4\n\t")
#undef COLUMNS

// clang-format on

static ALWAYS_INLINE void copy_columns(word* to, const uint8_t* from, int32_t pitch, int words, int rows,
                                       int32_t length, int order) {
  if (is_taps(order))
    columns_taps(to, from, pitch, words, rows, length);
  else if (is_rows_1(order))
    columns_rows_1(to, from, pitch, words, rows, length);
  else
    columns_rows_2(to, from, pitch, words, rows, length);
}
#else
static ALWAYS_INLINE uint32_t word_at(const uint8_t* from) { return *(const word*)(const void*)from; }

// `words` words of all columns, from `height` rows that are `length` bytes apart.
static NOINLINE void copy_columns(word* to, const uint8_t* from, int32_t pitch, int words, int height, int32_t length,
                                  int order) {
  const int span = span_of(order);
  for (; height > 0; height--, from += length) {
    const uint8_t* column = from;
    for (int k = words; k > 0; k--, column += 4, to += span) {
      const uint8_t* half = column + 3 * pitch;
      const uint32_t a = word_at(column), b = word_at(column + pitch), c = word_at(column + 2 * pitch),
                     d = word_at(half);
      if (order == ORDER_TAPS) {
        to[0] = a, to[1] = b, to[2] = c, to[3] = d;
        continue;
      }
      const uint32_t e = word_at(half + pitch), f = word_at(half + 2 * pitch);
      if (order == ORDER_ROWS_1) {
        to[0] = a, to[1] = b, to[2] = c, to[3] = d, to[4] = e, to[5] = f;
      } else {
        half += 3 * pitch;
        to[0] = a, to[5] = b, to[1] = c, to[6] = d, to[2] = e, to[7] = f;
        to[3] = word_at(half), to[8] = word_at(half + pitch), to[4] = word_at(half + 2 * pitch);
      }
    }
  }
}
#endif

static ALWAYS_INLINE void fill_words(word* to, int n, uint32_t value) {
  for (; n > 0; n--) *to++ = value;
}

// Column by column, what `height` rows of x from iy on hold from ix on: `count` columns. `inside`: those are in place already,
// and rows too, only columns to the left and right of x are to be overwritten.
static SMALL void gather_columns(const struct rows* rows, int32_t iy, int32_t ix, int height, int count, int c,
                                 word* to, int inside) {
  const struct window* window = rows->window;
  const int span = rows->span, step = step_of(rows), words = span * words_of(rows);
  int n = rows->n;
  if (inside && sets_of(rows) == 1) n *= height, height = 1;
  for (; height > 0; height--, iy += window->dilation_y) {
    const int32_t row = inside ? 0 : row_at(rows, iy);
    int32_t at = ix;
    for (int kx = 0; kx < sets_of(rows); kx++, to += words, at += window->dilation_x) {
      int32_t column = at;
      for (int j = 0; j < count; j++, column += step) {
        const uint8_t* from = 0;
        if (row >= 0 && (uint32_t)column < window->width) {
          if (inside) continue;
          from = rows->base + row + column * window->channels + c;
        }
        copy_column(to + place_of(rows->order, j), span, from, n, window->outside);
      }
    }
  }
}

// All columns of the tile from (oy, ox) on, in one row of y: all rows of x at once, or row by row near its first and last row,
// from a ring, or not of whole words.
static ALWAYS_INLINE void gather_row(const struct rows* rows, int32_t oy, int32_t ox, int c, word* to) {
  const struct window* window = rows->window;
  const int32_t step = window->dilation_y * rows->length, ix = ox * window->stride_x - window->left;
  const int beside = USES(BORDERS) && (ix < 0 || ix > rows->last_ix);
  const int words = sets_of(rows) * words_of(rows);
  int32_t iy = oy * window->stride_y - window->top;
  int height = window->kernel_height, n = 1;
  if (!has_ring(rows) && is_merged(rows) && iy >= 0 && iy <= rows->last_iy) n = height;
  for (; height > 0; height -= n, iy += window->dilation_y, to += rows->span * words) {
    const int32_t row = row_at(rows, iy), from = row + ix * window->channels + c;
    if (is_merged(rows) && row < 0) {
      fill_words(to, rows->span * words, window->outside * 0x01010101u);
    } else if (is_merged(rows) && from >= 0 && from + (n - 1) * step <= rows->last_from) {
      copy_columns(to, rows->base + from, rows->pitch, words, n, step, rows->order);
      if (beside) gather_columns(rows, iy, ix, n, rows->span, c, to, 1);
    } else {
      gather_columns(rows, iy, ix, n, rows->span, c, to, 0);
    }
  }
}

// The tile of `count` output pixels from (oy, ox) on, n channels from c on. Orders of rows: all in row oy of y.
static SMALL void gather_tile(struct rows* rows, int32_t oy, int32_t ox, int count, int c, word* to) {
  const int width = rows->window->out_width;
  if (!USES(WRAPPED_TILES) || ox + count <= width) {
    if (has_ring(rows)) next_row(rows, (int)oy);
    gather_row(rows, oy, ox, c, to);
  } else {
    for (int p = 0; p < count; p++) {
      const struct window* window = rows->window;
      const int32_t iy = oy * window->stride_y - window->top, ix = ox * window->stride_x - window->left;
      if (has_ring(rows)) next_row(rows, (int)oy);
      gather_columns(rows, iy, ix, window->kernel_height, 1, c, to + p, 0);
      if (++ox == width) ox = 0, oy++;
    }
  }
  if (USES(ZERO_WORDS) && rows->words > rows->used) fill_words(to + 4 * rows->used, 4 * (rows->words - rows->used), 0);
}
