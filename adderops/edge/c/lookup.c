// Bytes through tables: y[i] = tables[256 * (i % channels) + x[i]]. Images to the grid of the first layer (mean and standard
// deviation of each channel folded in), or bytes of one grid to another (one channel). y may be x.

static void lookup(const uint8_t* x, uint8_t* y, int32_t n, const uint8_t* tables, int channels) {
  for (int32_t i = 0; i < n; i += channels)
    for (int c = 0; c < channels; c++) y[i + c] = tables[256 * c + x[i + c]];
}
