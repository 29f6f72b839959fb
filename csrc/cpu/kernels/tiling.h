// How the passes cut their work, and where they read it: bands of rows, the pixels of a band, segments of the sum.

// A band is a run of whole images, of rows of one image, or of columns of one row: one task's share of pixels.
struct Bands {
  int64_t N, H, W;                // images, rows, columns
  int64_t images, rows, columns;  // of a band; all rows when images > 1, all columns when rows > 1
  int64_t count;
};
struct Band {
  int64_t n0, n1, h0, h1, w0, w1;
};

// Bands of about `budget` floats of source, of at least `least` pixels where there are so many; shared out evenly.
static Bands make_bands(int64_t N, int64_t H, int64_t W, int64_t floats_per_row, int64_t budget, int64_t least) {
  Bands b{N, H, W, 1, H, W, 0};
  const int64_t image = product(H, floats_per_row);
  if (image <= budget || H * W <= least) {
    b.images = smaller(N, larger(budget / larger(image, 1), blocks(least, H * W)));
    b.images = smaller(N, larger(b.images, 1));
    b.images = blocks(N, blocks(N, b.images));
  } else {
    b.rows = smaller(H, larger(larger(1, budget / floats_per_row), blocks(least, W)));
    b.rows = blocks(H, blocks(H, b.rows));
    if (b.rows == 1 && floats_per_row > 4 * budget) {
      b.columns = smaller(W, larger(least, product(W, budget) / floats_per_row));
      b.columns = blocks(W, blocks(W, b.columns));
    }
  }
  b.count = product(blocks(N, b.images), blocks(H, b.rows), blocks(W, b.columns));
  return b;
}

static Band band_at(const Bands& b, int64_t i) {
  const int64_t across = blocks(b.W, b.columns), down = blocks(b.H, b.rows);
  const int64_t w0 = i % across * b.columns, h0 = i / across % down * b.rows, n0 = i / across / down * b.images;
  return {n0, smaller(b.N, n0 + b.images), h0, smaller(b.H, h0 + b.rows), w0, smaller(b.W, w0 + b.columns)};
}

// Where a kernel finds the pixels it reads: in the tensor itself, or in a padded copy of one band.
struct Source {
  Operand tensor;
  int64_t H, W;               // of the image behind it
  int64_t pitch, row, image;  // floats from pixel to pixel, row to row, image to image
  bool in_place;              // float32, channels dense, nothing to pad
};

// A pixel pitch of a large power of two would put every row of a tile on the same few cache sets.
static int64_t copy_pitch(int64_t channels) { return channels % 512 == 0 ? channels + 16 : channels; }

// `padded`: columns or rows outside the image will be read.  `multiple`: channels are read in runs of so many.
static Source make_source(ElementType type, const Operand& x, int64_t H, int64_t W, int64_t channels, bool padded,
                          int64_t multiple) {
  Source s{x, H, W, 0, x.stride[2], x.stride[0], false};
  s.in_place = type == ElementType::kFloat32 && x.stride[1] == 1 && !padded && x.stride[3] % 512 != 0 &&
               channels % multiple == 0;
  s.pitch = s.in_place ? x.stride[3] : copy_pitch(channels);
  return s;
}

// What one band reads: images [n0, n1), channels from c0 on, rows and columns that may lie outside the image.
struct Opening {
  int64_t n0, n1, c0, h0, rows, w0, columns;
};

// Floats of the copy that an opening of so many pixels needs.
static int64_t copy_floats(const Source& s, int64_t images, int64_t rows, int64_t columns) {
  return s.in_place ? 0 : product(images, rows, columns, s.pitch);
}

// Copies channels [begin, end) of the opening into its scratch; nothing to do in place.
static void load_source(ElementType type, const Source& s, const Opening& o, int64_t begin, int64_t end,
                        float* scratch) {
  if (s.in_place) return;
  for (int64_t n = o.n0; n < o.n1; ++n)
    load_rows(type, s.tensor, s.H, s.W, {n, o.c0 + begin, end - begin, o.h0, o.rows, o.w0, o.columns},
              scratch + (n - o.n0) * o.rows * o.columns * s.pitch + begin, s.pitch);
}

// Returns where row h0, column w0 of image n0 is, loaded before; s->row and s->image become its distances.
static const float* open_source(Source* s, const Opening& o, const float* scratch) {
  if (s->in_place)
    return static_cast<const float*>(s->tensor.data) + o.n0 * s->image + o.c0 + o.h0 * s->row + o.w0 * s->pitch;
  s->row = o.columns * s->pitch;
  s->image = o.rows * s->row;
  return scratch;
}

// A strided 1x1 kernel without padding is a dense one on a strided view: rewrites *p so, and returns the view of x.
static Operand dense_view(Operand x, Conv2dProblem* p) {
  if (p->KH == 1 && p->KW == 1 && !p->pad_top && !p->pad_left && (p->OH - 1) * p->stride_h < p->H &&
      (p->OW - 1) * p->stride_w < p->W) {
    x.stride[2] *= p->stride_h, x.stride[3] *= p->stride_w;
    p->H = p->OH, p->W = p->OW, p->stride_h = p->stride_w = 1;
  }
  return x;
}

