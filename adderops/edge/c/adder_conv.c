// The adder convolution: sum[p][co] = sum_k |X[p][k] - W[co][k]|, then the output rule. See layers.h for the layouts.
//
//   tile: four output pixels, gathered once to scratch, against all filters of a group, two at a time
//
//             pixel 0  1  2  3        one call of sums_4x2 adds up 8 sums over all k;
//   filter 0        s  s  s  s        `finish` turns them into outputs
//   filter 1        s  s  s  s
//
// ORDER_TAPS: the pixels follow each other in the whole image, ORDER_ROWS: in a row of it. The last tile may have fewer; what
// scratch holds for the missing ones is computed and not stored.

static SMALL void adder_conv(const struct adder_conv* layer, const uint8_t* x, void* y, const void* residual,
                             void* scratch) {
  const struct window* window = &layer->window;
  const struct adder_conv* shortcut = USES(SHORTCUTS) ? layer->shortcut : 0;
  const struct adder_conv* other = shortcut ? shortcut : layer;
  const int groups = USES(GROUPS) ? layer->groups : 1;
  const int n = window->channels / groups, filters = window->filters / groups;
  const int taps = is_taps(layer->order), steps = layer->words / (taps ? 4 : 3);
  const int by_row =
      !taps || (USES(RINGS) && layer->ring && groups > 1);  // every group reads the same rows of the ring
#ifndef ADDER_TILES
  const int plain = is_plain(&layer->output);
#endif
  const int32_t pixels = (int32_t)window->out_height * window->out_width;
  word* const tile = (word*)scratch;
  word* const beside = tile + span_of(layer->order) * (taps ? layer->words : steps);
  word* const ring = beside + (shortcut ? 4 * shortcut->words : 0);
  struct rows rows, beside_rows;
  start_rows(&rows, window, x, layer->ring, ring);
  start_sets(&rows, n, layer->order, layer->words);
  if (shortcut) start_rows(&beside_rows, &other->window, (const uint8_t*)residual, 0, 0);
  if (shortcut) start_sets(&beside_rows, other->window.channels, ORDER_TAPS, other->words);
  if (USES(SUMS) && layer->output.form == FORM_SUMS)
    for (int co = 0; co < window->filters; co++) ((integer*)y)[co] = 0;
#ifdef ADDER_TILES
  struct tile fused;
  const int tiles = start_tiles(layer, tile, beside, &fused);
#endif
  for (int32_t pixel = 0, oy = 0, ox = 0; pixel < pixels;) {
    const int32_t left = by_row ? window->out_width - ox : pixels - pixel;
    const int count = left < 4 ? (int)left : 4;
    const uint32_t* w = layer->weights;
    for (int group = 0, co = 0; group < groups; group++, co += filters) {
      const uint32_t* beside_w = shortcut ? shortcut->weights : 0;
      gather_tile(&rows, oy, ox, count, group * n, tile);
      if (shortcut) gather_tile(&beside_rows, oy, ox, count, 0, beside);
#ifdef ADDER_TILES
      if (!LEFT(TILES) || (tiles && count == 4)) {
        run_tile(layer, &fused, w, y, residual, pixel * window->filters + co);
        w += (filters + filters % 2) * (layer->words + CONSTANTS);
        continue;
      }
#endif
      for (int f = 0; f < filters; f += 2, w += 2 * CONSTANTS) {
        const int32_t at = pixel * window->filters + co + f;
        const int some = filters - f < 2 ? 1 : 2;
        int32_t sums[8], beside_sums[8];
        sums_4x2(tile, w, layer->order, steps, sums);
        w += 2 * layer->words;
#ifndef ADDER_TILES
        if (plain && count == 4) {
          const uint8_t* from = layer->output.residual == RESIDUAL_BYTES ? (const uint8_t*)residual + at : 0;
          uint8_t* to = (uint8_t*)y + at;
          four_bytes(&layer->output, w, sums, from, window->filters, to);
          if (some == 2)
            four_bytes(&layer->output, w + CONSTANTS, sums + 4, from ? from + 1 : 0, window->filters, to + 1);
          continue;
        }
#endif
        if (shortcut) {
          sums_4x2(beside, beside_w, ORDER_TAPS, shortcut->words / 4, beside_sums);
          beside_w += 2 * shortcut->words;
        }
        finish(&layer->output, w, sums, beside_w, shortcut ? beside_sums : 0, count, some, residual, at,
               window->filters, co + f, y);
        if (shortcut) beside_w += 2 * CONSTANTS;
      }
    }
    pixel += count;
    for (ox += count; ox >= window->out_width; ox -= window->out_width) oy++;
  }
}