// x as forward and grad_w read it: the windows of a band's outputs.
static int64_t window_rows(const Conv2dProblem& p, int64_t outputs) {
  return (outputs - 1) * p.stride_h + (p.KH - 1) * p.dilation_h + 1;
}
static int64_t window_columns(const Conv2dProblem& p, int64_t outputs) {
  return (outputs - 1) * p.stride_w + (p.KW - 1) * p.dilation_w + 1;
}
static Opening window_opening(const Conv2dProblem& p, const Band& b, int64_t c0) {
  return {b.n0,
          b.n1,
          c0,
          b.h0 * p.stride_h - p.pad_top,
          window_rows(p, b.h1 - b.h0),
          b.w0 * p.stride_w - p.pad_left,
          window_columns(p, b.w1 - b.w0)};
}
static Source window_source(ElementType type, const Operand& x, const Conv2dProblem& p, int64_t channels,
                            int64_t multiple) {
  const bool padded = p.pad_top || p.pad_left || window_rows(p, p.OH) > p.H || window_columns(p, p.OW) > p.W;
  return make_source(type, x, p.H, p.W, channels, padded, multiple);
}

// Where windows hold little but padding, as with a dilation far beyond the image, the plain loops cost less than copies
// of the windows, whose size follows the distance of the taps and not their number.  `visited`: pixels that a kernel
// would copy, and the like, of `channels` each; `sums`: pixels that are summed for, in `lanes` channels, over all taps
// and channels; `others`: pixels of the tensor read.  A term of a plain loop costs about as much as two floats copied;
// a visited pixel costs 32 floats more.  Depthwise kernels, whose lanes are the channels, cost little beside the copy.
static bool is_sparse(const Conv2dProblem& p, int64_t visited, int64_t sums, int64_t others, int64_t channels,
                      int64_t lanes) {
  const int64_t terms = product(sums, p.KH, p.KW), wanted = sum(terms, others);
  if (visited <= larger(1 << 16, product(4, wanted))) return false;
  const bool depthwise = p.groups > 1 && p.C_in == p.groups;
  return visited > product(64, wanted) ||
         (!depthwise && product(visited, channels + 32) > product(2, terms, channels, lanes));
}
// Windows of `rows` x `columns`, one a band, copied or looked at.
static bool windows_are_sparse(const Conv2dProblem& p, const Bands& b, int64_t rows, int64_t columns) {
  return is_sparse(p, product(b.count, b.images, rows, columns), product(p.N, p.OH, p.OW), product(p.N, p.H, p.W),
                   p.C_in / p.groups, p.C_out / p.groups);
}
// The outputs that a band's pixels reach, and the band's phases.
static bool outputs_are_sparse(const Conv2dProblem& p, const Bands& b, int64_t rows, int64_t columns, int64_t phases) {
  return is_sparse(p, product(b.count, sum(product(b.images, rows, columns), phases)), product(p.N, p.H, p.W),
                   product(p.N, p.OH, p.OW), p.C_out / p.groups, p.C_in / p.groups);
}

// A run of terms whose sources are contiguous from `offset` floats behind a pixel's base on.  The packed weights hold
// the terms in the same order.  `block` numbers the runs that are summed while a slab of weights stays in the cache.
struct Segment {
  int64_t offset, length, block;
};

// Appends the segments of taps at offset[0], offset[1], ... (each `channels` long, ascending), joined where they
// touch and cut so that no block exceeds `depth`; returns how many segments.
static int64_t make_segments(const int64_t* offset, int64_t taps, int64_t channels, int64_t depth, Segment* out) {
  int64_t count = 0, block = 0, filled = 0;
  for (int64_t t = 0; t < taps;) {
    int64_t joined = 1;
    while (t + joined < taps && offset[t + joined] == offset[t] + joined * channels) ++joined;
    const int64_t run = joined * channels, parts = blocks(run, depth), step = round_up(blocks(run, parts), 4);
    for (int64_t begin = 0; begin < run; begin += step) {
      const int64_t length = smaller(step, run - begin);
      if (filled && filled + length > depth) ++block, filled = 0;
      filled += length;
      out[count++] = {offset[t] + begin, length, block};
    }
    t += joined;
  }
  return count;
}

// At most this many segments come of one call of make_segments.
static int64_t segment_bound(int64_t taps, int64_t channels, int64_t depth) {
  return product(taps, channels / depth + 2);
}

// The lanes of a group (its channels) in vectors, and the vectors in panels of at most `most`, shared out evenly.
struct Panels {
  int64_t vectors, count;
};
static Panels make_panels(int64_t channels, int64_t most) {
  const int64_t vectors = blocks(channels, kW);
  return {vectors, blocks(vectors, most)};
}
static int64_t panel_begin(const Panels& p, int64_t i) { return p.vectors * i / p.count; }

// Into how many tasks one band is divided, by lanes, so that there are tasks enough for several threads.
static int64_t band_splits(int64_t parts, int64_t bands) { return larger(1, smaller(parts, blocks(16, bands))); }

// The tasks of a divided band share one copy of its source, made in the stage before, this many channels a task.
constexpr int64_t kLoadChannels = 64;

// Hands out parts of a block of memory, 64-byte aligned.  With a null base it only counts.
struct Carver {
  char* base;
  int64_t used;
  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    used = sum(used, round_up(product(count, sizeof(T)), 64));
    return p;
  }
};
